"""Reads LoRA adapters in GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

from nybble.core.errors import CheckpointError
from nybble.core.fields import Fields
from nybble.formats.adapter_file import AdapterFile, FactorPair, StoredMatrix, check_pairs, matrix
from nybble.formats.gguf import GgufFile

_SUFFIXES = {".lora_a": "a", ".lora_b": "b"}


def read_gguf_adapter(path: Path) -> AdapterFile:
    """Pairs by the name of the tensor that they change, such as `blk.0.attn_q.weight`.

    The scale is adapter.lora.alpha over the rank; without alpha it is 1.

    Raises:
        CheckpointError: the file is damaged, a model, or an adapter of another kind.
    """
    gguf = GgufFile(path)
    fields = Fields(gguf.metadata, str(path))
    kind = fields.text("general.type", "model")
    if kind != "adapter":
        raise CheckpointError(f"{path} is a {kind!r:.40}, not an adapter: general.type must be 'adapter'")
    adapter_type = fields.text("adapter.type", "lora")
    if adapter_type != "lora":
        raise CheckpointError(f"{path}: adapters of the type {adapter_type!r:.40} are not supported, only 'lora'")
    if gguf.metadata.get("adapter.alora.invocation_tokens") is not None:
        raise CheckpointError(f"{path} is an activated LoRA (aLoRA), which is not supported: use a plain LoRA")
    alpha = fields.number("adapter.lora.alpha", 0.0, low=-1e6, high=1e6)
    found: dict[str, dict[str, StoredMatrix]] = {}
    for name, tensor in gguf.tensors.items():
        stem, dot, suffix = name.rpartition(".")
        which = _SUFFIXES.get(dot + suffix)
        if which is None:
            raise CheckpointError(
                f"{path}: the tensor {name!r:.120} is not a low-rank factor, so leaving it out would change the model: "
                "only *.lora_a and *.lora_b are supported"
            )
        found.setdefault(stem, {})[which] = matrix(tensor, gguf.file)
    pairs = {
        name: FactorPair(a, b, alpha / a.shape[0] if alpha else 1.0)
        for name, (a, b) in check_pairs(found, path).items()
    }
    return AdapterFile(path, "gguf", fields.text("general.architecture"), pairs, (gguf.file.view,))
