"""From a conversation to token ids, so that nobody can write control tokens into it.

A chat template renders to one text, in which its own `<|im_end|>` and one that a user typed look the same. So the first
character of each control token's name that stands in a message goes through the template as a stand-in: a character
that no message has. Afterwards the stand-ins tell which names came from messages; the text, with the characters put
back, is encoded with control tokens everywhere but there.

No string changes its length, and where no message names a control token nothing is replaced: ordinary conversations
get the ids of the plain text. What is not control (tokens such as `<tool_call>`) stays a token, typed or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from nybble.core.errors import TokenizerError
from nybble.tokenizer.tokenizer import Tokenizer


class Template(Protocol):
    """A ChatTemplate, or one in another language that takes and gives the same."""

    def render(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str: ...


def render_to_ids(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = True,
    bos_token_id: int | None = None,
    **variables: object,
) -> list[int]:
    """The token ids of a conversation. What stands in messages and variables is text, whatever it looks like.

    bos_token_id: what the prompt begins with if the template does not write it.

    Raises TokenizerError if the template refuses the messages, fails, or takes too much time or memory.
    """
    try:
        characters = _stand_ins(tokenizer, [*_strings(messages), *_strings(variables)])
        marked = _Marked(tokenizer, characters)
        messages, variables = marked.copy(messages), marked.copy(variables)
    except RecursionError:
        raise TokenizerError("the messages are nested too deeply: give plainer ones") from None
    text = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
    originals = {ord(stand_in): character for character, stand_in in characters.items()}
    literal = [at for at, character in enumerate(text) if ord(character) in originals] if originals else []
    text = text.translate(originals)
    token_ids = tokenizer.encode(text, add_special=False, parse_special=True, literal=literal)
    if bos_token_id is not None and token_ids[:1] != [bos_token_id]:
        return [bos_token_id, *token_ids]
    return token_ids


class _Marked:
    """Makes copies of values, in which the names of control tokens begin with a stand-in."""

    def __init__(self, tokenizer: Tokenizer, stand_ins: Mapping[str, str]) -> None:
        self._names = tokenizer.names
        self._stand_ins = stand_ins

    def copy(self, value: Any) -> Any:
        if not self._stand_ins:
            return value
        if isinstance(value, str):
            characters = list(value)
            for at in self._names.control_begins(value):
                characters[at] = self._stand_ins[characters[at]]
            return "".join(characters)
        if isinstance(value, Mapping):
            return {self.copy(key): self.copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(item) for item in value]
        return value


def _stand_ins(tokenizer: Tokenizer, texts: list[str]) -> dict[str, str]:
    """For each character that a control token's name begins with somewhere in the texts, one that they do not have."""
    begins = {text[at] for text in texts for at in tokenizer.names.control_begins(text)}
    if not begins:
        return {}
    taken = set(chain.from_iterable(texts))
    # First the noncharacters, which stand for nothing in any text, then those that mean what people agree on.
    candidates = map(chr, chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0x10FFFE)))
    free = (candidate for candidate in candidates if candidate not in taken)
    found = dict(zip(sorted(begins), free, strict=False))
    if len(found) < len(begins):
        raise TokenizerError("the messages use every private character of Unicode: leave some out")
    return found


def _strings(value: object) -> Iterator[str]:
    """All strings inside a value."""
    if isinstance(value, str):
        yield value
        return
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = chain(value.keys(), value.values())
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        yield from _strings(part)
