"""Loading: an error in one half does not wait for the other, and the file's pages go back."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from formats import raw
from nybble.backends.cpu import CpuModel
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.errors import TokenizerError
from nybble.engine import load
from nybble.engine.load import load_model
from nybble.formats.mapping import MappedFile
from tiny_files import gguf_model


def test_an_error_in_the_tokenizer_stops_the_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = raw.save(tmp_path / "model.gguf", gguf_model())  # without a tokenizer
    failed = threading.Event()
    packed: list[str] = []

    def pack(checkpoint: Checkpoint, **kwargs: object) -> CpuModel:
        for name, _ in checkpoint.tensors.items():
            packed.append(name)
            failed.wait(10)
        raise AssertionError("all tensors were packed")

    def fail(source: object) -> None:
        threading.Timer(0.05, failed.set).start()  # when the error is on its way
        raise TokenizerError("no tokenizer")

    monkeypatch.setattr(CpuModel, "load", pack)
    monkeypatch.setattr(load, "load_tokenizer", fail)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load_model(path)
    assert len(packed) == 1


def test_tensors_are_all_there_until_stopped() -> None:
    tensors: dict[str, Tensor] = dict.fromkeys("abc")  # type: ignore[assignment]
    stop = threading.Event()
    stoppable = load._UntilStopped(tensors, stop)
    assert (list(stoppable.items()), len(stoppable)) == (list(tensors.items()), 3)
    stop.set()
    with pytest.raises(RuntimeError, match="stopped"):
        list(stoppable)


def test_pages_are_given_back_while_they_are_read(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("needs Linux")
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    file = MappedFile(path)

    def resident_kib() -> int:
        lines = iter(smaps.read_text().splitlines())
        return sum(int(next(x for x in lines if x.startswith("Rss:")).split()[1]) for x in lines if str(path) in x)

    sum(file.view[::4096])
    assert resident_kib() > 4 << 10
    file.release(1, file.size - 1)
    assert resident_kib() < 1 << 10
    sum(file.view[::4096])
    file.release()
    assert resident_kib() == 0
    file.close()
