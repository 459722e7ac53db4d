"""What a recipe's models are worth: parameters, bytes, perplexity and KL divergence, tokens per second.

All models read the same text and run on the same machine, the source among them.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from nybble.checkpoint import open_checkpoint
from nybble.compress.methods import Progress
from nybble.compress.recipe.plan import ReportOptions
from nybble.core.errors import ConfigError
from nybble.engine.load import load_model
from nybble.engine.roofline import measure_roofline
from nybble.evaluate.compare import evaluate
from nybble.evaluate.report import Report
from nybble.evaluate.speed import Spread, plan
from nybble.evaluate.speed import measure as measure_speed
from nybble.formats.output import OutputFile

_PROMPT, _NEW, _REPEAT = 256, 32, 5
_TEXT_NAME = "held-out parts of Python's standard library.txt"
# Modules of prose and code that calibration and training do not read (nybble.compress.calibration.text).
_HELD_OUT = (
    "cmd", "codeop", "copy", "dis", "filecmp", "fileinput", "fnmatch", "ftplib", "getopt", "glob", "hmac",
    "imaplib", "locale", "mimetypes", "netrc", "pdb", "plistlib", "poplib", "pprint", "profile", "pstats", "queue",
    "sched", "selectors", "shelve", "shlex", "smtplib", "socketserver", "stringprep", "timeit", "trace", "warnings",
    "weakref", "zipapp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: of reading a prompt of 256, of generating 32 after 128, one stream."""

    prompt: Spread
    decode: Spread


@dataclass(frozen=True, slots=True)
class Measured:
    """The models in order, the source first. quality: of the source as the reference, and of all others."""

    parameters: tuple[int, ...]
    zeros: tuple[float, ...]
    quality: Report
    speeds: tuple[Speed, ...]
    threads: int


def measure(
    paths: Sequence[Path], options: ReportOptions, work: Path, progress: Progress, *, threads: int | None
) -> Measured:
    """paths: the source, then what each stage wrote. work: a folder for what is needed meanwhile.

    Raises ConfigError if the text is too short, and what `evaluate` raises.
    """
    text = options.text if options.text is not None else _held_out_text(work)
    quality = evaluate(
        [*paths[1:]],
        text,
        reference=paths[0],
        ctx=options.ctx,
        tokens=options.tokens,
        threads=threads,
        progress=_Windows(progress),
    )
    speeds: list[Speed] = []
    used = 0
    if options.speed:
        tests = plan(_PROMPT, _NEW, [1])
        roofline = measure_roofline(threads)
        for path in paths:
            loaded = load_model(path, threads=threads, context=max(test.context for test in tests))
            used = loaded.model.threads
            prompt, decode = measure_speed(loaded, tests, roofline=roofline, repeat=_REPEAT)
            speeds.append(Speed(prompt.tok_s, decode.tok_s))
    counted = [_count(path) for path in paths]
    return Measured(
        tuple(count for count, _ in counted), tuple(zeros for _, zeros in counted), quality, tuple(speeds), used
    )


def _count(path: Path) -> tuple[int, float]:
    """Parameters, and the share of those in matrices of the layers that are zero."""
    checkpoint = open_checkpoint(path)
    zeros = weights = 0
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("layers.") and len(tensor.shape) == 2:
            values = tensor.to_float32()
            zeros += int((values == 0).sum())
            weights += values.size
            checkpoint.release(tensor)
    total = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return total, zeros / max(1, weights)


def _held_out_text(work: Path) -> Path:
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [library / f"{name}.py" for name in _HELD_OUT]
    text = "\n\n".join(part.read_text("utf-8", errors="replace") for part in parts if part.is_file())
    if not text:
        raise ConfigError("this Python comes without the source of its library: give the report a text to read")
    path = work / _TEXT_NAME
    with OutputFile(path, force=True) as file:
        file.write(text.encode("utf-8"))
    return path


class _Windows:
    """An evaluation's progress, told as a stage's."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, total: int) -> None:
        self._progress.start(total)

    def advance(self, windows: int, what: str) -> None:
        self._progress.advance(windows, f"measuring {what}")
