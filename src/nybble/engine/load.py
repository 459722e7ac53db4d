"""From a path to a model that is ready to run: weights and tokenizer, prepared side by side."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

from nybble.backends.cpu import CpuModel
from nybble.backends.device import DeviceOptions, resolve_device
from nybble.cache.block_file import BlockFile
from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.core.errors import ConfigError
from nybble.engine.adapters import AdapterShelf
from nybble.engine.core import EngineCore
from nybble.engine.generate import Generator
from nybble.engine.model import LoadedWeights
from nybble.engine.options import KvCacheType
from nybble.engine.scheduler import blocks_for
from nybble.engine.speculation.draft_model import DraftWeights
from nybble.tokenizer import Tokenizer, load_tokenizer
from nybble.tokenizer.tokenizer import check_vocab

DEFAULT_CONTEXT = 8192  # the model's own context may be far longer than the memory for it
NATIVE = DeviceOptions(device="cpu")
_GIVE_BACK_SECONDS = 0.02


@dataclass(slots=True)
class LoadedModel:
    """Everything that is needed to generate text with a model."""

    checkpoint: Checkpoint
    model: LoadedWeights
    tokenizer: Tokenizer
    context: int
    adapters: AdapterShelf
    draft: DraftWeights | None = None  # a smaller model that guesses for this one
    adapter: str | None = None  # of the adapters, the one that generators use
    placement: DeviceOptions = NATIVE
    device: str = "cpu"  # what the placement came to: cpu, torch-cpu, cuda or cuda:N

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer, as the file and its tokenizer name them."""
        return frozenset(self.checkpoint.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)

    def generator(
        self,
        *,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        enable_prefix_caching: bool = True,
        speculate: str = "off",
        kept_in: BlockFile | None = None,
    ) -> Generator:
        """An engine of its own over this model; a cache of `num_blocks` blocks, or what the context needs.

        kept_in: what `open_prefix_cache` gave. The engine closes it.

        Raises:
            ConfigError: there is no memory for the cache.
        """
        core = EngineCore(
            self.model,
            self.tokenizer,
            context=self.context,
            vocab_size=self.checkpoint.spec.vocab_size,
            num_blocks=blocks_for(self.context) if num_blocks is None else num_blocks,
            eos_token_ids=self.eos_token_ids,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            speculate=speculate,
            adapters=self.adapters,
            draft=self.draft,
            kept_in=kept_in,
        )
        return Generator(core, adapter=self.adapter)


def choose_context(asked: int | None, longest: int) -> int:
    """The context to run with: what was asked for, or a default that the model can reach.

    Raises:
        ConfigError: more was asked for than the model was made for.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, longest)
    if not 1 <= asked <= longest:
        raise ConfigError(f"the context must be between 1 and {longest} tokens for this model, not {asked}")
    return asked


def load_model(
    path: Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv_cache_type: KvCacheType = "f16",
    adapter: Path | None = None,
    placement: DeviceOptions = NATIVE,
) -> LoadedModel:
    """Open a checkpoint and prepare it, and an adapter for its generators if one is given.

    placement: where it computes; by default the native backend on the CPU.

    The weights are packed by native code that leaves the interpreter free, so the tokenizer is built meanwhile.

    Raises:
        CheckpointError: the file is missing, damaged or not supported.
        TokenizerError: its tokenizer is, or does not belong to it.
        ConfigError: the threads, the context or the device cannot be used.
    """
    device = resolve_device(placement)
    if device == "cpu" and kv_cache_type == "fp8":
        raise ConfigError("kv_cache_type fp8 needs a GPU (or device 'torch-cpu'): the CPU has int8")
    checkpoint = open_checkpoint(path)
    chosen = choose_context(context, checkpoint.spec.context_length)
    stop = Event()  # an error or Ctrl-C does not wait until all weights are packed
    stoppable = replace(checkpoint, tensors=_UntilStopped(checkpoint.tensors, stop))
    with _pages_given_back(checkpoint), ThreadPoolExecutor(1, "load-weights") as executor, _set_on_error(stop):
        native: Callable[..., LoadedWeights] = CpuModel.load
        load = native if device == "cpu" else _torch_loader(device, placement)
        weights = executor.submit(load, stoppable, threads=threads, context=chosen, kv_cache_type=kv_cache_type)
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        check_vocab(tokenizer, checkpoint.spec.vocab_size)
        model = weights.result()
    adapters = AdapterShelf(load=model.load_adapter, spec=checkpoint.spec)
    chosen_adapter = None if adapter is None else adapters.load(adapter)
    return LoadedModel(
        checkpoint, model, tokenizer, chosen, adapters, adapter=chosen_adapter, placement=placement, device=device
    )


def _torch_loader(device: str, placement: DeviceOptions) -> Callable[..., LoadedWeights]:
    """The torch backend is imported when it is wanted: torch takes seconds, and need not be there."""
    model = importlib.import_module("nybble.backends.torch.serve").TorchModel
    return functools.partial(model.load, device=device, options=placement)


class _UntilStopped(Mapping[str, Tensor]):
    """Tensors that end with an error when nobody wants the rest any more."""

    def __init__(self, tensors: Mapping[str, Tensor], stop: Event) -> None:
        self._tensors = tensors
        self._stop = stop

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            if self._stop.is_set():
                raise RuntimeError("loading was stopped")
            yield name


@contextmanager
def _set_on_error(event: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        event.set()
        raise


@contextmanager
def _pages_given_back(checkpoint: Checkpoint) -> Iterator[None]:
    """Give the pages of the files back while they are read, and in the end all of them.

    What has been packed counts as memory until it is given back. Tensor by tensor would be too late, because the
    embedding of a large vocabulary is most of a small model. A page that is still in use comes back from the system's
    cache in a microsecond.
    """
    done = Event()

    def give_back() -> None:
        while not done.wait(_GIVE_BACK_SECONDS):
            for file in checkpoint.files:
                file.release()

    thread = Thread(target=give_back, name="give-back-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for file in checkpoint.files:
            file.release()
