"""A small real model over restarts: the same tokens and log-probabilities, to the bit, with and without the file."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest

from models import make_tiny
from nybble import LLM, SamplingParams
from nybble.core.errors import ConfigError
from nybble.engine.options import EngineOptions, parse_prefix_cache_file
from nybble.engine.prefix_file import default_place

pytestmark = pytest.mark.e2e
PROMPT = [token % 250 for token in range(7, 400, 3)][:100]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("gemma3", tmp_path_factory.mktemp("tiny"))  # with windows and norms of its own


def answer(folder: Path, file: Path | bool, **options: Any) -> tuple[Any, int, int]:
    """The answer to PROMPT by a fresh engine; how many tokens were cached, and how many came from the file."""
    defaults = {"max_model_len": 256, "kv_cache_memory": "16MiB", "max_num_seqs": 4, "threads": 1}
    llm = LLM(folder, prefix_cache_file=file, **(defaults | options))
    (output,) = llm.generate([PROMPT], PARAMS)
    restored = llm.engine_stats().prefix_restored
    llm._core.close()
    sample = output.outputs[0]
    told = [{token: row.logprob for token, row in position.items()} for position in sample.logprobs or ()]
    return (sample.token_ids, told), output.num_cached_tokens or 0, restored


@pytest.mark.parametrize("kv_cache_type", ["f16", "int8"])
def test_the_answer_is_the_same_to_the_bit(folder: Path, tmp_path: Path, kv_cache_type: str) -> None:
    file = tmp_path / "a.prefix-cache"
    without, _, _ = answer(folder, False, kv_cache_type=kv_cache_type)
    cold, cached, restored = answer(folder, file, kv_cache_type=kv_cache_type)
    assert (cached, restored) == (0, 0)
    warm, cached, restored = answer(folder, file, kv_cache_type=kv_cache_type)
    assert (cached, restored) == (96, 96)
    other_threads, cached, _ = answer(folder, file, kv_cache_type=kv_cache_type, threads=2, max_model_len=128)
    assert cached == 96
    assert without == cold == warm == other_threads


def test_random_damage_changes_no_answer(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.prefix-cache"
    expected, _, _ = answer(folder, file)
    whole = file.read_bytes()
    chance = random.Random(5)
    seen = set()
    for _ in range(12):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice([chance.randrange(64), chance.randrange(4096, 4400), chance.randrange(8192, len(raw))])
            raw[at] ^= 1 << chance.randrange(8)
        file.write_bytes(raw)
        given, cached, _ = answer(folder, file)
        assert given == expected
        seen.add(cached)
    assert len(seen) > 2  # some of it was of use


@pytest.mark.parametrize("change", ["kv", "isa", "act", "kernels", "model", "size"])
def test_what_computes_other_bits_begins_anew(
    folder: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.prefix-cache"
    answer(folder, file)
    options: dict[str, Any] = {}
    if change == "kv":
        options["kv_cache_type"] = "int8"
    elif change == "isa":
        monkeypatch.setenv("NYBBLE_ISA", "generic")
    elif change == "act":
        monkeypatch.setenv("NYBBLE_ACT", "f32")
    elif change == "kernels":
        monkeypatch.setattr("nybble.backends.cpu.model.machine_identity", lambda: b"built anew")
    elif change == "model":
        folder = make_tiny("gemma3", tmp_path / "other", seed=1)
    else:
        options["prefix_cache_size"] = "2MiB"
    with caplog.at_level(logging.INFO):
        _, cached, restored = answer(folder, file, **options)
    assert (cached, restored) == (0, 0)
    assert "begins anew" in caplog.text
    assert answer(folder, file, **options)[1] == 96


def test_a_swapped_model_of_the_same_name_size_and_time_is_noticed(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    file = tmp_path / "a.prefix-cache"
    answer(model, file)
    weights = model / "model.safetensors"
    before = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-9] ^= 0x40  # an exponent of the last weight
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second, cached, _ = answer(model, file)
    assert cached == 0
    assert second == answer(model, False)[0]


def test_two_engines_on_one_file(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.prefix-cache"
    expected, _, _ = answer(folder, file)
    holder = LLM(folder, prefix_cache_file=file, max_model_len=128, kv_cache_memory="16MiB", threads=1)
    given, cached, _ = answer(folder, file)
    assert given == expected and cached == 96
    assert "written by another process" in caplog.text
    caplog.clear()
    given, cached, _ = answer(folder, file, kv_cache_type="int8")
    assert cached == 0
    assert "will not survive this process" in caplog.text
    holder._core.close()


def test_it_lies_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    model = make_tiny("llama", tmp_path / "model")
    assert answer(model, True)[1] == 0
    assert (tmp_path / "model.prefix-cache").is_file()
    assert answer(model, True)[1] == 96
    assert not (tmp_path / "home").exists()


def test_or_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("NYBBLE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = make_tiny("llama", tmp_path / "hub" / "models--a--b" / "snapshots" / "main")
    assert answer(model, True)[1] == 0
    (file,) = (home / "prefix-cache").iterdir()
    assert answer(model, True)[1] == 96
    assert default_place(model) == file != default_place(model.with_name("other"))
    monkeypatch.setattr("nybble.engine.prefix_file.os.access", lambda *_: False)  # tests may run as root
    assert default_place(tmp_path / "read-only" / "a.gguf").parent == home / "prefix-cache"


def test_a_place_that_cannot_be_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, _, _ = answer(folder, False)
    assert answer(folder, tmp_path / "no" / "such" / "folder")[0] == expected
    assert len(caplog.records) == 1 and "will not survive this process" in caplog.text


def test_options_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave enable_prefix_caching on"):
        EngineOptions(prefix_cache_file=True, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        EngineOptions(prefix_cache_size="much")
    with pytest.raises(ConfigError, match="does not hold one block"):
        answer(folder, tmp_path / "a.prefix-cache", prefix_cache_size=5000)
    assert parse_prefix_cache_file("on") is True and parse_prefix_cache_file("off") is False
    assert parse_prefix_cache_file("a/b") == Path("a/b")
    with pytest.raises(ConfigError, match="on, off or a path"):
        parse_prefix_cache_file("")
