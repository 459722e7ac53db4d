"""From a path to a model that is ready to run: weights and tokenizer, prepared side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nybble.backends.cpu import CpuModel
from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.core.errors import ConfigError
from nybble.engine.generate import Generator
from nybble.tokenizer import Tokenizer, load_tokenizer
from nybble.tokenizer.tokenizer import check_vocab

DEFAULT_CONTEXT = 8192  # the model's own context may be far longer than the memory for it


@dataclass(slots=True)
class LoadedModel:
    """Everything that is needed to generate text with a model."""

    checkpoint: Checkpoint
    model: CpuModel
    tokenizer: Tokenizer
    context: int

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer, as the file and its tokenizer name them."""
        return frozenset(self.checkpoint.eos_token_ids) | frozenset(self.tokenizer.eos_token_ids)

    def generator(self, *, num_blocks: int | None = None) -> Generator:
        """A loop over this model; a cache of `num_blocks` blocks, or what the context needs.

        Raises:
            ConfigError: there is no memory for the cache.
        """
        return Generator(
            self.model,
            self.tokenizer,
            context=self.context,
            eos_token_ids=self.eos_token_ids,
            num_blocks=num_blocks,
        )


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


def load_model(path: Path, *, threads: int | None = None, context: int | None = None) -> LoadedModel:
    """Open a checkpoint and prepare it.

    The weights are packed by native code that leaves the interpreter free, so the tokenizer is built meanwhile.

    Raises:
        CheckpointError: the file is missing, damaged or not supported.
        TokenizerError: its tokenizer is, or does not belong to it.
        ConfigError: the threads or the context cannot be used.
    """
    checkpoint = open_checkpoint(path)
    chosen = choose_context(context, checkpoint.spec.context_length)
    with ThreadPoolExecutor(1, "load-weights") as executor:
        weights = executor.submit(CpuModel.load, checkpoint, threads=threads, context=chosen)
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        check_vocab(tokenizer, checkpoint.spec.vocab_size)
        return LoadedModel(checkpoint, weights.result(), tokenizer, chosen)
