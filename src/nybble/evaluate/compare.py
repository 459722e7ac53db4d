"""What quantisation cost: several models read the same windows of a text, beside a reference.

The windows and the scored tokens are those of `nybble.evaluate.perplexity`. One model is in memory at a time; the
reference comes first and leaves its logits on the disk (`nybble.evaluate.spool`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.core import env
from nybble.core.errors import ConfigError
from nybble.engine.load import load_model
from nybble.engine.model import Model
from nybble.engine.scheduler import blocks_for
from nybble.evaluate.bootstrap import Bootstrap, cut_blocks
from nybble.evaluate.report import Conditions, Report, Result
from nybble.evaluate.scores import TokenScores, join, loss, quality, score_rows
from nybble.evaluate.spool import LogitsSpool
from nybble.evaluate.windows import split_windows, window_logits
from nybble.store import resolve
from nybble.tokenizer import Tokenizer, load_tokenizer

Windows = list[list[int]]


class Progress(Protocol):
    """Told how far the work is."""

    def start(self, total: int) -> None:
        """So many windows will be read, over all models."""

    def advance(self, windows: int, what: str) -> None:
        """So many more have been, the last ones by the model `what`."""


class Silent:
    """Nobody is told."""

    def start(self, total: int) -> None:
        pass

    def advance(self, windows: int, what: str) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    path: Path
    bytes: int
    bpw: float
    linear_bpw: float
    vocab_size: int
    windows: Windows
    bos: int | None


def evaluate(
    models: Sequence[str | Path],
    text: str | Path,
    *,
    reference: str | Path | None = None,
    ctx: int = 512,
    tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Report:
    """Score models on a text file, and compare them with a reference if there is one.

    Args:
        models: GGUF files, Hugging Face folders (quantised or not) or names of the catalog.
        text: a file in UTF-8.
        reference: what the models were before they were made smaller; same tokenizer.
        ctx: tokens of a window.
        tokens: read so many tokens of the text, rounded down to whole windows; None: all.
        threads: to compute with; None: the cores that this process may use.
        announce: told before a model is fetched.

    Raises:
        ConfigError: the text is missing or too short, `ctx` is longer than a model's context, two models do not cut the
            text into the same tokens, or the reference's logits do not fit on the disk.
        CheckpointError, ModelNotFoundError, TokenizerError: a model cannot be read.
    """
    if not models:
        raise ConfigError("there is no model to evaluate: name at least one")
    if ctx < 4:
        raise ConfigError(f"a window needs at least 4 tokens, not {ctx}")
    if tokens is not None and tokens < ctx:
        raise ConfigError(f"--tokens {tokens} is less than one window of {ctx} tokens: give more, or a smaller --ctx")
    words, digest = _read(Path(text))
    asked = [*models] if reference is None else [reference, *models]
    paths = [resolve(one, announce=announce) for one in asked]
    candidates = _prepare(paths, words, ctx, None if tokens is None else tokens // ctx)
    first = candidates[0]
    for other in candidates[1:]:
        _check_same_tokens(first, other)
    windows, rows = len(first.windows), ctx - ctx // 2 - 1
    bootstrap = Bootstrap(cut_blocks(windows, rows))
    told = progress or Silent()
    told.start(windows * len(candidates))
    with ExitStack() as stack:
        spool = None
        if reference is not None:
            spool = stack.enter_context(LogitsSpool(windows * rows, first.vocab_size))
        scores: list[TokenScores] = []
        for index, one in enumerate(candidates):
            keep = spool if index == 0 else None
            scores.append(_run(one, ctx, threads, told, keep=keep, against=None if keep is not None else spool))
    results = [
        _result(one, found, scores[0] if reference is not None and index else None, bootstrap)
        for index, (one, found) in enumerate(zip(candidates, scores, strict=True))
    ]
    conditions = Conditions(
        text=Path(text).name,
        text_sha256=digest,
        ctx=ctx,
        score_from=ctx // 2 + 1,
        windows=windows,
        scored_tokens=windows * rows,
        bos=first.bos is not None,
        blocks=bootstrap.num_blocks,
        activations=env.activation_type(),
    )
    if reference is None:
        return Report(conditions, None, tuple(results))
    return Report(conditions, results[0], tuple(results[1:]))


def _read(path: Path) -> tuple[str, str]:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"the text {path} cannot be read: {e.strerror}") from e
    try:
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except UnicodeDecodeError as e:
        raise ConfigError(f"the text {path} is not UTF-8 (byte {e.start}): convert it first") from e


def _prepare(paths: list[Path], words: str, ctx: int, count: int | None) -> list[_Candidate]:
    """All that can be wrong is found here, before anything slow starts."""
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        checkpoint = open_checkpoint(path)
        spec = checkpoint.spec
        if ctx > spec.context_length:
            raise ConfigError(f"{name} reads {spec.context_length} tokens at most: give a smaller --ctx than {ctx}")
        bos = checkpoint.bos_token_id if checkpoint.add_bos else None
        windows = _windows(load_tokenizer(checkpoint.tokenizer), words, ctx, bos, count)
        found.append(_Candidate(name, path, checkpoint.file_bytes, *_bits(checkpoint), spec.vocab_size, windows, bos))
    return found


def _windows(tokenizer: Tokenizer, words: str, ctx: int, bos: int | None, count: int | None) -> Windows:
    token_ids = tokenizer.encode(words, add_special=True)
    needed = ctx * (count or 1)
    if len(token_ids) < needed:
        what = "one window" if count in (None, 1) else f"{count} windows"
        raise ConfigError(
            f"the text is too short: it has {len(token_ids)} tokens, {what} of {ctx} {'need' if count else 'needs'} "
            f"{needed}: give a longer one, or a smaller --tokens or --ctx"
        )
    return split_windows(token_ids, ctx, bos=bos, count=count)


def _check_same_tokens(first: _Candidate, other: _Candidate) -> None:
    if first.windows == other.windows and first.vocab_size == other.vocab_size:
        return
    why = "cut the text into different tokens"
    if first.vocab_size != other.vocab_size:
        why = f"have vocabularies of {first.vocab_size} and {other.vocab_size} tokens"
    elif (first.bos is None) != (other.bos is None):
        why = "differ in whether a text begins with a BOS token"
    raise ConfigError(
        f"{first.name} and {other.name} {why}: only models with the same tokenizer can be compared, evaluate them apart"
    )


def _names(paths: list[Path]) -> list[str]:
    """Last parts of the paths, with as many parts before them as tell them apart."""
    parts = 1
    while True:
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)) or parts >= max(len(path.parts) for path in paths):
            return names
        parts += 1


def _bits(checkpoint: Checkpoint) -> tuple[float, float]:
    """Bits per weight of all tensors, and of the matrices of the layers."""
    plain = [tensor for tensor in checkpoint.tensors.values() if tensor.packed is None]
    matrices = {name: t for name, t in checkpoint.tensors.items() if name.startswith("layers.") and len(t.shape) == 2}
    packed_bytes = checkpoint.packed_bytes
    total_bytes = sum(tensor.data.nbytes for tensor in plain) + packed_bytes
    matrix_bytes = sum(t.data.nbytes for t in matrices.values() if t.packed is None) + packed_bytes
    weights = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return 8 * total_bytes / weights, 8 * matrix_bytes / max(sum(prod(t.shape) for t in matrices.values()), 1)


def _run(
    candidate: _Candidate,
    ctx: int,
    threads: int | None,
    progress: Progress,
    *,
    keep: LogitsSpool | None,
    against: LogitsSpool | None,
) -> TokenScores:
    """Load a model, score it, and let it go."""
    progress.advance(0, candidate.name)
    model = load_model(candidate.path, threads=threads, context=ctx).model
    try:
        return score(
            model,
            candidate.windows,
            keep=keep,
            against=against,
            after_window=lambda: progress.advance(1, candidate.name),
        )
    except ValueError as e:
        raise ConfigError(f"{candidate.name} cannot be scored, {e}: its weights are damaged") from e


def score(
    model: Model,
    windows: Windows,
    *,
    keep: LogitsSpool | None = None,
    against: LogitsSpool | None = None,
    after_window: Callable[[], None] = lambda: None,
) -> TokenScores:
    """Score the second half of each window. Replaces the model's cache.

    keep: takes the logits. against: gives the reference's, from its first row on.

    Raises:
        ValueError: a logit is not finite.
    """
    ctx = len(windows[0])
    model.new_cache(blocks_for(ctx))
    if against is not None:
        against.rewind()
    found = []
    for window in windows:
        targets = np.asarray(window, np.int64)
        for begin, logits in window_logits(model, window[:-1], first_row=ctx // 2):
            reference = None if against is None else against.read(len(logits))
            found.append(score_rows(logits, targets[begin + 1 : begin + 1 + len(logits)], reference))
            if keep is not None:
                keep.write(logits)
        after_window()
    return join(found)


def _result(one: _Candidate, scores: TokenScores, reference: TokenScores | None, bootstrap: Bootstrap) -> Result:
    return Result(
        name=one.name,
        bytes=one.bytes,
        bpw=one.bpw,
        linear_bpw=one.linear_bpw,
        quality=quality(scores, bootstrap),
        loss=None if reference is None else loss(scores, reference, bootstrap),
        block_nll=tuple(bootstrap.block_means(scores.nll).tolist()),
        block_kl=None if scores.kl is None else tuple(bootstrap.block_means(scores.kl).tolist()),
    )
