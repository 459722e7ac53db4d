"""The maths of SparseGPT, of taking units out, of influence and of shares, on matrices alone."""

from __future__ import annotations

import pytest
import torch

from nybble.compress.gptq.algorithm import output_error
from nybble.compress.prune.influence import BlockInfluence, least_influential, mean_loss
from nybble.compress.prune.masks import NM, magnitude_mask, nm_mask, row_mask, wanda_score
from nybble.compress.prune.shares import allocate, whole
from nybble.compress.prune.sparsegpt import sparse_factor, sparsegpt
from nybble.compress.prune.units import (
    Inputs,
    activation_score,
    channels,
    choose,
    fluctuation_score,
    keep_best,
    refit,
    removal_score,
    without,
)


def correlated(tokens: int = 800, inputs: int = 192, seed: int = 0) -> torch.Tensor:
    """Inputs that resemble each other, as those of language models do, and are not centred."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs // 4, generator=g) @ torch.randn(inputs // 4, inputs, generator=g)
    sizes = torch.logspace(-1, 0.5, inputs)[torch.randperm(inputs, generator=g)]
    return x * sizes + 0.3 * torch.randn(tokens, inputs, generator=g) + 0.5


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return correlated()


@pytest.fixture(scope="module")
def inputs(x: torch.Tensor) -> Inputs:
    return Inputs(x.T @ x / len(x), x.mean(0))


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.unit
@pytest.mark.parametrize("nm", [None, NM(2, 4), NM(4, 8)])
def test_sparsegpt_loses_less_than_wanda_and_that_less_than_magnitude(
    inputs: Inputs, weight: torch.Tensor, nm: NM | None
) -> None:
    hessian = inputs.hessian
    factor, _ = sparse_factor(hessian)
    assert factor is not None
    ours = sparsegpt(weight, hessian, factor, amount=0.5, nm=nm)
    score = wanda_score(weight, hessian.diagonal())
    wanda = weight * (row_mask(score, 0.5) if nm is None else nm_mask(score, nm))
    magnitude = weight * (magnitude_mask(weight, 0.5) if nm is None else nm_mask(weight.abs(), nm))
    errors = [output_error(weight, found, hessian) for found in (ours, wanda, magnitude)]
    assert errors[0] < 0.7 * errors[1] < 0.7 * errors[2]
    assert float((ours == 0).float().mean()) == 0.5
    if nm is not None:
        assert bool(((ours != 0).reshape(48, -1, nm.group).sum(2) == nm.keep).all())


@pytest.mark.unit
def test_sparsegpt_on_independent_inputs_is_magnitude_times_the_inputs_size(weight: torch.Tensor) -> None:
    sizes = torch.logspace(-1, 1, 192).square()
    factor, _ = sparse_factor(torch.diag(sizes))
    assert factor is not None
    found = sparsegpt(weight[:, :128], torch.diag(sizes[:128]), factor[:128, :128], amount=0.5)
    # Damping shifts the sizes a little; with none of a row's errors carried on, weights that stay do not change.
    kept = found != 0
    torch.testing.assert_close(found[kept], weight[:, :128][kept])
    damped = sizes[:128] + 0.01 * sizes.mean()
    assert torch.equal(kept, magnitude_mask(weight[:, :128] * damped.sqrt(), 0.5))


@pytest.mark.unit
def test_inputs_that_never_came_lose_their_weights_and_do_no_harm(weight: torch.Tensor) -> None:
    x = correlated()
    x[:, 10] = 0
    hessian = x.T @ x / len(x)
    factor, _ = sparse_factor(hessian)
    assert factor is not None
    found = sparsegpt(weight, hessian, factor, amount=0.25)
    assert not bool(found[:, 10].any()) and bool(torch.isfinite(found).all())


@pytest.mark.unit
def test_refit_is_the_least_squares_solution(x: torch.Tensor, inputs: Inputs, weight: torch.Tensor) -> None:
    kept = torch.arange(0, 192, 2)
    fitted = refit(weight, inputs, kept)
    exact = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    error, best = ((x[:, kept] @ w.T - x @ weight.T).square().mean() for w in (fitted.weight, exact))
    plain = (x[:, kept] @ weight[:, kept].T - x @ weight.T).square().mean()
    assert best <= error < 0.2 * plain
    assert error < 1.2 * best + 0.02 * plain  # damping costs a little


@pytest.mark.unit
def test_a_bias_holds_what_the_removed_inputs_gave_on_average(
    x: torch.Tensor, inputs: Inputs, weight: torch.Tensor
) -> None:
    kept = torch.arange(0, 96)
    for fitted in (without(weight, inputs, kept, with_bias=True), refit(weight, inputs, kept, with_bias=True)):
        assert fitted.bias is not None
        outputs = x[:, kept] @ fitted.weight.T + fitted.bias
        torch.testing.assert_close(outputs.mean(0), (x @ weight.T).mean(0), rtol=1e-3, atol=1e-2)
    assert without(weight, inputs, kept).bias is None


@pytest.mark.unit
def test_the_removal_score_is_the_error_after_the_best_fit(inputs: Inputs, weight: torch.Tensor) -> None:
    score = removal_score(weight, inputs.hessian, 4)
    assert score.shape == (48,)
    for unit in (0, 7, 40):
        kept = torch.tensor([i for i in range(192) if i // 4 != unit])
        spread = torch.zeros_like(weight)
        spread[:, kept] = refit(weight, inputs, kept).weight
        damped = inputs.hessian + 0.01 * inputs.hessian.diagonal().mean() * torch.eye(192)
        torch.testing.assert_close(float(score[unit]), output_error(weight, spread, damped), rtol=0.02, atol=1e-3)


@pytest.mark.unit
def test_of_two_inputs_that_say_the_same_one_stays() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=g)
    x = torch.cat((x, x), dim=1)  # input i + 8 repeats input i
    weight = torch.randn(6, 16, generator=g)
    kept = choose(weight, Inputs(x.T @ x / 500, x.mean(0)), 1, 8)
    assert sorted(int(i) % 8 for i in kept) == list(range(8))


@pytest.mark.unit
def test_the_same_number_stays_of_every_group(inputs: Inputs, weight: torch.Tensor) -> None:
    kept = choose(weight, inputs, 8, 12, num_groups=6)  # 24 units of 8 inputs in 6 groups of 4
    assert [int((kept // 4 == group).sum()) for group in range(6)] == [2] * 6
    assert keep_best(torch.tensor([1.0, 4, 3, 2, 9, 8]), 2, 2).tolist() == [1, 4]
    assert channels(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.unit
def test_a_constant_input_matters_unless_a_bias_can_hold_it() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 1e-3, 1.0])
    x[:, 2] += 10
    given = Inputs(x.T @ x / 400, x.mean(0))
    assert int(activation_score(torch.ones(3, 4), given, 1).argmax()) == 2
    assert int(fluctuation_score(torch.ones(3, 4), given, 1).argmin()) == 2


@pytest.mark.unit
def test_influence_is_how_far_a_layer_turns_the_stream() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    same, turned = BlockInfluence(), BlockInfluence()
    same.add(before, before * 3)
    turned.add(before, before.flip(1))
    assert same.value == pytest.approx(0.0)
    assert turned.value == pytest.approx(1.0)
    assert least_influential([0.5, 0.1, 0.3, 0.2], 2) == [1, 3]
    logits = torch.zeros(1, 3, 5)
    assert mean_loss(logits, torch.tensor([[1, 2, 3]])) == pytest.approx(torch.log(torch.tensor(5.0)).item())


@pytest.mark.unit
def test_shares_become_whole_widths() -> None:
    assert [whole(1536, 0.75, 32), whole(1536, 0.01, 32), whole(9, 0.67), whole(3, None), whole(20, 0.5, 32)] == [
        1152, 32, 6, 3, 20,
    ]  # fmt: skip
    flat, steep = torch.arange(64.0), torch.cat((torch.zeros(48), torch.full((16,), 100.0)))
    widths = allocate([flat, steep], 0.5, 8)
    assert sum(widths) == 64 and widths[1] <= 24 < widths[0]
    assert allocate([flat, steep], None, 8) == [64, 64]
