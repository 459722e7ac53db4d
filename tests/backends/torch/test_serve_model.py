"""TorchModel gives the native backend's logits, for every family and encoding, however a step is put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.torch import serving  # noqa: E402
from backends.torch.serving import BLOCKS, Folders, as_checkpoint, in_torch, native, run_some, step  # noqa: E402
from models import FAMILIES, to_gguf  # noqa: E402
from native.tiny_models import tiny  # noqa: E402
from nybble.backends.cpu import BadLogitsError, SampleRow  # noqa: E402
from nybble.backends.device import DeviceOptions  # noqa: E402
from nybble.backends.torch.serve import TorchModel, memory  # noqa: E402
from nybble.backends.torch.serve.cache import PagedCache  # noqa: E402
from nybble.backends.torch.serve.draw import DeviceSampler  # noqa: E402
from nybble.backends.torch.serve.rank import Rank  # noqa: E402
from nybble.backends.torch.serve.setup import Setup, load_rank, make_setup, place_layers  # noqa: E402
from nybble.checkpoint import open_checkpoint  # noqa: E402
from nybble.core.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*model shards")]

MORE = [("llama", {"attention_bias": True}), ("mistral", {"sliding_window": 16}), ("gemma2", {"sliding_window": 5})]


@pytest.fixture(autouse=True)
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_ACT", "f32")


def close(found: list[serving.Floats], wanted: list[serving.Floats], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize(("family", "overrides"), [*((family, {}) for family in FAMILIES), *MORE], ids=str)
def test_logits_are_the_native_backends(folders: Folders, family: str, overrides: dict) -> None:
    folder = folders(family, **overrides)
    close(run_some(in_torch(folder), 250), run_some(native(folder), 250))


@pytest.mark.parametrize("name", ["llama-q4_k", "qwen-mix", "gemma-q8_0", "odd-f32"])
def test_encodings(name: str) -> None:
    source = as_checkpoint(tiny(name))
    vocab = source.spec.vocab_size
    close(run_some(in_torch(source), vocab), run_some(native(source), vocab))


def test_interleaved_rope_of_a_gguf_file(folders: Folders, tmp_path: Path) -> None:
    path = to_gguf(folders("llama"), tmp_path / "model.gguf")
    close(run_some(in_torch(path), 250), run_some(native(path), 250))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("float16", 0.008)])
def test_sixteen_bits(folders: Folders, dtype: str, bound: float) -> None:
    """Within some of the type's steps, and not closer than one: it does compute in it."""
    folder = folders("llama")
    wanted, found = run_some(native(folder), 250), run_some(in_torch(folder, dtype=dtype), 250)
    close(found, wanted, bound)
    assert np.abs(found[0] - wanted[0]).max() > bound / 100 * np.abs(wanted[0]).max()


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.04), ("fp8", 0.15)])
def test_keys_and_values_in_eight_bits(folders: Folders, kind: str, bound: float) -> None:
    folder = folders("qwen3")
    model = in_torch(folder, kv_cache_type=kind)
    wanted = run_some(native(folder), 250)
    close(run_some(model, 250), wanted, bound)
    assert model.cache_bytes_per_block == 2 * 2 * 16 * 2 * (32 + 4)  # layers, k and v, tokens, heads


def test_hidden_states_and_what_follows_from_them(folders: Folders) -> None:
    folder = folders("gemma2")
    torchs, natives = in_torch(folder), native(folder)
    one = step([([5, 6, 7, 8, 9], 0, [3])], rows=[4], hidden=[0, 3])
    for model in (torchs, natives):
        model.execute(one)
    np.testing.assert_allclose(torchs.hidden(), natives.hidden(), rtol=0, atol=1e-4)
    found, wanted = (model.score_hidden(model.hidden(), [9, 3], 2) for model in (torchs, natives))
    for a, b in zip(found, wanted, strict=True):
        assert (a.rank, [i for i, _ in a.top_logprobs]) == (b.rank, [i for i, _ in b.top_logprobs])
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    torchs.execute(step([([5], 0, [3])]))
    with pytest.raises(ValueError, match="asked for no hidden states"):
        torchs.hidden()
    with pytest.raises(ValueError, match="one id for each row"):
        torchs.score_hidden(np.zeros((2, 64), np.float32), [1])


def test_draws_are_the_native_samplers(folders: Folders) -> None:
    model = in_torch(folders("llama"))
    reference = native(folders("llama"))
    logits = model.execute(step([([1, 2, 3], 0, [0])]))
    rows = [SampleRow(seed=seed, top_p=0.9, logprobs=3) for seed in range(3)]
    assert model.sample(logits, rows) == reference.sample(logits, rows)
    logits = logits.copy()
    logits[1] = np.nan
    with pytest.raises(BadLogitsError) as caught:
        model.sample(logits, rows)
    assert caught.value.rows == (1,)


def test_the_short_way_to_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, -1.0, float("-inf"), 3.0]])
    sampler, short, long = DeviceSampler(), SampleRow(temperature=0.0, logprobs=None), SampleRow(temperature=0.0)
    assert [one.token_id for one in sampler.sample(logits, [short, short])] == [1, 0]
    assert [one.token_id for one in sampler.sample(logits, [short, long])] == [1, 0]
    logits[1, 2] = float("nan")
    for rows in ([short, short], [short, long]):
        with pytest.raises(BadLogitsError) as caught:
            sampler.sample(logits, rows)
        assert caught.value.rows == (1,)


def test_blocks_are_copied_read_and_written(folders: Folders) -> None:
    folder = folders("llama")
    tokens = list(range(1, 21))
    for kind in ("f16", "int8"):
        model = in_torch(folder, kv_cache_type=kind)
        model.execute(step([(tokens, 0, [3, 4])]))
        wanted = model.execute(step([([30], 20, [3, 4])]))
        model.copy_blocks([(3, 8), (4, 9)])
        np.testing.assert_array_equal(model.execute(step([([30], 20, [8, 9])])), wanted)
        blocks = model.cache_blocks()
        kept = blocks.read([3, 4])
        assert kept.shape == (2, blocks.block_bytes) == (2, model.cache_bytes_per_block)
        model.new_cache(BLOCKS)
        model.cache_blocks().write([1, 0], kept)
        np.testing.assert_array_equal(model.execute(step([([30], 20, [1, 0])])), wanted)
        for call in (
            lambda model=model: model.copy_blocks([(0, BLOCKS)]),
            lambda model=model: model.cache_blocks().read([-1]),
            lambda model=model, kept=kept: model.cache_blocks().write([0], kept),
        ):
            with pytest.raises(ValueError, match=r"blocks"):
                call()


def test_the_identity_depends_on_weights_and_types(folders: Folders) -> None:
    one, other = folders("llama"), folders("llama", seed=1)
    found = [
        in_torch(one).identity(),
        in_torch(other).identity(),
        in_torch(one, dtype="bfloat16").identity(),
        in_torch(one, kv_cache_type="int8").identity(),
    ]
    assert len(set(found)) == 4
    assert in_torch(one).identity() == found[0]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (step([([250, 1000], 0, [0])]), "token id"),
        (step([([1], 0, [BLOCKS])]), "block id"),
        (step([([1] * 20, 0, [0])]), "block table is too short"),
        (step([([1], 200, list(range(20)))]), "longer than 128"),
        (step([([1], 0, [0])], rows=[1]), "row is out of range"),
    ],
)
def test_steps_that_do_not_hold_together(folders: Folders, one: object, message: str) -> None:
    model = in_torch(as_checkpoint(tiny("llama-q4_k")))
    with pytest.raises(ValueError, match=message):
        model.execute(one)  # type: ignore[arg-type]


def test_no_cache_and_broken_weights(folders: Folders) -> None:
    folder = folders("llama")
    options = DeviceOptions(device="torch-cpu")
    model = TorchModel.load(open_checkpoint(folder), device="torch-cpu", options=options, context=64)
    with pytest.raises(ValueError, match="call new_cache first"):
        model.execute(step([([1], 0, [0])]))
    with pytest.raises(ConfigError, match="not enough memory for a cache of"):
        model.new_cache(1 << 50)
    broken = tiny("llama-f32")
    norm = np.full(broken.spec.hidden_size, np.nan, np.float32)
    source = as_checkpoint(broken)
    tensors = dict(source.tensors)
    tensors["final_norm"] = type(tensors["final_norm"])(
        "final_norm", norm.shape, tensors["final_norm"].format, memoryview(norm).cast("B")
    )
    object.__setattr__(source, "tensors", tensors)
    with pytest.raises(CheckpointError, match="'final_norm' holds a NaN"):
        in_torch(source)


# ---- what fits where ----


def test_layers_go_where_they_fit() -> None:
    assert place_layers([5, 5, 5], 15) == 3
    assert place_layers([5, 5, 5], 14) == 2
    assert place_layers([5, 5, 5], 4) == 0


def test_a_device_map_by_free_memory() -> None:
    source = as_checkpoint(tiny("qwen-mix"))
    spec, gpu, host = source.spec, torch.device("cpu", 0), torch.device("cpu")

    def setup(free: int, device_map: str | None = None) -> Setup:
        options = DeviceOptions(device="cuda", dtype="float32", gpu_memory_utilization=1.0, device_map=device_map)
        return make_setup(
            spec, source.tensors, options, gpu, context=64, kv_cache_type="f16", free_bytes=free, beside=host
        )

    def fits(free: int) -> bool:
        try:
            return setup(free).devices == (gpu,) * len(spec.layers)
        except ConfigError:
            return False

    least = next(free for free in range(10_000, 1 << 20, 1_000) if fits(free))
    with pytest.raises(ConfigError, match=r"device_map to 'auto'.*tensor_parallel_size"):
        setup(least - 1_000)
    placed = setup(least - 1_000, "auto")
    assert placed.devices == (*[gpu] * (len(spec.layers) - 1), host)  # the last one does not fit
    assert not placed.graphs
    assert setup(least, "auto").devices == (gpu,) * len(spec.layers)
    with pytest.raises(ConfigError, match="run the model with device 'cpu'"):
        setup(10_000, "auto")


def test_a_model_over_two_devices(folders: Folders) -> None:
    """The border is crossed for real: torch counts these as two devices."""
    folder = folders("gemma3")
    model = in_torch(folder)
    decoder = model._rank.decoder
    half = len(decoder.devices) // 2
    decoder.devices = (torch.device("cpu", 0),) * half + (torch.device("cpu"),) * (len(decoder.devices) - half)
    decoder._ropes |= {(rope, torch.device("cpu", 0)): table for (rope, _), table in decoder._ropes.items()}
    model._rank.cache = PagedCache(decoder.spec.layers, decoder.devices, BLOCKS, torch.float32)
    close(run_some(model, 250), run_some(native(folder), 250))


def test_what_the_largest_step_leaves(folders: Folders) -> None:
    assert memory.cache_bytes(total=1000, share=0.9, others=100, peak=300, device="cuda:0") == 500
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization 0.5 allows .* other programs"):
        memory.cache_bytes(total=1000, share=0.5, others=100, peak=400, device="cuda:0")
    largest = memory.largest_step(150, 8, 64)
    assert largest.kv_lens.tolist() == [64, 64, 22]
    assert (len(largest.logit_rows), largest.max_q_len) == (8, 64)
    options = DeviceOptions(device="torch-cpu")
    folder = folders("llama")
    rank, _ = load_rank(open_checkpoint(folder), options, torch.device("cpu"), context=64, kv_cache_type="f16")
    rank.new_cache(1)
    assert rank.run(largest).logits.shape[0] == 8  # it runs, and writes nothing:
    assert not rank.needed_cache().layers[0].k.any()


class FakeCuda:
    """What is asked of a GPU's memory, for a model that is on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int, total: int, reserved: int, peak: int) -> None:
        answers = {
            "mem_get_info": (free, total), "memory_reserved": reserved, "max_memory_allocated": peak,
            "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(Rank, "bytes_per_block_on", lambda self, kind: self.block_bytes if kind == "cuda" else 0)


def test_the_cache_takes_what_the_largest_step_leaves(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_torch(folders("llama"))
    rank, size = model._rank, model._rank.block_bytes
    options = DeviceOptions(device="cuda", gpu_memory_utilization=0.5)
    FakeCuda(monkeypatch, free=500 * size, total=1000 * size, reserved=380 * size, peak=300 * size)
    assert memory.blocks_that_fit(rank, 64, 4, options) == 500 - 300 - 120  # half of all, the step, other programs
    assert rank.cache is None  # what the step ran on is gone

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Rank, "run", no_memory)
    with pytest.raises(ConfigError, match="a step of 64 tokens does not fit on cpu beside the weights: lower"):
        memory.blocks_that_fit(rank, 64, 4, options)
    model.new_cache(BLOCKS)
    with pytest.raises(ConfigError, match="no memory left for this step: lower gpu_memory_utilization"):
        model.execute(step([([1], 0, [0])]))
