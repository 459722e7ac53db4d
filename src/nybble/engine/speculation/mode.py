"""What `--speculate` may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.core.errors import ConfigError

MODES = ("auto", "off", "ngram")
DEFAULT_DRAFT_TOKENS = 8
MAX_DRAFT_TOKENS = 16  # what the kernels for few tokens are made for
_SELF = "self:"


@dataclass(frozen=True, slots=True)
class Speculation:
    """When guesses are made, and what draft model makes some of them.

    draft: its name or path. draft_type: it is the model itself at this type. draft_tokens: its most guesses in a step.
    """

    when: Literal["auto", "off", "always"]
    draft: str | None = None
    draft_type: str | None = None
    draft_tokens: int = DEFAULT_DRAFT_TOKENS

    @property
    def needs_draft(self) -> bool:
        """Whether there is a draft model to load."""
        return self.draft is not None or self.draft_type is not None


def parse_mode(text: str) -> Speculation:
    """Read `auto`, `off`, `ngram`, or `draft=MODEL[,k=N][,always]`, where MODEL may be `self:TYPE`.

    Raises:
        ConfigError: it is none of them.
    """
    if text.startswith("draft="):
        return _parse_draft(text)
    if text not in MODES:
        raise ConfigError(
            f"speculate must be one of {', '.join(MODES)} or draft=MODEL (a name, a path, or self:q2_k), not {text!r}"
        )
    return Speculation("off" if text == "off" else "auto" if text == "auto" else "always")


def _parse_draft(text: str) -> Speculation:
    name, tokens, always = text.removeprefix("draft="), DEFAULT_DRAFT_TOKENS, False
    while "," in name:  # a path may have commas, so options are looked for from the end
        rest, _, option = name.rpartition(",")
        if option == "always":
            always = True
        elif option.startswith("k="):
            tokens = _count(option[2:], text)
        else:
            break
        name = rest
    kind = name.removeprefix(_SELF) if name.startswith(_SELF) else None
    if not name or kind == "":
        raise ConfigError(f"speculate is {text!r}, which names no draft model: write draft=MODEL or draft=self:q2_k")
    return Speculation("always" if always else "auto", None if kind else name, kind, tokens)


def _count(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= MAX_DRAFT_TOKENS):
        raise ConfigError(f"k in {text!r} must be a number of tokens between 1 and {MAX_DRAFT_TOKENS}")
    return int(digits)
