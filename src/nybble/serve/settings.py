"""How a server is set up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from nybble.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Limits and access of a server. Sizes in bytes, times in seconds.

    Raises:
        ConfigError: the key is empty.
    """

    model_name: str
    host: str = "127.0.0.1"
    api_key: str | None = None  # None: everybody who reaches the port may ask
    allowed_origins: tuple[str, ...] = ()  # of web pages (CORS); none by default
    max_queue: int = 256  # requests that may wait or run
    max_queue_tokens: int = 1_000_000  # prompt and longest answer of all of them
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_n: int = 32
    max_prompts: int = 256  # in one completion or embedding request
    drain_timeout: float = 30.0

    @property
    def checks_host(self) -> bool:
        """On the loopback interface a web page could reach the server under a name of its own (DNS rebinding)."""
        return is_loopback(self.host)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty: give it some characters, or leave it out")


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is that of this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
