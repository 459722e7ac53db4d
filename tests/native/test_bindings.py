"""The native core trusts its arguments, so the bindings must not let a wrong one through."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from native.tiny_models import native_layer, tiny
from nybble import _native

pytestmark = pytest.mark.kernels
FREQUENCIES = np.ones(16, np.float32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture(scope="module")
def native() -> _native.Model:
    return tiny("llama-q4_k").native(threads=2)


GOOD = {
    "token_ids": i32(1, 2, 3, 4),
    "cu_seqlens_q": i32(0, 3, 4),
    "context_lens": i32(0, 16),
    "block_tables": np.array([[0, 1], [2, 3]], np.int32),
    "logit_rows": i32(2, 3),
}
BAD = [
    ({"token_ids": i32(1, 2, 3, 101)}, r"token_ids\[3\] is 101"),
    ({"token_ids": i32(-1, 2, 3, 4)}, r"token_ids\[0\] is -1"),
    ({"token_ids": i32(), "cu_seqlens_q": i32(0, 0, 0), "logit_rows": i32()}, "at least one token"),
    ({"token_ids": GOOD["token_ids"].astype(np.int64)}, "token_ids must be an array of int32"),
    ({"token_ids": np.arange(8, dtype=np.int32)[::2]}, "token_ids must be contiguous"),
    ({"token_ids": GOOD["token_ids"].reshape(2, 2)}, "token_ids must have 1 dimensions"),
    ({"cu_seqlens_q": i32(0, 4)}, "one entry more"),
    ({"cu_seqlens_q": i32(1, 3, 4)}, "from 0 to the number of tokens, 4"),
    ({"cu_seqlens_q": i32(0, 3, 5)}, "from 0 to the number of tokens, 4"),
    ({"cu_seqlens_q": i32(0, 5, 4)}, "not descend"),
    ({"context_lens": i32(0, -1)}, "context_lens must not be negative"),
    ({"context_lens": i32(0, 32)}, "sequence 1 has 33 tokens, its block table holds 32"),
    ({"context_lens": i32(0, 2**31 - 1)}, "its block table holds 32"),
    ({"block_tables": np.array([[0, 1], [2, 8]], np.int32)}, r"block_tables\[1, 1\] is 8"),
    ({"block_tables": np.array([[-1, 1], [2, 3]], np.int32)}, r"block_tables\[0, 0\] is -1"),
    ({"block_tables": np.array([[3, 1], [2, 3]], np.int32)}, "block 3 is written twice"),
    ({"block_tables": np.array([[2, 1], [2, 3]], np.int32)}, "block 2 is written in this step while sequence 1"),
    ({"block_tables": np.array([[0, 1]], np.int32)}, "one row for each sequence"),
    ({"block_tables": i32(0, 1, 2, 3)}, "block_tables must have 2 dimensions"),
    ({"logit_rows": i32(4)}, r"logit_rows\[0\] is 4"),
    ({"logit_rows": i32(-1)}, r"logit_rows\[0\] is -1"),
    ({"hidden_rows": i32(3, 4)}, r"hidden_rows\[1\] is 4"),
    ({"hidden_rows": i32(-1)}, r"hidden_rows\[0\] is -1"),
    ({"hidden_rows": np.zeros(1, np.int64)}, "hidden_rows must be an array of int32"),
]


def test_the_good_step_runs(native):
    assert native.execute(_native.KvCache(native, 8), **GOOD).shape == (2, 101)
    read_only = {name: value.copy() for name, value in GOOD.items()}
    for value in read_only.values():
        value.flags.writeable = False
    native.execute(_native.KvCache(native, 8), **read_only)


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_refuses_steps_that_do_not_hold_together(native, changes, message):
    with pytest.raises(ValueError, match=message):
        native.execute(_native.KvCache(native, 8), **(GOOD | changes))


def test_entries_past_the_last_token_are_not_read(native):
    tables = np.array([[0, -7], [2, 3]], np.int32)
    native.execute(_native.KvCache(native, 8), **(GOOD | {"block_tables": tables}))


def test_refuses_a_cache_of_another_model(native):
    other = tiny("llama-q4_k").native()
    with pytest.raises(ValueError, match="another model"):
        native.execute(_native.KvCache(other, 8), **GOOD)


def new_model(**changes: object) -> _native.Model:
    llama = tiny("llama-f32")
    layers = [native_layer(llama.spec.layers[0], *llama.ropes[0])]
    config = {"vocab_size": 32, "hidden_size": 256, "norm_eps": 1e-5, "layers": layers, "tied_head": True}
    return _native.Model(**(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be between 1"),
        ({"hidden_size": -4}, "hidden_size must be between 1"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"logit_scale": float("nan")}, "finite"),
        ({"threads": 0}, "threads must be between 1"),
        ({"isa": "sse9"}, "unknown instruction set 'sse9'"),
        ({"act": "int3"}, "unknown activation type 'int3'"),
    ],
)
def test_refuses_models_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        new_model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"kv_heads": 0}, "kv_heads must be between 1"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16"),
        ({"inv_freq": np.ones(17, np.float32)}, "more dimensions than a head"),
        ({"inv_freq": np.full(4, np.inf, np.float32)}, "inv_freq must be finite"),
        ({"window": -1}, "window must not be negative"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_refuses_layers_that_cannot_be(changes, message):
    config = {"q_heads": 8, "kv_heads": 2, "head_dim": 32, "ffn_size": 64, "sm_scale": 1.0, "inv_freq": FREQUENCIES}
    with pytest.raises(ValueError, match=message):
        new_model(layers=[_native.LayerConfig(**(config | changes))])


def test_refuses_wrong_tensors():
    model = new_model()
    with pytest.raises(ValueError, match=r"no tensor layers\.1\.ffn_norm"):
        model.set_tensor("layers.1.ffn_norm", "F32", 1, 256, bytes(1024))
    with pytest.raises(ValueError, match=r"embed must be \[32, 256\], not \[256, 32\]"):
        model.set_tensor("embed", "Q8_0", 256, 32, bytes(256 * 34))
    with pytest.raises(ValueError, match="must have 8704 bytes, not 8703"):
        model.set_tensor("embed", "Q8_0", 32, 256, bytes(8703))
    with pytest.raises(ValueError, match="unknown weight format 'Q9_0'"):
        model.set_tensor("embed", "Q9_0", 32, 256, bytes(8704))
    with pytest.raises(ValueError, match="final_norm must be F32"):
        model.set_tensor("final_norm", "F16", 1, 256, bytes(512))
    model.set_tensor("embed", "Q8_0", 32, 256, bytes(8704))
    with pytest.raises(ValueError, match="embed was set before"):
        model.set_tensor("embed", "Q8_0", 32, 256, bytes(8704))
    with pytest.raises(ValueError, match=r"tensors are missing: final_norm, layers\.0\."):
        model.finish()
    with pytest.raises(ValueError, match="not complete"):
        model.execute(_native.KvCache(model, 8), **GOOD)


def test_refuses_caches_that_cannot_be(native):
    with pytest.raises(ValueError, match="num_blocks must be at least 1"):
        _native.KvCache(native, 0)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (np.array([[0, 8]], np.int32), r"pairs\[1\] is 8"),
        (np.array([[0, 1], [-1, 2]], np.int32), r"pairs\[2\] is -1"),
        (np.array([[0, 1, 2]], np.int32), "pairs must have 2 columns"),
        (np.array([0, 1], np.int32), "pairs must have 2 dimensions"),
        (np.array([[0, 1]], np.int64), "pairs must be an array of int32"),
    ],
)
def test_refuses_copies_that_cannot_be(native, pairs, message):
    with pytest.raises(ValueError, match=message):
        native.copy_blocks(_native.KvCache(native, 8), pairs)


def test_refuses_copies_in_a_cache_of_another_model(native):
    other = tiny("llama-q4_k").native()
    with pytest.raises(ValueError, match="another model"):
        native.copy_blocks(_native.KvCache(other, 8), np.array([[0, 1]], np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.zeros((2, 101), np.float64)}, "must be an array of float32"),
        ({"rows": np.zeros((2, 77), np.float32)}, "columns"),
        ({"rows": np.zeros(101, np.float32)}, "must have 2 dimensions"),
        ({"rows": np.zeros((2, 202), np.float32)[:, ::2]}, "must be contiguous|columns"),
        ({"target_ids": i32(0)}, "one id for each row"),
        ({"target_ids": i32(0, 101)}, r"target_ids\[1\] is 101"),
        ({"target_ids": i32(-1, 0)}, r"target_ids\[0\] is -1"),
        ({"target_ids": np.zeros(2, np.int64)}, "target_ids must be an array of int32"),
        ({"top": -1}, "top must not be negative"),
    ],
)
def test_refuses_scores_that_do_not_hold_together(native, changes, message):
    for method, width in ((native.score, 101), (native.score_hidden, 256)):
        arguments = {"rows": np.zeros((2, width), np.float32), "target_ids": i32(0, 100), "top": 1}
        assert len(method(*arguments.values())) == 2
        with pytest.raises(ValueError, match=message):
            method(*(arguments | changes).values())


def test_hidden_states_need_a_complete_model():
    with pytest.raises(ValueError, match="not complete"):
        new_model().score_hidden(np.zeros((1, 256), np.float32), i32(0), 0)


def test_python_threads_may_share_a_model(native):
    caches = [_native.KvCache(native, 8) for _ in range(4)]
    results: list[list[np.ndarray]] = [[] for _ in caches]

    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(native.execute(caches[index], **(GOOD | {"context_lens": i32(0, 0)})))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(out, results[0][0]) for rows in results for out in rows)


def test_decoding_of_packed_weights():
    data = np.random.default_rng(0).integers(0, 100, 20 * 8 * 34, dtype=np.uint8).tobytes()
    flat = _native.dequantize("Q8_0", data)
    assert flat.shape == (20 * 256,)
    assert np.array_equal(flat.reshape(20, 256), _native.pack_roundtrip("Q8_0", data, 20, 256), equal_nan=True)
    with pytest.raises(ValueError, match="not whole blocks of Q8_0"):
        _native.dequantize("Q8_0", data[:-1])
    with pytest.raises(ValueError, match="do not fit the shape"):
        _native.pack_roundtrip("Q8_0", data, 21, 256)
