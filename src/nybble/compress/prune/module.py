"""Weights of a model in memory set to zero, in place: any `torch.nn.Module`, for example one of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from nybble.compress.prune.masks import NM, lowest_removed, magnitude_mask, nm_mask, num_pruned, row_mask, wanda_score
from nybble.core.errors import ConfigError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Batch = torch.Tensor | Mapping[str, Any] | Sequence[Any]


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """Linears and convolutions by name, without a language model's head, whose weight often is the embedding's too.

    exclude: parts of names of layers to leave out.
    """
    of_model: Any = model  # transformers' models say which layer their head is
    head = of_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer)
        and module is not head
        and id(module.weight) not in embeddings
        and not any(part in name for part in exclude)
    }


def prune_module(
    model: nn.Module,
    amount: float | None = None,
    *,
    nm: str | None = None,
    method: Literal["magnitude", "wanda"] = "magnitude",
    scope: Literal["layer", "global"] = "layer",
    batches: Iterable[Batch] | None = None,
    exclude: Sequence[str] = (),
    keep_masks: bool = False,
) -> dict[str, float]:
    """Set weights to zero, in place. Gives the share of zeros of each layer by its name.

    amount: the share that becomes zero. nm: or "2:4". method wanda needs batches: inputs that the model is called with,
    each a tensor, a tuple of arguments or a mapping of named ones. scope global compares the magnitudes of all layers.
    keep_masks: as torch.nn.utils.prune does it, with `weight_orig` and `weight_mask`, so that training keeps the zeros;
    `torch.nn.utils.prune.remove` makes them final. Without, they are, and training would fill them again.

    Raises ConfigError for options that cannot be used or do not go together, before a weight changes.
    """
    layers = prunable(model, exclude)
    if not layers:
        raise ConfigError("the model has no linear layer or convolution to prune")
    pattern = None if nm is None else NM.parse(nm)
    _check(layers, amount, pattern, method, scope, batches is not None)
    with torch.no_grad():
        if method == "wanda":
            assert batches is not None
            masks = _wanda(model, layers, amount, pattern, batches)
        elif scope == "global":
            assert amount is not None
            masks = _global(layers, amount)
        else:
            masks = {name: _magnitude(layer.weight.detach().cpu(), amount, pattern) for name, layer in layers.items()}
        found = {}
        for name, layer in layers.items():
            mask = masks[name].to(layer.weight.device)
            torch_prune.custom_from_mask(layer, "weight", mask)  # type: ignore[no-untyped-call]
            if not keep_masks:
                torch_prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
            found[name] = float((~mask).float().mean())
    return found


def _check(
    layers: Mapping[str, Layer], amount: float | None, nm: NM | None, method: str, scope: str, has_batches: bool
) -> None:
    if (amount is None) == (nm is None):
        raise ConfigError("prune_model needs one of amount (like 0.3) and nm (like '2:4')")
    if amount is not None:
        num_pruned(amount, 1)
    if method not in ("magnitude", "wanda"):
        raise ConfigError(
            f"method {method!r} does not go with a model in memory, only magnitude and wanda: give the path of a model"
        )
    if scope not in ("layer", "global"):
        raise ConfigError(f"scope {scope!r} is not known: layer or global")
    if scope == "global" and (method != "magnitude" or nm is not None):
        raise ConfigError("scope global only goes with method magnitude and an amount")
    if (method == "wanda") != has_batches:
        raise ConfigError("method wanda needs batches, which no other method has: what the model is called with")
    if method == "wanda" or nm is not None:
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise ConfigError(
                    f"{name} is a convolution, which method magnitude with an amount can prune: exclude it"
                )
            if nm is not None:
                nm.check(layer.in_features, name)


def _magnitude(weight: torch.Tensor, amount: float | None, nm: NM | None) -> torch.Tensor:
    return nm_mask(weight.abs(), nm) if nm is not None else magnitude_mask(weight, amount or 0.0)


def _global(layers: Mapping[str, Layer], amount: float) -> dict[str, torch.Tensor]:
    """The same masks as `torch.nn.utils.prune.global_unstructured(..., L1Unstructured, amount)`."""
    weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
    score = torch.cat([weight.abs().reshape(-1) for weight in weights.values()])
    mask = lowest_removed(score, num_pruned(amount, score.numel()))
    parts = torch.split(mask, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}


def _wanda(
    model: nn.Module, layers: Mapping[str, Layer], amount: float | None, nm: NM | None, batches: Iterable[Batch]
) -> dict[str, torch.Tensor]:
    squares = {name: torch.zeros(layer.weight.shape[1]) for name, layer in layers.items()}
    with _watched(layers, squares):
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, torch.Tensor):
                model(batch)
            else:
                model(*batch)
    masks = {}
    for name, layer in layers.items():
        if not bool(torch.isfinite(squares[name]).all()):
            raise ConfigError(f"what {name} reads is not a number any more on these batches: check the model")
        score = wanda_score(layer.weight.detach().cpu().float(), squares[name])
        masks[name] = nm_mask(score, nm) if nm is not None else row_mask(score, amount or 0.0)
    if all(not bool(found.any()) for found in squares.values()):
        raise ConfigError("there are no batches, or no layer has read anything from them: method wanda needs some")
    return masks


@contextmanager
def _watched(layers: Mapping[str, Layer], squares: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Sums of squares of what each layer reads."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach()
            squares[name].add_(x.reshape(-1, x.shape[-1]).float().square().sum(0).cpu())

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
