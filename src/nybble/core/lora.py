"""Which adapter a request wants, with the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nybble.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for `LLM.generate`. lora_path: a PEFT folder, or a GGUF or safetensors file.

    The name and the number say which one it is: two paths must not share either. A number is 1 or more.

    Raises:
        ConfigError: the name is empty, or the number is not positive.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | Path

    def __post_init__(self) -> None:
        if not self.lora_name:
            raise ConfigError("lora_name must not be empty")
        if self.lora_int_id < 1:
            raise ConfigError(f"lora_int_id must be 1 or more, not {self.lora_int_id}")
        if not str(self.lora_path):
            raise ConfigError("lora_path must not be empty")
