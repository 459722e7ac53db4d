"""A loss over a large vocabulary with the logits of a few tokens in memory at a time.

Logits of 2048 tokens over 150000 words are 1.2 GB, and a loss holds several such tensors. Here each chunk's gradients
are made at once, so no chunk is kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# From the hidden states of a slice of tokens [n, hidden_size], the head and the slice: the sum of each loss term.
ChunkLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


def chunked_sum(
    hidden: torch.Tensor, head: torch.Tensor, loss: ChunkLoss, *, num_terms: int, chunk_tokens: int = 128
) -> torch.Tensor:
    """Sums of loss terms over all tokens, [num_terms], differentiable in hidden [tokens, hidden_size] and head.

    The gradient is that of the first term; the others are told for the log.
    """
    found: torch.Tensor = _Chunked.apply(hidden, head, loss, num_terms, chunk_tokens)  # type: ignore[no-untyped-call]
    return found


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, loss: ChunkLoss, num_terms: int, chunk_tokens: int
    ) -> torch.Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros(num_terms, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        weight = head.detach().requires_grad_(wants_head)
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
            if grad_head is not None:
                grad_head += grads.pop(0)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(ctx.dtypes[0]),
            None if grad_head is None else (grad_head * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
