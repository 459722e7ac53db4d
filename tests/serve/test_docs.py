"""docs/serving.md names every option, route, field and metric there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from served import serving

from nybble.cli.serve import serve
from nybble.serve.openai.schemas import ChatBody, CompletionBody, EmbeddingBody

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def named() -> set[str]:
    """Everything that stands in backticks, and the words of the code blocks."""
    text = DOCS.read_text("utf-8")
    code = re.findall(r"```.*?```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {word for part in [*code, *inline] for word in re.findall(r"[\w./{}-]+", part)}


def test_every_option(named: set[str]) -> None:
    application = typer.Typer()
    application.command()(serve)
    options = {
        name
        for parameter in typer.main.get_command(application).params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name not in ("--help", "--install-completion", "--show-completion")
    }
    assert "--kv-cache-memory" in options
    assert not options - named - {"--prefix-caching"}


def test_every_field(named: set[str]) -> None:
    fields = {*ChatBody.model_fields, *CompletionBody.model_fields, *EmbeddingBody.model_fields}
    assert not fields - named - {"input", "encoding_format"}


def test_every_route_and_metric(named: set[str]) -> None:
    with serving() as served:
        paths = {path.replace("{name}", "NAME") for path in served.get("/openapi.json").json()["paths"]}
        lines = served.get("/metrics").text.splitlines()
    assert not paths - named
    metrics = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert len(metrics) > 20
    known = {name.partition("{")[0].removesuffix("_total") for name in named}
    missing = {name.removesuffix("_total") for name in metrics if not name.endswith("_created")} - known
    assert not missing
