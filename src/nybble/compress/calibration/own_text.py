"""Text that a model writes by itself, where no text can be had that is like what it knows: `calibrate: self`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.compress.gguf.quantize import quantize as to_gguf
from nybble.compress.methods import Progress, QuantizeRequest, Silent, find
from nybble.compress.scratch import scratch_folder
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.scheduler import blocks_for
from nybble.tokenizer import load_tokenizer

_AT_ONCE = 48  # documents
_LENGTH = 256  # tokens of one, at most
_LEAST = 16  # what the model adds, at least: less says nothing
_PASSAGE = 32  # tokens of a given text that a document begins with
_CONTEXT = _LENGTH + 16


def own_texts(model: Path, num_tokens: int, progress: Progress) -> list[str]:
    """Texts of together a little more than so many tokens, which are fewer again when they are cut into windows.

    The same each time, so that an interrupted run goes on with what it began with. Raises as `write_own_text`.
    """
    documents = write_own_text(model, num_tokens + num_tokens // 8, 0, progress)
    tokenizer = load_tokenizer(open_checkpoint(model).tokenizer)
    return [tokenizer.decode(document) for document in documents]


def write_own_text(
    model: Path, num_tokens: int, seed: int, progress: Progress, *, after: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Documents of together about so many tokens, drawn at temperature 1: the same for the same seed.

    Each begins with a passage of `after`, texts as token ids, or without those with a token drawn from all that are
    text, so that they differ (Liu et al. 2023, arXiv 2305.17888). A model in 16 bits or more writes with weights of 8
    bits, which is faster and changes what it says hardly.

    Raises:
        CheckpointError, TokenizerError, OutputError: the model cannot be read, or not be made smaller for this.
        ConfigError: there is no memory for it, it writes nothing, or `after` has no passage.
    """
    passages = None if after is None else _passages(after)
    progress.note(f"{model.name} writes {num_tokens} tokens to learn from")
    with _as_it_writes(model) as weights:
        loaded = load_model(weights, context=_CONTEXT)
    if passages is None:
        special = loaded.tokenizer.special_token_ids
        passages = [[i] for i in range(loaded.tokenizer.vocab_size) if i not in special]
    progress.start(num_tokens)
    return _documents(loaded, num_tokens, random.Random(seed), str(model), passages, progress)


def _passages(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """All pieces of one length, one after the other. Raises ConfigError if there is none."""
    found = [list(text[at : at + _PASSAGE]) for text in texts for at in range(0, len(text) - _PASSAGE + 1, _PASSAGE)]
    if not found:
        raise ConfigError(f"the text to go on from has no passage of {_PASSAGE} tokens: give a longer one")
    return found


@contextmanager
def _as_it_writes(model: Path) -> Iterator[Path]:
    """Files with at most 8 bits a weight, or the model's own."""
    if not _is_wide(open_checkpoint(model)):
        yield model
        return
    with scratch_folder() as folder:
        target = folder / f"{model.stem}.gguf"
        to_gguf(QuantizeRequest(source=model, target=target, method=find("Q8_0")), Silent())
        yield target


def _is_wide(checkpoint: Checkpoint) -> bool:
    tensors = checkpoint.tensors.values()
    return all(tensor.packed is None and tensor.format.name in ("F32", "F16", "BF16") for tensor in tensors)


def writing_bytes(checkpoint: Checkpoint) -> int:
    """Memory that a model takes while it writes, about: its weights, and keys and values in 16 bits."""
    spec = checkpoint.spec
    weights = checkpoint.file_bytes
    if _is_wide(checkpoint):
        weights = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()) * 34 // 32
    numbers = sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    return weights + _AT_ONCE * _CONTEXT * numbers * 2


def _documents(
    loaded: LoadedModel,
    num_tokens: int,
    draw: random.Random,
    name: str,
    passages: Sequence[list[int]],
    progress: Progress,
) -> list[list[int]]:
    bos = loaded.checkpoint.bos_token_id
    begin = [bos] if loaded.checkpoint.add_bos and bos is not None else []
    generator = loaded.generator(
        num_blocks=_AT_ONCE * (blocks_for(_CONTEXT) + 1), max_num_seqs=_AT_ONCE, enable_prefix_caching=False
    )
    documents: list[list[int]] = []
    found = 0
    while found < num_tokens:
        starts = [draw.choice(passages) for _ in range(max(8, 4 * (num_tokens - found) // (3 * _LENGTH)))]
        rows = [
            SamplingParams(temperature=1.0, max_tokens=_LENGTH + 1 - len(start), seed=draw.getrandbits(31))
            for start in starts
        ]
        written = [list(start) for start in starts]
        for events in generator.generate([[*begin, *start] for start in starts], rows):
            for event in events:
                written[event.index].append(event.token_id)
            progress.advance(len(events), "tokens written")
        ends = zip(written, starts, strict=True)
        good = [document for document, start in ends if len(document) >= len(start) + _LEAST - 1]
        documents += good
        found += sum(map(len, good))
        if len(good) < len(written) // 16:
            raise ConfigError(f"{name} ends its texts at once: give a text instead of self")
    return documents
