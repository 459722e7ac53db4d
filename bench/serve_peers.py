#!/usr/bin/env python3
"""One peer on the jobs of standard input, in the interpreter that has it; prints a JSON document.

    python bench/serve_peers.py transformers|vllm|openvino MODEL_FOLDER THREADS BUDGET_SECONDS < JOBS

Loading is not timed. `transformers` answers one request after the other until the budget is over, in the order of the
jobs, which is random; the others take all jobs at once, as their own batching allows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from serve_workload import Job, load, rates


def transformers(folder: str, threads: int, budget: float, jobs: list[Job]) -> dict[str, Any]:
    """`generate`, a request at a time, in the faster of float32 and bfloat16 on one short request."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def answer(job: Job) -> None:
        ids = torch.tensor([job.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job.max_tokens,
            min_new_tokens=job.max_tokens, pad_token_id=0,
        )  # fmt: skip
        if out.shape[1] != len(job.prompt) + job.max_tokens:
            raise SystemExit("an answer is too short")

    short = Job(jobs[0].prompt[:64], 16)
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        answer(short)
        begin = time.perf_counter()
        answer(short)
        speeds[dtype] = time.perf_counter() - begin
    best = min(speeds, key=lambda dtype: speeds[dtype])
    model = model.to(best)
    done = 0
    begin = time.perf_counter()
    while done < len(jobs) and time.perf_counter() - begin < budget:
        answer(jobs[done])
        done += 1
    seconds = time.perf_counter() - begin
    return {**rates(jobs[:done], seconds), "jobs": done, "dtype": str(best)}


def vllm(folder: str, threads: int, budget: float, jobs: list[Job]) -> dict[str, Any]:
    """`LLM.generate` in bfloat16 with vLLM's defaults for CPUs."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, dtype="bfloat16", max_model_len=1024, skip_tokenizer_init=True)
    prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
    params = [
        SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False) for job in jobs
    ]
    llm.generate(prompts[:2], [SamplingParams(max_tokens=4, detokenize=False)] * 2, use_tqdm=False)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    if [len(output.outputs[0].token_ids) for output in outputs] != [job.max_tokens for job in jobs]:
        raise SystemExit("an answer is too short")
    return {**rates(jobs, seconds), "jobs": len(jobs), "dtype": "bfloat16"}


def openvino(folder: str, threads: int, budget: float, jobs: list[Job]) -> dict[str, Any]:
    """`ContinuousBatchingPipeline.generate` on a folder that optimum-cli exported."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    def run(some: list[Job]) -> float:
        inputs = [ov.Tensor(np.array([job.prompt], np.int64)) for job in some]
        configs = []
        for job in some:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = job.max_tokens
            config.do_sample = False
            config.ignore_eos = True
            configs.append(config)
        begin = time.perf_counter()
        results = pipeline.generate(inputs, configs)
        seconds = time.perf_counter() - begin
        if [len(result.m_generation_ids[0]) for result in results] != [job.max_tokens for job in some]:
            raise SystemExit("an answer is too short")
        return seconds

    run([Job(job.prompt[:32], 4) for job in jobs[:2]])
    return {**rates(jobs, run(jobs)), "jobs": len(jobs), "dtype": "int4"}


ENGINES = {"transformers": transformers, "vllm": vllm, "openvino": openvino}


def main() -> None:
    engine, folder, threads, budget = sys.argv[1:]
    found = ENGINES[engine](folder, int(threads), float(budget), load(sys.stdin.read()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
