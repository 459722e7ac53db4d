"""How a server is set up."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Limits and access of a server. Sizes in bytes, times in seconds."""

    model_name: str
    host: str = "127.0.0.1"
    api_key: str | None = None  # None: everybody who reaches the port may ask
    allowed_origins: tuple[str, ...] = ()  # of web pages (CORS); none by default
    max_queue: int = 256  # requests that may wait or run
    max_queue_tokens: int = 1_000_000  # prompt and longest answer of all of them
    max_body_bytes: int = 8 * 2**20
    max_stop_strings: int = 16
    max_n: int = 32
    max_prompts: int = 256  # in one completion or embedding request
    drain_timeout: float = 30.0

    @property
    def checks_host(self) -> bool:
        """On the loopback interface a web page could reach the server under a name of its own (DNS rebinding)."""
        return self.host in LOOPBACK
