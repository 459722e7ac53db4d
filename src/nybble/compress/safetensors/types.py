"""Registers the TYPEs that write folders. The passes themselves need torch, and are imported when one is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from nybble.compress.methods import Method, Progress, QuantizeReport, QuantizeRequest, register
from nybble.core.errors import ConfigError

_TYPES = {
    "fp16": ("rtn", "16-bit floats"),
    "bf16": ("rtn", "16-bit floats with the range of 32"),
    "fp8": ("rtn", "8-bit floats, a scale per row"),
    "int8": ("rtn", "8-bit integers, a scale per row"),
    "int4": ("rtn", "4-bit integers, a scale per 128 inputs"),
    "int3": ("rtn", "3-bit integers, a scale per 128 inputs"),
    "int2": ("rtn", "2-bit integers, a scale per 64 inputs"),
    "llm-int8": ("bnb", "bitsandbytes: 8 bits per row, outlier inputs in 16 bits"),
    "nf4": ("bnb", "bitsandbytes: 4 bits, quantiles of a normal distribution"),
    "fp4": ("bnb", "bitsandbytes: 4-bit floats"),
    "gptq-2bit": ("gptq", "GPTQ, 2 bits"),
    "gptq-3bit": ("gptq", "GPTQ, 3 bits"),
    "gptq-4bit": ("gptq", "GPTQ, 4 bits"),
    "gptq-8bit": ("gptq", "GPTQ, 8 bits"),
    "awq-4bit": ("awq", "AWQ, 4 bits"),
}


def _runner(name: str) -> Callable[[QuantizeRequest, Progress], QuantizeReport]:
    def run(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
        if importlib.util.find_spec("torch") is None:
            raise ConfigError(f"--to {request.method.name} needs PyTorch: pip install 'nybble[compress]'")
        walk, torch = importlib.import_module(f"nybble.compress.{name}.walk"), importlib.import_module("torch")
        threads = torch.get_num_threads()
        torch.set_num_threads(request.threads or threads)
        try:
            report: QuantizeReport = walk.quantize(request, progress)
        finally:
            torch.set_num_threads(threads)
        return report

    return run


for _name, (_module, _summary) in _TYPES.items():
    register(Method(_name, "safetensors", _summary, _runner(_module)))
