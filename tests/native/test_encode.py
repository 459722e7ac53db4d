"""The encoders of GGUF blocks: the bytes of llama.cpp's quantizer, on every instruction set.

The hashes were taken when the same input gave the same bytes as `ggml_quantize_chunk` of llama.cpp build 11434.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from nybble import _native
from nybble.quant.formats import FORMATS
from nybble.quant.reference import dequantize

pytestmark = pytest.mark.kernels
ISAS = _native.available_isas()
Floats = npt.NDArray[np.float32]
ROWS, COLS = 24, 1536

# Encoder -> first characters of the SHA-256 without importance and with it.
GOLDENS: dict[str, tuple[str, str]] = {
    "F32": ("69128506ead7296a", "69128506ead7296a"),
    "F16": ("efc50cb05b393eca", "efc50cb05b393eca"),
    "BF16": ("6e0b7befc21eae31", "6e0b7befc21eae31"),
    "Q4_0": ("9677f224058d8a1c", "453f0cd6e0794184"),
    "Q4_1": ("08b6084af3a67565", "1f611ee20d0b3726"),
    "Q5_0": ("faa556d5a92e7dbf", "36f1bd377f69f646"),
    "Q5_1": ("6663aa3446025223", "388bcabb516b14be"),
    "Q8_0": ("74a38c5f0591412c", "74a38c5f0591412c"),
    "Q2_K": ("10783d4c03b36dac", "23b13309730d2cbe"),
    "Q3_K": ("f9ca61443cf0aa6f", "47c644a146ee9fb3"),
    "Q4_K": ("ad3f700ac050b017", "79c4d637a7d4f738"),
    "Q5_K": ("2205b4bce9560c60", "d410b25fe6a4719c"),
    "Q6_K": ("cc5f94543d8b8bdd", "44a01d687961c92d"),
    "IQ4_NL": ("d5687ad1dfa88849", "9f61913443564ef3"),
    "IQ4_XS": ("13755d93dc449530", "08b05a82e7614ab8"),
    "MXFP4": ("dcc6848f5ee0e47b", "dcc6848f5ee0e47b"),
}
# Upper bounds of the mean squared error, as a share of the mean square of Gaussian weights.
BOUNDS = {
    "F32": 0.0, "F16": 1e-7, "BF16": 4e-6, "Q8_0": 4e-5, "Q6_K": 4e-4, "Q5_1": 1.6e-3, "Q5_K": 1.4e-3,
    "Q5_0": 1.9e-3, "Q4_1": 7e-3, "IQ4_NL": 6e-3, "Q4_K": 6e-3, "IQ4_XS": 6.5e-3, "Q4_0": 8e-3, "MXFP4": 1.5e-2,
    "Q3_K": 2.7e-2, "Q2_K": 9e-2,
}  # fmt: skip


def weights() -> Floats:
    """Without random numbers or functions of a library, which may change. Rows 0 to 5 are degenerate."""
    n = np.arange(ROWS * COLS, dtype=np.uint64)
    state = (n + 1) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    v = (state >> np.uint64(44)).astype(np.float64) / (1 << 20) + (state & np.uint64(0xFFFFF)).astype(np.float64) / (
        1 << 20
    )
    v -= 1.0
    x = (0.03 * v + 0.1 * v * v * v).astype(np.float32).reshape(ROWS, COLS)  # some are far out
    x[0] = 0
    x[1, ::3] = 0
    x[2] = np.abs(x[2])
    x[3] = 0.01
    x[4, :64] *= np.float32(1e-3)
    x[5] = -np.abs(x[5])
    return x


def importance() -> Floats:
    n = np.arange(COLS, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 16)
    values = n.astype(np.float64) / (1 << 16)
    return (values * values * values * values).astype(np.float32)


def encode(
    name: str, x: Floats, isa: str | None = None, *, threads: int = 1, importance: Floats | None = None
) -> bytes:
    out = np.zeros(x.size // x.shape[1] * FORMATS[name].row_bytes(x.shape[1]), np.uint8)
    encoder = _native.Encoder(threads=threads, isa=isa)
    bad = encoder.encode_into(
        to=name, source_format="F32", source=x, rows=x.shape[0], cols=x.shape[1], out=out, importance=importance
    )
    assert bad == -1
    return out.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_bytes_of_llama_cpp(name: str, isa: str) -> None:
    x = weights()
    found = [hashlib.sha256(encode(name, x, isa, importance=w)).hexdigest()[:16] for w in (None, importance())]
    assert tuple(found) == GOLDENS[name]


@pytest.mark.parametrize("name", BOUNDS)
def test_errors_stay_below_a_bound(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((16, 2048)).astype(np.float32)
    decoded = dequantize(FORMATS[name], encode(name, x)).reshape(x.shape)
    assert float(np.mean((decoded - x) ** 2) / np.mean(x**2)) <= BOUNDS[name]


@pytest.mark.parametrize(
    "name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"]
)
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((16, 2048)).astype(np.float32)
    w = np.random.default_rng(2).gamma(0.3, size=2048).astype(np.float32)

    def error(data: bytes) -> float:
        return float(np.sum(w * (dequantize(FORMATS[name], data).reshape(x.shape) - x) ** 2))

    assert error(encode(name, x, importance=w)) < error(encode(name, x))


@pytest.mark.parametrize("name", GOLDENS)
def test_threads_change_nothing(name: str) -> None:
    x = weights()
    assert encode(name, x, threads=3) == encode(name, x)


@pytest.mark.parametrize("source", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_other_sources_are_decoded_first(source: str) -> None:
    data = b"\0" + encode(source, weights())
    decoded = dequantize(FORMATS[source], data[1:]).reshape(ROWS, COLS)
    out = np.zeros(ROWS * FORMATS["Q5_K"].row_bytes(COLS), np.uint8)
    _native.Encoder(threads=1).encode_into(
        to="Q5_K", source_format=source, source=memoryview(data)[1:], rows=ROWS, cols=COLS, out=out
    )
    assert out.tobytes() == encode("Q5_K", np.ascontiguousarray(decoded))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 70000.0])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16"])
def test_the_first_bad_row_is_named(name: str, bad: float) -> None:
    x = weights()
    x[7, 1000] = x[12, 3] = bad
    out = np.zeros(ROWS * FORMATS[name].row_bytes(COLS), np.uint8)
    for threads in (1, 3):
        encoder = _native.Encoder(threads=threads)
        assert encoder.encode_into(to=name, source_format="F32", source=x, rows=ROWS, cols=COLS, out=out) == 7


def test_large_weights_fit_formats_with_wide_exponents() -> None:
    x = np.full((1, 32), 1e30, np.float32)
    assert dequantize(FORMATS["BF16"], encode("BF16", x))[0] == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": "IQ2_XS"}, "unknown weight format"),
        ({"to": "U4_32"}, "no encoder for U4_32"),
        ({"cols": 100}, "not whole blocks"),
        ({"rows": 3}, "the source does not fit"),
        ({"out": np.zeros(7, np.uint8)}, "out does not fit"),
        ({"importance": np.zeros(8, np.float32)}, "one number per column"),
        ({"importance": np.zeros(256)}, "must be an array of float32"),
        ({"rows": -1}, "at least 1"),
    ],
)
def test_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "to": "Q4_K", "source_format": "F32", "source": np.zeros((2, 256), np.float32), "rows": 2, "cols": 256,
        "out": np.zeros(288, np.uint8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.Encoder(threads=1).encode_into(**(arguments | change))  # type: ignore[arg-type]
