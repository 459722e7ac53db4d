"""How models are described: `/api/tags`, `/api/ps` and `/api/show`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nybble.core.errors import NybbleError
from nybble.engine.facts import ModelFacts, model_facts
from nybble.serve.models import Resident
from nybble.serve.ollama.prompt import capabilities
from nybble.serve.ollama.wire import timestamp
from nybble.store import StoredModel

# general.file_type of a GGUF file, as ggml numbers them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16", 38: "MXFP4",
}  # fmt: skip
_FOR_EVER = 2**63 / 1e9  # seconds: what Ollama shows as never, the longest time that Go knows
_NO_DETAILS = {
    "parent_model": "", "format": "", "family": "", "families": None, "parameter_size": "", "quantization_level": ""
}  # fmt: skip


def listed(models: Iterable[StoredModel], residents: Iterable[Resident]) -> list[dict[str, Any]]:
    """The entries of `/api/tags`: all of the library, and what is served without it."""
    entries = [_entry(model) for model in models]
    known = {entry["name"] for entry in entries}
    for resident in residents:
        if resident.stored is None and resident.name not in known:
            entries.append(_loose_entry(resident))
    return entries


def running(residents: Iterable[Resident]) -> list[dict[str, Any]]:
    """The entries of `/api/ps`."""
    return [_running(resident) for resident in residents]


def _running(resident: Resident) -> dict[str, Any]:
    entry = _loose_entry(resident) if resident.stored is None else _entry(resident.stored)
    del entry["modified_at"]
    expires = time.time() + _FOR_EVER if resident.expires_at is None else resident.expires_at
    return {
        **entry,
        "size": resident.size,
        "expires_at": timestamp(expires),
        "size_vram": 0,  # the processor's memory is all there is
        "context_length": resident.server.engine.context,
    }


def _entry(model: StoredModel) -> dict[str, Any]:
    facts = _facts(model)
    return {
        "name": str(model.name),
        "model": str(model.name),
        "modified_at": timestamp(model.modified),
        "size": model.size,
        "digest": model.digest.removeprefix("sha256:"),
        "details": dict(_NO_DETAILS) if facts is None else _details(facts, model.parent),
        "capabilities": [] if facts is None else capabilities(model.template or facts.chat_template),
    }


def _loose_entry(resident: Resident) -> dict[str, Any]:
    """Of a model that was given by its path."""
    server = resident.server
    return {
        "name": resident.name,
        "model": resident.name,
        "modified_at": timestamp(server.started),
        "size": resident.size,
        "digest": "",
        "details": dict(_NO_DETAILS),
        "capabilities": capabilities(server.engine.chat_template_source),
    }


def _facts(model: StoredModel) -> ModelFacts | None:
    """None for a file that is damaged or of a kind that nybble cannot run: it is listed all the same."""
    try:
        return model_facts(model.path)
    except NybbleError:
        return None


def _details(facts: ModelFacts, parent: str | None) -> dict[str, Any]:
    file_type = facts.metadata.get("general.file_type")
    level = _FILE_TYPES.get(file_type) if isinstance(file_type, int) else None
    return {
        "parent_model": parent or "",
        "format": facts.container,
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": _human(facts.num_weights),
        "quantization_level": level or facts.encoding,
    }


def _human(count: int) -> str:
    if count >= 10**9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.2f}M" if count >= 10**6 else f"{count / 1e3:.2f}K"


def shown(model: StoredModel, *, verbose: bool) -> dict[str, Any]:
    """The answer of `/api/show`. Takes a moment: call it off the event loop.

    Raises:
        CheckpointError: the model's file is damaged or not supported.
        ConfigError: a text of it cannot be written in a Modelfile.
    """
    facts = model_facts(model.path, vocabulary=verbose)
    template = model.template or facts.chat_template
    info: dict[str, Any] = {key: _value(value, verbose=verbose) for key, value in facts.metadata.items()}
    info["general.architecture"] = facts.architecture
    info["general.parameter_count"] = facts.num_weights
    # Clients read these two, whatever the container.
    info.setdefault(f"{facts.architecture}.context_length", facts.context)
    info.setdefault(f"{facts.architecture}.embedding_length", facts.hidden_size)
    answer: dict[str, Any] = {
        "modelfile": model.modelfile(),
        "parameters": "\n".join(_parameter_lines(model.parameters)),
        "template": template or "",
        "details": _details(facts, model.parent),
        "model_info": info,
        "capabilities": capabilities(template),
        "modified_at": timestamp(model.modified),
    }
    if model.license:
        answer["license"] = "\n".join(model.license)
    if model.system is not None:
        answer["system"] = model.system
    if model.messages:
        answer["messages"] = [{"role": role, "content": content} for role, content in model.messages]
    if verbose:
        answer["tensors"] = [
            {"name": name, "type": encoding, "shape": list(shape)} for name, encoding, shape in facts.tensors
        ]
    return answer


def _parameter_lines(parameters: Mapping[str, Any]) -> Iterator[str]:
    for name, value in parameters.items():
        for one in value if isinstance(value, list) else [value]:
            yield f"{name:<30} {json.dumps(one, ensure_ascii=False)}"


def _value(value: object, *, verbose: bool) -> Any:
    """As JSON; lists only if everything is to be told, as Ollama does."""
    if isinstance(value, np.ndarray):
        return value.tolist() if verbose else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    assert isinstance(value, Iterable)
    return [_value(one, verbose=True) for one in value] if verbose else None
