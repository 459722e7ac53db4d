"""A checkpoint on a GPU, or in torch on the CPU, as the engine wants it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nybble.adapter import Adapter
from nybble.backends.cpu import BadLogitsError, Sampled, SampleRow, Scored, Step
from nybble.backends.cpu.machine import chosen_threads
from nybble.backends.cpu.sampling import checked_array
from nybble.backends.device import DeviceOptions
from nybble.backends.torch.parallel.driver import Team, start_team
from nybble.backends.torch.parallel.ranks import Order
from nybble.backends.torch.serve.adapter import StepAdapters, TorchAdapter, make_adapter
from nybble.backends.torch.serve.cache import CacheBlocks
from nybble.backends.torch.serve.draw import DeviceSampler, Ids, NativeSampler, Sampler
from nybble.backends.torch.serve.inputs import host_inputs, to_flat
from nybble.backends.torch.serve.memory import blocks_that_fit
from nybble.backends.torch.serve.rank import Rank
from nybble.backends.torch.serve.setup import Setup, load_rank, on_device, torch_device
from nybble.checkpoint import Checkpoint
from nybble.core.errors import BackendError, ConfigError

_SCORED_AT_ONCE = 256  # rows of logits of a long prompt


class TorchModel:
    """One decoder and its cache; with tensor parallelism this process's part and those that work for it.

    `load` makes it. team: the other processes, None if there are none.
    """

    def __init__(
        self,
        rank: Rank,
        setup: Setup,
        options: DeviceOptions,
        *,
        threads: int,
        checkpoint: Checkpoint,
        team: Team | None = None,
    ) -> None:
        self._rank = rank
        self._setup = setup
        self._options = options
        self._team = team
        self._checkpoint = checkpoint
        self._hidden: torch.Tensor | None = None
        self.threads = threads
        vocab = checkpoint.spec.vocab_size
        self._sampler: Sampler = DeviceSampler() if setup.device.type == "cuda" else NativeSampler(vocab, threads)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str,
        options: DeviceOptions,
        threads: int | None = None,
        context: int,
        kv_cache_type: str = "f16",
    ) -> TorchModel:
        """Copy the weights to their devices, tensor by tensor. device: what `resolve_device` gave.

        Raises:
            CheckpointError: a tensor cannot be run.
            ConfigError: weights or cache do not fit, the model cannot be split so, or a rank does not start.
        """
        place = torch_device(device)
        count = chosen_threads(threads)
        size, team = options.tensor_parallel_size, None
        if place.type == "cpu" and (threads is not None or size > 1):
            torch.set_num_threads(max(count // size, 1))
        if size > 1:
            asked = {"context": context, "kv_cache_type": kv_cache_type, "threads": count}
            team = start_team(checkpoint.path, options, place, **asked)
        try:
            rank, setup = load_rank(
                checkpoint,
                options,
                place,
                context=context,
                kv_cache_type=kv_cache_type,
                group=None if team is None else team.group,
            )
            if team is not None:
                team.wait_until_ready()
        except BaseException:
            if team is not None:
                team.close()
            raise
        return cls(rank, setup, options, threads=count, checkpoint=checkpoint, team=team)

    # ---- facts ----

    @property
    def isa(self) -> str:
        """What computes."""
        device = self._setup.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "torch-cpu"
        return f"{name}, {str(self._setup.dtype).removeprefix('torch.')}"

    @property
    def memory_bytes(self) -> int:
        """Bytes of this process's weights and cache."""
        cache = self._rank.cache
        return self._rank.decoder.nbytes + (0 if cache is None else cache.nbytes)

    @property
    def cache_bytes_per_block(self) -> int:
        """Bytes of the keys and values of 16 tokens: on each GPU, or on the CPU in all processes together."""
        size = 1 if self._team is None or self._setup.device.type == "cuda" else self._team.group.size
        return self._rank.block_bytes * size

    def identity(self) -> bytes:
        """32 bytes that stand for all that the keys and values of a text depend on. Reads all weights."""
        digest = hashlib.blake2b(digest_size=32)
        parts = (self._checkpoint.spec, self._setup.dtype, self._setup.kind, self.isa, torch.__version__)
        digest.update(repr((*parts, self._rank.context)).encode())
        for name, tensor in self._checkpoint.tensors.items():
            digest.update(name.encode() + tensor.format.name.encode())
            digest.update(tensor.data)
            self._checkpoint.release(tensor)
        return digest.digest()

    # ---- the cache ----

    def fitting_blocks(self, *, max_num_batched_tokens: int, max_num_seqs: int) -> int | None:
        """How many blocks the GPU has room for beside weights and the largest step, which is run to see what it takes.

        None on the CPU.

        Raises:
            ConfigError: there is no room for any.
        """
        if self._setup.device.type != "cuda":
            return None
        self._tell(Order.FIT_BLOCKS, (max_num_batched_tokens, max_num_seqs))
        with self._watched(), on_device(self._setup.device):
            blocks = blocks_that_fit(self._rank, max_num_batched_tokens, max_num_seqs, self._options)
            return blocks if self._team is None else self._team.group.smallest(blocks)

    def new_cache(self, num_blocks: int) -> None:
        """Make room for so many blocks; what an earlier cache held is gone.

        Raises:
            ConfigError: there is not enough memory.
        """
        self._tell(Order.NEW_CACHE, (num_blocks,))
        self._rank.new_cache(num_blocks)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, in all layers: each pair is (from, to), one after the other.

        Raises:
            ValueError: there is no cache, or it has no such block.
        """
        cache = self._rank.needed_cache()
        array = checked_array(pairs, np.int32, "block ids").reshape(-1, 2)
        cache.check(array)
        self._tell(Order.COPY_BLOCKS, (), array)
        cache.copy(array)

    def cache_blocks(self) -> CacheBlocks:
        """The blocks of the present cache as bytes, also after `new_cache` made another one.

        Raises:
            ValueError: there is no cache.
            ConfigError: it is spread over processes.
        """
        if self._team is not None:
            raise ConfigError("a prefix cache file needs tensor_parallel_size 1: leave prefix_cache_file out")
        return CacheBlocks(self._rank.needed_cache())

    # ---- steps ----

    def load_adapter(self, adapter: Adapter) -> TorchAdapter:
        """Make an adapter ready for steps. Safe on any thread, while steps run.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: the model is split over processes, or there is not enough memory.
        """
        if self._team is not None:
            raise ConfigError(
                "adapters need tensor_parallel_size 1: leave them out, or merge the adapter into the model"
            )
        try:
            return make_adapter(adapter, self._setup.devices, self._setup.dtype)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"there is not enough memory for the adapter {adapter.path}") from error

    def execute(self, step: Step) -> Any:
        """Run a step; returns the logits [logit_rows, vocab_size], float32: an array, or a tensor on the GPU.

        Raises:
            ValueError: the step does not hold together.
            ConfigError: the GPU has no memory for a step of this size.
            BackendError: another rank is gone.
        """
        cache = self._rank.needed_cache()
        self._hidden = None
        spec = self._checkpoint.spec
        host = host_inputs(step, vocab_size=spec.vocab_size, num_blocks=cache.num_blocks, context=self._rank.context)
        adapters = None
        if step.adapter_of is not None:
            own: Any = step.adapters  # a shelf gives an engine's steps only what this model loaded
            adapters = StepAdapters(own, host.cu_seqlens_q, step.adapter_of)
        self._tell(Order.STEP, host.header, to_flat(host))
        with self._watched(), on_device(self._setup.device):
            output = self._rank.run(host, adapters)
            self._wait()
        if len(host.hidden_rows):
            self._hidden = output.hidden
        return self._sampler.rows(output.logits)

    def hidden(self) -> npt.NDArray[np.float32]:
        """The final-normed hidden states [hidden_rows, hidden_size] of the last step.

        Raises:
            ValueError: the last step asked for none, or failed.
        """
        if self._hidden is None:
            raise ValueError("the last step asked for no hidden states: name them in Step.hidden_rows")
        return self._hidden.float().cpu().numpy()

    # ---- from logits ----

    def sample(self, logits: Any, params: Sequence[SampleRow]) -> list[Sampled]:
        """Draw one token from each row of what `execute` gave, or of some of its rows.

        Raises:
            BadLogitsError: no token can be drawn from some rows, which it names.
            ValueError: a parameter is out of range.
        """
        with on_device(self._setup.device):
            return self._sampler.sample(logits, params)

    def score(self, logits: Any, target_ids: Ids, top: int = 0) -> list[Scored]:
        """What the model thinks of target_ids[i] where it gives logits[i], with the `top` likeliest tokens.

        Raises:
            BadLogitsError: some rows hold NaN or infinity.
            ValueError: an id is out of range, or there is not one for each row.
        """
        with on_device(self._setup.device):
            return self._sampler.score(logits, target_ids, top)

    def score_hidden(self, hidden: npt.NDArray[np.float32], target_ids: Ids, top: int = 0) -> list[Scored]:
        """`score` of the logits that follow from hidden states, without holding the logits of a long prompt at once.

        Raises:
            BadLogitsError: some rows hold NaN or infinity.
            ValueError: an id is out of range, or there is not one for each row.
        """
        if len(target_ids) != len(hidden):
            raise ValueError("target_ids must have one id for each row")
        scored: list[Scored] = []
        for at in range(0, len(hidden), _SCORED_AT_ONCE):
            rows = np.ascontiguousarray(hidden[at : at + _SCORED_AT_ONCE], np.float32)
            self._tell(Order.LOGITS, (len(rows),), rows.reshape(-1).view(np.int32))
            with self._watched(), on_device(self._setup.device):
                logits = self._rank.logits(torch.from_numpy(rows))
            try:
                scored += self.score(self._sampler.rows(logits), target_ids[at : at + _SCORED_AT_ONCE], top)
            except BadLogitsError as error:
                raise BadLogitsError(tuple(at + row for row in error.rows)) from error
        return scored

    # ---- other ranks ----

    def close(self) -> None:
        """End the other processes, if there are any. The model cannot be used afterwards."""
        if self._team is not None:
            self._team.close()

    def _wait(self) -> None:
        """Until the step is computed: what it took is measured, and an error of the GPU belongs to it."""
        if self._setup.device.type != "cuda":
            return
        if self._team is not None:
            self._team.wait_for(self._setup.device)
        torch.cuda.current_stream(self._setup.device).synchronize()

    def _tell(self, order: Order, arguments: tuple[int, ...], payload: npt.NDArray[np.int32] | None = None) -> None:
        if self._team is not None:
            self._team.tell(order, arguments, payload)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """What goes wrong on the GPU, or because a rank is gone, is said in a sentence."""
        try:
            if self._team is None:
                yield
            else:
                with self._team.watched():
                    yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the GPU has no memory left for this step: lower gpu_memory_utilization (which leaves more beside the "
                "cache), max_num_batched_tokens or max_num_seqs"
            ) from error
        except RuntimeError as error:
            if self._setup.device.type != "cuda":
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"{self._setup.device} failed in the middle of a step ({first:.200}): load the model again, with "
                "NYBBLE_TORCH_OPS=torch if it happens again, or device 'cpu'"
            ) from error
