"""Adapters over HTTP, with real small models: models of their own that share an engine, its batches, and its memory."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from huggingface_hub import InferenceClient
from served import wait_for

from loras import make_lora
from nybble import AsyncEngine, EngineOptions, SamplingParams
from nybble.core.errors import ConfigError
from nybble.engine.load import load_model
from nybble.serve.app import create_app
from nybble.serve.lifecycle import bind
from nybble.serve.loading import Loader
from nybble.serve.models import Models
from nybble.serve.settings import ServeSettings
from nybble.store import Library

OPTIONS = EngineOptions(max_model_len=96, kv_cache_memory="8MiB", max_num_seqs=8, threads=2)
PROMPT = "The lower the"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@dataclass
class Adapted:
    """A small model and two adapters of it, with what each of them answers when nothing else runs."""

    base: Path
    loras: dict[str, Path]
    texts: dict[str, str]


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    there = tmp_path_factory.mktemp("loras")
    loras = {name: make_lora(folder, there / name, seed=seed) for seed, name in enumerate(("one", "two"))}
    texts = {}
    for name, lora in (("base", None), *loras.items()):
        loaded = load_model(folder, threads=2, context=96, adapter=lora)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        steps = loaded.generator().generate([loaded.tokenizer.encode(PROMPT, add_special=True)], params)
        texts[name] = "".join(event.text for events in steps for event in events)
    assert len(set(texts.values())) == 3
    return Adapted(folder, loras, texts)


@contextmanager
def running(models: Models) -> Iterator[str]:
    listening = bind("127.0.0.1", 0)
    app = create_app(models, models.settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))

    async def run() -> None:
        await server.serve(sockets=[listening])
        await models.shutdown(None)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def generate(url: str, model: str, **more: Any) -> str:
    """Ollama's way."""
    answer = httpx.post(url + "/api/generate", json={"model": model, "stream": False, **more}, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["response"])


def complete(url: str, model: str, **more: Any) -> httpx.Response:
    return httpx.post(url + "/v1/completions", json={**GREEDY, "model": model, **more}, timeout=60)


def text(url: str, model: str) -> str:
    answer = complete(url, model)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def all_at_once(url: str, models: list[str]) -> dict[str, set[str]]:
    """What each model answers when all of them are asked three times at the same time."""
    said: dict[str, set[str]] = {name: set() for name in models}
    threads = [
        threading.Thread(target=lambda name=name: said[name].add(text(url, name))) for name in models for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


# ---- one model, --lora ----


@pytest.fixture(scope="module")
def one(adapted: Adapted) -> Iterator[tuple[str, Models]]:
    engine = AsyncEngine.from_model(adapted.base, options=OPTIONS)
    ids = {name: asyncio.run(engine.load_adapter(lora)) for name, lora in adapted.loras.items()}
    models = Models.of_one(engine, ServeSettings("base"), adapters=ids)
    with running(models) as url:
        yield url, models


def test_each_adapter_is_a_model_of_its_own(one: tuple[str, Models], adapted: Adapted) -> None:
    url, _ = one
    listed = {model["id"]: model for model in httpx.get(url + "/v1/models").json()["data"]}
    assert set(listed) == {"base", "one", "two"}
    assert listed["one"]["parent"] == "base" and "parent" not in listed["base"]
    assert httpx.get(url + "/v1/models/one").json()["id"] == "one"
    tags = httpx.get(url + "/api/tags").json()["models"]
    assert {model["name"] for model in tags} == {"base", "one", "two"}
    answer = complete(url, "three")
    assert answer.status_code == 404
    assert "this server has 'base' and 'one' and 'two'" in answer.json()["error"]["message"]
    assert all_at_once(url, ["base", "one", "two"]) == {name: {told} for name, told in adapted.texts.items()}


def test_every_route_uses_the_adapter(one: tuple[str, Models], adapted: Adapted) -> None:
    url, _ = one
    client = InferenceClient(model=url, token="unused")
    for name in ("base", "one", "two"):
        adapter = {} if name == "base" else {"adapter_id": name}
        told = client.text_generation(PROMPT, max_new_tokens=12, **adapter)
        assert adapted.texts[name].startswith(told)  # TGI's API has no ignore_eos
        raw = generate(url, name, prompt=PROMPT, raw=True, options={"temperature": 0, "num_predict": 12})
        assert adapted.texts[name].startswith(raw)
    vectors = [
        httpx.post(url + "/v1/embeddings", json={"model": name, "input": PROMPT}, timeout=60).json()["data"][0][
            "embedding"
        ]
        for name in ("base", "one", "two")
    ]
    assert len({json.dumps(vector) for vector in vectors}) == 3
    embedded = httpx.post(url + "/api/embed", json={"model": "one", "input": PROMPT}, timeout=60).json()["embeddings"]
    assert embedded[0] == pytest.approx(vectors[1], abs=1e-6)


def test_two_models_of_one_name_are_refused(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    from nybble.cli.serve import _named_adapters

    path = adapted.loras["one"]
    assert _named_adapters([f"a={path}", f"b={path}"]) == {"a": path, "b": path}
    for given, message in (
        (["a"], "NAME=PATH"), (["=x"], "NAME=PATH"), (["a="], "NAME=PATH"), (["a=/no/such"], "no adapter at /no/such"),
        ([f"a={path}", f"A:latest={path}"], "gives the name 'A:latest' twice"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            _named_adapters(given)


# ---- models of the store ----


@pytest.fixture
def library(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    for name in ("NYBBLE_HOME", "OLLAMA_MODELS", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    library = Library()
    make(library, "base", f"FROM {adapted.base}", tmp_path)
    for name, lora in adapted.loras.items():
        make(library, name, f"FROM base\nADAPTER {lora}", tmp_path)
    return library


def make(library: Library, name: str, modelfile: str, folder: Path) -> None:
    library.create(name, modelfile, base_folder=folder, progress=lambda status: None)


class Counting(Loader):
    """Notes what is loaded."""

    loads: list[str] = []  # noqa: RUF012 (a frozen dataclass with slots has no other place)

    def load(self, stored: Any) -> AsyncEngine:
        self.loads.append(str(stored.name))
        return super().load(stored)


@contextmanager
def serving(library: Library, **options: Any) -> Iterator[tuple[str, Models, list[str]]]:
    loader = Counting(OPTIONS)
    loader.loads.clear()
    models = Models(ServeSettings(""), library=library, loader=loader, **options)
    with running(models) as url:
        yield url, models, loader.loads


def test_models_of_the_same_weights_share_an_engine(library: Library, adapted: Adapted) -> None:
    with serving(library) as (url, models, loads):
        assert all_at_once(url, ["base", "one", "two"]) == {name: {told} for name, told in adapted.texts.items()}
        assert len(loads) == 1
        residents = models.resident()
        assert {resident.name for resident in residents} == {"base:latest", "one:latest", "two:latest"}
        assert len({id(resident.server.engine) for resident in residents}) == 1
        assert len(residents[0].server.engine.adapters()) == 2
        assert len(httpx.get(url + "/api/ps").json()["models"]) == 3
        listed = {model["id"]: model for model in httpx.get(url + "/v1/models").json()["data"]}
        assert listed["one:latest"]["parent"] == "base:latest"


def test_an_adapter_leaves_with_the_last_model_that_has_it(library: Library, adapted: Adapted, tmp_path: Path) -> None:
    with serving(library) as (url, models, loads):
        assert text(url, "one") == adapted.texts["one"]
        make(library, "again", f"FROM base\nADAPTER {adapted.loras['one']}", tmp_path)
        assert text(url, "again") == adapted.texts["one"]
        engine = models.resident()[0].server.engine
        with_both = models.resident()[0].size
        assert len(engine.adapters()) == 1, "it is the same one"
        generate(url, "one", keep_alive=0)
        assert len(engine.adapters()) == 1
        assert text(url, "base") == adapted.texts["base"]
        generate(url, "again", keep_alive=0)
        wait_for(lambda: not engine.adapters())
        assert models.resident()[0].size < with_both
        assert text(url, "base") == adapted.texts["base"]
        generate(url, "base", keep_alive=0)
        wait_for(lambda: not models.resident())
        assert len(loads) == 1 and not engine.is_healthy()


def test_a_model_made_again_has_its_new_adapter(library: Library, adapted: Adapted, tmp_path: Path) -> None:
    with serving(library) as (url, models, loads):
        assert text(url, "one") == adapted.texts["one"]
        make(library, "one", f"FROM base\nADAPTER {adapted.loras['two']}\nSYSTEM be brief", tmp_path)
        assert text(url, "one") == adapted.texts["two"]
        [resident] = models.resident()
        assert len(resident.server.engine.adapters()) == 1
        assert resident.server.preset.system == "be brief"
        make(library, "one", "FROM base\nPARAMETER num_ctx 48", tmp_path)
        assert text(url, "one") == adapted.texts["base"]
        assert len(loads) == 2, "another context is another engine"
        assert [one.server.engine.context for one in models.resident()] == [96]  # what the server's option says


def test_an_adapter_that_cannot_be_used_is_one_sentence(library: Library, adapted: Adapted, tmp_path: Path) -> None:
    both = "\n".join(f"ADAPTER {lora}" for lora in adapted.loras.values())
    make(library, "both", f"FROM base\n{both}", tmp_path)
    damaged = shutil.copytree(adapted.loras["one"], tmp_path / "damaged")
    make(library, "damaged", f"FROM base\nADAPTER {damaged}", tmp_path)
    (damaged / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": true}')
    with serving(library) as (url, models, _):
        for name, message in (("both", "has 2 adapters"), ("damaged", "")):
            answer = complete(url, name)
            assert 400 <= answer.status_code < 500, answer.text
            assert message in answer.json()["error"]["message"]
        wait_for(lambda: not models.resident() and not models._leaving)
        assert text(url, "one") == adapted.texts["one"]


def test_adapters_count_as_memory(library: Library, adapted: Adapted) -> None:
    with serving(library) as (url, models, _):
        assert text(url, "base") == adapted.texts["base"]
        models.memory = models.resident()[0].size + 100
        answer = complete(url, "one")
        assert answer.status_code == 503 and "no room" in answer.json()["error"]["message"]
        assert text(url, "base") == adapted.texts["base"]
