"""The prefix cache comes back from its file: fewer tokens are computed, and none differs."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeModel, FakeTokenizer, continuation
from nybble.cache import block_file
from nybble.cache.block_file import BlockFile
from nybble.core.outputs import RequestOutput
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore

pytestmark = pytest.mark.unit
PROMPT = [token % 97 for token in range(3, 203, 2)]  # 100 tokens, 6 full blocks
ROOM = 8192 + 64 * 128


def engine(path: Path, model: FakeModel | None = None, *, max_bytes: int = ROOM, num_blocks: int = 64) -> EngineCore:
    file = BlockFile.open(path, identity=bytes(32), block_bytes=128, max_bytes=max_bytes)
    return EngineCore(
        model or FakeModel(),
        FakeTokenizer(),
        context=256,
        vocab_size=97,
        num_blocks=num_blocks,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kept_in=file,
    )


def answers(core: EngineCore, *prompts: list[int], max_tokens: int = 8, **values: object) -> list[RequestOutput]:
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        core.add_request(core.make_request(str(number), prompt, params, **values))  # type: ignore[arg-type]
    last: dict[str, RequestOutput] = {}
    while core.has_unfinished_requests:
        for output in core.step():
            last[output.request_id] = output
        core.check_integrity()
    for number, prompt in enumerate(prompts):
        assert last[str(number)].outputs[0].token_ids == continuation(prompt, max_tokens)
    return [last[str(number)] for number in range(len(prompts))]


def computed(model: FakeModel) -> int:
    return sum(len(step.token_ids) for step in model.steps)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.prefix-cache"


def test_a_prefix_survives(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    core.close()
    model = FakeModel()
    again = engine(path, model)
    (output,) = answers(again, PROMPT)
    assert output.num_cached_tokens == 96
    assert computed(model) == 4 + 7
    stats = again.stats()
    assert stats.prefix_restored == 96 and stats.prefix_hits == 96
    answers(again, PROMPT)
    assert again.stats().prefix_restored == 96  # the second time it was in the cache
    again.close()


def test_it_goes_on_after_the_end(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    core.close()
    core.close()
    answers(core, PROMPT, [5, *PROMPT])


def test_salted_prefixes_stay_apart(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT, cache_salt="a")
    core.close()
    again = engine(path)
    assert answers(again, PROMPT)[0].num_cached_tokens == 0
    assert answers(again, PROMPT, cache_salt="b")[0].num_cached_tokens == 0
    assert answers(again, PROMPT, cache_salt="a")[0].num_cached_tokens == 96
    again.close()


def test_every_token_of_a_prompt_whose_log_probabilities_are_wanted_is_computed(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    core.close()
    model = FakeModel()
    again = engine(path, model)
    again.add_request(again.make_request("0", PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=1)))
    while again.has_unfinished_requests:
        again.step()
    assert computed(model) == len(PROMPT)
    again.close()


def test_it_is_written_while_the_engine_rests(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    deadline = time.monotonic() + 10
    size = path.stat().st_size
    while path.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_size > size
    core.close()


def test_it_is_written_when_the_engine_is_thrown_away(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    del core
    gc.collect()
    again = engine(path)
    assert answers(again, PROMPT)[0].num_cached_tokens == 96
    again.close()


def test_what_was_taken_out_of_the_cache_comes_back(path: Path) -> None:
    """Blocks that the cache had no room for are in the file, and the rest of the prefix still is in the cache."""
    core = engine(path, num_blocks=16)
    answers(core, PROMPT)
    core.close()
    again = engine(path, num_blocks=16)
    answers(again, PROMPT)
    answers(again, [60] * 200)
    answers(again, PROMPT)
    assert again.stats().prefix_restored > 96
    again.close()


def test_a_small_file_keeps_the_beginning(path: Path) -> None:
    core = engine(path, max_bytes=8192 + 4 * 128)
    answers(core, PROMPT)
    core.close()
    assert path.stat().st_size <= 8192 + 4 * 128
    again = engine(path, max_bytes=8192 + 4 * 128)
    assert answers(again, PROMPT)[0].num_cached_tokens == 64
    again.close()


def test_what_is_used_again_stays_in_a_small_file(path: Path) -> None:
    core = engine(path, max_bytes=8192 + 14 * 128)
    for other in range(5):
        answers(core, PROMPT)
        answers(core, [other] * 100)
    answers(core, PROMPT)
    core.close()
    again = engine(path, max_bytes=8192 + 14 * 128)
    assert answers(again, PROMPT)[0].num_cached_tokens == 96
    again.close()


def test_a_full_disk_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = engine(path)

    def full(descriptor: int, view: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_file.os, "pwrite", full)
    answers(core, PROMPT)
    answers(core, [5, *PROMPT])
    core.close()
    assert len(caplog.records) == 1
    assert "is written no more" in caplog.text and "No space left" in caplog.text


def test_a_second_engine_reads_what_the_first_wrote(path: Path) -> None:
    core = engine(path)
    answers(core, PROMPT)
    core.close()
    core = engine(path)
    second = engine(path)
    assert answers(second, PROMPT)[0].num_cached_tokens == 96
    assert answers(core, PROMPT)[0].num_cached_tokens == 96
    second.close()
    core.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_never_gives_a_wrong_token(
    tmp_path_factory: pytest.TempPathFactory, chosen: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.prefix-cache"
    core = engine(path)
    answers(core, PROMPT, [7, *PROMPT])
    core.close()
    raw = bytearray(path.read_bytes())
    places = st.integers(0, 80) | st.integers(4096, 4096 + 40 * 14) | st.integers(2 * 4096, len(raw) - 1)
    for _ in range(chosen.draw(st.integers(0, 20))):
        raw[chosen.draw(places)] ^= chosen.draw(st.integers(1, 255))
    if chosen.draw(st.booleans()):
        del raw[chosen.draw(st.integers(0, len(raw))) :]
    path.write_bytes(raw)
    again = engine(path, num_blocks=20)
    answers(again, PROMPT, [7, *PROMPT], [8, *PROMPT])
    again.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 20))
def test_any_traffic_over_restarts(
    tmp_path_factory: pytest.TempPathFactory, conversations: list[list[int]], slots: int
) -> None:
    """Prompts that share beginnings, in a cache that is too small for all of them, with a file of any size."""
    path = tmp_path_factory.mktemp("traffic") / "a.prefix-cache"
    for begin in range(0, len(conversations), 3):
        core = engine(path, max_bytes=8192 + slots * 128, num_blocks=18)
        prompts = [
            [piece * 16 + i for piece in pieces for i in range(16)] for pieces in conversations[begin : begin + 3]
        ]
        answers(core, *prompts, max_tokens=20)
        core.close()
    assert path.stat().st_size <= 8192 + slots * 128
