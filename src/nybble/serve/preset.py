"""What a Modelfile says about every request to its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.engine.async_engine import AsyncEngine
from nybble.store import StoredModel
from nybble.store.go_template import GoTemplate
from nybble.store.template import is_go_template
from nybble.tokenizer import ChatTemplate

# Modelfile's name -> SamplingParams'
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
}


@dataclass(frozen=True, slots=True)
class Preset:
    """What counts where a request says nothing.

    sampling: fields of SamplingParams. max_tokens: the longest answer. messages: what every conversation begins with.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    system: str | None = None
    messages: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, stored: StoredModel | None) -> Preset:
        """That of a stored model; an empty one for a path."""
        if stored is None:
            return cls()
        sampling = {_SAMPLING[name]: value for name, value in stored.parameters.items() if name in _SAMPLING}
        seed, longest = stored.parameters.get("seed"), stored.parameters.get("num_predict")
        if isinstance(seed, int) and seed >= 0:
            sampling["seed"] = seed
        max_tokens = longest if isinstance(longest, int) and longest > 0 else None
        return cls(sampling, max_tokens, stored.system, stored.messages)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages behind those of the Modelfile, and its system message unless they bring one."""
        opening: list[Mapping[str, Any]] = [{"role": role, "content": text} for role, text in self.messages]
        if self.system is not None and not any(message["role"] == "system" for message in (*opening, *messages)):
            opening.insert(0, {"role": "system", "content": self.system})
        return [*opening, *messages]


def use_template(engine: AsyncEngine, stored: StoredModel) -> None:
    """Let the Modelfile's template take the place of the model file's.

    Raises:
        TokenizerError: it cannot be used.
    """
    source = stored.template
    if source is None:
        return
    if is_go_template(source):
        engine.chat_template = GoTemplate(source)
    else:
        tokenizer = engine.tokenizer
        engine.chat_template = ChatTemplate(
            source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or ""
        )
    engine.chat_template_source = source
