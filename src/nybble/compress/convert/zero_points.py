"""GPTQ folders whose label says the wrong version, so that every zero point would be read one off.

Version 1 stores zero points less one, version 2 as they are, and files are known that carry the other's label.

- Symmetric ones give themselves away: the zero point must be 2**(bits - 1).
- Of the others, weights tell: they lie around zero, so the mean of code - zero point is near 0 if the zero points are
  right, and near 1 or -1 if they are one off. It is taken for many linears, and nearly all must agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nybble.formats.dialects.gptq import read_gptq
from nybble.formats.dialects.logical import Logical, Tensors
from nybble.formats.stored import read_array
from nybble.formats.words import unpack_words
from nybble.quant.weights import GroupedInt

_NAMES = ("gptq", "gptq_v2")
_LINEARS = 24  # that are looked at, evenly spread
_OFF, _NEAR = 0.6, 0.4  # mean code - zero point: at least this for the label, at most this for the other version
_AGREEING = 0.9  # of the linears


def examine(config: Mapping[str, object], tensors: Tensors, where: str) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """The quantisation config, with the version that the zero points have, and sentences if it is not the label's.

    Raises CheckpointError for a GPTQ folder that cannot be right.
    """
    if config.get("quant_method") != "gptq":
        return config, ()
    label = str(config.get("checkpoint_format", config.get("format", "gptq")))
    as_labelled = read_gptq(config, tensors, where)
    if label not in _NAMES or not as_labelled:
        return config, ()
    other = _NAMES[label == "gptq"]
    swapped = {**config, "checkpoint_format": other}
    step = -(-len(as_labelled) // _LINEARS)
    sample = as_labelled[::step]
    symmetric = [_symmetric_version(logical, bool(config.get("sym", True))) for logical in sample]
    if all(version == other for version in symmetric):
        reason = "all of them are in the middle only if so"
    elif any(version is not None for version in symmetric):
        return config, ()
    else:
        as_other = {logical.name: logical for logical in read_gptq(swapped, tensors, where)}
        means = [(_mean_offset(logical), _mean_offset(as_other[logical.name])) for logical in sample]
        wrong = sum(abs(own) >= _OFF and abs(theirs) <= _NEAR for own, theirs in means)
        if wrong < _AGREEING * len(means):
            return config, ()
        own, theirs = (float(np.median(column)) for column in zip(*means, strict=True))
        reason = f"so weights lie {theirs:+.2f} steps around zero instead of {own:+.2f}"
    versions = {"gptq": "version 1, less one", "gptq_v2": "version 2, as they are"}
    note = (
        f"the folder is labelled {label}, but its zero points are stored as in {other} ({versions[other]}): {reason}; "
        "they are read so"
    )
    return swapped, (note,)


def _symmetric_version(logical: Logical, symmetric: bool) -> str | None:
    """The version in which every zero point is in the middle, if the folder says that it is symmetric."""
    words = next(read_array(part) for part in logical.parts if part.name.endswith(".qzeros"))
    stored, middle = unpack_words(words, logical.bits, logical.shape[0]), 1 << (logical.bits - 1)
    if not symmetric or not stored.size or not (stored == stored[0, 0]).all():
        return None
    return {middle: "gptq_v2", middle - 1: "gptq"}.get(int(stored[0, 0]))


def _mean_offset(logical: Logical) -> float:
    weight = logical.read()
    assert isinstance(weight, GroupedInt)
    middle = float(1 << (weight.bits - 1))
    if weight.zeros is None:
        zero = middle
    elif weight.g_idx is None:
        zero = float(weight.zeros.mean())
    else:
        counts = np.bincount(weight.g_idx, minlength=weight.zeros.shape[1])
        zero = float((weight.zeros * counts).sum() / (counts.sum() * len(weight.zeros)))
    return float(weight.codes.mean()) - zero
