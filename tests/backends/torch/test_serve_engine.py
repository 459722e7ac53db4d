"""The whole engine over the torch backend: what it does on the native one, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from backends.torch.serving import Folders
from loras import make_lora
from nybble import LLM, BeamSearchParams, LoRARequest, SamplingParams, StructuredOutputsParams
from nybble.core.errors import ConfigError

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*model shards")]

PROMPTS = [[(5 * i + 7 * p) % 250 for i in range(3 + 9 * p)] for p in range(5)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=2)


@pytest.fixture(autouse=True)
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ACT", "f32")


def llm(folder: Path, device: str, **options: object) -> LLM:
    sizes = {"max_model_len": 128, "kv_cache_memory": "16MiB", "max_num_seqs": 8, "threads": 2}
    return LLM(folder, device=device, **(sizes | options))  # type: ignore[arg-type]


def tokens(one: LLM, params: SamplingParams = GREEDY, **options: object) -> list[list[int]]:
    outputs = one.generate(PROMPTS, params, use_tqdm=False, **options)  # type: ignore[arg-type]
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_and_seeded_tokens(family: str, folders: Folders) -> None:
    folder = folders(family)
    torchs, natives = llm(folder, "torch-cpu"), llm(folder, "cpu")
    assert tokens(torchs) == tokens(natives)
    seeded = SamplingParams(temperature=0.8, top_p=0.9, seed=3, n=2, max_tokens=6, repetition_penalty=1.1)
    assert tokens(torchs, seeded) == tokens(natives, seeded)
    torchs._core.check_integrity()


def test_greedy_tokens_in_bfloat16_repeat(folders: Folders) -> None:
    """In bfloat16 near-ties turn out as they will, but the same way every time, and they begin as in float32."""
    folder = folders("llama")
    found = [tokens(llm(folder, "torch-cpu", dtype="bfloat16", enable_prefix_caching=False)) for _ in range(2)]
    assert found[0] == found[1]
    wanted = tokens(llm(folder, "cpu"))
    assert sum(a[0] == b[0] for a, b in zip(found[0], wanted, strict=True)) >= len(PROMPTS) - 1


def test_the_engine_on_top(folders: Folders) -> None:
    """Chunks, preemption, a prefix cache, guesses, and a draft model change nothing."""
    folder = folders("llama")
    longer = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)  # needs blocks that others have
    wanted = tokens(llm(folder, "cpu"), longer)
    for options in (
        {"max_num_batched_tokens": 24},
        {"kv_cache_memory": 9 * 8192},  # nine blocks: preempts
        {"speculate": "ngram"},
        {"speculate": f"draft={folder},k=3"},
        {},
    ):
        one = llm(folder, "torch-cpu", **options)
        assert tokens(one, longer) == wanted, options
        if "kv_cache_memory" in options:
            assert one.engine_stats().num_preemptions > 0
        if "speculate" in options:
            assert one.engine_stats().speculation.drafted > 0
        one._core.check_integrity()
    assert tokens(one, longer) == wanted  # with what the first time left in the cache
    assert one.engine_stats().prefix_hits > 0


def test_scores_vectors_grammars_and_beams(folders: Folders) -> None:
    folder = folders("qwen3")
    torchs, natives = llm(folder, "torch-cpu"), llm(folder, "cpu")
    scored = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2, logprobs=3)
    for a, b in zip(*(one.generate(PROMPTS, scored) for one in (torchs, natives)), strict=True):
        for x, y in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            assert list(x) == list(y)
            assert [v.rank for v in x.values()] == [v.rank for v in y.values()]
            np.testing.assert_allclose([v.logprob for v in x.values()], [v.logprob for v in y.values()], atol=1e-4)
    for pooling in ("mean", "last"):
        a, b = (one.embed(PROMPTS, pooling=pooling) for one in (torchs, natives))
        np.testing.assert_allclose(
            [o.outputs.embedding for o in a], [o.outputs.embedding for o in b], rtol=0, atol=1e-5
        )
    digits = SamplingParams(
        temperature=1.0, seed=1, max_tokens=12, structured_outputs=StructuredOutputsParams(regex=r"\d{3}-\d{2}")
    )
    texts = [[o.outputs[0].text for o in one.generate(PROMPTS[:2], digits)] for one in (torchs, natives)]
    assert texts[0] == texts[1]
    assert all(len(text) == 6 and text[3] == "-" for text in texts[0])
    beams = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    a, b = (one.beam_search([{"prompt_token_ids": PROMPTS[1]}], beams)[0].sequences for one in (torchs, natives))
    assert [s.tokens for s in a] == [s.tokens for s in b]


def test_adapters(folders: Folders, tmp_path: Path) -> None:
    folder = folders("llama")
    loras = [LoRARequest(f"lora{i}", i + 1, make_lora(folder, tmp_path / f"lora{i}", seed=i)) for i in range(2)]
    each = [loras[0], None, loras[1], loras[0], loras[1]]
    found, wanted = (tokens(llm(folder, device), lora_request=each) for device in ("torch-cpu", "cpu"))
    assert found == wanted
    assert found != tokens(llm(folder, "cpu"))


def test_a_prefix_cache_in_a_file(folders: Folders, tmp_path: Path) -> None:
    folder = folders("llama")
    file = tmp_path / "prefixes"
    first = llm(folder, "torch-cpu", prefix_cache_file=file)
    wanted = tokens(first)
    first._core.close()
    again = llm(folder, "torch-cpu", prefix_cache_file=file)
    assert tokens(again) == wanted
    assert again.engine_stats().prefix_restored > 0


def test_refusals(folders: Folders) -> None:
    folder = folders("llama")
    for options, message in (
        ({"tensor_parallel_size": 2, "prefix_cache_file": True}, "need tensor_parallel_size 1"),
        ({"device_map": "auto"}, "with device 'torch-cpu' leave it out"),
        ({"kv_cache_memory": "1kB"}, "lower max_model_len"),
    ):
        with pytest.raises(ConfigError, match=message):
            llm(folder, "torch-cpu", **options)
