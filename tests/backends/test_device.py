"""Where a model computes: what each option comes to on a machine without a GPU, and the sentences that refuse it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nybble.backends import device as devices
from nybble.backends.device import DeviceOptions, gpu_problem, resolve_device
from nybble.core.errors import ConfigError

pytestmark = pytest.mark.unit

LOOK = devices._driver_is_there  # what other tests have in its place sees nothing


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_driver_is_there", lambda: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu, cuda, cuda:N or torch-cpu"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16"),
        ({"tensor_parallel_size": 0}, "between 1 and 64"),
        ({"gpu_memory_utilization": 1.5}, "above 0 and at most 1"),
        ({"gpu_memory_utilization": 0.0}, "above 0 and at most 1"),
        ({"device_map": "balanced"}, "device_map must be 'auto'"),
        ({"device_map": "auto", "tensor_parallel_size": 2}, "give only one of them"),
        ({"device": "cuda:1", "tensor_parallel_size": 2}, "takes the GPUs from the first one on"),
    ],
)
def test_values_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeviceOptions(**options)


def test_without_a_gpu(no_gpu: None) -> None:
    assert resolve_device(DeviceOptions()) == "cpu"
    assert resolve_device(DeviceOptions(device="cpu")) == "cpu"
    for options, message in (
        ({"device": "cuda"}, "no NVIDIA GPU or driver was found on this machine; device 'cpu' works without"),
        ({"device": "cuda:1"}, "device 'cuda:1' cannot be used"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1 on the CPU, not 2"),
        ({"device": "cpu", "dtype": "bfloat16"}, "dtype must be 'auto' on the CPU"),
        ({"device_map": "auto"}, "no GPU is used here: leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_device(DeviceOptions(**options))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_driver_is_there", lambda: True)
    monkeypatch.setattr(devices, "_is_installed", lambda package: package == "torch")
    with pytest.raises(ConfigError, match=r"the package triton, which is not installed: .*nybble\[cuda\]"):
        resolve_device(DeviceOptions(device="cuda"))
    assert resolve_device(DeviceOptions()) == "cpu"
    assert "runs on the CPU: a GPU needs the package triton" in caplog.text
    monkeypatch.setattr(devices, "_is_installed", lambda package: False)
    with pytest.raises(ConfigError, match="'torch-cpu' needs PyTorch"):
        resolve_device(DeviceOptions(device="torch-cpu"))
    monkeypatch.setattr(devices, "_is_installed", lambda package: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_problem() == "CUDA_VISIBLE_DEVICES hides all GPUs: unset it"


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_driver_is_there", lambda: True)
    monkeypatch.setattr(devices, "_is_installed", lambda package: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in (gpu_problem() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    problem = gpu_problem() or ""
    assert "too old (found version 11040)" in problem
    assert "may need a newer driver" in problem
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    assert gpu_problem() == "an old GPU has compute capability 6.1, and Triton needs 7.0 or above"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpu_problem", lambda: None)
    monkeypatch.setattr(devices, "gpu_names", lambda: ["one", "another"])
    assert resolve_device(DeviceOptions(device="cuda:1")) == "cuda:1"
    assert resolve_device(DeviceOptions(device="auto")) == "cuda"
    with pytest.raises(ConfigError, match="'cuda:2' cannot be used: PyTorch sees 2 GPUs, and the first one is cuda:0"):
        resolve_device(DeviceOptions(device="cuda:2"))


def test_the_driver_is_looked_for_in_device_files(tmp_path: Path) -> None:
    assert not LOOK(tmp_path)
    (tmp_path / "nvidia-uvm").touch()
    assert not LOOK(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert LOOK(tmp_path)


def test_the_cpu_path_imports_no_torch() -> None:
    code = (
        "import nybble.engine.start, nybble.llm, sys\n"
        "from nybble.backends.device import DeviceOptions, resolve_device\n"
        "resolve_device(DeviceOptions(device='cpu'))\n"
        "print('torch' in sys.modules or 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
