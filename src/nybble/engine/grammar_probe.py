"""Tries a grammar in a process of its own, whose time and memory are limited, before it may enter this one.

A schema of a few kilobytes can make the compiler build gigabytes (references that multiply when schemas are merged),
and a call into it cannot be interrupted. The trial costs about a tenth of a second, once per grammar.
"""

from __future__ import annotations

import subprocess
import sys

from nybble.core.errors import ConfigError

MAX_SECONDS = 3
MAX_MEMORY_BYTES = 1 << 30
# The child must not load nybble: it starts in a fraction of the time. It says "ok" or nothing.
_CHILD = """
import resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from llguidance import LLMatcher, LLTokenizer
LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0).compute_ff_bytes()
print("ok")
"""


def check_cost(grammar: str, what: str) -> None:
    """Raises ConfigError if compiling the grammar takes too much time or memory; not if it is wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(MAX_SECONDS), str(MAX_MEMORY_BYTES)],
            input=grammar.encode(),
            capture_output=True,
            timeout=4 * MAX_SECONDS,  # the wall clock runs faster than the child on a busy machine
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.stdout.strip() != b"ok":
        raise ConfigError(f"{what} is too costly to compile: make it simpler")
