"""What the teacher says about a batch: computed when it is asked for, or once for all and kept on the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.trainable import TrainableDecoder, head_logits
from nybble.checkpoint import Checkpoint
from nybble.compress.distil.loss import divergence, top_k, top_k_divergence
from nybble.compress.methods import Progress
from nybble.compress.train.data import Sequences
from nybble.compress.train.head import as_multiplied, tokens_at_once
from nybble.core.errors import ConfigError, OutputError
from nybble.formats.output import OutputFile
from nybble.formats.safetensors import read_json
from nybble.formats.safetensors_writer import write_json
from nybble.tokenizer import load_tokenizer

_PASS_TOKENS = 1024  # that the teacher reads at a time, to read its weights that much less often
_PROBE = (
    "The quick brown fox, 12345 and 3.1: na\u00efve caf\u00e9s don't \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\U0001f600\n\n\tdef f(x):\n    return x**2  # <|end|> </s>"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The teacher's words on a batch.

    divergence: from the student's logits of a slice of the batch's tokens and the slice to KL(teacher || student) of
    each token. hidden: outputs of the layers that were asked for, [batch, tokens, hidden_size].
    """

    divergence: Callable[[torch.Tensor, slice], torch.Tensor]
    hidden: tuple[torch.Tensor, ...] = ()


class Teacher(Protocol):
    """token_ids: [batch, seq_len]; rows: which sequences they are."""

    def answer(self, token_ids: torch.Tensor, rows: npt.NDArray[np.int64]) -> Answer: ...


class LiveTeacher:
    """keep: layers whose outputs are wanted. vocab_size: that both models share, less than a padded head has."""

    def __init__(
        self, model: TrainableDecoder, temperature: float, *, vocab_size: int, keep: tuple[int, ...] = ()
    ) -> None:
        self.model = model.requires_grad_(False)
        self._temperature = temperature
        self._vocab_size = vocab_size
        self._keep = keep

    @torch.no_grad()
    def answer(self, token_ids: torch.Tensor, rows: npt.NDArray[np.int64]) -> Answer:
        spec, vocab = self.model.spec, self._vocab_size
        hidden, kept = self.model(token_ids, lambda x, weight, kept: (x.flatten(0, 1), kept), self._keep)
        head = as_multiplied(self.model.outer["embed" if spec.tied_head else "head"])

        def told(student: torch.Tensor, part: slice) -> torch.Tensor:
            with torch.no_grad():
                wanted = _first(head_logits(spec, hidden[part], head), vocab)
            return divergence(_first(student, vocab), wanted, self._temperature)

        return Answer(told, tuple(kept))


def _first(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Without what pads the head. A slice of everything would still copy the gradient."""
    return logits if logits.shape[-1] == vocab_size else logits[:, :vocab_size]


class KeptTeacher:
    """The k likeliest tokens of every position, in a file; the mass of all others is one more outcome."""

    def __init__(
        self, ids: npt.NDArray[np.int32], log_probs: npt.NDArray[np.float32], temperature: float, vocab_size: int
    ) -> None:
        self._ids = ids
        self._log_probs = log_probs
        self._temperature = temperature
        self._vocab_size = vocab_size

    def answer(self, token_ids: torch.Tensor, rows: npt.NDArray[np.int64]) -> Answer:
        ids = torch.from_numpy(self._ids[rows].astype(np.int64)).flatten(0, 1).to(token_ids.device)
        log_probs = torch.from_numpy(np.array(self._log_probs[rows])).flatten(0, 1).to(token_ids.device)

        def told(student: torch.Tensor, part: slice) -> torch.Tensor:
            return top_k_divergence(_first(student, self._vocab_size), ids[part], log_probs[part], self._temperature)

        return Answer(told)


def keep_answers(
    folder: Path,
    model: Callable[[], TrainableDecoder],
    sequences: Sequences,
    *,
    k: int,
    temperature: float,
    vocab_size: int,
    identity: dict[str, object],
    progress: Progress,
    bf16: bool,
    device: torch.device,
) -> KeptTeacher:
    """The teacher's likeliest tokens for all sequences: from files in `folder` if they are of this teacher, text, k and
    temperature, else made now.

    model: gives the teacher, if it is needed. Raises OutputError if the files cannot be written.
    """
    wanted = {**identity, "text": sequences.digest, "k": k, "temperature": temperature, "version": 1}
    shape = (len(sequences.token_ids), sequences.token_ids.shape[1] - 1, k)
    about = folder / "teacher.json"
    if not (about.exists() and read_json(about) == json.loads(json.dumps(wanted))):
        _make(folder, model(), sequences, shape, temperature, vocab_size, progress, bf16, device)
        write_json(about, wanted)
    paths = folder / "teacher-ids.bin", folder / "teacher-log-probs.bin"
    if any(path.stat().st_size != 4 * math.prod(shape) for path in paths):
        raise ConfigError(f"{folder} holds teacher's answers of another size than it says: remove it")
    ids: Any = np.memmap(paths[0], np.int32, "r", shape=shape)
    log_probs: Any = np.memmap(paths[1], np.float32, "r", shape=shape)
    return KeptTeacher(ids, log_probs, temperature, vocab_size)


@torch.no_grad()
def _make(
    folder: Path,
    model: TrainableDecoder,
    sequences: Sequences,
    shape: tuple[int, int, int],
    temperature: float,
    vocab_size: int,
    progress: Progress,
    bf16: bool,
    device: torch.device,
) -> None:
    spec = model.spec
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder} cannot be made: {e.strerror or e}") from e
    (folder / "teacher.json").unlink(missing_ok=True)
    progress.start(shape[0])
    rows = max(1, _PASS_TOKENS // shape[1])
    with (
        OutputFile(folder / "teacher-ids.bin", force=True) as ids_file,
        OutputFile(folder / "teacher-log-probs.bin", force=True) as values_file,
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        for row in range(0, shape[0], rows):
            token_ids = torch.from_numpy(sequences.token_ids[row : row + rows, :-1]).to(device)

            def head(x: torch.Tensor, weight: torch.Tensor, _: list[torch.Tensor]) -> None:
                weight = as_multiplied(weight)
                for part in torch.split(x.flatten(0, 1), tokens_at_once(weight)):
                    found = top_k(head_logits(spec, part, weight)[:, :vocab_size], shape[2], temperature)
                    ids_file.write(found[0].to(torch.int32).cpu().numpy().tobytes())
                    values_file.write(found[1].cpu().numpy().tobytes())

            model(token_ids, head)
            progress.advance(len(token_ids), "what the teacher says")


def shared_vocab(student: Checkpoint, teacher: Checkpoint) -> int:
    """How many tokens both models have. Raises ConfigError if their tokenizers differ."""
    ours, theirs = load_tokenizer(student.tokenizer), load_tokenizer(teacher.tokenizer)
    why = ""
    if ours.vocab_size != theirs.vocab_size:
        why = f"have {ours.vocab_size} and {theirs.vocab_size} tokens"
    elif any(ours.token_bytes(i) != theirs.token_bytes(i) for i in range(ours.vocab_size)):
        odd = next(i for i in range(ours.vocab_size) if ours.token_bytes(i) != theirs.token_bytes(i))
        why = f"mean {ours.token_bytes(odd)!r:.40} and {theirs.token_bytes(odd)!r:.40} by token {odd}"
    elif ours.encode(_PROBE, add_special=False) != theirs.encode(_PROBE, add_special=False):
        why = "cut a text into different tokens"
    if why:
        raise ConfigError(
            f"the student {student.path} and the teacher {teacher.path} have different tokenizers, which {why}: a "
            "teacher must speak the student's tokens, so choose one of the same family"
        )
    return min(student.spec.vocab_size, teacher.spec.vocab_size)
