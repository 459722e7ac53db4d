"""From a step of the engine to the flat tensors that a decoder runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.cpu import Step

BLOCK_SIZE = 16  # tokens of a cache block, as the engine's pool counts them
SKIP = -1  # a slot that stands for no token
_ALIGN = 4  # int32s: kernels are compiled anew for pointers that are not multiples of 16 bytes

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class HostInputs:
    """A step as int32 arrays, checked. What other ranks are sent.

    token_ids, positions, slots: [tokens]. cu_seqlens_q: [sequences + 1]. kv_lens: [sequences], this step's tokens
    included. block_tables: [sequences, blocks]. logit_rows, hidden_rows: which tokens are asked for.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    cu_seqlens_q: Ints
    kv_lens: Ints
    block_tables: Ints
    logit_rows: Ints
    hidden_rows: Ints

    @property
    def header(self) -> tuple[int, int, int, int, int]:
        """The sizes from which `layout` follows."""
        sequences, width = self.block_tables.shape
        return len(self.token_ids), sequences, width, len(self.logit_rows), len(self.hidden_rows)

    @property
    def max_q_len(self) -> int:
        return int(np.diff(self.cu_seqlens_q).max())

    @property
    def num_decodes(self) -> int:
        """How many sequences at the front have one token."""
        longer = np.flatnonzero(np.diff(self.cu_seqlens_q) != 1)
        return int(longer[0]) if len(longer) else len(self.kv_lens)

    @property
    def is_decode(self) -> bool:
        """One token of each sequence, the logits of all of them in order, and nothing else."""
        count = len(self.kv_lens)
        return (
            len(self.token_ids) == count
            and not len(self.hidden_rows)
            and np.array_equal(self.logit_rows, np.arange(count))
        )


def host_inputs(step: Step, *, vocab_size: int, num_blocks: int, context: int) -> HostInputs:
    """Positions and slots of a step's tokens.

    Raises:
        ValueError: the step does not hold together: an id, a block or a row is out of range, or lengths differ.
    """
    token_ids, cu, context_lens, tables, logit_rows = (
        np.ascontiguousarray(a, np.int32)
        for a in (step.token_ids, step.cu_seqlens_q, step.context_lens, step.block_tables, step.logit_rows)
    )
    hidden_rows = (
        np.zeros(0, np.int32) if step.hidden_rows is None else np.ascontiguousarray(step.hidden_rows, np.int32)
    )
    counts = np.diff(cu)
    _check(len(cu) == len(context_lens) + 1 and len(context_lens) > 0, "cu_seqlens_q has not one entry per sequence")
    _check(cu[0] == 0 and cu[-1] == len(token_ids) and bool((counts > 0).all()), "cu_seqlens_q does not fit the tokens")
    _check(tables.ndim == 2 and len(tables) == len(context_lens), "there is not one block table per sequence")
    _check(_within(token_ids, vocab_size), f"a token id is not below {vocab_size}")
    _check(_within(logit_rows, len(token_ids)) and _within(hidden_rows, len(token_ids)), "a row is out of range")
    kv_lens = context_lens + counts
    _check(bool((context_lens >= 0).all()) and int(kv_lens.max()) <= context, f"a sequence is longer than {context}")
    _check(int(kv_lens.max()) <= tables.shape[1] * BLOCK_SIZE, "a block table is too short")
    sequence = np.repeat(np.arange(len(counts)), counts)
    positions = (np.arange(len(token_ids)) - cu[:-1][sequence] + context_lens[sequence]).astype(np.int32)
    blocks = np.where(np.arange(tables.shape[1]) * BLOCK_SIZE < kv_lens[:, None], tables, 0).astype(np.int32)
    _check(_within(blocks, num_blocks), f"a block id is not below {num_blocks}")
    slots = (blocks[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32)
    return HostInputs(token_ids, positions, slots, cu, kv_lens.astype(np.int32), blocks, logit_rows, hidden_rows)


def layout(header: tuple[int, int, int, int, int]) -> list[tuple[str, int, tuple[int, ...]]]:
    """Where each array of a step lies in its flat form: (name, begin, shape), each at a multiple of 16 bytes.

    header: the numbers of tokens, sequences, blocks of a table, rows of logits and of hidden states.
    """
    tokens, sequences, width, logit_rows, hidden_rows = header
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_ids", (tokens,)),
        ("positions", (tokens,)),
        ("slots", (tokens,)),
        ("cu_seqlens_q", (sequences + 1,)),
        ("kv_lens", (sequences,)),
        ("block_tables", (sequences, width)),
        ("logit_rows", (logit_rows,)),
        ("hidden_rows", (hidden_rows,)),
    ]
    places, begin = [], 0
    for name, shape in shapes:
        places.append((name, begin, shape))
        begin += -(-math.prod(shape) // _ALIGN) * _ALIGN
    return [*places, ("", begin, ())]


def to_flat(host: HostInputs, out: Ints | None = None) -> Ints:
    """All arrays of a step in one, so that one copy or one message carries them. out: where to write them."""
    places = layout(host.header)
    flat = np.zeros(places[-1][1], np.int32) if out is None else out
    for name, begin, shape in places[:-1]:
        flat[begin : begin + math.prod(shape)] = getattr(host, name).reshape(-1)
    return flat


def from_flat(header: tuple[int, int, int, int, int], flat: Ints) -> HostInputs:
    """What to_flat was given. Raises ValueError if the length is not what the header says."""
    places = layout(header)
    if len(flat) != places[-1][1]:
        raise ValueError(f"a step of {header} takes {places[-1][1]} numbers, not {len(flat)}")
    arrays = {name: flat[begin : begin + math.prod(shape)].reshape(shape) for name, begin, shape in places[:-1]}
    return HostInputs(**arrays)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on a device, as kernels take it; int32, shaped as in HostInputs."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    hidden_rows: torch.Tensor
    max_q_len: int
    num_decodes: int  # sequences at the front that have one token

    def to(self, device: torch.device) -> StepTensors:
        """A copy on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type == "torch.Tensor"}
        return replace(self, **moved)


def step_tensors(host: HostInputs, device: torch.device) -> StepTensors:
    """Copy a step to a device, in one piece."""
    flat = torch.from_numpy(to_flat(host))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return step_views(host, flat)


def step_views(host: HostInputs, flat: torch.Tensor) -> StepTensors:
    """The tensors of a step whose flat form is on a device already."""
    parts = {
        name: flat[begin : begin + math.prod(shape)].view(shape) for name, begin, shape in layout(host.header)[:-1]
    }
    return StepTensors(**parts, max_q_len=host.max_q_len, num_decodes=host.num_decodes)


def padded(host: HostInputs, size: int, table_width: int) -> HostInputs:
    """A decode step with `size` sequences: those behind the real ones write and see nothing."""
    count = len(host.kv_lens)

    def longer(array: Ints, fill: int) -> Ints:
        return np.concatenate([array, np.full(size - count, fill, np.int32)])

    tables = np.zeros((size, table_width), np.int32)
    tables[:count, : host.block_tables.shape[1]] = host.block_tables[:, :table_width]
    return HostInputs(
        token_ids=longer(host.token_ids, 0),
        positions=longer(host.positions, 0),
        slots=longer(host.slots, SKIP),
        cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
        kv_lens=longer(host.kv_lens, 0),
        block_tables=tables,
        logit_rows=np.arange(size, dtype=np.int32),
        hidden_rows=host.hidden_rows,
    )


def _within(values: Ints, end: int) -> bool:
    return not values.size or (int(values.min()) >= 0 and int(values.max()) < end)


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(f"the step does not hold together: {sentence}")
