#!/usr/bin/env python3
"""Many requests of ShareGPT-like lengths: tokens per second of the engine, and of Transformers' generate.

Random weights at real shapes, random prompts; greedy, every request ends at its own length. Lengths are drawn from
log-normal distributions with the means that the vLLM paper gives for ShareGPT (161 tokens in, 338 out; Kwon et al.
2023, arXiv 2309.06180), cut at 1024. Only tokens that a request asked for count: what a static batch computes beyond
the end of its shorter requests does not.

    python bench/gpu/throughput.py --engine nybble [--requests 256] [--out docs/benchmarks/gpu]
    python bench/gpu/throughput.py --engine transformers [--alone 2] [--batches 32,64]

Transformers runs a sample of the requests, for 256 one at a time would take an hour: `--alone` of them one by one, and
the first batch of each size. Without a GPU it only shows that it runs: --shape tiny --requests 6 --longest 24.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import SHAPES, random_checkpoint

from nybble import SamplingParams, __version__
from nybble.backends.device import DeviceOptions
from nybble.backends.torch.serve import TorchModel
from nybble.engine.core import EngineCore
from nybble.engine.scheduler import blocks_for

ON_GPU = torch.cuda.is_available()
MEAN_IN, MEAN_OUT, SPREAD = 161.31, 337.99, 1.0
Lengths = list[tuple[int, int]]


def draw_lengths(count: int, longest: int, seed: int = 0) -> Lengths:
    """(prompt, answer) of each request."""
    rng = np.random.default_rng(seed)

    def lengths(mean: float) -> list[int]:
        drawn = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)
        return np.clip(drawn, 4, longest).astype(int).tolist()

    return list(zip(lengths(MEAN_IN), lengths(MEAN_OUT), strict=True))


def run_nybble(shape: str, lengths: Lengths, max_num_seqs: int) -> dict[str, Any]:
    checkpoint = random_checkpoint(shape, "BF16")
    context = max(a + b for a, b in lengths) + 1
    device = "cuda" if ON_GPU else "torch-cpu"
    model = TorchModel.load(checkpoint, device=device, options=DeviceOptions(device=device), context=context)
    tokens = 4096 if ON_GPU else 512
    fitting = model.fitting_blocks(max_num_batched_tokens=tokens, max_num_seqs=max_num_seqs)
    usable = max_num_seqs * blocks_for(context)
    core = EngineCore(
        model,
        None,
        context=context,
        vocab_size=checkpoint.spec.vocab_size,
        num_blocks=usable if fitting is None else min(fitting, usable),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        prefill_beside_decode=tokens,
    )
    # Kernels are compiled and tuned, and graphs of all sizes recorded: the batch shrinks one by one.
    _serve(core, [(8, 2 + place) for place in range(min(max_num_seqs, len(lengths)))], seed=1)
    _serve(core, lengths[: max(len(lengths) // 16, 1)], seed=3)
    seconds, waste = _serve(core, lengths, seed=2)
    answered = sum(out for _, out in lengths)
    core.check_integrity()
    return {
        "engine": "nybble", "seconds": seconds, "tokens_s": answered / seconds, "requests": len(lengths),
        "kv_waste_median": statistics.median(waste), "kv_waste_most": max(waste), "blocks": core.pool.num_blocks,
        "preemptions": core.stats().num_preemptions,
    }  # fmt: skip


def _serve(core: EngineCore, lengths: Lengths, seed: int) -> tuple[float, list[float]]:
    """Seconds for all requests, and the share of used blocks that held no token, step by step."""
    rng = np.random.default_rng(seed)
    for index, (prompt, answer) in enumerate(lengths):
        ids = rng.integers(0, 500, prompt).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False, logprobs=None)
        core.add_request(core.make_request(f"{seed} {index}", ids, params))
    waste = []
    begin = time.perf_counter()
    while core.has_unfinished_requests:
        core.step()
        waste.append(core.stats().kv_waste)
    return time.perf_counter() - begin, waste


def run_transformers(shape: str, lengths: Lengths, alone: int, batches: list[int]) -> dict[str, Any]:
    import transformers

    hidden, layers, q_heads, kv_heads, ffn, vocab = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=q_heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    device = torch.device("cuda" if ON_GPU else "cpu")
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    _generate(model, lengths[:1], 4)
    one_by_one = _tokens_s(model, [[request] for request in lengths[:alone]])
    by_batch = {size: _tokens_s(model, [lengths[:size]]) for size in batches if size <= len(lengths)}
    return {
        "engine": "transformers", "transformers": transformers.__version__, "one_by_one_tokens_s": one_by_one,
        "sampled_alone": alone, "static_tokens_s": by_batch,
        "best_static_tokens_s": max(by_batch.values(), default=0.0),
    }  # fmt: skip


def _tokens_s(model: Any, batches: list[Lengths]) -> float:
    begin = time.perf_counter()
    for batch in batches:
        _generate(model, batch, max(out for _, out in batch))
    if ON_GPU:
        torch.cuda.synchronize()
    return sum(out for batch in batches for _, out in batch) / (time.perf_counter() - begin)


def _generate(model: Any, batch: Lengths, count: int) -> None:
    """Prompts padded on the left to the longest, and as many tokens for all as the longest answer has."""
    width = max(prompt for prompt, _ in batch)
    ids = torch.randint(1, 500, (len(batch), width), device=model.device)
    mask = torch.ones_like(ids)
    for row, (prompt, _) in enumerate(batch):
        mask[row, : width - prompt] = 0
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("nybble", "transformers"), default="nybble")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt, and of an answer")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--alone", type=int, default=2, help="requests that transformers answers one by one")
    parser.add_argument("--batches", default="32,64", help="static batches of transformers, with commas")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lengths = draw_lengths(given.requests, given.longest)
    if given.engine == "nybble":
        result = run_nybble(given.shape, lengths, given.max_num_seqs)
    else:
        result = run_transformers(given.shape, lengths, given.alone, [int(b) for b in given.batches.split(",")])
    report = {
        "benchmark": "gpu-throughput", "nybble": __version__, "torch": torch.__version__, "shape": given.shape,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "mean_in": statistics.mean(a for a, _ in lengths), "mean_out": statistics.mean(b for _, b in lengths), **result,
    }  # fmt: skip
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"throughput-{given.engine}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
