"""One answer, streamed to standard output, with the figures of how fast it came."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Protocol

from nybble.core.outputs import FinishReason
from nybble.core.sampling import SamplingParams
from nybble.engine.generate import Steps
from nybble.engine.load import LoadedModel
from nybble.engine.roofline import Roofline, decode_fraction, measure_roofline, model_cost


@dataclass(slots=True)
class Answer:
    """What came, and when."""

    text: str
    num_prompt_tokens: int
    num_read_tokens: int  # of the prompt; those of earlier turns are still in the cache
    num_new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reason: FinishReason | None  # None: the user stopped it


class Interrupt:
    """Ctrl-C while an answer streams: asks for its end instead of raising in the middle of a step."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take over Ctrl-C for the time of an answer."""
        self.asked = False

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Writer(Protocol):
    """Shows an answer while it comes."""

    def write(self, text: str) -> None: ...
    def end(self) -> None: ...


class Plain:
    """A Writer of the text as it is."""

    def __init__(self) -> None:
        self._last = "\n"

    def write(self, text: str) -> None:
        """Print at once what is new."""
        self._last = text or self._last
        print(text, end="", flush=True)

    def end(self) -> None:
        """The shell's next line is not to begin in the middle."""
        if not self._last.endswith("\n"):
            print(flush=True)


def show_answer(
    steps: Steps, *, num_prompt_tokens: int, interrupt: Interrupt | None = None, writer: Writer | None = None
) -> Answer:
    """Print the text of a single sequence as it comes and return all of it."""
    writer = writer or Plain()
    pieces: list[str] = []
    reason: FinishReason | None = None
    begin = perf_counter()
    first = last = begin
    num_new_tokens = num_cached_tokens = 0
    try:
        for events in steps:
            for event in events:
                last = perf_counter()
                num_new_tokens += 1
                if num_new_tokens == 1:
                    first = last
                    num_cached_tokens = event.num_cached_tokens
                pieces.append(event.text)
                reason = event.finish_reason
                writer.write(event.text)
            if interrupt is not None and interrupt.asked:
                steps.close()
                break
    finally:  # after Ctrl-C, too, the shell's next line is not to begin here
        writer.end()
    return Answer(
        text="".join(pieces),
        num_prompt_tokens=num_prompt_tokens,
        num_read_tokens=num_prompt_tokens - num_cached_tokens,
        num_new_tokens=num_new_tokens,
        prefill_seconds=first - begin,
        decode_seconds=last - first,
        finish_reason=reason,
    )


def note(message: str) -> None:
    """Something to know about an answer, kept apart from it."""
    print(f"[{message}]", file=sys.stderr, flush=True)


def note_ending(answer: Answer, params: SamplingParams, context: int) -> None:
    """Say so if an answer did not end by itself."""
    if answer.finish_reason is None:
        note("stopped")
    elif answer.finish_reason == "length":
        if answer.num_prompt_tokens + answer.num_new_tokens >= context:
            note(f"cut off: the context of {context} tokens is full; --ctx makes it longer")
        else:
            note(f"cut off after {params.max_tokens} tokens; --max-tokens allows more")


class Figures:
    """The line of figures of an answer.

    The machine is measured once, after the first answer. Its probe reads a large buffer of its own, which must not
    count as the model's memory, so the peak is taken before the probe runs and only grows with what is in use later.
    """

    def __init__(self, loaded: LoadedModel, threads: int | None) -> None:
        self._cost = model_cost(loaded.checkpoint)
        self._threads = threads
        self._is_native = loaded.device == "cpu"  # the machine's limit is measured for this backend
        self._roofline: Roofline | None = None
        self._peak_bytes = 0

    def line(self, answer: Answer) -> str:
        """How fast an answer came, in how much memory, and how near the machine's limit."""
        used = _peak_rss() if self._roofline is None else _current_rss()
        self._peak_bytes = max(self._peak_bytes, used)
        decoded = answer.num_new_tokens - 1  # the first comes out of the prompt's own step
        parts = [
            f"prompt {answer.num_read_tokens} tokens, {_rate(answer.num_read_tokens, answer.prefill_seconds)}",
            f"generated {answer.num_new_tokens} tokens, {_rate(decoded, answer.decode_seconds)}",
            f"memory {self._peak_bytes / 1e6:.0f} MB at most",
        ]
        if decoded > 0 and self._is_native:
            self._roofline = self._roofline or measure_roofline(self._threads)
            fraction = decode_fraction(
                self._cost,
                self._roofline,
                batch=1,
                context=answer.num_prompt_tokens + answer.num_new_tokens // 2,
                step_seconds=answer.decode_seconds / decoded,
            )
            parts.append(f"{fraction:.0%} of the roofline ({self._roofline.read_gb_s:.1f} GB/s read)")
        return " | ".join(parts)


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _current_rss() -> int:
    try:
        resident_pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0  # not Linux: the peak of the first answer stands
    return resident_pages * resource.getpagesize()


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if tokens > 0 and seconds > 0 else "too few to time"
