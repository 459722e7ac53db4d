"""A file of blocks gives back what was written to it, or nothing, whatever happened to it meanwhile."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.cache import block_file
from nybble.cache.block_file import BlockFile, BlockFileError
from nybble.core.errors import ConfigError

pytestmark = pytest.mark.unit
BYTES = 96
IDENTITY = bytes(range(32))
ROOM = 4096 * 2 + BYTES * 10  # ten slots


def open_file(path: Path, *, identity: bytes = IDENTITY, block_bytes: int = BYTES, max_bytes: int = ROOM) -> BlockFile:
    return BlockFile.open(path, identity=identity, block_bytes=block_bytes, max_bytes=max_bytes)


def content(number: int) -> bytes:
    return number.to_bytes(16, "big")


def data(number: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, BYTES).astype(np.uint8)


def filled(path: Path, numbers: range) -> None:
    file = open_file(path)
    for number in numbers:
        file.write(content(number), data(number))
    file.close()


def readable(file: BlockFile, numbers: range) -> list[int]:
    """Which blocks are whole; each must be what was written."""
    found = []
    for number in numbers:
        rows = file.read([content(number)])
        if len(rows):
            assert rows[0].tolist() == data(number).tolist()
            found.append(number)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf.prefix-cache"


def test_blocks_survive_a_restart(path: Path) -> None:
    filled(path, range(1, 6))
    file = open_file(path)
    assert len(file) == 5
    assert content(3) in file and content(6) not in file
    rows = file.read([content(2), content(4), content(9), content(1)])
    assert rows.tolist() == [data(2).tolist(), data(4).tolist()]  # up to the first that is not there
    assert file.num_damaged == 0


def test_only_its_user_may_read_it(path: Path) -> None:
    filled(path, range(1, 2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_size_is_a_limit_and_what_was_unused_longest_goes(path: Path) -> None:
    file = open_file(path)
    assert file.num_slots == 10
    for number in range(1, 11):
        file.write(content(number), data(number))
    assert file.touch(content(1))
    assert not file.touch(content(99))
    file.keep_order()
    file.write(content(11), data(11))
    assert readable(file, range(1, 12)) == [1, *range(3, 12)]
    file.close()
    again = open_file(path)  # the order is in the file
    for number in range(12, 20):
        again.write(content(number), data(number))
    assert readable(again, range(1, 20)) == [1, *range(11, 20)]
    assert path.stat().st_size <= ROOM


def test_an_order_that_was_not_kept_is_only_a_hint(path: Path) -> None:
    file = open_file(path)
    for number in range(1, 11):
        file.write(content(number), data(number))
    file.touch(content(1))
    file.close()
    again = open_file(path)
    again.write(content(11), data(11))
    assert readable(again, range(1, 12)) == list(range(2, 12))


@pytest.mark.parametrize("size", [1, 4096, 4096 + BYTES])
def test_a_size_without_room_for_a_block_is_refused(path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match="does not hold one block"):
        open_file(path, max_bytes=size)


@pytest.mark.parametrize("size", [4096 + 4096 + BYTES, 10_000, 123_456])
def test_no_file_is_larger_than_it_may_be(path: Path, size: int) -> None:
    file = open_file(path, max_bytes=size)
    for number in range(1, file.num_slots + 3):
        file.write(content(number), data(number))
    assert size - BYTES - 4096 < path.stat().st_size <= size
    assert len(file) == file.num_slots


@pytest.mark.parametrize("change", [{"identity": bytes(32)}, {"block_bytes": 64}, {"max_bytes": ROOM + BYTES}])
def test_another_model_setting_or_size_begins_anew(path: Path, change: dict, caplog: pytest.LogCaptureFixture) -> None:
    filled(path, range(1, 6))
    with caplog.at_level(logging.INFO):
        file = open_file(path, **change)
    assert len(file) == 0
    assert "begins anew" in caplog.text
    file.close()
    assert len(open_file(path, **change)) == 0


def test_slots_of_another_model_are_never_taken(path: Path) -> None:
    """Even if the header were exchanged: the digests have the identity as their key."""
    filled(path, range(1, 6))
    other = path.with_name("other.prefix-cache")
    open_file(other, identity=bytes(32)).close()
    path.write_bytes(other.read_bytes()[:4096] + path.read_bytes()[4096:])
    file = open_file(path, identity=bytes(32))
    assert len(file) == 5
    assert readable(file, range(1, 6)) == []
    assert file.num_damaged == 5


def test_swapped_slots_are_found(path: Path) -> None:
    filled(path, range(1, 3))
    whole = path.read_bytes()
    first, second = whole[-2 * BYTES : -BYTES], whole[-BYTES:]
    path.write_bytes(whole[: -2 * BYTES] + second + first)
    assert readable(open_file(path), range(1, 3)) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_gives_a_wrong_block(tmp_path_factory: pytest.TempPathFactory, chosen: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.prefix-cache"
    filled(path, range(1, 9))
    raw = bytearray(path.read_bytes())
    # A page of padding would take most of the damage.
    places = st.integers(0, 80) | st.integers(4096, 4096 + 40 * 8) | st.integers(2 * 4096, len(raw) - 1)
    for _ in range(chosen.draw(st.integers(1, 6))):
        raw[chosen.draw(places)] ^= chosen.draw(st.integers(1, 255))
    if chosen.draw(st.booleans()):
        del raw[chosen.draw(st.integers(0, len(raw))) :]
    path.write_bytes(raw)
    file = open_file(path)
    readable(file, range(1, 9))
    file.write(content(9), data(9))
    assert 9 in readable(file, range(1, 10))
    file.close()
    again = open_file(path)
    assert 9 in readable(again, range(1, 10))
    again.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["write", "touch", "read", "reopen"]), st.integers(1, 25)), max_size=60))
def test_any_history_keeps_the_newest(tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("history") / "a.prefix-cache"
    file = open_file(path)
    order: list[int] = []  # a model of it: what was of no use for longest first
    for action, number in history:
        if action == "write" and number not in order:
            file.write(content(number), data(number))
            order = [*order, number][-10:]
        elif action == "touch":
            assert file.touch(content(number)) == (number in order)
            if number in order:
                order = [*(n for n in order if n != number), number]
        elif action == "read":
            assert (readable(file, range(number, number + 1)) == [number]) == (number in order)
        else:
            file.keep_order()
            file.close()
            file = open_file(path)
    assert readable(file, range(1, 26)) == sorted(order)
    file.close()


@pytest.mark.parametrize("length", [0, 3, 60, 4096, 4100, 4096 + 3 * 40, 8192, 8192 + BYTES + 1])
def test_a_file_that_was_cut(path: Path, length: int) -> None:
    filled(path, range(1, 6))
    os.truncate(path, length)
    file = open_file(path)
    assert set(readable(file, range(1, 6))) <= {1}
    file.write(content(7), data(7))
    assert readable(file, range(7, 8)) == [7]


def test_a_file_that_is_cut_while_it_is_open(path: Path) -> None:
    filled(path, range(1, 6))
    file = open_file(path)
    os.truncate(path, 0)
    assert readable(file, range(1, 6)) == []


def test_one_sentence_about_damage(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(path, range(1, 6))
    raw = path.read_bytes()
    path.write_bytes(raw[:8192] + bytes(len(raw) - 8192))
    file = open_file(path)
    assert readable(file, range(1, 6)) == []
    assert len(caplog.records) == 1 and "a damaged block was dropped" in caplog.text
    assert file.num_damaged == 5
    file.close()
    assert len(open_file(path)) == 0  # they are gone from the file too


def test_a_second_process_reads_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(path, range(1, 6))
    writer = open_file(path)
    reader = open_file(path)
    assert writer.writable and not reader.writable
    assert "written by another process" in caplog.text
    assert readable(reader, range(1, 6)) == [1, 2, 3, 4, 5]
    for number in range(6, 12):  # one slot is used anew
        writer.write(content(number), data(number))
    assert readable(reader, range(1, 12)) == [2, 3, 4, 5]
    assert reader.num_damaged == 0  # it was replaced, not damaged
    writer.close()
    assert open_file(path).writable


def test_a_second_process_with_another_model_goes_without(path: Path) -> None:
    filled(path, range(1, 6))
    writer = open_file(path)
    with pytest.raises(BlockFileError, match="another process uses it"):
        open_file(path, identity=bytes(32))
    assert readable(writer, range(1, 6)) == [1, 2, 3, 4, 5]


def test_the_lock_ends_with_the_process(path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from nybble.cache.block_file import BlockFile; import numpy as np\n"
        f"f = BlockFile.open(Path(sys.argv[1]), identity=bytes(range(32)), block_bytes={BYTES}, max_bytes={ROOM})\n"
        f"f.write(bytes(15) + b'\\1', np.zeros({BYTES}, np.uint8)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    file = open_file(path)
    assert file.writable
    assert file.read([content(1)]).tolist() == [[0] * BYTES]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(BlockFileError, match="is left alone"):
        open_file(path)
    assert path.read_text() == "years of work"


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BlockFileError, match="No such file"):
        open_file(tmp_path / "no" / "a.prefix-cache")
    with pytest.raises(BlockFileError, match="directory"):
        open_file(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BlockFileError, match="symbolic links"):
        open_file(tmp_path / "loop")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_read_only_file_is_read(path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    filled(path, range(1, 6))
    really = os.open

    def read_only(name: object, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(error, os.strerror(error))
        return really(name, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(block_file.os, "open", read_only)
    file = open_file(path)
    assert not file.writable
    assert readable(file, range(1, 6)) == [1, 2, 3, 4, 5]
    with pytest.raises(BlockFileError, match="it is read-only"):
        open_file(path, identity=bytes(32))
    path.unlink()
    with pytest.raises(BlockFileError, match="cannot keep the prefix cache"):
        open_file(path)


@pytest.mark.parametrize("written", [0, 40, 50, 130])
def test_a_full_disk_leaves_no_wrong_block(path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """The disk takes so many bytes more; 40 are a record."""
    filled(path, range(1, 11))
    file = open_file(path)
    really, left = os.pwrite, written

    def until_full(descriptor: int, view: memoryview, at: int) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = really(descriptor, view[:left], at)
        left -= done
        return done

    monkeypatch.setattr(block_file.os, "pwrite", until_full)
    with pytest.raises(OSError, match="No space"):
        file.write(content(11), data(11))
    assert readable(file, range(1, 12)) == list(range(2, 11))
    monkeypatch.setattr(block_file.os, "pwrite", really)
    file.close()
    assert readable(open_file(path), range(2, 12)) == list(range(2, 11))


def test_a_full_disk_at_the_beginning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, view: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_file.os, "pwrite", full)
    with pytest.raises(BlockFileError, match="No space left"):
        open_file(path)


def test_nothing_is_known_after_the_end(path: Path) -> None:
    filled(path, range(1, 6))
    file = open_file(path)
    file.close()
    file.close()
    assert content(1) not in file
    assert len(file.read([content(1)])) == 0
