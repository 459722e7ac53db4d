"""A loss over a large vocabulary with the logits of a few tokens in memory at a time.

Logits of 2048 tokens over 150000 words are 1.2 GB, and a loss holds several such tensors. Here each chunk's gradients
are made at once, so no chunk is kept or computed twice. A chunk has as many tokens as a bound on its bytes allows: each
one reads the whole head and writes a gradient of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CHUNK_BYTES = 1 << 27  # of float32 logits

# From the hidden states of a slice of tokens [n, hidden_size], the head and the slice: the sum of each loss term.
ChunkLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


def chunked_sum(
    hidden: torch.Tensor, head: torch.Tensor, loss: ChunkLoss, *, num_terms: int, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Sums of loss terms over all tokens, [num_terms], differentiable in hidden [tokens, hidden_size] and head.

    The gradient is that of the first term, and can be asked for once; the others are told for the log. Under autocast
    `loss` gets the head in its type. chunk_tokens: None: as many as a bound on the memory of their logits allows.
    """
    size = chunk_tokens or tokens_at_once(head)
    # torch gives `apply` no types
    found: torch.Tensor = _Chunked.apply(hidden, head, loss, num_terms, size)  # type: ignore[no-untyped-call]
    return found


def tokens_at_once(head: torch.Tensor) -> int:
    """How many tokens a head [vocab_size, hidden_size] is multiplied with at a time."""
    return max(1, _CHUNK_BYTES // (4 * len(head)))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, loss: ChunkLoss, num_terms: int, chunk_tokens: int
    ) -> torch.Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros(num_terms, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_head: torch.Tensor | None = None
        weight = as_multiplied(head).requires_grad_(wants_head)
        for begin in range(0, len(hidden), chunk_tokens):
            part = slice(begin, min(begin + chunk_tokens, len(hidden)))
            with torch.enable_grad():
                x = hidden[part].detach().requires_grad_(wants_hidden)
                terms = loss(x, weight, part)
                first = terms[0]
            total += terms.detach()
            wanted = [tensor for tensor, wants in ((x, wants_hidden), (weight, wants_head)) if wants]
            if not wanted:
                continue
            grads = list(torch.autograd.grad(first, wanted))
            if grad_hidden is not None:
                grad_hidden[part] = grads.pop(0)
            if wants_head:
                grad_head = grads[0].float() if grad_head is None else grad_head.add_(grads[0])
        ctx.grads = grad_hidden, grad_head
        ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grads, ctx.grads = ctx.grads, ()
        scaled = (None if one is None else one.mul_(grad[0]).to(of) for one, of in zip(grads, ctx.dtypes, strict=True))
        return *scaled, None, None, None


def as_multiplied(head: torch.Tensor) -> torch.Tensor:
    """The head in the type that autocast multiplies in: once, in place of once for every chunk. No gradient."""
    kind = head.device.type
    weight = head.detach()
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
