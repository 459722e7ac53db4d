"""Calibration texts as tokens: windows of one length, taken evenly from the whole text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Checkpoint
from nybble.compress.calibration.own_text import own_texts
from nybble.compress.calibration.text import DEFAULT_NAME, OWN_NAME, SELF, OwnText, read_texts
from nybble.compress.methods import Progress
from nybble.compress.safetensors.options import DEFAULT_SAMPLES, Options, sample_tokens
from nybble.core.errors import ConfigError
from nybble.tokenizer import Tokenizer, load_tokenizer

_FEWEST = 4  # windows
_CHARS_PER_TOKEN = 8  # more than any text that is not mostly spaces has
_HINT = "; {method} usually does better with text like what the model will read, or --calibrate self"


@dataclass(frozen=True, slots=True)
class Calibration:
    """token_ids: int64 [samples, tokens]. name: of the text. control_ids: the special tokens of the vocabulary."""

    token_ids: npt.NDArray[np.int64]
    name: str
    vocab_size: int
    control_ids: frozenset[int]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.token_ids.tobytes()).hexdigest()

    def coverage(self, particular: str | None = None) -> str:
        """What of the vocabulary the samples show. particular: a method that usually does better on another text."""
        seen = set(np.unique(self.token_ids).tolist())
        samples, length = self.token_ids.shape
        words = len(seen - self.control_ids) / max(1, self.vocab_size - len(self.control_ids))
        special = f"{len(seen & self.control_ids)} of {len(self.control_ids)} special tokens"
        hint = _HINT.format(method=particular) if particular is not None and self.name == DEFAULT_NAME else ""
        return (
            f"calibrated on {samples} x {length} tokens of {self.name}, which show {words:.0%} of the vocabulary and "
            f"{special}{hint}"
        )


def load_calibration(checkpoint: Checkpoint, options: Options, progress: Progress) -> Calibration:
    """The samples that the options ask for; `self`: of text that the model writes first.

    Raises:
        ConfigError: the text cannot be read or is too short.
        TokenizerError: the model's tokenizer cannot be built.
        CheckpointError, OutputError: as `write_own_text`.
    """
    count = options.integer("calibration_samples", DEFAULT_SAMPLES, high=1 << 16)
    length = sample_tokens(options)
    if length > checkpoint.spec.context_length:
        raise ConfigError(
            f"--calibration-tokens {length} is more than the model's context of {checkpoint.spec.context_length}"
        )
    source = options.values.get("calibrate")
    if source == SELF:
        source = OwnText(checkpoint.path)
    if isinstance(source, OwnText):
        texts, name = own_texts(source.model, count * length, progress), OWN_NAME
    else:
        texts, name = read_texts(source, count * length * _CHARS_PER_TOKEN)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    bos = checkpoint.bos_token_id if checkpoint.add_bos else None
    windows = _windows(tokenizer, "\n\n".join(texts), count, length - (bos is not None))
    if len(windows) < min(count, _FEWEST):
        raise ConfigError(
            f"the calibration text ({name}) is too short: it gives {len(windows)} samples of {length} tokens, at least "
            f"{min(count, _FEWEST)} are needed; give a longer one or a smaller --calibration-tokens"
        )
    rows = [window if bos is None else [bos, *window] for window in windows]
    token_ids = np.array(rows, np.int64)
    if int(token_ids.max()) >= checkpoint.spec.vocab_size:
        raise ConfigError("the tokenizer gives tokens that the model has no embedding for: they do not belong together")
    return Calibration(token_ids, name, tokenizer.vocab_size, tokenizer.special_token_ids)


def _windows(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[Sequence[int]]:
    span = length * _CHARS_PER_TOKEN
    if len(text) <= 2 * count * span:
        token_ids = tokenizer.encode(text, add_special=False)
        found = [token_ids[i : i + length] for i in range(0, len(token_ids) - length + 1, length)]
        return [found[i * len(found) // count] for i in range(count)] if len(found) > count else list(found)
    windows: list[Sequence[int]] = []
    for i in range(count):
        begin = i * (len(text) - span) // count
        begin = text.find("\n", begin, begin + span // 4) + 1 or begin  # words stay whole
        window = tokenizer.encode(text[begin : begin + span], add_special=False)[:length]
        if len(window) == length:
            windows.append(window)
    return windows
