"""Which tensor of a GGUF file gets which type. A mix such as Q4_K_M gives more bits to the tensors that suffer most.

The rules are those of llama.cpp's quantizer (`src/llama-quant.cpp`, build 11434), so that files come out alike. They
know tensors by their names; `docs/quantise.md` has them as a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nybble.core.errors import ConfigError
from nybble.formats.gguf_writer import TensorInfo
from nybble.quant.formats import FORMATS, QuantFormat


@dataclass(frozen=True, slots=True)
class Mix:
    """One TYPE. default: what most matrices get; file_type: `general.file_type` of the file."""

    name: str
    default: str
    file_type: int
    summary: str


MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("F32", "F32", 0, "32-bit floats"),
        Mix("F16", "F16", 1, "16-bit floats"),
        Mix("BF16", "BF16", 32, "16-bit floats with the range of 32-bit ones"),
        Mix("Q8_0", "Q8_0", 7, "8.5 bits, no loss to speak of"),
        Mix("Q6_K", "Q6_K", 18, "6.6 bits"),
        Mix("Q5_K_M", "Q5_K", 17, "5.5 bits, half of attn_v and ffn_down with 6.6"),
        Mix("Q5_K_S", "Q5_K", 16, "5.5 bits"),
        Mix("Q5_1", "Q5_1", 9, "6 bits, simple"),
        Mix("Q5_0", "Q5_0", 8, "5.5 bits, simple"),
        Mix("Q4_K_M", "Q4_K", 15, "4.5 bits, half of attn_v and ffn_down with 6.6: a good first choice"),
        Mix("Q4_K_S", "Q4_K", 14, "4.5 bits, the first layers a little more"),
        Mix("Q4_1", "Q4_1", 3, "5 bits, simple"),
        Mix("Q4_0", "Q4_0", 2, "4.5 bits, simple"),
        Mix("Q3_K_L", "Q3_K", 13, "3.4 bits, attention outputs, attn_v and ffn_down with 5.5"),
        Mix("Q3_K_M", "Q3_K", 12, "3.4 bits, attention outputs, attn_v and ffn_down with 4.5"),
        Mix("Q3_K_S", "Q3_K", 11, "3.4 bits"),
        Mix("Q2_K", "Q2_K", 10, "2.6 bits, the sensitive matrices with 3.4: use an importance matrix"),
        Mix("IQ4_NL", "IQ4_NL", 25, "4.5 bits, uneven steps"),
        Mix("IQ4_XS", "IQ4_XS", 30, "4.25 bits, uneven steps"),
        Mix("MXFP4", "MXFP4", 38, "4.25 bits, the OCP format"),
    )
}

# Of a width that its blocks do not divide, a type becomes one with blocks of 32 weights that is no worse.
_FALLBACK = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"blk\.(\d+)\.")
# Parts of names of small or delicate matrices, which stay as they are.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight",
    "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight",
    "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules ask about a model."""

    arch: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    num_experts: int = 0

    @property
    def gqa(self) -> int:
        return self.num_q_heads // max(1, self.num_kv_heads)

    @property
    def is_70b(self) -> bool:
        """Eighty layers whose value matrices are small: they get more bits nearly for free."""
        if self.num_layers != 80:
            return False
        return self.arch == "qwen2" or (self.arch == "llama" and self.num_q_heads != self.num_kv_heads)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The type of one tensor. wanted: what it would have got if its width allowed it, else None."""

    info: TensorInfo
    format: QuantFormat
    wanted: str | None = None


@dataclass(slots=True)
class _Rules:
    """Walks over the tensors in file order, counting some kinds of them."""

    mix: Mix
    facts: Facts
    tied: bool
    has_imatrix: bool
    num_v: int
    seen: dict[str, int] = field(default_factory=dict)

    def take(self, kind: str) -> int:
        count = self.seen.get(kind, 0)
        self.seen[kind] = count + 1
        return count

    def of(self, name: str, width: int) -> str:
        kind = _kind(name)
        if kind == "output" or (self.tied and kind == "embedding"):
            return self._head(width)
        if kind == "embedding":
            return self.mix.default
        rule = _BY_KIND.get(kind)
        return self.mix.default if rule is None else rule(self, name)

    def _head(self, width: int) -> str:
        default = self.mix.default
        if default == "MXFP4" or width % FORMATS[default].block_size:
            return "Q8_0"
        return default if default == "Q8_0" else "Q6_K"

    def layer(self, kind: str, name: str) -> int:
        count = self.take(kind)
        found = _LAYER.match(name)
        # Experts of one layer do not follow each other in every file.
        return int(found[1]) if self.facts.num_experts > 1 and found else count


def _more_bits(i: int, count: int) -> bool:
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2


def _attn_v(rules: _Rules, name: str) -> str:
    mix, facts, i = rules.mix.name, rules.facts, rules.take("attn_v")
    kind = rules.mix.default
    if mix == "Q2_K":
        kind = "Q4_K" if facts.gqa >= 4 else "Q3_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if i < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and facts.gqa >= 4):
        kind = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(i, rules.num_v):
        kind = "Q6_K"
    elif mix == "Q4_K_S" and i < 4:
        kind = "Q5_K"
    if facts.is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if facts.num_experts == 8 else kind


def _attn_k(rules: _Rules, name: str) -> str:
    return "Q8_0" if rules.facts.num_experts == 8 else rules.mix.default


def _ffn_down(rules: _Rules, name: str) -> str:
    mix, kind = rules.mix.name, rules.mix.default
    i, count = rules.layer("ffn_down", name), rules.facts.num_layers
    falcon, early = rules.facts.arch == "falcon", i < count // 8
    if mix == "Q2_K":
        kind = "Q3_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if i < count // 16 else "Q4_K" if not falcon or _more_bits(i, count) else "Q3_K"
    elif mix == "Q3_K_L":
        kind = "Q4_K" if falcon else "Q5_K"
    elif mix == "Q4_K_M" and falcon:
        kind = "Q6_K" if i < count // 16 else "Q5_K" if _more_bits(i, count) else "Q4_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(i, count):
        kind = "Q6_K"
    elif early and ((mix in ("IQ4_NL", "IQ4_XS") and not rules.has_imatrix) or (mix == "Q4_K_S" and not falcon)):
        kind = "Q5_K"
    elif early and mix in ("Q4_0", "Q5_0") and rules.has_imatrix:
        kind = "Q4_1" if mix == "Q4_0" else "Q5_1"
    return kind


def _attn_output(rules: _Rules, name: str) -> str:
    mix, default = rules.mix.name, rules.mix.default
    if rules.facts.arch == "falcon":
        return "Q4_K" if mix == "Q3_K_L" else default
    if rules.facts.num_experts == 8:
        raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
        return "Q5_K" if mix in raised else default
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, default)


_BY_KIND: dict[str, Callable[[_Rules, str], str]] = {
    "attn_v": _attn_v,
    "attn_k": _attn_k,
    "ffn_down": _ffn_down,
    "attn_output": _attn_output,
}
_KINDS = (  # the first part that is found in a name decides
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_down", "ffn_down"),
)


def _kind(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((kind for part, kind in _KINDS if part in name), "")


def in_file_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """By layer, those outside the layers first, then by name: the order in which the rules count."""

    def key(info: TensorInfo) -> tuple[int, bytes]:
        found = _LAYER.match(info.name)
        return (int(found[1]) if found else -1, info.name.encode())

    return sorted(tensors, key=key)


def is_quantised(info: TensorInfo) -> bool:
    """Whether the rules touch a tensor at all: matrices, but no norms and nothing small or delicate."""
    name = info.name
    if not any(dim > 1 for dim in info.shape[:-1]) or not name.endswith("weight"):
        return False
    return name not in ("position_embd.weight", "token_types.weight") and not any(part in name for part in _KEPT)


def parse_overrides(overrides: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Raises ConfigError for a pattern that is not a regular expression or a type that cannot be written."""
    parsed = []
    for pattern, name in overrides:
        upper = name.upper()
        if upper not in {mix.default for mix in MIXES.values()}:
            known = ", ".join(dict.fromkeys(mix.default for mix in MIXES.values()))
            raise ConfigError(f"--tensor {pattern}={name}: {name} is not the type of a tensor; these are: {known}")
        try:
            parsed.append((re.compile(pattern), upper))
        except re.error as e:
            raise ConfigError(f"--tensor {pattern}={name}: the pattern is not a regular expression: {e}") from None
    return parsed


def assign(
    mix: Mix,
    facts: Facts,
    tensors: Sequence[TensorInfo],
    *,
    has_imatrix: bool = False,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
) -> list[Assignment]:
    """The type of every tensor, which must be in file order.

    Overrides, the first that is found in a name, hold only in mixes of quantised types. Raises ConfigError where one of
    them would change nothing.
    """
    num_v = sum(_kind(info.name) == "attn_v" for info in tensors)
    tied = not any(info.name == "output.weight" for info in tensors)
    rules = _Rules(mix, facts, tied, has_imatrix, num_v)
    if mix.default in _FLOATS and overrides:
        raise ConfigError(f"--tensor does not go with --to {mix.name}, which has one type for all matrices")
    used: set[int] = set()
    result = []
    for info in tensors:
        if not is_quantised(info):
            result.append(Assignment(info, info.format))
            continue
        if mix.default in _FLOATS:
            result.append(Assignment(info, FORMATS[mix.default]))
            continue
        hits = [i for i, (pattern, _) in enumerate(overrides) if pattern.search(info.name)]
        used.update(hits)
        wanted = overrides[hits[0]][1] if hits else rules.of(info.name, info.shape[-1])
        name = _fitting(wanted, info.shape[-1])
        result.append(Assignment(info, FORMATS[name], wanted if name != wanted else None))
    for i, (pattern, name) in enumerate(overrides):
        if i not in used:
            raise ConfigError(f"--tensor {pattern.pattern}={name.lower()} fits the name of no matrix of this model")
    return result


def _fitting(name: str, width: int) -> str:
    if width % FORMATS[name].block_size == 0:
        return name
    name = _FALLBACK.get(name, name)
    return name if width % FORMATS[name].block_size == 0 else "F16"
