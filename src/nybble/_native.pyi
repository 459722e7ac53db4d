"""The native core. Arrays must be C-contiguous and of exactly the type that is written; errors are ValueError."""

from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

def isa() -> str: ...
def available_isas() -> list[str]: ...
def default_threads() -> int: ...
def measure_read_bandwidth(threads: int, isa: str | None = None) -> float: ...
def measure_int8_peak(threads: int, isa: str | None = None) -> float: ...
def dequantize(format: str, data: Buffer | npt.NDArray[Any]) -> npt.NDArray[np.float32]: ...
def pack_roundtrip(format: str, data: Buffer | npt.NDArray[Any], rows: int, cols: int) -> npt.NDArray[np.float32]: ...

class Encoder:
    def __init__(self, *, threads: int | None = None, isa: str | None = None) -> None: ...
    @property
    def threads(self) -> int: ...
    def encode_into(
        self,
        *,
        to: str,
        source_format: str,
        source: Buffer | npt.NDArray[Any],
        rows: int,
        cols: int,
        out: npt.NDArray[np.uint8],
        importance: npt.NDArray[np.float32] | None = None,
    ) -> int: ...

# Token id, log-probability, rank, and the likeliest tokens with their log-probabilities.
_Sampled: TypeAlias = tuple[int, float, int, tuple[tuple[int, float], ...]]

class LogitEdits:
    def __init__(
        self,
        *,
        allowed: npt.NDArray[np.uint32] | None = None,
        banned_ids: npt.NDArray[np.int32] | None = None,
        bias_ids: npt.NDArray[np.int32] | None = None,
        bias: npt.NDArray[np.float32] | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        prompt_ids: npt.NDArray[np.int32] | None = None,
        output_ids: npt.NDArray[np.int32] | None = None,
    ) -> None: ...

class LayerConfig:
    def __init__(
        self,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        ffn_size: int,
        sm_scale: float,
        activation: str = "silu",
        window: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        post_norms: bool = False,
        attn_softcap: float = 0.0,
        inv_freq: npt.NDArray[np.float32],
        rope_scale: float = 1.0,
        rope_interleaved: bool = False,
    ) -> None: ...

class Model:
    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        norm_eps: float,
        layers: Sequence[LayerConfig],
        tied_head: bool,
        embed_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float = 0.0,
        threads: int | None = None,
        isa: str | None = None,
        act: str = "int8",
        kv: str = "f16",
    ) -> None: ...
    def set_tensor(
        self,
        name: str,
        format: str,
        rows: int,
        cols: int,
        data: Buffer | npt.NDArray[Any],
        order: npt.NDArray[np.int32] | None = None,
    ) -> None: ...
    def takes_order(self, name: str, format: str, order: npt.NDArray[np.int32] | None = None) -> bool: ...
    def finish(self) -> None: ...
    @overload
    def execute(
        self,
        cache: KvCache,
        token_ids: npt.NDArray[np.int32],
        cu_seqlens_q: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        logit_rows: npt.NDArray[np.int32],
        hidden_rows: None = None,
        adapters: Sequence[Adapter] = (),
        adapter_of: npt.NDArray[np.int32] | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def execute(
        self,
        cache: KvCache,
        token_ids: npt.NDArray[np.int32],
        cu_seqlens_q: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        logit_rows: npt.NDArray[np.int32],
        hidden_rows: npt.NDArray[np.int32],
        adapters: Sequence[Adapter] = (),
        adapter_of: npt.NDArray[np.int32] | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...
    def copy_blocks(self, cache: KvCache, pairs: npt.NDArray[np.int32]) -> None: ...
    def read_blocks(self, cache: KvCache, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]: ...
    def write_blocks(self, cache: KvCache, ids: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> None: ...
    def weights_fingerprint(self) -> bytes: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        temperature: npt.NDArray[np.float32],
        top_k: npt.NDArray[np.int32],
        top_p: npt.NDArray[np.float32],
        min_p: npt.NDArray[np.float32],
        seed: npt.NDArray[np.uint64],
        position: npt.NDArray[np.uint64],
        top_logprobs: npt.NDArray[np.int32],
        edits: list[LogitEdits | None] | None = None,
    ) -> list[_Sampled | None]: ...  # None: no token can be drawn from the row
    def score(
        self, logits: npt.NDArray[np.float32], target_ids: npt.NDArray[np.int32], top: int
    ) -> list[_Sampled | None]: ...
    def score_hidden(
        self, hidden: npt.NDArray[np.float32], target_ids: npt.NDArray[np.int32], top: int
    ) -> list[_Sampled | None]: ...
    @property
    def cache_bytes_per_block(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def act(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

# Name, rank, a[rank][in], b[out][rank] and what the product is multiplied by; both matrices in the adapter's format.
_Factors: TypeAlias = tuple[str, int, Buffer | npt.NDArray[Any], Buffer | npt.NDArray[Any], float]

class Adapter:
    def __init__(self, model: Model, format: str) -> None: ...
    def set_layer(self, layer: int, factors: Sequence[_Factors]) -> None: ...
    def finish(self) -> None: ...
    @property
    def nbytes(self) -> int: ...

class KvCache:
    def __init__(self, model: Model, num_blocks: int) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
