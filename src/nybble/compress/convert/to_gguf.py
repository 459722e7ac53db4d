"""From a Hugging Face folder to a GGUF file, without changing a value."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nybble.compress.gguf.mixes import MIXES, is_quantised
from nybble.compress.gguf.source import open_source
from nybble.compress.gguf.write import check_target, make_plan, write
from nybble.compress.methods import Progress, QuantizeReport
from nybble.core.errors import ConfigError


def to_gguf(source_path: Path, target: Path, progress: Progress, *, force: bool = False) -> QuantizeReport:
    """Vectors become float32, in which every value of a shorter type can be said; matrices stay what they are.

    Raises:
        ConfigError: the source is a GGUF file already, or the target's name is not that of one.
        CheckpointError, TokenizerError, ModelNotFoundError: the folder cannot be read or said in GGUF.
        OutputError: the target exists or cannot be written.
    """
    if source_path.is_file():
        raise ConfigError(f"{source_path} is a file: convert reads Hugging Face folders, quantize reads GGUF files too")
    if target.suffix != ".gguf":
        raise ConfigError(f"{target} does not end in .gguf, and GGUF files are all that convert writes")
    check_target(source_path, target, force=force)
    source = open_source(source_path)
    formats = [tensor.info.format for tensor in source.tensors]
    matrices = Counter(tensor.info.format.name for tensor in source.tensors if is_quantised(tensor.info))
    commonest = matrices.most_common(1)[0][0] if matrices else "F32"
    file_type = next((mix.file_type for mix in MIXES.values() if mix.default == commonest), 0)
    plan = make_plan(source, formats, file_type, {}, ())
    for note in plan.report.notes:
        progress.note(note)
    write(plan, target, progress, force=force)
    return plan.report
