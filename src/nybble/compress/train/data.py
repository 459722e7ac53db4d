"""Training text as packed sequences: documents one after the other, an end-of-text token between, cut to one length.

A sequence may begin inside a document and may hold several; a token sees all before it in its sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Checkpoint
from nybble.compress.calibration.own_text import write_own_text
from nybble.compress.calibration.text import SELF, SELF_AFTER, read_texts
from nybble.compress.methods import Progress, Silent
from nybble.core.errors import ConfigError
from nybble.tokenizer import load_tokenizer

# A text or several; None: the built-in one.
Data = str | tuple[str, ...] | None
_CHARS_PER_TOKEN = 6


@dataclass(frozen=True, slots=True)
class Sequences:
    """token_ids: int64 [sequences, seq_len + 1]: each also holds the token that its last position should say."""

    token_ids: npt.NDArray[np.int64]
    name: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.token_ids.tobytes()).hexdigest()

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The sequences of an epoch, shuffled."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.token_ids))

    def batch(self, number: int, size: int, seed: int) -> npt.NDArray[np.int64]:
        """Indices of the sequences of batch `number`, over all epochs; the same for every run with this seed."""
        count = len(self.token_ids)
        at = number * size
        found: list[int] = []
        while len(found) < size:
            epoch, begin = divmod(at + len(found), count)
            found += self.order(seed, epoch)[begin : begin + size - len(found)].tolist()
        return np.array(found, np.int64)


def load_sequences(
    checkpoint: Checkpoint,
    data: Data,
    *,
    seq_len: int,
    tokens: int,
    own_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sequences:
    """Sequences of together up to `tokens` tokens.

    data: a text file, a JSONL file with a `text` in each line, the name of a data set, `self` for what the model
    writes (own_tokens of it at most), `self:` and one of the first three for what it writes after passages of 32 tokens
    of that text, or None for the built-in text. Several give equal shares; what one has too little
    for, those behind it make up for.

    Raises:
        ConfigError: there is no such text, it is too short, or it does not belong to the model.
        TokenizerError: the model's tokenizer cannot be built.
    """
    if seq_len > checkpoint.spec.context_length:
        raise ConfigError(f"seq_len {seq_len} is more than the model's context of {checkpoint.spec.context_length}")
    sources = data if isinstance(data, tuple) else (data,)
    documents: list[list[int]] = []
    names = []
    left = tokens
    for number, source in enumerate(sources):
        share = max(1, left // (len(sources) - number))
        if writes_itself(source):
            wanted = share if own_tokens is None else min(share, own_tokens)
            found, name = _written(checkpoint, source, wanted, seed, Silent() if progress is None else progress)
        else:
            found, name = _encoded(checkpoint, source, share)
        if len(sources) > 1:
            found = _first_tokens(found, share)
        documents += found
        names.append(name)
        left -= sum(len(document) + 1 for document in found)
    return pack(documents, checkpoint, " and ".join(names), seq_len=seq_len, tokens=tokens)


def writes_itself(source: object) -> TypeGuard[str]:
    """Whether the model is to write the text."""
    return isinstance(source, str) and (source == SELF or source.startswith(SELF_AFTER))


def _written(
    checkpoint: Checkpoint, source: str, tokens: int, seed: int, progress: Progress
) -> tuple[list[list[int]], str]:
    name = "text that the teacher wrote"
    if source == SELF:
        return write_own_text(checkpoint.path, tokens, seed, progress), name
    # As much as is there: passages are drawn, so that the more the text has, the more they differ.
    after, whose = _encoded(checkpoint, source.removeprefix(SELF_AFTER), tokens)
    return write_own_text(checkpoint.path, tokens, seed, progress, after=after), f"{name} after {whose}"


def _first_tokens(documents: list[list[int]], count: int) -> list[list[int]]:
    """So many tokens, with the ends of documents."""
    found: list[list[int]] = []
    for document in documents:
        if count <= 0:
            break
        found.append(document[:count])
        count -= len(found[-1]) + 1
    return found


def pack(
    documents: Sequence[Sequence[int]], checkpoint: Checkpoint, name: str, *, seq_len: int, tokens: int
) -> Sequences:
    """Documents as sequences. Raises ConfigError if they give none, or a token that the model does not know."""
    end = checkpoint.eos_token_ids[:1]
    begin = (checkpoint.bos_token_id,) if checkpoint.add_bos and checkpoint.bos_token_id is not None else ()
    stream: list[int] = []
    for document in documents:
        stream += [*begin, *document, *end]
        if len(stream) > tokens + seq_len:
            break
    count = (len(stream) - 1) // seq_len
    if count < 1:
        raise ConfigError(
            f"the training text ({name}) has {len(stream)} tokens, too few for one sequence of {seq_len}: give more "
            "text or a smaller seq_len"
        )
    count = min(count, max(1, tokens // seq_len))
    flat = np.array(stream[: count * seq_len + 1], np.int64)
    if int(flat.max()) >= checkpoint.spec.vocab_size:
        raise ConfigError("the tokenizer gives tokens that the model has no embedding for: they do not belong together")
    windows = np.lib.stride_tricks.sliding_window_view(flat, seq_len + 1)[::seq_len]
    return Sequences(np.ascontiguousarray(windows), name)


def _encoded(checkpoint: Checkpoint, data: str | None, tokens: int) -> tuple[list[list[int]], str]:
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    if data is not None and Path(data).suffix.lower() in (".jsonl", ".ndjson"):
        texts, name = _read_jsonl(Path(data)), Path(data).name
    else:
        texts, name = _read(data, tokens)
    documents: list[list[int]] = []
    found = 0
    for text in texts:
        documents.append(list(tokenizer.encode(text, add_special=False)))
        found += len(documents[-1]) + 1
        if found > tokens:
            break
    return documents, name


def _read(data: str | None, tokens: int) -> tuple[list[str], str]:
    try:
        return read_texts(data, tokens * _CHARS_PER_TOKEN)
    except ConfigError as e:  # that module serves another option
        raise ConfigError(str(e).replace("--calibrate", "data")) from None


def _read_jsonl(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"data {path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"data {path} is not a text in UTF-8: byte {e.start} cannot be read") from e
    texts = [_text_of(line, f"data {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise ConfigError(f"data {path} has no lines: give a file with one JSON object per line")
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where} is not JSON: {e}") from e
    text = value if isinstance(value, str) else value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{where} has no text: each line must be an object with a key `text`")
    return text
