#!/usr/bin/env python3
"""Greedy text of nybble beside llama.cpp's: the first 32 tokens on ten prompts per model.

Both get the same token ids; that llama.cpp tokenises the prompt in the same way is checked as well. Five prompts are
plain text, five go through the model's chat template if it has one. Where the two part, the line says how far apart
llama.cpp's two likeliest tokens lay: below 0.05 logits the order of additions decides, and the case is allowed.

    python bench/compare_text.py --llama-bin DIR MODEL.gguf ...

The last line of standard output is a JSON document; the exit code is 1 if a model parts where it should not.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_cpp import LlamaServer, PeerToken

from nybble.core.sampling import SamplingParams
from nybble.engine.load import LoadedModel, load_model
from nybble.tokenizer import ChatTemplate

MAX_TOKENS = 32
ALLOWED_GAP = 0.05
PLAIN = (
    "The capital of France is",
    "def quicksort(items):\n    ",
    "Once upon a time, in a village at the foot of a mountain,",
    "Water boils at a lower temperature on high mountains because",
    "1, 1, 2, 3, 5, 8, 13,",
)
CHAT = (
    "Explain in two sentences what a hash table is.",
    "Write a haiku about rain.",
    "Translate to German: Where is the train station?",
    "What are three differences between a list and a tuple in Python?",
    "用一句话解释什么是递归。",
)


@dataclass(frozen=True)
class Case:
    """One prompt of one model."""

    prompt: str
    same_prompt_tokens: bool
    equal_tokens: int  # before the texts part, or all
    parted: bool
    gap: float | None = None  # llama.cpp's, where they part
    ours: str = ""
    theirs: str = ""
    ours_is_runner_up: bool = False

    @property
    def ok(self) -> bool:
        return self.same_prompt_tokens and (not self.parted or (self.gap is not None and self.gap < ALLOWED_GAP))


def prompts(loaded: LoadedModel) -> list[str]:
    """Ten texts as the model wants them."""
    source = loaded.checkpoint.chat_template
    if source is None:
        return [*PLAIN, *CHAT]
    tokenizer = loaded.tokenizer
    template = ChatTemplate(source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "")
    return [*PLAIN, *(template.render([{"role": "user", "content": text}]) for text in CHAT)]


def continue_greedily(loaded: LoadedModel, prompt: list[int]) -> list[int]:
    generator = loaded.generator()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return [event.token_id for events in generator.generate([prompt], params) for event in events]


def judge(loaded: LoadedModel, text: str, same_prompt: bool, ours: list[int], theirs: list[PeerToken]) -> Case:
    equal = 0
    for own, peer in zip(ours, theirs, strict=False):
        if own != peer.token_id:
            break
        equal += 1
    ended = set(ours[equal:]) <= loaded.eos_token_ids  # llama.cpp may leave the token out that ended the text
    if equal == len(theirs) and ended:
        return Case(text, same_prompt, equal, parted=False)
    name = loaded.tokenizer.decode
    if equal >= len(theirs) or equal >= len(ours):  # one of them ended early
        return Case(text, same_prompt, equal, parted=True, ours=name(ours[equal:]), theirs="")
    peer = theirs[equal]
    return Case(
        text,
        same_prompt,
        equal,
        parted=True,
        gap=peer.gap,
        ours=name([ours[equal]], skip_special=False),
        theirs=name([peer.token_id], skip_special=False),
        ours_is_runner_up=ours[equal] == peer.second_id,
    )


def compare(model: Path, bin_dir: Path, threads: int) -> list[Case]:
    loaded = load_model(model, threads=threads, context=512)
    cases = []
    with LlamaServer(bin_dir, model, threads=threads) as server:
        for text in prompts(loaded):
            is_chat = text not in PLAIN and loaded.checkpoint.chat_template is not None
            prompt = loaded.tokenizer.encode(text, add_special=True, parse_special=is_chat)
            same_prompt = prompt == server.tokenize(text, parse_special=is_chat)
            theirs = server.greedy(prompt, MAX_TOKENS)
            cases.append(judge(loaded, text, same_prompt, continue_greedily(loaded, prompt), theirs))
    return cases


def describe(case: Case) -> str:
    name = repr(case.prompt if len(case.prompt) <= 60 else case.prompt[:28] + " ... " + case.prompt[-28:])
    if not case.same_prompt_tokens:
        return f"  TOKENS    {name}: the prompt is tokenised differently"
    if not case.parted:
        return f"  equal     {name}: {case.equal_tokens} tokens"
    gap = "ended early" if case.gap is None else f"llama.cpp's top two lie {case.gap:.4f} apart"
    mark = "allowed  " if case.ok else "DIFFERENT"
    return f"  {mark} {name}: after {case.equal_tokens} tokens {case.ours!r}, llama.cpp {case.theirs!r}; {gap}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    results: dict[str, list[dict[str, object]]] = {}
    good = True
    for model in args.models:
        print(model.name, flush=True)
        cases = compare(model, args.llama_bin, args.threads)
        for case in cases:
            print(describe(case), flush=True)
        good &= all(case.ok for case in cases)
        results[model.name] = [{**asdict(case), "ok": case.ok} for case in cases]
    print(json.dumps({"max_tokens": MAX_TOKENS, "allowed_gap": ALLOWED_GAP, "ok": good, "results": results}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
