"""The table of weight encodings. Reading, kernels, reports and the docs all look here; an encoding is a row.

GGUF type ids and block layouts: the GGUF specification of ggml (`docs/gguf.md`) and its `ggml-common.h`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One encoding of a weight matrix.

    name: as users write it. ggml_type: id in a GGUF file, None where GGUF has no such type. block_size: weights per
    block, along in_features. block_bytes: bytes per block, scales included. has_kernel: whether the native
    engine multiplies it.
    """

    name: str
    ggml_type: int | None
    block_size: int
    block_bytes: int
    has_kernel: bool = True

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return self.block_bytes * 8 / self.block_size

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row. Raises ValueError if a block would be cut."""
        blocks, rest = divmod(in_features, self.block_size)
        if rest:
            raise ValueError(f"{self.name} needs rows in multiples of {self.block_size} weights, not {in_features}")
        return blocks * self.block_bytes


_ROWS = (
    QuantFormat("F32", 0, 1, 4),
    QuantFormat("F16", 1, 1, 2),
    QuantFormat("BF16", 30, 1, 2),
    QuantFormat("Q4_0", 2, 32, 18),
    QuantFormat("Q4_1", 3, 32, 20),
    QuantFormat("Q5_0", 6, 32, 22),
    QuantFormat("Q5_1", 7, 32, 24),
    QuantFormat("Q8_0", 8, 32, 34),
    QuantFormat("Q2_K", 10, 256, 84),
    QuantFormat("Q3_K", 11, 256, 110),
    QuantFormat("Q4_K", 12, 256, 144),
    QuantFormat("Q5_K", 13, 256, 176),
    QuantFormat("Q6_K", 14, 256, 210),
    QuantFormat("IQ4_NL", 20, 32, 18),
    QuantFormat("IQ4_XS", 23, 256, 136),
    QuantFormat("MXFP4", 39, 32, 17),
    # What weights of safetensors dialects become in memory (nybble.quant.grouped): name is U<bits>_<weights per scale>.
    QuantFormat("U2_32", None, 32, 12),
    QuantFormat("U2_128", None, 128, 36),
    QuantFormat("U3_32", None, 32, 16),
    QuantFormat("U3_128", None, 128, 52),
    QuantFormat("U4_32", None, 32, 20),
    QuantFormat("U4_128", None, 128, 68),
    QuantFormat("U8_32", None, 32, 40),
    QuantFormat("U8_128", None, 128, 136),
    # And the codebooks of bitsandbytes (nybble.quant.codebook).
    QuantFormat("NF4_64", None, 64, 36),
    QuantFormat("FP4_64", None, 64, 36),
    # And of FP8 (nybble.quant.float8).
    QuantFormat("F8_32", None, 32, 36),
    QuantFormat("F8_128", None, 128, 132),
    # Known by size only, so that a file that holds them is described and then refused by name.
    QuantFormat("IQ2_XXS", 16, 256, 66, has_kernel=False),
    QuantFormat("IQ2_XS", 17, 256, 74, has_kernel=False),
    QuantFormat("IQ3_XXS", 18, 256, 98, has_kernel=False),
    QuantFormat("IQ1_S", 19, 256, 50, has_kernel=False),
    QuantFormat("IQ3_S", 21, 256, 110, has_kernel=False),
    QuantFormat("IQ2_S", 22, 256, 82, has_kernel=False),
    QuantFormat("U8", None, 1, 1, has_kernel=False),
    QuantFormat("BOOL", None, 1, 1, has_kernel=False),
    QuantFormat("F8_E4M3", None, 1, 1, has_kernel=False),
    QuantFormat("I8", 24, 1, 1, has_kernel=False),
    QuantFormat("I16", 25, 1, 2, has_kernel=False),
    QuantFormat("I32", 26, 1, 4, has_kernel=False),
    QuantFormat("I64", 27, 1, 8, has_kernel=False),
    QuantFormat("F64", 28, 1, 8, has_kernel=False),
    QuantFormat("IQ1_M", 29, 256, 56, has_kernel=False),
    QuantFormat("TQ1_0", 34, 256, 54, has_kernel=False),
    QuantFormat("TQ2_0", 35, 256, 66, has_kernel=False),
    QuantFormat("NVFP4", 40, 64, 36, has_kernel=False),
    QuantFormat("Q1_0", 41, 128, 18, has_kernel=False),
    QuantFormat("Q2_0", 42, 64, 18, has_kernel=False),
)

FORMATS: dict[str, QuantFormat] = {row.name: row for row in _ROWS}
_BY_GGML_TYPE = {row.ggml_type: row for row in _ROWS if row.ggml_type is not None}


def by_ggml_type(ggml_type: int) -> QuantFormat:
    """The encoding with this GGUF type id. Raises KeyError if there is none."""
    return _BY_GGML_TYPE[ggml_type]
