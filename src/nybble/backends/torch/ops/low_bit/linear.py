"""What every packed weight matrix can do, and the plain one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from nybble.core.errors import ConfigError


class Linear(ABC):
    """A weight matrix [out_features, in_features] on a device, ready to be multiplied.

    kind: a word for tables and logs, such as "Q4_K" or "bfloat16".
    """

    kind: str

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    @property
    def bytes(self) -> int:
        """Of codes, scales and all else that a product reads."""
        return sum(part.numel() * part.element_size() for part in self.parts())

    @abstractmethod
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the matrix."""

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out_features, in_features] that the product stands for."""

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[M, in_features] -> [M, out_features], of the type of x."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], of the type of x.

        Raises:
            ConfigError: x has another width.
        """
        if x.shape[-1] != self.in_features:
            raise ConfigError(
                f"a {self.kind} matrix of {self.out_features} x {self.in_features} cannot multiply rows of "
                f"{x.shape[-1]} values"
            )
        y = self.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias.to(y.dtype)


class DenseLinear(Linear):
    """Floats; torch's own product is as good as any."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape)
        self.weight = weight
        self.kind = str(weight.dtype).removeprefix("torch.")

    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
