"""`nybble.quantize`: the passes from Python, with configs whose fields are called as in `transformers`.

A field that is not here does not exist: nothing is accepted and then ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nybble.compress import table
from nybble.compress.calibration.text import SELF
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest, Silent, find
from nybble.core.errors import ConfigError

assert table  # imported for what it registers

# A file, the name of a `datasets` data set, texts, or "self": text that the model writes; None: text that comes with
# Python.
Dataset = str | Path | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a config asks for, as the command line would say it."""

    type: str
    options: Mapping[str, object] = field(default_factory=dict)
    tensors: tuple[tuple[str, str], ...] = ()
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class GPTQConfig:
    """GPTQ: columns rounded one after the other, each error spread over those to come.

    bits: 2, 3, 4 or 8. group_size: inputs per scale, -1 for whole rows; None: 128, whole rows at 8 bits. desc_act:
    groups in the order of importance, which readers follow by g_idx and some kernels cannot; without it columns are
    rounded in that order too, but inside their groups. damp_percent: the share of the mean of the Hessian's diagonal
    that is added to it; more trusts the text less. sym: a zero point in the middle. dataset: what to calibrate with
    (a file, a `datasets` name, texts, "self" for what the model writes; None: Python's own documentation), num_samples
    windows of it with sample_tokens tokens each. modules_to_not_convert: parts of names of linears that stay in 16
    bits.
    """

    bits: int = 4
    dataset: Dataset = None
    group_size: int | None = None
    damp_percent: float = 0.25
    desc_act: bool = False
    static_groups: bool = False
    sym: bool = True
    clip_search: bool = True
    num_samples: int = 128
    sample_tokens: int = 512
    modules_to_not_convert: Sequence[str] = ()

    def asked(self) -> Asked:
        """Raises ConfigError for bits that GPTQ's format does not have."""
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"GPTQConfig(bits={self.bits!r}) cannot be used: bits must be 2, 3, 4 or 8")
        options: dict[str, object] = {
            "damp_percent": self.damp_percent,
            "desc_act": self.desc_act,
            "static_groups": self.static_groups,
            "symmetric": self.sym,
            "clip_search": self.clip_search,
        }
        if self.group_size is not None:
            options["group_size"] = self.group_size
        options |= _calibration(self.dataset, self.num_samples, self.sample_tokens)
        return Asked(f"gptq-{self.bits}bit", options, _kept(self.modules_to_not_convert))


@dataclass(frozen=True, slots=True)
class AWQConfig:
    """AWQ: inputs that matter are scaled up before their weights are rounded to 4 bits, and back where they come from.

    zero_point: a zero point for each group; without, it is in the middle. Other fields as in GPTQConfig.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    dataset: Dataset = None
    clip_search: bool = True
    num_samples: int = 128
    sample_tokens: int = 512
    modules_to_not_convert: Sequence[str] = ()

    def asked(self) -> Asked:
        """Raises ConfigError for bits that AWQ's format does not have."""
        if self.bits != 4:
            raise ConfigError(f"AWQConfig(bits={self.bits!r}) cannot be used: AWQ's format has 4 bits only")
        options: dict[str, object] = {
            "group_size": self.group_size,
            "symmetric": not self.zero_point,
            "clip_search": self.clip_search,
        }
        options |= _calibration(self.dataset, self.num_samples, self.sample_tokens)
        return Asked("awq-4bit", options, _kept(self.modules_to_not_convert))


@dataclass(frozen=True, slots=True)
class BitsAndBytesConfig:
    """bitsandbytes: 8 bits per row (LLM.int8) or a 4-bit codebook with a scale for each 64 weights.

    bnb_4bit_quant_type: "nf4" or "fp4"; as in `transformers` the default is fp4, though nf4 is more exact.
    bnb_4bit_compute_dtype: "float32", "float16", "bfloat16" or one of torch's; None: the model's own.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Sequence[str] | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_compute_dtype: object = None
    bnb_4bit_use_double_quant: bool = False

    def asked(self) -> Asked:
        """Raises ConfigError if it does not say which of the two, or names another code."""
        if self.load_in_8bit == self.load_in_4bit:
            raise ConfigError("BitsAndBytesConfig needs one of load_in_8bit=True and load_in_4bit=True")
        tensors = _kept(self.llm_int8_skip_modules or ())
        if self.load_in_8bit:
            return Asked("llm-int8", {"threshold": self.llm_int8_threshold}, tensors)
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} cannot be used: it must be nf4 or fp4")
        options: dict[str, object] = {"double_quant": self.bnb_4bit_use_double_quant}
        if self.bnb_4bit_compute_dtype is not None:
            options["compute_dtype"] = str(self.bnb_4bit_compute_dtype).removeprefix("torch.")
        return Asked(self.bnb_4bit_quant_type, options, tensors)


@dataclass(frozen=True, slots=True)
class RoundToNearestConfig:
    """compressed-tensors: each weight rounded by itself. type: int8, int4, int3, int2 or fp8.

    dataset: if given, ranges are clipped where that makes the error least, weighted by the mean square of each input on
    it. clip_search: None: so; False: not even then; True: without a data set too, which usually makes a model worse.
    """

    type: str = "int4"
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool | None = None
    dataset: Dataset = None
    modules_to_not_convert: Sequence[str] = ()

    def asked(self) -> Asked:
        """The type and its options."""
        options: dict[str, object] = {} if self.type == "fp8" else {"symmetric": self.symmetric}
        for name, value in (("group_size", self.group_size), ("clip_search", self.clip_search)):
            if value is not None:
                options[name] = value
        if self.dataset is not None:
            options["calibrate"] = _source(self.dataset)
        return Asked(self.type, options, _kept(self.modules_to_not_convert))


@dataclass(frozen=True, slots=True)
class GGUFConfig:
    """A GGUF file. type: Q4_K_M, Q8_0, ... imatrix: an importance matrix. tensors: regular expression -> type."""

    type: str = "Q4_K_M"
    imatrix: str | Path | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)

    def asked(self) -> Asked:
        """The type and its options."""
        imatrix = None if self.imatrix is None else Path(self.imatrix)
        return Asked(self.type, {}, tuple(self.tensors.items()), imatrix)


Config = GPTQConfig | AWQConfig | BitsAndBytesConfig | RoundToNearestConfig | GGUFConfig


def quantize(
    model: str | Path,
    config: Config | str,
    output: str | Path,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a model with fewer bits.

    model: a GGUF file or a Hugging Face folder. config: or the name of a type, with its defaults (`nybble quantize
    --help` lists them). output: a file for GGUF, else a folder; it appears when it is complete, and the same call after
    an interruption goes on where that one stopped. force: replace it.

    Raises:
        ConfigError: the config cannot be used.
        CheckpointError, TokenizerError, ModelNotFoundError: the model cannot be read, or has a NaN.
        OutputError: the output exists or cannot be written.
    """
    asked = Asked(config) if isinstance(config, str) else config.asked()
    target = Path(output)
    request = QuantizeRequest(
        source=Path(model),
        target=target,
        method=find(asked.type, target),
        imatrix=asked.imatrix,
        tensors=asked.tensors,
        threads=threads,
        force=force,
        options=asked.options,
    )
    return request.method.run(request, Silent() if progress is None else progress)


def _calibration(dataset: Dataset, num_samples: int, sample_tokens: int) -> dict[str, object]:
    options: dict[str, object] = {"calibration_samples": num_samples, "calibration_tokens": sample_tokens}
    if dataset is not None:
        options["calibrate"] = _source(dataset)
    return options


def _source(dataset: Dataset) -> object:
    if isinstance(dataset, Path) and str(dataset) == SELF:  # a file that has this name
        return f"./{SELF}"
    return dataset if isinstance(dataset, str) else str(dataset) if isinstance(dataset, Path) else list(dataset or ())


def _kept(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The head is never quantised, so to name it says nothing new."""
    return tuple((re.escape(name), "fp16") for name in names if name != "lm_head")
