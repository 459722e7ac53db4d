"""The engine on a GPU: the native backend's tokens, with graphs and without, a cache that fits, and two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import make_tiny, to_gguf
from nybble import LLM, SamplingParams
from nybble.core.errors import ConfigError

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*model shards")]

PROMPTS = [[(5 * i + 7 * p) % 250 for i in range(3 + 9 * p)] for p in range(6)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
SIZES = {"max_model_len": 128, "kv_cache_memory": "64MiB", "max_num_seqs": 8}


@pytest.fixture(autouse=True)
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ACT", "f32")


def same_up_to_ties(found: LLM, wanted: LLM, near: float) -> None:
    """Equal tokens, up to the first place where the reference has two that are almost as likely."""
    answers = zip(found.generate(PROMPTS, GREEDY), wanted.generate(PROMPTS, GREEDY), strict=True)
    for ours, theirs in ((a.outputs[0], b.outputs[0]) for a, b in answers):
        for index, (x, y) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            if x != y:
                first, second = sorted((v.logprob for v in theirs.logprobs[index].values()), reverse=True)[:2]
                assert first - second < near
                break


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-3), ("bfloat16", 0.3)])
def test_greedy_tokens(family: str, dtype: str, near: float, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / "model")
    same_up_to_ties(LLM(folder, device="cuda", dtype=dtype, **SIZES), LLM(folder, device="cpu", **SIZES), near)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0"])
def test_codes_of_a_file(quant: str, tmp_path: Path) -> None:
    path = to_gguf(make_tiny("llama", tmp_path / "model"), tmp_path / "model.gguf", quant)
    same_up_to_ties(LLM(path, device="cuda", dtype="float32", **SIZES), LLM(path, device="cpu", **SIZES), 2e-2)


def test_graphs_change_nothing(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    recorded, eager = (LLM(folder, device="cuda", dtype="float32", enforce_eager=e, **SIZES) for e in (False, True))
    same_up_to_ties(recorded, eager, 1e-3)
    assert recorded._loaded.model._rank._graphs.captured  # type: ignore[attr-defined]
    same_up_to_ties(recorded, eager, 1e-3)  # replayed


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_caches(kind: str, tmp_path: Path) -> None:
    folder = make_tiny("qwen3", tmp_path / "model")
    one = LLM(folder, device="cuda", dtype="float32", kv_cache_type=kind, **SIZES)  # type: ignore[arg-type]
    same_up_to_ties(one, LLM(folder, device="cpu", **SIZES), 0.5)


def test_the_cache_is_sized_by_what_is_left(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    llm = LLM(folder, device="cuda", max_model_len=128, max_num_seqs=8, gpu_memory_utilization=0.5)
    assert llm.engine_stats().num_blocks == 8 * 8  # as many as can be used
    assert llm.generate(PROMPTS, GREEDY)[0].finished
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        LLM(folder, device="cuda", max_model_len=128, gpu_memory_utilization=1e-6)


def test_vectors_and_scores(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    found, wanted = (LLM(folder, device=d, **SIZES) for d in ("cuda", "cpu"))
    a, b = (np.array([o.outputs.embedding for o in llm.embed(PROMPTS)]) for llm in (found, wanted))
    assert (a * b).sum(1).min() > 0.99
    scored = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0)
    for x, y in zip(found.generate(PROMPTS, scored), wanted.generate(PROMPTS, scored), strict=True):
        for p, q in zip(x.prompt_logprobs[1:], y.prompt_logprobs[1:], strict=True):
            assert next(iter(p.values())).logprob == pytest.approx(next(iter(q.values())).logprob, abs=0.5)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    two = LLM(folder, device="cuda", dtype="float32", tensor_parallel_size=2, **SIZES)
    same_up_to_ties(two, LLM(folder, device="cpu", **SIZES), 1e-3)


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"this machine has \d+ GPUs: set it to at most that"):
        LLM(folder, device="cuda", tensor_parallel_size=32, **SIZES)
