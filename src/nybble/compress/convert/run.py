"""Which conversion is meant, and whether there is one."""

from __future__ import annotations

from pathlib import Path

from nybble.compress.convert.outcome import Conversion, Outcome
from nybble.compress.convert.to_dialect import to_dialect
from nybble.compress.convert.to_float import to_float
from nybble.compress.convert.to_gguf import to_gguf
from nybble.compress.methods import Progress
from nybble.core.errors import ConfigError, ModelNotFoundError

TARGETS = ("gguf", "hf", "gptq", "awq", "compressed-tensors")
_DTYPES = {
    "f32": "F32", "fp32": "F32", "float32": "F32", "f16": "F16", "fp16": "F16", "float16": "F16", "bf16": "BF16",
    "bfloat16": "BF16",
}  # fmt: skip


def convert(
    source: Path,
    target: Path,
    progress: Progress,
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Write `target`, prove it, and only then give it its name; with dry_run only say what would be written.

    to: one of TARGETS; None: gguf if the name of `target` ends so. dtype: of the tensors of a plain folder.

    Raises:
        ConfigError: the options do not go together, or the target cannot say what the source has.
        CheckpointError, TokenizerError, ModelNotFoundError: the source cannot be read, or not be said in the target.
        OutputError: the target exists or cannot be written.
    """
    if not source.exists():
        raise ModelNotFoundError(f"{source} does not exist: give a GGUF file or a model folder")
    is_gguf = target.suffix.lower() == ".gguf"
    if to is None and not is_gguf:
        raise ConfigError(f"{target} does not end in .gguf: say what it will be with --to {', '.join(TARGETS[1:])}")
    chosen = "gguf" if to is None else to.lower()
    if chosen not in TARGETS:
        raise ConfigError(f"--to {to} is nothing that convert writes: it writes {', '.join(TARGETS)}")
    if chosen == "gguf" and not is_gguf:
        raise ConfigError(f"{target} does not end in .gguf: GGUF files are found by their names")
    if chosen != "gguf" and is_gguf:
        raise ConfigError(f"{target} ends in .gguf, but --to {chosen} writes a folder: choose another name")
    if dtype is not None and chosen != "hf":
        raise ConfigError(f"--dtype goes with --to hf only: --to {chosen} changes no value (nybble quantize does)")
    if dtype is not None and dtype.lower() not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is no type of float: it can be f32, f16 or bf16")
    asked = Conversion(source, target, None if dtype is None else _DTYPES[dtype.lower()], force, dry_run)
    if chosen == "gguf":
        return to_gguf(asked, progress)
    return to_float(asked, progress) if chosen == "hf" else to_dialect(asked, chosen, progress)
