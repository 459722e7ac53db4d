"""A checkpoint on the CPU. The weights live once, in the layout that the kernels read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.backends.cpu.machine import chosen_isa, chosen_threads
from nybble.backends.cpu.step import Sampled, SampleRow, Step
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core import env
from nybble.core.errors import CheckpointError, ConfigError
from nybble.core.rope import inverse_frequencies
from nybble.core.spec import LayerSpec, ModelSpec


class CpuModel:
    """One decoder and its cache. `load` makes it."""

    def __init__(self, native: _native.Model) -> None:
        self._native = native
        self._cache: _native.KvCache | None = None

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, threads: int | None = None, context: int) -> CpuModel:
        """Pack the weights tensor by tensor, giving the pages of the file back on the way.

        `context` is how many tokens a sequence may reach: some rotary embeddings depend on it.

        Raises:
            CheckpointError: a tensor is missing, has the wrong shape, or an encoding that nybble cannot run.
            ConfigError: the threads, NYBBLE_ISA or NYBBLE_ACT cannot be used, or there is not enough memory.
        """
        isa, count, act = chosen_isa(), chosen_threads(threads), env.activation_type()
        try:
            native = _new_native(checkpoint.spec, context, count, isa, act)
            for name, tensor in checkpoint.tensors.items():
                _upload(native, name, tensor)
                checkpoint.release(tensor)
            native.finish()
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path} cannot be run: {error}") from error
        except MemoryError as error:
            raise ConfigError(f"there is not enough memory for the weights of {checkpoint.path}") from error
        return cls(native)

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

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        """Run a step; returns the logits [logit_rows, vocab_size].

        Raises:
            ValueError: the step does not hold together.
        """
        if self._cache is None:
            raise ValueError("the model has no cache: call new_cache first")
        return self._native.execute(
            self._cache,
            _int32(step.token_ids),
            _int32(step.cu_seqlens_q),
            _int32(step.context_lens),
            _int32(step.block_tables),
            _int32(step.logit_rows),
        )

    def sample(self, logits: npt.NDArray[np.float32], params: list[SampleRow]) -> list[Sampled]:
        """Draw one token from each row of logits.

        Raises:
            ValueError: a row holds NaN, or a parameter is out of range.
        """
        drawn = self._native.sample(
            np.ascontiguousarray(logits, np.float32),
            temperature=np.array([row.temperature for row in params], np.float32),
            top_k=np.array([row.top_k for row in params], np.int32),
            top_p=np.array([row.top_p for row in params], np.float32),
            min_p=np.array([row.min_p for row in params], np.float32),
            seed=np.array([row.seed for row in params], np.uint64),
            position=np.array([row.position for row in params], np.uint64),
            top_logprobs=np.array([-1 if row.logprobs is None else row.logprobs for row in params], np.int32),
        )
        return [Sampled(token_id, logprob, tuple(top)) for token_id, logprob, top in drawn]


def _int32(array: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(array, np.int32)


def _new_native(spec: ModelSpec, context: int, threads: int, isa: str, act: str) -> _native.Model:
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
    if not tensor.format.has_kernel:
        raise ValueError(f"tensor {name} is encoded as {tensor.format.name}, which nybble cannot multiply yet")
    rows, cols = tensor.shape
    native.set_tensor(name, tensor.format.name, rows, cols, tensor.data)
