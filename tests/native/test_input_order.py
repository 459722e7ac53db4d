"""Matrices whose columns lie in another order than their inputs (act-order)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from native.test_adapter import adapter, random_factors
from native.test_executor import Runner, prompt
from native.tiny_models import LLAMA, TinyModel, build
from nybble import _native

pytestmark = pytest.mark.kernels
Orders = dict[str, npt.NDArray[np.int32]]
SITES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
BLOCK = 32


def shuffled(model: TinyModel, *, skip: str = "") -> tuple[TinyModel, Orders]:
    """The same model with the columns of each block of Q8_0 in another order, which keeps every product as it was.

    skip: the end of names of matrices that are left alone.
    """
    rng = np.random.default_rng(4)
    raw, orders, of_site = dict(model.raw), {}, {}
    for name, (fmt, shape, data) in model.raw.items():
        site = SITES.get(name.rpartition(".")[2])
        if fmt != "Q8_0" or site is None or not name.startswith("layers.") or (skip and name.endswith(skip)):
            continue
        key = name.split(".")[1] + site
        blocks = shape[1] // BLOCK
        if key not in of_site:
            inner = np.concatenate([i * BLOCK + rng.permutation(BLOCK) for i in range(blocks)])
            of_site[key] = inner.astype(np.int32)
        rows = np.frombuffer(data, np.uint8).reshape(shape[0], blocks, 34)
        codes = rows[:, :, 2:].reshape(shape[0], -1)[:, of_site[key]].reshape(shape[0], blocks, BLOCK)
        raw[name] = fmt, shape, np.concatenate([rows[:, :, :2], codes], axis=2).tobytes()
        orders[name] = of_site[key]
    assert orders
    return replace(model, raw=raw), orders


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("formats", [("Q8_0",), ("Q8_0", "F16")])
def test_products_are_those_of_the_unordered_matrix(isa, formats):
    """Matrices in floats may stand beside them: those read the inputs as they are."""
    plain = build(LLAMA, formats)
    ordered, orders = shuffled(plain)
    tokens = [prompt(plain, 40), prompt(plain, 7, seed=2)]
    expected = Runner(plain.native(isa=isa), tokens).run(17)
    for threads in (1, 3):
        found = Runner(ordered.native(orders, isa=isa, threads=threads), tokens).run(17)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_adapters_read_the_inputs_as_they_are():
    plain = build(LLAMA, ("Q8_0",))
    ordered, orders = shuffled(plain)
    factors, tokens = random_factors(plain, 1), [prompt(plain, 40)]
    logits = []
    for model in (plain.native(), ordered.native(orders)):
        logits += Runner(model, tokens, adapters=[adapter(model, factors)], adapter_of=[0]).run(17)
    np.testing.assert_array_equal(logits[0], logits[1])


def test_one_order_for_all_that_read_an_input():
    plain = build(LLAMA, ("Q8_0",))
    ordered, orders = shuffled(plain, skip="attn.k")
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.k cannot have its inputs in this order"):
        ordered.native(orders)


@pytest.mark.parametrize(
    ("name", "fmt", "order", "takes"),
    [
        ("layers.0.attn.q", "Q8_0", np.arange(256)[::-1], True),
        ("layers.0.attn.q", "Q8_0", None, True),
        ("layers.0.attn.q", "Q8_0", np.arange(255), False),
        ("layers.0.attn.q", "Q8_0", np.arange(256) // 2, False),
        ("layers.0.attn.q", "Q8_0", np.arange(256) - 1, False),
        ("layers.0.attn.q", "F16", np.arange(256)[::-1], False),
        ("layers.0.attn.q", "F16", None, True),
        ("embed", "Q8_0", np.arange(256)[::-1], False),
        ("layers.9.attn.q", "Q8_0", None, False),
    ],
)
def test_orders_that_a_matrix_takes(name, fmt, order, takes):
    model = build(LLAMA, ("Q8_0",)).empty()
    given = None if order is None else np.ascontiguousarray(order, np.int32)
    assert model.takes_order(name, fmt, given) is takes


def test_floats_alone_have_no_order():
    """With NYBBLE_ACT=f32 every product reads floats."""
    model = build(LLAMA, ("Q8_0",)).empty(act="f32")
    assert not model.takes_order("layers.0.attn.q", "Q8_0", np.arange(256, dtype=np.int32)[::-1].copy())


def test_the_fingerprint_knows_the_order():
    plain = build(LLAMA, ("Q8_0",))
    ordered, orders = shuffled(plain)
    other = {name: order.copy() for name, order in orders.items()}
    for order in other.values():
        order[:2] = order[1::-1]
    fingerprints = [model.native(given).weights_fingerprint() for model, given in
                    ((ordered, orders), (ordered, other), (ordered, {}), (ordered, orders))]  # fmt: skip
    assert fingerprints[0] == fingerprints[3]
    assert len(set(fingerprints)) == 3
