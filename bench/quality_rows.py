"""The rows of the quality table: which files are made of the reference, by which program, with which options."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nybble.compress.calibration.text import default_texts
from nybble.formats.gguf import GgufFile

NYBBLE = str(Path(sys.executable).with_name("nybble"))
PLAIN = ("F32", "F16", "BF16")
GGUF = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
CALIBRATED = ("gptq-8bit", "gptq-4bit", "gptq-3bit", "gptq-2bit", "awq-4bit")
SAMPLE_TOKENS = 512
ASYMMETRIC = ("--asymmetric",)
BLIND = ("--clip-search",)  # without knowing which inputs matter
OWN_TEXT = ("--calibrate", "self")


@dataclass(frozen=True)
class Row:
    """One file. tool: "nybble" or "llama.cpp". imatrix: made with the importance matrix of the calibration text."""

    tool: str
    type: str
    imatrix: bool = False
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.tool, self.type, *(["imatrix"] if self.imatrix else []), *self.options])

    @property
    def is_gguf(self) -> bool:
        return self.type.upper() == self.type

    @property
    def file_name(self) -> str:
        return self.name.replace(" ", "_").replace("/", "-") + (".gguf" if self.is_gguf else "")


def all_rows() -> list[Row]:
    """Every type, ours before llama.cpp's, so that equal files are seen to be equal."""
    rows = [Row("nybble", one) for one in PLAIN]
    for kind in GGUF:
        for imatrix in (False, True) if kind != "Q8_0" else (False,):  # Q8_0 knows no weights
            rows += [Row("nybble", kind, imatrix), Row("llama.cpp", kind, imatrix)]
    rows.append(Row("nybble", "MXFP4"))
    rows += [Row("nybble", one) for one in ("fp16", "bf16", "fp8", "llm-int8", "nf4", "fp4")]
    rows.append(Row("nybble", "nf4", options=("--double-quant",)))
    rows.append(Row("nybble", "int8"))
    for kind in ("int4", "int3", "int2"):
        rows += [Row("nybble", kind), Row("nybble", kind, imatrix=True)]
        rows += [Row("nybble", kind, options=options) for options in (BLIND, ASYMMETRIC, (*ASYMMETRIC, *BLIND))]
    rows += [Row("nybble", one) for one in CALIBRATED]
    rows.append(Row("nybble", "gptq-4bit", options=("--desc-act",)))
    rows += [Row("nybble", one, options=OWN_TEXT) for one in CALIBRATED]
    return rows


@dataclass(frozen=True)
class Workshop:
    """Makes the files. Everything but `reference` and the programs lies in `folder` and is made when it is needed.

    samples: windows of the calibration text that importance matrices, GPTQ and AWQ look at.
    """

    reference: Path
    folder: Path
    llama_bin: Path | None
    threads: int
    samples: int = 64

    def make(self, row: Row) -> Path:
        """The file or folder of a row."""
        target = self.folder / row.file_name
        if target.exists():
            return target
        if row.tool == "llama.cpp":
            self._llama_quantize(row, target)
            return target
        command = [NYBBLE, "quantize", self.reference, target, "--to", row.type, "--threads", self.threads]
        if row.imatrix:
            command += ["--imatrix", self.imatrix()]
        if row.type in CALIBRATED:
            command += ["--calibration-samples", self.samples, "--calibration-tokens", SAMPLE_TOKENS]
            if row.options != OWN_TEXT:
                command += ["--calibrate", self.calibration_text()]
        run([*command, *row.options])
        return target

    def calibration_text(self) -> Path:
        """What comes with Python: nybble's default, as a file, so that every tool reads the same."""
        path = self.folder / "calibration.txt"
        if not path.exists():
            path.write_text("\n\n".join(default_texts())[:2_000_000], "utf-8")
        return path

    def imatrix(self) -> Path:
        """One for all tools; nybble's and llama-imatrix's differ by less than their text does."""
        path = self.folder / "imatrix.gguf"
        if not path.exists():
            text = self.calibration_text()
            run([NYBBLE, "imatrix", self.reference, "--text", text, "-o", path, "--chunks", self.samples])
        return path

    def _llama_quantize(self, row: Row, target: Path) -> None:
        if self.llama_bin is None:
            raise SystemExit(f"{row.name} needs --llama-bin")
        source = self.folder / "f16.gguf"
        if not source.exists():
            run([NYBBLE, "convert", self.reference, source])
        command = [self.llama_bin / "llama-quantize", *(["--imatrix", self.imatrix()] if row.imatrix else [])]
        part = target.with_suffix(".part")
        libraries = {**os.environ, "LD_LIBRARY_PATH": str(self.llama_bin)}
        run([*command, source, part, row.type, self.threads], environment=libraries)
        part.replace(target)


def run(command: list[object], environment: dict[str, str] | None = None) -> str:
    """Standard output of a program; SystemExit with what it said if it failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def tensors_digest(path: Path) -> str | None:
    """A hash of all tensors of a GGUF file: equal ones compute the same. None for a folder."""
    if path.is_dir():
        return None
    found = hashlib.sha256()
    gguf = GgufFile(path)
    for name in sorted(gguf.tensors):
        tensor = gguf.tensors[name]
        found.update(f"{name} {tensor.format.name} {tensor.shape} ".encode())
        found.update(gguf.data(tensor))
    return found.hexdigest()
