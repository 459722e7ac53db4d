"""Rotary position embeddings in torch, from the same frequencies as every other backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.core.rope import inverse_frequencies
from nybble.core.spec import RopeSpec


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines [tokens, rotary_dim / 2] of positions 0, 1, ..., with the scaling's magnitude in them."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @classmethod
    def make(cls, spec: RopeSpec, num_tokens: int, *, context: int, device: torch.device | None = None) -> Rope:
        """context: tokens that a sequence may reach, by which some scalings choose their frequencies."""
        inv_freq, magnitude = inverse_frequencies(spec, context)
        angles = torch.arange(num_tokens, dtype=torch.float32)[:, None] * torch.from_numpy(inv_freq)[None, :]
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        return cls(cos.to(device), sin.to(device), spec.interleaved)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, heads, tokens, head_dim]. Dimensions beyond rotary_dim stay."""
        half = self.cos.shape[-1]
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turned[..., :half], turned[..., half:]
            out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out
