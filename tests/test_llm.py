"""LLM on a small real model: the names of vLLM, and the same answers whatever is asked beside them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from models import make_tiny
from nybble import LLM, BeamSearchParams, GGUFConfig, SamplingParams, StructuredOutputsParams
from nybble.core.errors import ConfigError, ModelNotFoundError, PromptError

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_model_len=128, kv_cache_memory="16MiB", max_num_seqs=8, threads=2)


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def test_as_in_the_readme(llm: LLM) -> None:
    prompts = ["hello world", "the quick brown fox"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt
        assert output.finished
        assert isinstance(output.outputs[0].text, str)
        assert 1 <= len(output.outputs[0].token_ids) <= 8
        assert output.outputs[0].finish_reason in ("stop", "length")


def test_together_is_as_alone(llm: LLM) -> None:
    prompts = [[i + 1] * (3 * i + 1) for i in range(12)]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=5 + i, ignore_eos=True, repetition_penalty=1.2)
        for i in range(12)
    ]
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    alone = [llm.generate([p], r)[0].outputs[0].token_ids for p, r in zip(prompts, params, strict=True)]
    assert together == alone


def test_samples_are_those_of_their_seeds(llm: LLM) -> None:
    prompt = list(range(1, 21))
    three = llm.generate(prompt, SamplingParams(n=3, seed=40, max_tokens=10, ignore_eos=True))[0]
    for index, sample in enumerate(three.outputs):
        one = llm.generate(prompt, SamplingParams(seed=40 + index, max_tokens=10, ignore_eos=True))[0]
        assert sample.index == index
        assert sample.token_ids == one.outputs[0].token_ids


def test_log_probabilities_agree(llm: LLM) -> None:
    prompt = [5, 6, 7, 8, 9]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
    answer = llm.generate(prompt, params)[0].outputs[0]
    assert answer.logprobs is not None
    drawn = [position[token_id] for position, token_id in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert all(entry.rank == 1 for entry in drawn)
    assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in drawn))
    again = llm.generate([*prompt, *answer.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    assert again.prompt_logprobs is not None and again.prompt_logprobs[0] is None
    for entry, position, token_id in zip(drawn, again.prompt_logprobs[len(prompt) :], answer.token_ids, strict=True):
        assert position is not None
        assert position[token_id].logprob == entry.logprob  # to the bit


def test_a_choice_is_kept_to(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, seed=1, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    outputs = llm.generate(["a", "b", "c"], params)
    assert {output.outputs[0].text for output in outputs} <= {"yes", "no"}
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


def test_beam_search_finds_likelier_text_than_greedy(llm: LLM) -> None:
    prompt = [3, 4, 5]
    greedy = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=0))[0]
    (found,) = llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True))
    assert len(found.sequences) == 4
    assert found.sequences[0].cum_logprob >= (greedy.outputs[0].cumulative_logprob or -math.inf) - 1e-5
    scores = [sequence.cum_logprob for sequence in found.sequences]
    assert scores == sorted(scores, reverse=True)


def test_vectors_have_length_one_and_depend_on_the_text(llm: LLM) -> None:
    one, two, same = llm.embed(["hello", "world", "hello"])
    assert np.linalg.norm(one.outputs.embedding) == pytest.approx(1)
    assert one.outputs.embedding == same.outputs.embedding
    assert one.outputs.embedding != two.outputs.embedding
    assert llm.embed("hello", pooling="last")[0].outputs.embedding != one.outputs.embedding


def test_a_chat(llm: LLM) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    conversation = [{"role": "user", "content": "hello"}]
    (answer,) = llm.chat(conversation, GREEDY, chat_template=template)
    (plain,) = llm.generate(llm.get_tokenizer().encode("[user]hello", add_special=False), GREEDY)
    assert answer.outputs[0].token_ids == plain.outputs[0].token_ids
    assert len(llm.chat([conversation, conversation], GREEDY, chat_template=template)) == 2


def test_dictionaries_as_prompts(llm: LLM) -> None:
    by_text, by_ids = llm.generate(
        [{"prompt": "hello"}, {"prompt_token_ids": llm.get_tokenizer().encode("hello", add_special=True)}], GREEDY
    )
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1"),
        ({"dtype": "float16"}, "dtype must be 'auto'"),
        ({"swap_space": 4}, "no option 'swap_space'"),
        ({"kv_cache_memory": "lots"}, "'lots' is not an amount of memory"),
        ({"kv_cache_memory": "1kB"}, "lower max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 3}, "must not be below max_num_seqs"),
    ],
)
def test_refuses_options(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(folder, **({"max_model_len": 64} | options))


def test_refuses_prompts(llm: LLM) -> None:
    for prompt, message in [
        ([[]], "empty"),
        ({"text": "a"}, "either prompt or prompt_token_ids"),
        ([3.5], "not 3.5"),
        ([1] * 500, "the context holds 128"),
    ]:
        with pytest.raises(PromptError, match=message):
            llm.generate(prompt, GREEDY)
    with pytest.raises(ConfigError, match="2 prompts came with 1 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        LLM("no-such-model")


@pytest.mark.parametrize("quantization", ["q8_0", "int8", "nf4", GGUFConfig("F16")])
def test_quantised_while_it_is_loaded(folder: Path, llm: LLM, quantization, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    small = LLM(folder, quantization=quantization, max_model_len=64, kv_cache_memory="16MiB", threads=2)
    assert list((tmp_path / "home").iterdir()) == []  # nothing is left behind
    prompt = [{"prompt_token_ids": list(range(1, 20))}]
    whole = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [a], [b] = (one.generate(prompt, whole, use_tqdm=False) for one in (llm, small))
    scores = [
        [entry[token].logprob for entry, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
        for o in (a, b)
    ]
    assert np.abs(np.subtract(*scores)).mean() < 0.5
    assert scores[0] != scores[1] or quantization == GGUFConfig("F16")


def test_a_quantisation_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not quantised as gptq"):
        LLM(folder, quantization="gptq")
    with pytest.raises(ConfigError, match="q4_z is not a type"):
        LLM(folder, quantization="q4_z")
