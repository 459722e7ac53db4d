"""The training loop: sequences in, updates of weights out, with checkpoints that an interrupted run goes on from.

It does not know what is trained or why: a `Task` gives the losses. The same seed, options and number of processes give
the same curve, whether a run was interrupted or not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.trainable import TrainableDecoder
from nybble.compress.methods import Progress, Silent
from nybble.compress.train.data import Sequences
from nybble.compress.train.group import Group, copy_whole, full
from nybble.compress.train.log import StepLog
from nybble.compress.train.options import TrainOptions
from nybble.compress.train.schedule import factor
from nybble.compress.train.state import LOG, Position, RunFolder
from nybble.core.errors import CheckpointError, TrainingError

_TIMED = (2, 6)  # updates whose time says how many fit the minutes; the first ones allocate
_BETAS = (0.9, 0.95)


class Task(Protocol):
    """What is trained. terms: names of the losses, the first of which is made small."""

    @property
    def model(self) -> TrainableDecoder: ...

    @property
    def terms(self) -> tuple[str, ...]: ...

    def losses(self, token_ids: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Means over a batch's tokens, one for each term. token_ids: [batch, seq_len + 1]; rows: which sequences."""

    def rate(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by, by its name in the model."""


@dataclass(frozen=True, slots=True)
class Trained:
    """steps: updates; first, last: mean loss of the first and the last tenth of them; seconds: of training."""

    steps: int
    tokens: int
    first: float
    last: float
    seconds: float


class Trainer:
    """One run. folder: where its checkpoints and its log go."""

    def __init__(
        self,
        task: Task,
        sequences: Sequences,
        options: TrainOptions,
        folder: RunFolder | None,
        group: Group,
        progress: Progress,
    ) -> None:
        self._task = task
        self._sequences = sequences
        self._options = options
        self._folder = folder
        self._group = group
        self._progress: Progress = progress if group.leads else Silent()
        self._parameters = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self._optimizer = self._make_optimizer()
        self._step = 0
        self._total = options.num_steps
        self._seconds = 0.0
        self._before_timed = 0.0
        self._saved = -1
        self._saved_at = time.monotonic()

    def run(self) -> Trained:
        """Train to the end.

        Raises:
            TrainingError: the loss is not a number any more; the state before it is kept.
            OutputError: a checkpoint cannot be written; the one before it is kept.
            CheckpointError: the checkpoint to go on from is damaged.
        """
        self._restore()
        log = self._open_log()
        history: list[float] = []
        try:
            with self._saved_on_interrupt():
                while self._total is None or self._step < self._total:
                    history.append(self._update(log))
        finally:
            if log is not None:
                log.close()
        tenth = max(1, len(history) // 10)
        first, last = (sum(part) / len(part) if part else math.nan for part in (history[:tenth], history[-tenth:]))
        tokens = self._step * self._options.tokens_per_step * self._group.size
        return Trained(self._step, tokens, first, last, self._seconds)

    def _update(self, log: StepLog | None) -> float:
        began = time.monotonic()
        options, group = self._options, self._group
        rate = options.learning_rate * factor(self._step, warmup=options.warmup, total=self._total)
        means = self._gradients()
        norm = full(torch.nn.utils.clip_grad_norm_(self._parameters.values(), options.clip))
        numbers = group.mean(means).tolist()
        if not all(map(math.isfinite, [*numbers, float(norm)])):
            self._give_up(numbers[0])
        for one in self._optimizer.param_groups:
            one["lr"] = rate * one["factor"]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        took = time.monotonic() - began
        self._seconds += took
        self._decide_total()
        if log is not None:
            self._tell(log, numbers, rate, float(norm), took)
        if time.monotonic() - self._saved_at > 60 * options.save_minutes:
            self._save()
        return float(numbers[0])

    def _gradients(self) -> torch.Tensor:
        """Of all passes of an update. Gives the means of the losses in this process."""
        options, group = self._options, self._group
        means = torch.zeros(len(self._task.terms))
        for part in range(options.accumulate):
            number = self._step * options.accumulate + part
            rows = self._sequences.batch(number, options.batch * group.size, options.seed)
            rows = rows[group.rank * options.batch : (group.rank + 1) * options.batch]
            token_ids = torch.from_numpy(self._sequences.token_ids[rows]).to(group.device)
            with torch.autocast(group.device.type, torch.bfloat16, enabled=bool(options.bf16)):
                losses = self._task.losses(token_ids, rows) / options.accumulate
            losses[0].backward()  # type: ignore[no-untyped-call]
            means += losses.detach().float().cpu()
        return means

    def _tell(self, log: StepLog, numbers: list[float], rate: float, norm: float, took: float) -> None:
        each = self._options.tokens_per_step * self._group.size
        values: dict[str, object] = dict(zip(self._task.terms, numbers, strict=True))
        values |= {
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": round(each / took, 2),
            "seconds": round(self._seconds, 2),
        }
        left = None if self._total is None else (self._total - self._step) * self._seconds / self._step
        log.add(self._step, self._total, values, left)

    def _decide_total(self) -> None:
        """With minutes asked for, their number of steps follows from the first ones."""
        if self._total is not None or self._options.minutes is None:
            return
        if self._step <= _TIMED[0]:
            self._before_timed = self._seconds
        if self._step < _TIMED[1]:
            return
        each = (self._seconds - self._before_timed) / (_TIMED[1] - _TIMED[0])
        fit = int((60 * self._options.minutes - self._seconds) / max(each, 1e-6))
        self._total, _ = self._group.share(self._step + max(1, fit))

    def _give_up(self, loss: float) -> None:
        step = self._step + 1
        self._optimizer.zero_grad(set_to_none=True)
        self._save()
        kept = "" if self._folder is None else f": the state before it is kept in {self._folder.path}"
        raise TrainingError(
            f"the loss of step {step} is {loss:g}, or its gradient is no number{kept}; go on from it with --resume "
            "and a smaller learning rate"
        )

    @contextlib.contextmanager
    def _saved_on_interrupt(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._optimizer.zero_grad(set_to_none=True)
            if self._group.size == 1:  # the others may be anywhere
                self._save()
            raise

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._saved == self._step:
            return
        tensors = {name: full(p).cpu() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    tensors[f"{key}:{name}"] = full(state[key]).cpu()
        if self._folder is not None:
            self._folder.save(Position(self._step, self._total, self._seconds), tensors)
        self._saved = self._step

    def _restore(self) -> None:
        found = None if self._folder is None else self._folder.load()
        place, own = (None, {}) if found is None else (asdict(found[0]), found[1])
        place, tensors = self._group.share(place, own)
        if place is None:
            if self._folder is not None:
                self._folder.need(12 * sum(p.numel() for p in self._parameters.values()))
            return
        position = Position(**place)
        missing = set(self._parameters) - set(tensors)
        if missing or any(tensors[name].shape != p.shape for name, p in self._parameters.items()):
            raise CheckpointError("the checkpoint does not fit the model: start again without --resume")
        for name, parameter in self._parameters.items():
            copy_whole(parameter, tensors[name])
            if f"exp_avg:{name}" in tensors:
                state: dict[str, Any] = {"step": torch.tensor(float(position.step))}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(parameter)
                    copy_whole(state[key], tensors[f"{key}:{name}"])
                self._optimizer.state[parameter] = state
        self._step, self._total, self._seconds = position.step, position.total, position.seconds
        self._saved = self._step
        self._progress.note(f"going on after step {self._step}")

    def _open_log(self) -> StepLog | None:
        if self._folder is None:
            return None
        return StepLog(self._folder.path / LOG, self._step, self._progress)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Vectors and what belongs to a grid are not drawn to zero."""
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            decay = self._options.weight_decay if parameter.dim() > 1 and "transforms" not in name else 0.0
            groups.setdefault((self._task.rate(name), decay), []).append(parameter)
        listed = [
            {"params": members, "weight_decay": decay, "factor": rate} for (rate, decay), members in groups.items()
        ]
        return torch.optim.AdamW(listed, lr=self._options.learning_rate, betas=_BETAS, fused=self._group.size == 1)


def log_path(folder: Path) -> Path:
    """Where a run's folder has its log."""
    return folder / LOG


def wants_bf16(options: TrainOptions, device: torch.device) -> bool:
    """What was asked for, or whether the device multiplies bfloat16 faster than float32.

    Processors with AVX-512 BF16 or AMX do, by a factor of 2 to 3; on others torch widens each number first, which is
    slower than float32.
    """
    if options.bf16 is not None:
        return options.bf16
    if device.type == "cuda":
        return True
    able: Mapping[str, object] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
