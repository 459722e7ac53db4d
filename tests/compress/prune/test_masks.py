"""Masks against torch.nn.utils.prune and against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from nybble.compress.prune.masks import NM, GlobalCut, magnitude_mask, nm_mask, num_pruned, row_mask, wanda_score
from nybble.core.errors import ConfigError


def linear(rows: int, columns: int, seed: int = 0, *, ties: bool = False) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    if ties:
        layer.weight.data = (layer.weight.data * 20).round() / 20
    return layer


@pytest.mark.unit
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.333, 0.5, 0.97])
@pytest.mark.parametrize("ties", [False, True])
def test_magnitude_is_torchs_l1_unstructured(amount: float, ties: bool) -> None:
    layer = linear(31, 17, ties=ties)
    ours = magnitude_mask(layer.weight.detach(), amount)
    torch_prune.l1_unstructured(layer, "weight", amount=amount)
    assert torch.equal(ours, layer.weight_mask.bool())


@pytest.mark.unit
@pytest.mark.parametrize("amount", [0.0, 0.2, 0.5, 0.9])
def test_the_global_cut_is_torchs_global_unstructured(amount: float) -> None:
    layers = [linear(31, 17, 1), linear(5, 64, 2), linear(64, 33, 3)]
    layers[1].weight.data *= 0.1
    weights = [layer.weight.detach().clone() for layer in layers]
    cut = GlobalCut.find(lambda: iter(weights), amount)
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=torch_prune.L1Unstructured, amount=amount
    )
    for layer, weight in zip(layers, weights, strict=True):
        mask, cut = cut.apply(weight)
        assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.unit
def test_equal_weights_at_the_global_cut_go_in_order_and_no_more_than_asked() -> None:
    weights = [torch.full((2, 8), 0.5), torch.full((2, 8), -0.5)]
    cut = GlobalCut.find(lambda: iter(weights), 0.625)
    masks = []
    for weight in weights:
        mask, cut = cut.apply(weight)
        masks.append(mask)
    assert [int((~mask).sum()) for mask in masks] == [16, 4]
    assert cut.ties == 0


@pytest.mark.unit
def test_wanda_compares_inputs_of_one_output_only() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 10), torch.randn(50, 10) * torch.logspace(-2, 2, 10)
    mask = row_mask(wanda_score(weight, x.square().mean(0)), 0.4)
    for row in range(6):
        score = weight[row].abs() * x.norm(dim=0)
        assert set(torch.nonzero(~mask[row]).flatten().tolist()) == set(score.argsort()[:4].tolist())


@pytest.mark.unit
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 5)])
def test_of_every_group_the_largest_stay(keep: int, group: int) -> None:
    torch.manual_seed(0)
    score = torch.rand(7, group * 6)
    mask = nm_mask(score, NM(keep, group))
    for row in range(7):
        for begin in range(0, group * 6, group):
            part = score[row, begin : begin + group]
            kept = torch.nonzero(mask[row, begin : begin + group]).flatten().tolist()
            assert kept == sorted(part.argsort(descending=True)[:keep].tolist())


@pytest.mark.unit
def test_equal_scores_still_leave_the_pattern() -> None:
    assert nm_mask(torch.zeros(1, 8), NM(2, 4)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.unit
@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2", "2:4:8", "a:b", "2/4", "-1:4", "2:1000"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be like 2:4"):
        NM.parse(text)


@pytest.mark.unit
@pytest.mark.parametrize("amount", [1.0, -0.1, 2, float("nan")])
def test_amounts_outside_of_their_range_are_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and less than 1"):
        num_pruned(amount, 10)
