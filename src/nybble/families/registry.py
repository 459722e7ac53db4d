"""Which family reads which file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nybble.core.errors import CheckpointError
from nybble.core.fields import Fields
from nybble.families import gemma, llama, phi
from nybble.families.common import Mapped, check_heads

# deci: llama's decoder with widths that may differ from layer to layer, which llama.cpp reads under this name only.
_GGUF = ("llama", "deci", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_HF: Mapping[str, Callable[[Fields, frozenset[str]], Mapped]] = {
    "LlamaForCausalLM": lambda f, has: llama.from_hf(f, has=has),
    "MistralForCausalLM": lambda f, has: llama.from_hf(f, has=has),
    "Qwen2ForCausalLM": lambda f, has: llama.from_hf(f, family="qwen2", has=has),
    "Qwen3ForCausalLM": lambda f, has: llama.from_hf(f, family="qwen3", has=has),
    "Gemma2ForCausalLM": lambda f, has: gemma.from_hf(f, version=2, has=has),
    "Gemma3ForCausalLM": lambda f, has: gemma.from_hf(f, version=3, has=has),
    "Phi3ForCausalLM": lambda f, has: phi.from_hf(f, has=has),
}


def map_gguf(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    read_vector: Callable[[str], tuple[float, ...]],
    where: str,
) -> Mapped:
    """read_vector gives a float tensor's values, () if the file has none of that name.

    Raises CheckpointError for an architecture that is not supported, or numbers that cannot be right.
    """
    arch = Fields(metadata, where).text("general.architecture")
    if arch not in _GGUF:
        raise CheckpointError(f"{where}: the architecture {arch!r} is not supported (supported: {', '.join(_GGUF)})")
    embed = shapes.get("token_embd.weight", ())
    if len(embed) != 2:
        raise CheckpointError(f"{where}: the tensor token_embd.weight is missing or not a matrix: get a complete file")
    f = Fields(metadata, where, prefix=f"{arch}.")
    vocab_size, tied = embed[0], "output.weight" not in shapes
    if arch.startswith("gemma"):
        mapped = gemma.from_gguf(f, version=int(arch[-1]), vocab_size=vocab_size, tied=tied)
    elif arch == "phi3":
        short, long = read_vector("rope_factors_short.weight"), read_vector("rope_factors_long.weight")
        mapped = phi.from_gguf(f, vocab_size=vocab_size, tied=tied, short_factors=short, long_factors=long)
    else:
        if f.has("expert_count") and f.integer("expert_count", low=0):
            raise CheckpointError(f"{where}: mixtures of experts are not supported yet")
        factors = read_vector("rope_freqs.weight")
        has = frozenset(shapes)
        family = "llama" if arch == "deci" else arch
        mapped = llama.from_gguf(
            f,
            family=family,
            vocab_size=vocab_size,
            tied=tied,
            freq_factors=factors,
            has=has,
            interleaved=family == "llama",
        )
    check_heads(mapped.spec, where)
    return mapped


def map_hf(config: Mapping[str, object], names: frozenset[str], where: str) -> Mapped:
    """names: of the tensors, as an unquantised folder has them.

    Raises CheckpointError for an architecture that is not supported, or numbers that cannot be right.
    """
    f = Fields(config, where)
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    if name not in _HF:
        raise CheckpointError(f"{where}: the architecture {name!r} is not supported (supported: {', '.join(_HF)})")
    _check_features(f, is_gemma=name.startswith("Gemma"), has=names)
    mapped = _HF[name](f, names)
    check_heads(mapped.spec, where)
    return mapped


def _check_features(f: Fields, *, is_gemma: bool, has: frozenset[str]) -> None:
    """Refuse by name what would otherwise be computed wrongly."""
    if f.flag("mlp_bias"):
        raise CheckpointError(f"{f.where}: biases in the feed-forward part (mlp_bias) are not supported yet")
    wanted = "gelu_pytorch_tanh" if is_gemma else "silu"
    activation = f.text("hidden_activation", f.text("hidden_act", wanted))
    if activation != wanted:
        raise CheckpointError(f"{f.where}: the activation {activation!r} is not supported here, only {wanted!r}")
    if is_gemma and "model.layers.0.self_attn.q_proj.bias" in has:
        raise CheckpointError(f"{f.where}: biases in Gemma's attention are not supported")
