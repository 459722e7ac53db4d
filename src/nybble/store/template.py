"""The two languages of chat templates: Jinja, and Go's as Ollama's models use it."""

from __future__ import annotations

import re

from nybble.core.errors import TokenizerError
from nybble.store.go_template import GoTemplate

_GO = re.compile(
    r"\{\{-?\s*(?:/\*|\$|(?:if|range|with|else|end|break|continue|template|define|block)\b|[^}%]*?(?:^|[\s({])\.)"
)


def is_go_template(source: str) -> bool:
    """Whether a template is Go's. One without any action is Jinja, where it means the same."""
    return "{%" not in source and _GO.search(source) is not None


def check_template(source: str) -> None:
    """Raises TokenizerError if a template cannot be used."""
    if is_go_template(source):
        GoTemplate(source)
        return
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (TemplateSyntaxError, RecursionError) as error:
        raise TokenizerError(f"the template is not valid Jinja: {error}") from error
