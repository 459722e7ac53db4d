"""Loading a draft model, and whether it may guess for its target."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError, TokenizerError
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.speculation.draft_model import DraftWeights
from nybble.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MOST_PADDING = 1024  # ids by which two vocabularies of one tokenizer may differ: heads are padded to round sizes


def load_draft(path: Path, target: LoadedModel, *, threads: int | None = None) -> DraftWeights:
    """Load the draft model of a target. One that is not smaller is allowed, with a warning.

    Raises:
        ConfigError: it has another tokenizer or vocabulary.
        CheckpointError, TokenizerError: it is damaged or not supported.
    """
    context = min(target.context, open_checkpoint(path).spec.context_length)
    # Beside its target, whole: it is small.
    placement = replace(target.placement, tensor_parallel_size=1, device_map=None)
    draft = load_model(path, threads=threads, context=context, placement=placement)
    check_same_tokens(draft.tokenizer, target.tokenizer, str(path), str(target.checkpoint.path))
    own, other = draft.model.memory_bytes, target.model.memory_bytes
    if own >= other:
        logger.warning(
            "the draft model %s takes %.2f GB and its target %.2f GB: a draft should be several times smaller, or "
            "its guesses cost more than they save",
            path, own / 1e9, other / 1e9,
        )  # fmt: skip
    return DraftWeights(draft.model, context, draft.checkpoint.spec.vocab_size, draft.model.cache_bytes_per_block)


def check_same_tokens(draft: Tokenizer, target: Tokenizer, draft_name: str, target_name: str) -> None:
    """Raises ConfigError if an id does not stand for the same text in both."""
    sizes = draft.vocab_size, target.vocab_size
    if abs(sizes[0] - sizes[1]) > _MOST_PADDING:
        raise ConfigError(
            f"the draft model {draft_name} has a vocabulary of {sizes[0]} tokens and {target_name} one of {sizes[1]}: "
            "a draft must have the tokenizer of its target"
        )
    for token_id in range(min(sizes)):
        texts = _text(draft, token_id), _text(target, token_id)
        if texts[0] != texts[1]:
            raise ConfigError(
                f"the draft model {draft_name} has another tokenizer than {target_name}: token {token_id} is "
                f"{_shown(texts[0])} and not {_shown(texts[1])}"
            )


def _text(tokenizer: Tokenizer, token_id: int) -> bytes:
    try:
        return tokenizer.token_bytes(token_id)
    except TokenizerError:  # some vocabularies have gaps
        return b""


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "replace"))[:40]
