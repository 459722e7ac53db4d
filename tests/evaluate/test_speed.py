"""The definitions of the figures, on numbers that can be done by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import FakeModel
from nybble.core.errors import ConfigError
from nybble.engine.core import EngineCore
from nybble.engine.generate import Generator
from nybble.engine.roofline import ModelCost, Roofline, decode_fraction, model_cost, prefill_fraction
from nybble.evaluate.speed import SpeedTest, measure, plan, report

pytestmark = pytest.mark.unit

ROOFLINE = Roofline(read_gb_s=10.0, int8_gops=1.0)
COST = ModelCost(weight_bytes=4_000, linear_weights=5_000, head_weights=1_000, kv_layers=((8, None), (8, 100)))


def tensor(*shape: int, num_bytes: int, packed: object = None) -> Any:
    return SimpleNamespace(shape=shape, data=memoryview(bytes(num_bytes)), packed=packed)


def checkpoint(**tensors: Any) -> Any:
    layer = SimpleNamespace(num_kv_heads=2, head_dim=4, window=None)
    spec = SimpleNamespace(layers=[layer], vocab_size=97)
    packed_bytes = 50 if any(one.packed for one in tensors.values()) else 0
    return SimpleNamespace(tensors=tensors, spec=spec, file_bytes=1234, packed_bytes=packed_bytes)


def test_an_embedding_counts_only_as_a_head() -> None:
    parts = {"embed": tensor(10, 8, num_bytes=80), "norm": tensor(8, num_bytes=32), "q": tensor(8, 8, num_bytes=64)}
    tied = model_cost(checkpoint(**parts))
    assert tied == ModelCost(80 + 32 + 64, 64, 80, ((32, None),))
    untied = model_cost(checkpoint(**parts, head=tensor(10, 8, num_bytes=40)))
    assert untied == ModelCost(40 + 32 + 64, 64, 80, ((32, None),))


def test_packed_matrices_count_with_their_scales() -> None:
    parts = {"embed": tensor(10, 8, num_bytes=80), "q": tensor(8, 8, num_bytes=32, packed=object())}
    assert model_cost(checkpoint(**parts)) == ModelCost(80 + 50, 64, 80, ((32, None),))


def test_a_window_bounds_what_is_read() -> None:
    assert COST.kv_bytes(50) == 8 * 50 + 8 * 50
    assert COST.kv_bytes(300) == 8 * 300 + 8 * 100


def test_one_stream_is_bound_by_bytes_and_many_by_arithmetic() -> None:
    one = decode_fraction(COST, Roofline(1.0, 1.0), batch=1, context=50, step_seconds=1e-4)
    assert one == pytest.approx(max(4_800 / 1e-4 / 1e9, 12_000 / 1e-4 / 1e9))
    slow_memory = decode_fraction(COST, Roofline(0.1, 1.0), batch=1, context=50, step_seconds=1e-4)
    assert slow_memory == pytest.approx(4_800 / 1e-4 / 1e8)
    many = decode_fraction(COST, Roofline(1.0, 1.0), batch=8, context=50, step_seconds=1e-3)
    assert many == pytest.approx(8 * 12_000 / 1e-3 / 1e9)


def test_prefill_counts_one_row_of_logits_per_prompt() -> None:
    fraction = prefill_fraction(COST, ROOFLINE, tokens=1024, prompts=2, seconds=0.1)
    assert fraction == pytest.approx(2 * (5_000 * 1024 + 1_000 * 2) / 0.1 / 1e9)


def test_the_plan_names_its_cells() -> None:
    assert [test.name for test in plan(512, 64, [1, 8])] == ["pp512@b1", "pp512@b8", "tg64@b1", "tg64@b8"]
    assert [test.name for test in plan(0, 64, [1])] == ["tg64@b1"]


@pytest.mark.parametrize(("arguments"), [(0, 0, [1]), (-1, 5, [1]), (5, 5, [0]), (5, 5, [])])
def test_a_plan_of_nothing_is_refused(arguments: tuple[int, int, list[int]]) -> None:
    with pytest.raises(ConfigError):
        plan(*arguments)


class Loaded:
    """Stands in for LoadedModel."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.model: Any = FakeModel()
        self.model.threads, self.model.isa = 2, "generic"
        self.checkpoint = checkpoint(embed=tensor(10, 8, num_bytes=80), q=tensor(8, 8, num_bytes=64))

    def generator(self, *, num_blocks: int, **options: Any) -> Generator:
        core = EngineCore(self.model, None, context=self.context, vocab_size=97, num_blocks=num_blocks, **options)
        return Generator(core)


def test_decoding_is_timed_on_all_sequences_at_once() -> None:
    loaded: Any = Loaded(SpeedTest("tg", 6, 9).context)
    measure(loaded, [SpeedTest("tg", 6, 9)], roofline=ROOFLINE, repeat=1)
    assert [len(step.context_lens) for step in loaded.model.steps[-6:]] == [9] * 6
    assert [len(step.token_ids) for step in loaded.model.steps[-6:]] == [9] * 6


def test_a_report_is_json_with_every_cell() -> None:
    tests = plan(20, 3, [1, 2])
    loaded: Any = Loaded(max(test.context for test in tests))
    seen: list[str] = []
    results = measure(loaded, tests, roofline=ROOFLINE, repeat=2, progress=seen.append)
    assert len(seen) == 8
    document = json.loads(json.dumps(report(loaded, "m.gguf", ROOFLINE, results)))
    assert set(document) == {
        "model", "bytes", "threads", "isa", "roofline", "results", "version", "metrics_version",
    }  # fmt: skip
    assert document["roofline"] == {"read_gb_s": 10.0, "int8_gops": 1.0}
    assert [row["test"] for row in document["results"]] == ["pp20@b1", "pp20@b2", "tg3@b1", "tg3@b2"]
    for row in document["results"]:
        assert row["tok_s"]["min"] <= row["tok_s"]["median"] <= row["tok_s"]["max"]
        assert row["roofline_fraction"] > 0


def test_what_cannot_be_measured_is_said() -> None:
    loaded: Any = Loaded(10)
    with pytest.raises(ConfigError, match="needs a context of 21"):
        measure(loaded, plan(20, 0, [1]), roofline=ROOFLINE, repeat=1)
    with pytest.raises(ConfigError, match="at least once"):
        measure(loaded, plan(5, 0, [1]), roofline=ROOFLINE, repeat=0)
