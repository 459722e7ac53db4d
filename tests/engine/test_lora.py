"""Adapters in the engine: what merged weights would say, whatever else runs, and nothing of it left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import fakes
from loras import make_lora, merge, to_gguf_lora
from models import make_tiny, to_gguf
from nybble import LLM, AsyncEngine, EngineOptions, LoRARequest, SamplingParams
from nybble.adapter import open_adapter
from nybble.backends.cpu import CpuModel, Step
from nybble.checkpoint import open_checkpoint
from nybble.core.errors import CheckpointError, ConfigError, ModelNotFoundError
from nybble.engine.core import EngineCore

pytestmark = pytest.mark.unit
Floats = npt.NDArray[np.float32]
TOKENS = [(7 * i * i + 3 * i) % 250 for i in range(70)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def logits(path: Path, lora: Path | None = None) -> Floats:
    """Of every token of TOKENS, in one step."""
    checkpoint = open_checkpoint(path)
    model = CpuModel.load(checkpoint, threads=2, context=128)
    model.new_cache(8)
    adapters = () if lora is None else (model.load_adapter(open_adapter(lora, checkpoint.spec)),)
    step = Step(
        token_ids=np.array(TOKENS, np.int32),
        cu_seqlens_q=np.array([0, len(TOKENS)], np.int32),
        context_lens=np.zeros(1, np.int32),
        block_tables=np.arange(8, dtype=np.int32)[None],
        logit_rows=np.arange(len(TOKENS), dtype=np.int32),
        adapters=adapters,
        adapter_of=np.zeros(1, np.int32) if adapters else None,
    )
    return model.execute(step)


def divergence(reference: Floats, other: Floats) -> float:
    """The largest KL divergence of any token's distribution."""

    def log_softmax(x: Floats) -> npt.NDArray[np.float64]:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_an_adapter_is_what_merged_weights_are(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny(family, tmp_path / "base")
    lora = make_lora(base, tmp_path / "lora", ranks={"down_proj": 17, "o_proj": 1}, use_rslora=family == "qwen2")
    both = merge(base, lora, tmp_path / "merged")
    usual = logits(both), logits(base, lora)  # 16-bit keys, values and factors
    assert divergence(logits(base), usual[1]) > 0.05  # it does something
    monkeypatch.setenv("NYBBLE_ACT", "f32")
    want, exact = logits(both), logits(base, lora)
    np.testing.assert_allclose(exact, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert divergence(want, exact) < 1e-8
    # What 16-bit factors cost is of the order of what 16-bit keys and values do.
    assert divergence(want, usual[1]) < 20 * divergence(want, usual[0]) + 1e-7


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_both_containers_of_an_adapter_fit_both_of_a_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_ACT", "f32")
    base = make_tiny(family, tmp_path / "base")
    lora = make_lora(base, tmp_path / "lora")
    want = logits(merge(base, lora, tmp_path / "merged"))
    as_gguf = to_gguf_lora(base, lora, tmp_path / "lora.gguf")
    model = to_gguf(base, tmp_path / "model.gguf")
    limit = 2e-5 * np.abs(want).max()
    for path in (base, model):
        for adapter in (lora, as_gguf, lora / "adapter_model.safetensors"):
            np.testing.assert_allclose(logits(path, adapter), want, rtol=0, atol=limit, err_msg=f"{path} {adapter}")


def test_patterns_give_modules_their_own_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ACT", "f32")
    base = make_tiny("llama", tmp_path / "base")
    pattern = {"model.layers.1.self_attn.q_proj": 5.0, "up_proj": 0.5}
    lora = make_lora(base, tmp_path / "lora", alpha_pattern=pattern, ranks={"v_proj": 2})
    want = logits(merge(base, lora, tmp_path / "merged"))
    np.testing.assert_allclose(logits(base, lora), want, rtol=0, atol=2e-5 * np.abs(want).max())


# ---- requests ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[LoRARequest]]:
    folder = tmp_path_factory.mktemp("loras")
    base = make_tiny("llama", folder / "base", hidden_size=128, intermediate_size=160)
    paths = [make_lora(base, folder / f"lora-{i}", seed=i, rank=3 + 5 * i, size=1.0) for i in range(3)]
    quantised = to_gguf(base, folder / "model.gguf", "Q8_0")
    return quantised, [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(paths)]


def prompts(count: int) -> list[list[int]]:
    return [[(13 * i + 7 * j * (i + 1)) % 250 for j in range(3 + 9 * i)] for i in range(count)]


def test_a_request_is_the_same_in_any_company(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    which = [[None, *loras][(i * 3) % 4] for i in range(17)]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, ignore_eos=True, logprobs=3)

    def told(llm: LLM, chosen: list[int]) -> list[tuple[list[int], object]]:
        texts = [prompts(17)[i] for i in chosen]
        outputs = llm.generate(texts, params, lora_request=[which[i] for i in chosen])
        return [(list(output.outputs[0].token_ids), output.outputs[0].logprobs) for output in outputs]

    alone = LLM(path, threads=1, speculate="off", enable_prefix_caching=False)
    want = [told(alone, [i])[0] for i in range(17)]
    assert len({tuple(tokens) for tokens, _ in want}) > 10
    for options in ({"threads": 2}, {"max_num_batched_tokens": 24, "max_num_seqs": 17}, {"speculate": "ngram"}):
        llm = LLM(path, **{"threads": 1, "speculate": "off", **options})  # type: ignore[arg-type]
        assert told(llm, list(range(17))) == want, options
        assert told(llm, list(range(17))[::-1]) == want[::-1], options  # from the prefix cache now


def test_the_prefix_cache_keeps_adapters_apart(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    llm = LLM(path, threads=1)
    prompt = prompts(9)[8]
    bare, first, second = (llm.generate(prompt, GREEDY, lora_request=one)[0] for one in (None, loras[0], loras[1]))
    assert [output.num_cached_tokens for output in (bare, first, second)] == [0, 0, 0]
    again = llm.generate([prompt] * 3, GREEDY, lora_request=[None, loras[0], loras[1]])
    assert [output.num_cached_tokens for output in again] == [64, 64, 64]
    for one, other in zip((bare, first, second), again, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    assert bare.outputs[0].token_ids != first.outputs[0].token_ids != second.outputs[0].token_ids


def test_vllm_s_options_mean_something(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    llm = LLM(path, threads=1, max_loras=2, max_lora_rank=12)
    texts = prompts(3)
    llm.generate(texts[:2], GREEDY, lora_request=loras[0])
    with pytest.raises(ConfigError, match="rank 13, and max_lora_rank is 12"):
        llm.generate(texts[:1], GREEDY, lora_request=loras[2])
    with pytest.raises(ConfigError, match="3 adapters are asked for at once"):
        llm.generate(texts, GREEDY, lora_request=loras)
    with pytest.raises(ConfigError, match="2 prompts came with 1 adapters"):
        llm.generate(texts[:2], GREEDY, lora_request=[loras[0]])
    with pytest.raises(ConfigError, match="give each its own"):
        llm.generate(texts[:1], GREEDY, lora_request=LoRARequest("lora-0", 9, loras[1].lora_path))
    with pytest.raises(ConfigError, match="enable_lora=False"):
        LLM(path, threads=1, enable_lora=False).generate(texts[:1], GREEDY, lora_request=loras[0])
    for values in (("", 1, "x"), ("x", 0, "x"), ("x", 1, "")):
        with pytest.raises(ConfigError):
            LoRARequest(*values)
    for options in ({"max_loras": 0}, {"max_lora_rank": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            LLM(path, threads=1, **options)  # type: ignore[arg-type]


def test_the_least_recently_used_adapter_leaves(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    llm = LLM(path, threads=1, max_loras=2)
    core = llm._core
    for one in (0, 1, 0, 2):
        llm.generate([5, 6, 7], GREEDY, lora_request=loras[one])
    assert [one.path for one in core.adapters.all()] == [Path(loras[0].lora_path), Path(loras[2].lora_path)]


def test_every_way_to_ask_takes_an_adapter(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    llm = LLM(path, threads=1)
    bare, with_lora = (llm.embed([5, 6, 7], lora_request=one)[0].outputs.embedding for one in (None, loras[1]))
    assert bare != with_lora
    said = [{"role": "user", "content": "hi"}]
    texts = [llm.chat(said, GREEDY, lora_request=one)[0].outputs[0].token_ids for one in (None, loras[1])]
    assert texts[0] != texts[1]


def test_adapters_come_and_go_while_answers_run(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    options = EngineOptions(threads=2, adapters=(loras[0].lora_path,), max_model_len=256)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    async def tokens(engine: AsyncEngine, name: str, adapter: str | None) -> list[int]:
        found: list[int] = []
        async for output in engine.generate([1, 2, 3], long, name, adapter=adapter):
            found = list(output.outputs[0].token_ids)
        return found

    async def session() -> None:
        engine = AsyncEngine.from_model(path, options=options)
        try:
            [first] = engine.adapters()
            alone = await tokens(engine, "alone", first.id)
            running = asyncio.create_task(tokens(engine, "running", first.id))
            second = await engine.load_adapter(loras[1].lora_path)
            assert await engine.load_adapter(Path(loras[1].lora_path) / "adapter_model.safetensors") == second
            assert [one.id for one in engine.adapters()] == [first.id, second]
            assert await tokens(engine, "second", second) != alone
            busy = asyncio.create_task(tokens(engine, "busy", first.id))
            await asyncio.sleep(0)
            assert await running == alone
            engine.unload_adapter(second)
            for gone in (second, "nonsense"):
                with pytest.raises(ConfigError, match="no adapter"):
                    engine.unload_adapter(gone)
                with pytest.raises(ConfigError, match="no adapter"):
                    await tokens(engine, "gone", gone)
            assert await busy == alone
            with pytest.raises(ModelNotFoundError):
                await engine.load_adapter("nowhere")
        finally:
            await engine.shutdown(drain_timeout=None)

    asyncio.run(session())


def test_a_request_keeps_an_adapter_that_was_unloaded(tiny: tuple[Path, list[LoRARequest]]) -> None:
    path, loras = tiny
    llm = LLM(path, threads=1)
    core = llm._core
    adapter = core.load_adapter(loras[0].lora_path)
    want = llm.generate([1, 2, 3], GREEDY, lora_request=loras[0])[0].outputs[0].token_ids
    request = core.make_request("kept", [1, 2, 3], GREEDY, adapter=adapter)
    core.unload_adapter(adapter)
    core.add_request(request)
    while core.has_unfinished_requests:
        core.step()
    assert request.sequences[0].token_ids[3:] == list(want)
    with pytest.raises(ConfigError, match="no adapter"):
        core.make_request("late", [1], GREEDY, adapter=adapter)


def test_an_engine_without_adapters_says_so() -> None:
    core = EngineCore(fakes.FakeModel(), None, context=64, vocab_size=fakes.VOCAB, num_blocks=8)
    with pytest.raises(ConfigError, match="without adapters"):
        core.load_adapter("x")


def test_an_adapter_of_another_model_is_refused(tiny: tuple[Path, list[LoRARequest]], tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other")
    lora = make_lora(other, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"for a matrix of \[64, 96\], the model's is \[128, 160\]"):
        LLM(tiny[0], threads=1).generate([1], GREEDY, lora_request=LoRARequest("x", 1, lora))
