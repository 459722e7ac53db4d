#!/usr/bin/env python3
"""A folder quantised by GPTQModel on the very samples that nybble's own GPTQ takes of a text.

    python bench/interop/gptqmodel_folder.py HF_FOLDER TARGET --text FILE [--bits 4] [--group-size 64] [--samples 64]

So `nybble eval` can compare the two: same bits, same groups, same tokens. Needs GPTQModel, which asks for a newer torch
than nybble's tests use; installed without its dependencies it runs beside 2.13.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from nybble.checkpoint import open_checkpoint
from nybble.compress.calibration.samples import load_calibration
from nybble.compress.methods import Silent
from nybble.compress.safetensors.options import Options

# Version 7.7 gives its pool of threads half of the cores and a pool inside of it two: on two cores it stops there.
LEAST_CORES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    asked = {"calibrate": str(args.text), "calibration_samples": args.samples, "calibration_tokens": args.tokens}
    calibration = load_calibration(open_checkpoint(args.source), Options("gptq", asked), Silent())
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.from_numpy(calibration.token_ids)
    ]
    cores = max(os.cpu_count() or 1, LEAST_CORES)
    os.cpu_count = lambda: cores
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, device="cpu")
    model = GPTQModel.load(str(args.source), config)
    began = time.perf_counter()
    model.quantize(rows, batch_size=1)
    model.save(str(args.target))
    print(f"{args.target}: {calibration.coverage()}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
