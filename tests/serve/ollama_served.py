"""Ollama's routes over a real library and a model that writes what a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import uvicorn
from served import EOS, ScriptedModel, make_engine, tokenizer, wait_for
from served import TEMPLATE as TOOLS

from nybble.engine.async_engine import AsyncEngine
from nybble.serve.app import create_app
from nybble.serve.lifecycle import bind
from nybble.serve.loading import Loader
from nybble.serve.models import DEFAULT, KeepAlive, Models
from nybble.serve.preset import use_template
from nybble.serve.settings import ServeSettings
from nybble.store import Library, StoredModel
from tiny_files import gguf_model

__all__ = ["MODEL", "OPENS", "PLAIN", "THINKS", "TOOLS", "OllamaServed", "ollama"]

MODEL = "tiny"
KEYS = {"general.file_type": 1, "tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.scores": list(range(2000))}
PLAIN = "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>{% endfor %}<|bos|>assistant{{ '\\n' }}"
THINKS = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>{% endfor %}<|bos|>assistant{{ '\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENS = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>{% endfor %}<|bos|>assistant\n<think>{{ '\\n' }}"
)


class Remembering(ScriptedModel):
    """Keeps the prompts that engines make requests of."""

    def __init__(self) -> None:
        super().__init__("Hello")
        self.prompts: list[list[int]] = []


@dataclass
class OneScript:
    """Loads the same scripted model under every name, with the template that a test wants or a Modelfile has."""

    model: Remembering
    template: str = PLAIN
    engines: list[AsyncEngine] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def size(self, stored: StoredModel) -> int:
        return 1000

    def load(self, stored: StoredModel) -> AsyncEngine:
        self.gate.wait(20)
        engine = make_engine(self.model)
        make_request = engine._core.make_request

        def remember(request_id: str, ids: list[int], *args: Any, **options: Any) -> Any:
            self.model.prompts.append(ids)
            return make_request(request_id, ids, *args, **options)

        cast(Any, engine._core).make_request = remember
        use_template(engine, replace(stored, template=stored.template or self.template))
        self.engines.append(engine)
        return engine


@dataclass
class OllamaServed:
    """A running server and what is behind it. kept: the keep_alive of each lease."""

    url: str
    model: Remembering
    loader: OneScript
    models: Models
    library: Library
    file: Path
    kept: list[Any] = field(default_factory=list)

    @property
    def engine(self) -> AsyncEngine:
        return self.loader.engines[-1]

    def says(self, script: str | None, template: str = PLAIN) -> None:
        """What the next answers are, and the chat template."""
        self.model.script = None if script is None else [*tokenizer().encode(script, add_special=False), EOS]
        self.loader.template = template
        for resident in self.models.resident():
            if resident.stored is not None and resident.stored.template is None:
                use_template(resident.server.engine, replace(resident.stored, template=template))

    def prompt(self) -> str:
        """The text that the model was last given, with its control tokens."""
        return tokenizer().decode(self.model.prompts[-1], skip_special=False)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def wait_until_idle(self) -> None:
        """Until nothing runs, every block is free and nobody holds a model."""
        wait_for(lambda: self.models.admission.num_requests == 0)
        wait_for(lambda: not any(slot.users for slot in self.models._slots.values()))
        for resident in self.models.resident():
            stats = resident.server.engine.stats
            wait_for(lambda stats=stats: stats().num_running + stats().num_waiting == 0)
            assert stats().kv_usage == 0
            resident.server.engine._core.check_integrity()


@contextmanager
def ollama(folder: Path, *, quantizer: Any = None, **settings: Any) -> Iterator[OllamaServed]:
    """A server in a thread, with a library of its own, in which there is one model, `tiny`."""
    root = folder / "home"
    file = folder / "weights.gguf"
    file.write_bytes(gguf_model(extra=KEYS))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("NYBBLE_HOME", root), ("OLLAMA_MODELS", folder / "o"), ("HF_HOME", folder / "h")):
            patch.setenv(name, str(value))
        patch.delenv("HF_HUB_CACHE", raising=False)
        with _serving(root, file, quantizer, settings) as made:
            yield made


@contextmanager
def _serving(root: Path, file: Path, quantizer: Any, settings: dict[str, Any]) -> Iterator[OllamaServed]:
    library = Library(root)
    library.create(MODEL, f"FROM {file}", base_folder=file.parent, progress=lambda status: None)
    loader = OneScript(Remembering())
    wanted = ServeSettings("", **settings)
    models = Models(wanted, library=library, loader=cast(Loader, loader))
    app = create_app(models, wanted, quantizer=quantizer)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    left: list[str] = []

    async def run() -> None:
        await server.serve(sockets=[listening])
        await models.shutdown(None)
        left.extend(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task())

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="ollama")
    thread.start()
    wait_for(lambda: server.started)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    made = OllamaServed(url, loader.model, loader, models, library, file)
    lease = models.lease

    def noted(name: str, *, keep_alive: KeepAlive = DEFAULT) -> Any:
        made.kept.append(keep_alive)
        return lease(name, keep_alive=keep_alive)

    cast(Any, models).lease = noted
    try:
        made.says("Hello")
        yield made
        loader.model.gate.set()
        made.wait_until_idle()
    finally:
        loader.model.gate.set()
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert not left
