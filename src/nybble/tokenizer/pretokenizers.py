"""How byte-level BPE tokenizers cut text into words, by the name that GGUF files carry (`tokenizer.ggml.pre`).

The patterns are part of each tokenizer's definition, as published in its `tokenizer.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """pattern None: GPT-2's own words. single_digits: every digit is a word. whole_words: a word that is a token stays
    one, whatever the merges say. add_bos: the default where the file says nothing."""

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        if self.pattern is not None:
            split = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if not self.single_digits:
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


_BY_NAME = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2"), PreTokenizer()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), PreTokenizer(single_digits=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), PreTokenizer(_QWEN2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), PreTokenizer(_LLAMA3, whole_words=True, add_bos=True)
    ),
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True, add_bos=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Raises TokenizerError if the name is not known: guessing would give wrong tokens silently."""
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(sorted(_BY_NAME))
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported (known: {known}); "
            "use the model's Hugging Face folder, whose tokenizer.json says everything"
        ) from None
