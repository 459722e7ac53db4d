"""The files beside the weights: the tokenizer's, the chat template and generation_config.json."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from nybble.checkpoint import Checkpoint
from nybble.compress.safetensors.tokenizer_json import tokenizer_json
from nybble.core.errors import OutputError
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.formats.output import OutputFile
from nybble.formats.safetensors_writer import write_json

# What a model folder may have besides its weights and config.json.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "NOTICE",
)  # fmt: skip


def write_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copied from a folder, made from the keys of a GGUF file.

    Raises:
        TokenizerError: the file's tokenizer cannot be said in a tokenizer.json.
        OutputError: a file cannot be written.
    """
    if isinstance(checkpoint.tokenizer, GgufTokenizer):
        _write_made(checkpoint, checkpoint.tokenizer, folder)
        return
    copy_side_files(checkpoint.path, folder)


def copy_side_files(model: Path, folder: Path) -> None:
    """Of a model folder, as they are. Raises OutputError if a file cannot be written."""
    for name in _COPIED:
        source = model / name
        if source.is_file():
            try:
                shutil.copyfile(source, folder / name)
            except OSError as e:
                raise OutputError(f"{source} cannot be copied to {folder}: {e.strerror or e}") from e


def _write_made(checkpoint: Checkpoint, source: GgufTokenizer, folder: Path) -> None:
    with OutputFile(folder / "tokenizer.json", force=True) as file:
        file.write(tokenizer_json(source).encode("utf-8"))
    pieces = cast("Sequence[object]", source.metadata.get("tokenizer.ggml.tokens", ()))

    def name(key: str) -> str | None:
        token_id = source.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return str(pieces[token_id]) if isinstance(token_id, int) and 0 <= token_id < len(pieces) else None

    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "unk_token": name("unknown"),
        "pad_token": name("padding"),
        "add_bos_token": checkpoint.add_bos,
        "model_max_length": checkpoint.spec.context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": checkpoint.chat_template,
    }
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    ids = list(checkpoint.eos_token_ids)
    generation: dict[str, object] = {"bos_token_id": checkpoint.bos_token_id}
    if ids:
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    write_json(
        folder / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )
