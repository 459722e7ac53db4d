"""A server over the real engine and a model that writes what a test wants, on a free port of this machine."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import numpy.typing as npt
import uvicorn

from fakes import FakeModel, expected_next
from models import write_tokenizer
from nybble.backends.cpu import Sampled, SampleRow, Scored, Step
from nybble.core.sampling import StructuredOutputsParams
from nybble.core.tokenizer_source import TokenizerFile
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.core import EngineCore
from nybble.engine.grammar import GrammarCompiler
from nybble.engine.load import LoadedModel
from nybble.engine.request import Matcher
from nybble.serve.app import create_app
from nybble.serve.settings import ServeSettings
from nybble.tokenizer import Tokenizer, load_tokenizer

MODEL = "tiny"
CONTEXT = 512
EOS = 257 + 13  # see models.py: bytes, merges, then <|bos|> <|eos|> <|pad|>
VOCAB = 259 + 13
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


@cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return load_tokenizer(
            TokenizerFile(Path(folder) / "tokenizer.json", {"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
        )


class ScriptedModel(FakeModel):
    """Writes `script`, then ends; without a script, letters that depend on everything before. Grammars are kept to.

    While `gate` is cleared no step runs; each step takes `delay` seconds.
    """

    def __init__(self, script: str | None = None) -> None:
        super().__init__()
        self.script = None if script is None else [*tokenizer().encode(script, add_special=False), EOS]
        self.delay = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None  # what the next step fails with
        closers = [tokenizer().encode(text, add_special=False)[0] for text in ('"', "}", "]")]
        self._base = np.zeros(VOCAB, np.float32)
        self._base[[EOS, *closers]] = (4, 3, 2, 1)  # what a grammar has to be brought to an end with

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        self.gate.wait()
        time.sleep(self.delay)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        super().execute(step)
        logits = np.repeat(self._base[None], len(self._histories), axis=0)
        for row, history in zip(logits, self._histories, strict=True):
            row[self._next(history)] = 8
        return logits

    def _next(self, history: list[int]) -> int:
        if self.script is None:
            return expected_next(history)
        written = max(n for n in range(len(self.script)) if history[len(history) - n :] == self.script[:n])
        return self.script[written]

    def sample(self, logits: npt.NDArray[np.float32], params: Sequence[SampleRow]) -> list[Sampled]:
        return [self._draw(row, wanted) for row, wanted in zip(logits, params, strict=True)]

    def _draw(self, logits: npt.NDArray[np.float32], row: SampleRow) -> Sampled:
        self.rows.append(row)
        edited = logits.copy()
        for token_id, bias in row.logit_bias:
            edited[token_id] += bias
        edited[list(row.banned_ids)] = -np.inf
        if row.allowed_mask is not None:
            allowed = np.unpackbits(row.allowed_mask.view(np.uint8), bitorder="little")[:VOCAB]
            edited[allowed == 0] = -np.inf
        return _scored(logits, int(edited.argmax()), row.logprobs or 0)

    def score_hidden(self, hidden: npt.NDArray[np.float32], target_ids: Sequence[int], top: int = 0) -> list[Scored]:
        drawn = [_scored(self._base, token_id, top) for token_id in target_ids]
        return [Scored(one.logprob, one.rank, one.top_logprobs) for one in drawn]


def _scored(logits: npt.NDArray[np.float32], token_id: int, top: int) -> Sampled:
    logprobs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-logits, kind="stable")
    best = tuple((int(i), float(logprobs[i])) for i in order[:top])
    return Sampled(token_id, float(logprobs[token_id]), best, int(np.flatnonzero(order == token_id)[0]) + 1)


def make_engine(model: ScriptedModel, *, num_blocks: int = 256, max_num_seqs: int = 16) -> AsyncEngine:
    """The real engine over this model."""
    compiler = GrammarCompiler(tokenizer(), VOCAB, frozenset((EOS,)))

    def compile_grammar(params: StructuredOutputsParams) -> Matcher:
        return compiler.compile(params)

    core = EngineCore(
        model,
        tokenizer(),
        context=CONTEXT,
        vocab_size=VOCAB,
        num_blocks=num_blocks,
        eos_token_ids=frozenset((EOS,)),
        max_num_seqs=max_num_seqs,
        compile_grammar=compile_grammar,
    )
    checkpoint = SimpleNamespace(chat_template=TEMPLATE, add_bos=False, bos_token_id=None)
    loaded = cast(LoadedModel, SimpleNamespace(tokenizer=tokenizer(), checkpoint=checkpoint))
    return AsyncEngine(core, loaded, MODEL)


@dataclass
class Served:
    """A running server and what is behind it."""

    url: str
    model: ScriptedModel
    engine: AsyncEngine
    app: Any

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def wait_until_idle(self) -> None:
        """Until nothing runs and every block is free."""
        wait_for(lambda: self.engine.stats().num_running + self.engine.stats().num_waiting == 0)
        wait_for(lambda: self.app.state.server.admission.num_requests == 0)
        assert self.engine.stats().kv_usage == 0
        self.engine._core.check_integrity()


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def serving(
    script: str | None = None, *, engine_options: dict[str, int] | None = None, **settings: Any
) -> Iterator[Served]:
    """A server in a thread; in the end nothing may be left in its engine or its event loop."""
    model = ScriptedModel(script)
    engine = make_engine(model, **(engine_options or {}))
    app = create_app(engine, replace(ServeSettings(MODEL), **settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    left: list[str] = []

    async def run() -> None:
        await server.serve()
        await engine.shutdown(drain_timeout=None)
        left.extend(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task())

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="served")
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", model, engine, app)
        yield served
        model.gate.set()
        served.wait_until_idle()
    finally:
        model.gate.set()
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    assert not left
