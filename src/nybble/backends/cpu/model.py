"""A checkpoint on the CPU. The weights live once, in the layout that the kernels read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.adapter import Adapter
from nybble.backends.cpu.adapter import CpuAdapter, pack_adapter
from nybble.backends.cpu.machine import chosen_isa, chosen_threads, machine_identity
from nybble.backends.cpu.sampling import checked_array, sample, score
from nybble.backends.cpu.step import Sampled, SampleRow, Scored, Step
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core import env
from nybble.core.errors import CheckpointError, ConfigError
from nybble.core.rope import inverse_frequencies
from nybble.core.spec import LayerSpec, ModelSpec
from nybble.quant.rows import float_rows, to_rows

KvType = Literal["f16", "int8"]


class CpuModel:
    """One decoder and its cache. `load` makes it."""

    def __init__(self, native: _native.Model, setting: bytes = b"") -> None:
        self._native = native
        self._setting = setting
        self._cache: _native.KvCache | None = None
        self._hidden: npt.NDArray[np.float32] | None = None

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, threads: int | None = None, context: int, kv_cache_type: KvType = "f16"
    ) -> CpuModel:
        """Pack the weights tensor by tensor, giving the pages of the file back on the way.

        context: how many tokens a sequence may reach: some rotary embeddings depend on it. kv_cache_type: of keys and
        values; int8 has a scale per token and head, and takes about half of the memory.

        Raises:
            CheckpointError: a tensor is missing, has the wrong shape, or an encoding that nybble cannot run.
            ConfigError: the threads, NYBBLE_ISA or NYBBLE_ACT cannot be used, or there is not enough memory.
        """
        isa, count, act = chosen_isa(), chosen_threads(threads), env.activation_type()
        try:
            native = _new_native(checkpoint.spec, context, count, isa, act, kv_cache_type)
            for name, tensor in checkpoint.tensors.items():
                _upload(native, name, tensor)
                checkpoint.release(tensor)
            native.finish()
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path} cannot be run: {error}") from error
        except MemoryError as error:
            raise ConfigError(f"there is not enough memory for the weights of {checkpoint.path}") from error
        return cls(native, _setting(checkpoint.spec, context, act, kv_cache_type))

    def identity(self) -> bytes:
        """32 bytes that stand for all that the keys and values of a text depend on, to the bit.

        The weights as they are packed, the model's shape, the types of activations and of keys and values, the compiled
        kernels, the instruction set, and the system's mathematical functions. Reads all weights: 0.1 s for a gigabyte.
        """
        parts = (self._native.weights_fingerprint(), self._setting, self.isa.encode(), machine_identity())
        return hashlib.blake2b(b"".join(bytes([len(part)]) + part for part in parts), digest_size=32).digest()

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._native.threads

    @property
    def memory_bytes(self) -> int:
        """Bytes of the packed weights and of the cache. A cache takes real memory only where it was written."""
        return self._native.weight_bytes + (self._cache.nbytes if self._cache else 0)

    @property
    def cache_bytes_per_block(self) -> int:
        """Bytes of the keys and values of 16 tokens, in all layers together."""
        return self._native.cache_bytes_per_block

    def fitting_blocks(self, *, max_num_batched_tokens: int, max_num_seqs: int) -> int | None:
        """None: the cache is in the machine's memory, which the engine shares out."""
        return None

    def new_cache(self, num_blocks: int) -> None:
        """Make room for the keys and values of so many blocks of 16 tokens; an earlier cache is gone.

        Raises:
            ConfigError: there is not enough memory.
        """
        self._cache = None
        try:
            self._cache = _native.KvCache(self._native, num_blocks)
        except MemoryError as error:
            raise ConfigError(
                f"there is not enough memory for a cache of {num_blocks} blocks: ask for a smaller context"
            ) from error

    def load_adapter(self, adapter: Adapter) -> CpuAdapter:
        """Make an adapter ready for steps. Safe on any thread, while steps run.

        Raises:
            CheckpointError: it is damaged, or does not fit this model.
            ConfigError: there is not enough memory.
        """
        try:
            return pack_adapter(self._native, adapter)
        except ValueError as error:
            raise CheckpointError(f"{adapter.path} cannot be applied: {error}") from error
        except MemoryError as error:
            raise ConfigError(f"there is not enough memory for the adapter {adapter.path}") from error

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        """Run a step; returns the logits [logit_rows, vocab_size].

        Raises:
            ValueError: the step does not hold together.
        """
        cache = self._needed_cache()
        self._hidden = None
        arrays = (step.token_ids, step.cu_seqlens_q, step.context_lens, step.block_tables, step.logit_rows)
        token_ids, cu_seqlens_q, context_lens, block_tables, logit_rows = map(_int32, arrays)
        adapters = [adapter.native for adapter in step.adapters if isinstance(adapter, CpuAdapter)]
        adapter_of = None if step.adapter_of is None else _int32(step.adapter_of)
        step_arrays = (cache, token_ids, cu_seqlens_q, context_lens, block_tables, logit_rows)
        if step.hidden_rows is None or not len(step.hidden_rows):
            return self._native.execute(*step_arrays, adapters=adapters, adapter_of=adapter_of)
        logits, self._hidden = self._native.execute(
            *step_arrays, _int32(step.hidden_rows), adapters=adapters, adapter_of=adapter_of
        )
        return logits

    def hidden(self) -> npt.NDArray[np.float32]:
        """The final-normed hidden states [hidden_rows, hidden_size] of the last step.

        Raises:
            ValueError: the last step asked for none, or failed.
        """
        if self._hidden is None:
            raise ValueError("the last step asked for no hidden states: name them in Step.hidden_rows")
        return self._hidden

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, in all layers: each pair is (from, to), one after the other.

        Raises:
            ValueError: there is no cache, or it has no such block.
        """
        cache = self._needed_cache()
        self._native.copy_blocks(cache, checked_array(pairs, np.int32, "block ids").reshape(-1, 2))

    def cache_blocks(self) -> CacheBlocks:
        """The blocks of the present cache as bytes, also after `new_cache` made another one.

        Raises:
            ValueError: there is no cache.
        """
        return CacheBlocks(self._native, self._needed_cache())

    def sample(self, logits: npt.NDArray[np.float32], params: Sequence[SampleRow]) -> list[Sampled]:
        """Draw one token from each row of logits.

        Raises:
            BadLogitsError: no token can be drawn from some rows, which it names.
            ValueError: a parameter is out of range.
        """
        return sample(self._native, logits, params)

    def score(
        self, logits: npt.NDArray[np.float32], target_ids: Sequence[int] | npt.NDArray[np.int32], top: int = 0
    ) -> list[Scored]:
        """What the model thinks of target_ids[i] where it gives logits[i], with the `top` likeliest tokens.

        Raises:
            BadLogitsError: some rows hold NaN or infinity.
            ValueError: an id is out of range, or there is not one for each row.
        """
        return score(self._native.score, logits, target_ids, top)

    def score_hidden(
        self, hidden: npt.NDArray[np.float32], target_ids: Sequence[int] | npt.NDArray[np.int32], top: int = 0
    ) -> list[Scored]:
        """`score` of the logits that follow from hidden states, the same to the bit.

        A long prompt takes [tokens, hidden_size] floats this way; its logits would take [tokens, vocab_size].

        Raises:
            BadLogitsError: some rows hold NaN or infinity.
            ValueError: an id is out of range, or there is not one for each row.
        """
        return score(self._native.score_hidden, hidden, target_ids, top)

    def _needed_cache(self) -> _native.KvCache:
        if self._cache is None:
            raise ValueError("the model has no cache: call new_cache first")
        return self._cache


class CacheBlocks:
    """Blocks of one cache as bytes, layer after layer. The bytes mean the same in any cache of an equal model.

    Another thread may read a block while steps run that do not write it.
    """

    def __init__(self, native: _native.Model, cache: _native.KvCache) -> None:
        self._native = native
        self._cache = cache

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self._native.cache_bytes_per_block

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Copies of blocks, [ids, block_bytes]. Raises ValueError if there is no such block."""
        return self._native.read_blocks(self._cache, checked_array(ids, np.int32, "block ids"))

    def write(self, ids: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """Fill blocks from [ids, block_bytes]. Raises ValueError if there is no such block, or `data` does not fit."""
        self._native.write_blocks(self._cache, checked_array(ids, np.int32, "block ids"), data)


def _int32(array: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, np.int32)


def _setting(spec: ModelSpec, context: int, act: str, kv: KvType) -> bytes:
    """A digest of what a model is besides its weights. Of the context, what its rotary embedding makes of it counts."""
    digest = hashlib.blake2b(repr((spec, act, kv)).encode())
    for layer in spec.layers:
        inv_freq, scale = inverse_frequencies(layer.rope, context)
        digest.update(np.ascontiguousarray(inv_freq, np.float32).tobytes() + np.float32(scale).tobytes())
    return digest.digest()


def _new_native(spec: ModelSpec, context: int, threads: int, isa: str, act: str, kv: KvType) -> _native.Model:
    return _native.Model(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        norm_eps=spec.norm_eps,
        layers=[_layer(layer, context) for layer in spec.layers],
        tied_head=spec.tied_head,
        embed_scale=spec.embed_scale,
        logit_scale=spec.logit_scale,
        logit_softcap=spec.logit_softcap or 0.0,
        threads=threads,
        isa=isa,
        act=act,
        kv=kv,
    )


def _layer(layer: LayerSpec, context: int) -> _native.LayerConfig:
    inv_freq, scale = inverse_frequencies(layer.rope, context)
    return _native.LayerConfig(
        q_heads=layer.num_q_heads,
        kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        ffn_size=layer.ffn_size,
        sm_scale=layer.sm_scale,
        activation=layer.activation,
        window=layer.window or 0,
        qkv_bias=layer.qkv_bias,
        out_bias=layer.out_bias,
        qk_norm=layer.qk_norm,
        post_norms=layer.post_norms,
        attn_softcap=layer.attn_softcap or 0.0,
        inv_freq=np.ascontiguousarray(inv_freq, np.float32),
        rope_scale=scale,
        rope_interleaved=layer.rope.interleaved,
    )


def _upload(native: _native.Model, name: str, tensor: Tensor) -> None:
    if len(tensor.shape) == 1:  # norms and biases are small, and computed in float32 whatever the file has
        vector = np.ascontiguousarray(tensor.to_float32(), np.float32)
        native.set_tensor(name, "F32", 1, vector.size, vector)
        return
    rows, cols = tensor.shape
    if tensor.packed is not None:
        weight = tensor.packed()
        found = to_rows(weight)
        if not native.takes_order(name, found.format.name, found.order):
            found = float_rows(weight)  # its neighbours read the same input in another order
        native.set_tensor(name, found.format.name, rows, cols, found.data, found.order)
        return
    if not tensor.format.has_kernel:
        raise ValueError(f"tensor {name} is encoded as {tensor.format.name}, which nybble cannot multiply yet")
    native.set_tensor(name, tensor.format.name, rows, cols, tensor.data)
