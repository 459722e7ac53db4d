"""What every training run is asked: for how long, on what, how fast to learn."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.core.errors import ConfigError

_DEFAULT_STEPS = 200


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Defaults for two CPU cores.

    steps: updates of the weights; minutes instead: as many as fit, found from the time of the first ones. batch:
    sequences of seq_len tokens for each pass, on each device; accumulate: passes for each update. learning_rate: the
    peak, reached after `warmup` steps, from where a cosine leads down to a hundredth of it. clip: the largest norm of a
    gradient. bf16: matrix products in bfloat16 (autocast); None: where the processor has instructions for it.
    recompute: keep no activations inside of layers (less memory, a third more time). data: a text or JSONL file, the
    name of a `datasets` data set, `self` for text that the teacher writes, `self:` and one of the first three for what
    it writes after passages of that, or several of these; None: text that comes with Python.
    save_minutes: between two checkpoints.
    """

    steps: int | None = None
    minutes: float | None = None
    batch: int = 2
    seq_len: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    bf16: bool | None = None
    recompute: bool = False
    data: str | tuple[str, ...] | None = None
    tokens: int | None = None
    save_minutes: float = 5.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("steps and minutes both say how long to train: give one of them")
        if self.data == ():
            raise ConfigError("data is an empty list: name a text, or leave it out for Python's documentation")
        for name, low, high in (
            ("steps", 1, 1 << 24), ("batch", 1, 1 << 12), ("seq_len", 8, 1 << 17), ("accumulate", 1, 1 << 12),
            ("warmup", 0, 1 << 20), ("seed", 0, (1 << 31) - 1), ("threads", 1, 1 << 12), ("tokens", 64, 1 << 40),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, not {value}")
        for name, least, most in (
            ("minutes", 0.0, 1e6), ("learning_rate", 0.0, 1.0), ("clip", 0.0, 1e6), ("save_minutes", 0.0, 1e6),
        ):  # fmt: skip
            number = getattr(self, name)
            if number is not None and not least < number <= most:
                raise ConfigError(f"{name} must be above {least:g} and up to {most:g}, not {number:g}")
        if not 0 <= self.weight_decay <= 1:
            raise ConfigError(f"weight_decay must be from 0 to 1, not {self.weight_decay:g}")

    @property
    def num_steps(self) -> int | None:
        """None: as many as fit `minutes`."""
        return _DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps

    @property
    def tokens_per_step(self) -> int:
        """On one device."""
        return self.batch * self.seq_len * self.accumulate
