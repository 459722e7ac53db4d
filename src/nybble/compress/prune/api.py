"""`nybble.prune_model`: one call for a model in memory and for one on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nybble.compress.methods import Progress, Silent
from nybble.compress.prune.module import prune_module
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.run import run_prune
from nybble.compress.stage import StageResult
from nybble.core.errors import ConfigError

_AMOUNT = 0.3
_SMALLER = ("drop_layers", "ffn_width", "heads", "kv_groups")


def prune_model(model: Any, amount: float | None = None, **options: Any) -> Any:
    """Prune a model, and give what was pruned.

    A `torch.nn.Module` is pruned in place, like with `torch.nn.utils.prune`: the `amount` of each linear's and
    convolution's weights with the smallest magnitude becomes zero; embeddings and a language model's head stay. The
    module itself is returned. Without an amount it is 0.3. options: as `nybble.compress.prune.module.prune_module` has
    them (nm, method, scope, batches, exclude, keep_masks).

    A path (a Hugging Face folder or a GGUF file) stays as it is: the pruned model is written to `output`, by default
    `NAME-pruned` beside it, whose path is returned. options: output, force, progress, and the fields of `PruneOptions`;
    the method is magnitude unless one is named or the model is made smaller (drop_layers, ffn_width, heads, kv_groups).
    `prune` is the same with all figures.

    Zeros alone make no file smaller and nothing faster. Raises as `prune_module` and `prune` do.
    """
    if amount is None and not any(name in options for name in ("nm", *_SMALLER)):
        amount = _AMOUNT
    if isinstance(model, nn.Module):
        prune_module(model, amount, **options)
        return model
    if not isinstance(model, str | Path):
        raise ConfigError(f"prune_model takes a torch.nn.Module or the path of a model, not {type(model).__name__}")
    source = Path(model)
    output, force, progress = (options.pop(name, None) for name in ("output", "force", "progress"))
    suffix = ".gguf" if source.suffix.lower() == ".gguf" else ""
    target = (
        Path(output) if output is not None else source.with_name(source.name.removesuffix(suffix) + "-pruned" + suffix)
    )
    chosen = _options(amount, options)
    prune(source, target, chosen, force=bool(force), progress=progress)
    return target


def _options(amount: float | None, given: dict[str, Any]) -> PruneOptions:
    if "method" not in given and not any(name in given for name in _SMALLER):
        given = {**given, "method": "magnitude"}
    try:
        return PruneOptions(amount=amount, **given)
    except TypeError as e:
        raise ConfigError(f"prune_model: {e}") from e


def prune(
    source: str | Path,
    target: str | Path,
    options: PruneOptions,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> StageResult:
    """Write a pruned model: a GGUF file if the name of `target` ends so, else a Hugging Face folder.

    resume: go on where an interrupted run with the same options stopped. Raises as `run_prune`.
    """
    told = Silent() if progress is None else progress
    return run_prune(Path(source), Path(target), options, progress=told, resume=resume, force=force)
