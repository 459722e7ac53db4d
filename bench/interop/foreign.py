#!/usr/bin/env python3
"""Whether nybble reads folders that other tools write: logits of both over one text, a line per folder.

    python bench/interop/foreign.py --text FILE [--tokens 256] --work DIR HF_FOLDER RECIPE ...

RECIPE: nf4, nf4-double, fp4, bnb-int8 (bitsandbytes through transformers), gptq-4bit, gptq-8bit (GPTQModel), or
w4a16, w4a16-asym, w8a16, fp8a16, fp8-dynamic, w8a8 (llm-compressor, round to nearest).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from reading import decoder_logits, dequantized_logits, kernel_logits, row, tokens_of, transformers_logits
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}
# Its presets have groups of 128, which do not divide every width of small models. The last two round activations too.
LLM_COMPRESSOR: dict[str, dict[str, Any] | str] = {
    "w4a16": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
    "w4a16-asym": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64},
    "w8a16": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    "fp8a16": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "fp8-dynamic": "FP8_DYNAMIC",
    "w8a8": "W8A8",
}


def by_bitsandbytes(source: Path, target: Path, recipe: str) -> None:
    config = BitsAndBytesConfig(**BITSANDBYTES[recipe])
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float16, device_map="cpu"
    )
    model.save_pretrained(target)


def by_gptqmodel(source: Path, target: Path, recipe: str, text: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    words = text.read_text("utf-8")
    samples = [words[i : i + 2000] for i in range(0, 64000, 2000)]
    config = QuantizeConfig(bits=int(recipe[5]), group_size=32, device="cpu")
    model = GPTQModel.load(str(source), config)
    model.quantize(samples, batch_size=1)
    model.save(str(target))


def by_llm_compressor(source: Path, target: Path, recipe: str) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    scheme = LLM_COMPRESSOR[recipe]
    if isinstance(scheme, str):
        modifier = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    else:
        group = {"targets": ["Linear"], "weights": scheme}
        modifier = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    oneshot(model=model, recipe=modifier)
    model.save_pretrained(target, save_compressed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    ids = tokens_of(args.source, args.text, args.tokens)
    for recipe in args.recipes:
        target = args.work / f"by-{recipe}"
        try:
            if not target.exists():
                if recipe in BITSANDBYTES:
                    by_bitsandbytes(args.source, target, recipe)
                elif recipe in LLM_COMPRESSOR:
                    by_llm_compressor(args.source, target, recipe)
                else:
                    by_gptqmodel(args.source, target, recipe, args.text)
                AutoTokenizer.from_pretrained(args.source).save_pretrained(target)
            theirs = transformers_logits(target, ids, "bfloat16" if recipe.startswith("gptq") else "float32")
            ours, served = decoder_logits(target, ids), kernel_logits(target, ids)
            pairs = [("decoder", ours, theirs), ("served", served, theirs)]
            if recipe in BITSANDBYTES:
                pairs.append(("decoder, their weights expanded", ours, dequantized_logits(target, ids)))
            print(row(recipe, *pairs), flush=True)
        except Exception as e:  # a row that says why is the result
            print(f"{recipe} | {type(e).__name__}: {str(e).strip().splitlines()[0][:200]}", flush=True)


if __name__ == "__main__":
    main()
