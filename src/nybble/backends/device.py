"""Where a model computes: the options, and a look at the machine that imports no torch.

The CPU backend is native and needs none; `resolve_device` imports torch only when a GPU seems to be there or one was
asked for.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from nybble.core import env
from nybble.core.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32", "half", "float")
NEEDS_TORCH = "install it with: pip install 'nybble[cuda]'"
DEFAULT_UTILISATION = 0.9


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """Where and how a model computes.

    device: "cpu" is the native backend; "cuda" a GPU (or "cuda:1" the second one); "torch-cpu" the torch backend on
    the CPU; "auto" a GPU if there is one that can be used, else "cpu". dtype: that torch computes in; "auto" is
    bfloat16 on a GPU and float32 on the CPU. tensor_parallel_size: over how many GPUs, or processes on the CPU, the
    matrices are split. gpu_memory_utilization: the share of a GPU's memory that weights, cache and all else may take.
    enforce_eager: do not record CUDA graphs. device_map: "auto" puts layers that do not fit on the GPU on the CPU.

    Raises:
        ConfigError: a value makes no sense.
    """

    device: str = "auto"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda", "torch-cpu") and not re.fullmatch(r"cuda:\d{1,3}", self.device):
            raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or torch-cpu, not {self.device!r:.60}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r:.60}")
        if not 1 <= self.tensor_parallel_size <= 64:
            raise ConfigError(f"tensor_parallel_size must be between 1 and 64, not {self.tensor_parallel_size}")
        share = self.gpu_memory_utilization
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")
        if self.device_map not in (None, "auto"):
            raise ConfigError(f"device_map must be 'auto' or left out, not {self.device_map!r:.60}")
        if self.device_map is not None and self.tensor_parallel_size > 1:
            raise ConfigError("device_map spreads layers and tensor_parallel_size splits them: give only one of them")
        if self.tensor_parallel_size > 1 and ":" in self.device:
            raise ConfigError(
                f"tensor_parallel_size takes the GPUs from the first one on: device {self.device!r} is one"
            )


def resolve_device(options: DeviceOptions) -> str:
    """ "cpu", "torch-cpu", "cuda" or "cuda:N": what `options.device` comes to on this machine.

    Raises:
        ConfigError: what was asked for cannot be had, or an option does not go with the native backend.
    """
    if options.device == "cpu":
        return _native(options)
    if options.device == "auto":
        problem = gpu_problem()
        if problem is None:
            return "cuda"
        if _driver_is_there():
            logger.warning("the model runs on the CPU: %s", problem)
        return _native(options)
    if options.device == "torch-cpu":
        if not _is_installed("torch"):
            raise ConfigError(f"device 'torch-cpu' needs PyTorch, which is not installed: {NEEDS_TORCH}")
        if options.device_map is not None:
            raise ConfigError("device_map spreads layers over a GPU and the CPU: with device 'torch-cpu' leave it out")
        return "torch-cpu"
    problem = gpu_problem() or _number_problem(options.device)
    if problem is not None:
        raise ConfigError(f"device {options.device!r} cannot be used: {problem}; device 'cpu' works without")
    return options.device


def gpu_problem() -> str | None:
    """Why no GPU can be used, in a few words; None if one can. Imports torch only if a driver shows devices."""
    if env.hides_all_gpus():
        return "CUDA_VISIBLE_DEVICES hides all GPUs: unset it"
    if not _driver_is_there():
        return "no NVIDIA GPU or driver was found on this machine"
    for package in ("torch", "triton"):
        if not _is_installed(package):
            return f"a GPU needs the package {package}, which is not installed: {NEEDS_TORCH}"
    return _torch_problem()


def gpu_names() -> list[str]:
    """Of the GPUs, where gpu_problem says that they can be used."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _number_problem(device: str) -> str | None:
    """Why there is no such GPU among those that can be used."""
    count, number = len(gpu_names()), int(device.partition(":")[2] or 0)
    return None if number < count else f"PyTorch sees {count} GPUs, and the first one is cuda:0"


def _driver_is_there(folder: Path = Path("/dev")) -> bool:
    """Linux's device files, and what WSL has instead."""
    return any(folder.glob("nvidia[0-9]*")) or (folder / "dxg").exists()


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torch_problem() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"the installed PyTorch {torch.__version__} was built without CUDA: {NEEDS_TORCH}"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # says what is_available keeps to itself
    except RuntimeError as error:
        return (
            f"PyTorch finds no usable GPU ({_first_line(error)}): its CUDA {torch.version.cuda} may need a newer driver"
        )
    if not torch.cuda.device_count():
        return "PyTorch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and Triton needs 7.0 or above"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]


def _native(options: DeviceOptions) -> str:
    """Raises ConfigError for what only torch does."""
    if options.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size must be 1 on the CPU, not {options.tensor_parallel_size}: the native backend uses "
            "all cores in one process (device 'torch-cpu' would split the model over processes, which is slower)"
        )
    if options.dtype != "auto":
        raise ConfigError(
            f"dtype must be 'auto' on the CPU, not {options.dtype!r}: weights stay in the encoding of their file"
        )
    if options.device_map is not None:
        raise ConfigError("device_map spreads layers over a GPU and the CPU, and no GPU is used here: leave it out")
    return "cpu"
