"""What this machine can do at best, and how near to it a run came.

Two limits bind a decoder on a CPU: the bytes that memory delivers and the 8-bit multiply-adds that the cores finish.
`roofline_fraction` compares a run with whichever of the two it must hit first, so it is the same question for one
stream (bytes) and for many (arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.backends.cpu import measure_int8_gops, measure_read_gb_s
from nybble.checkpoint import Checkpoint

KV_ELEMENT_BYTES = 2  # the cache holds float16

DEFINITION = (
    "roofline_fraction = max(bytes / time / read bandwidth, int8 operations / time / int8 peak). "
    "Bytes of a decode step: every weight once as the file has it, with its scales (an untied embedding not at all), "
    "and the keys and values of each sequence. Operations: 2 per weight of the linear layers and token, and 2 per "
    "weight of the output head and row of logits. For prefill only the operations count."
)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The two limits of a machine, measured with the threads that are used."""

    read_gb_s: float  # 10**9 bytes read per second from memory
    int8_gops: float  # 10**9 8-bit multiplications and additions per second


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step of a model must at least read and compute."""

    weight_bytes: int  # read once per step
    linear_weights: int  # each used once per token
    head_weights: int  # each used once per row of logits
    kv_layers: tuple[tuple[int, int | None], ...]  # per layer: bytes per token of context, window

    @property
    def row_weight(self) -> float:
        """The arithmetic of a row of logits in that of a token."""
        return self.head_weights / self.linear_weights

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys and values that a token reads after `context` tokens."""
        return sum(size * (context if window is None else min(context, window)) for size, window in self.kv_layers)

    def operations(self, num_tokens: int, num_logit_rows: int) -> int:
        """8-bit operations of a step, a multiply-add counting as two."""
        return 2 * (self.linear_weights * num_tokens + self.head_weights * num_logit_rows)


def measure_roofline(threads: int | None = None) -> Roofline:
    """Measure this machine; takes about a second."""
    return Roofline(read_gb_s=measure_read_gb_s(threads), int8_gops=measure_int8_gops(threads))


def model_cost(checkpoint: Checkpoint) -> ModelCost:
    """Count what a step of this checkpoint costs, from its tensors alone."""
    spec = checkpoint.spec
    head_name = "head" if "head" in checkpoint.tensors else "embed"
    weight_bytes = checkpoint.packed_bytes
    linear_weights = head_weights = 0
    for name, tensor in checkpoint.tensors.items():
        if name == "embed" and head_name != "embed":
            continue  # only one row per token is looked up
        if tensor.packed is None:
            weight_bytes += tensor.data.nbytes
        if name == head_name:
            head_weights = tensor.shape[0] * tensor.shape[1]
        elif len(tensor.shape) == 2:
            linear_weights += tensor.shape[0] * tensor.shape[1]
    kv_layers = tuple((2 * la.num_kv_heads * la.head_dim * KV_ELEMENT_BYTES, la.window) for la in spec.layers)
    return ModelCost(weight_bytes, linear_weights, head_weights, kv_layers)


def decode_fraction(cost: ModelCost, roofline: Roofline, *, batch: int, context: int, step_seconds: float) -> float:
    """How near a decode step of `batch` sequences came to the machine's limit."""
    num_bytes = cost.weight_bytes + batch * cost.kv_bytes(context)
    return max(
        num_bytes / step_seconds / (roofline.read_gb_s * 1e9),
        cost.operations(batch, batch) / step_seconds / (roofline.int8_gops * 1e9),
    )


def prefill_fraction(cost: ModelCost, roofline: Roofline, *, tokens: int, prompts: int, seconds: float) -> float:
    """How near the reading of prompts came to the machine's int8 peak."""
    return cost.operations(tokens, prompts) / seconds / (roofline.int8_gops * 1e9)
