"""Models in memory, against torch.nn.utils.prune."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from prune_helpers import TOKENS
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM

import nybble
from nybble.checkpoint import open_checkpoint
from nybble.compress.prune.module import prune_module
from nybble.core.errors import ConfigError, OutputError


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.unit
def test_a_module_is_pruned_in_place_as_torch_does_it() -> None:
    model, theirs = small(), small()
    assert nybble.prune_model(model, amount=0.3) is model
    for layer in (theirs[0], theirs[2], theirs[4]):
        torch_prune.l1_unstructured(layer, "weight", amount=0.3)
        torch_prune.remove(layer, "weight")
    for (name, ours), (_, expected) in zip(model.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(ours, expected), name


@pytest.mark.unit
def test_the_global_scope_is_torchs_too() -> None:
    model, theirs = small(), small()
    shares = prune_module(model, 0.4, scope="global")
    layers = [(theirs[i], "weight") for i in (0, 2, 4)]
    torch_prune.global_unstructured(layers, pruning_method=torch_prune.L1Unstructured, amount=0.4)
    for i in (0, 2, 4):
        assert torch.equal(model[i].weight, theirs[i].weight)
    assert set(shares) == {"0", "2", "4"} and len(set(shares.values())) == 3


@pytest.mark.unit
def test_kept_masks_hold_through_training() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    prune_module(model, 0.5, keep_masks=True)
    zeros = model[0].weight == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(4, 8))
    assert int(zeros.sum()) == 32 and torch.equal(model[0].weight == 0, zeros)


@pytest.mark.unit
def test_a_language_models_head_and_embeddings_stay(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = copy.deepcopy(model.state_dict())
    nybble.prune_model(model, amount=0.5)
    for name, weight in model.state_dict().items():
        if "_proj" in name:
            assert float((weight == 0).float().mean()) == 0.5, name
        else:
            assert torch.equal(weight, before[name]), name


@pytest.mark.unit
def test_wanda_in_memory_looks_at_what_the_layers_read(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    layer = model.model.layers[0].self_attn.q_proj
    weight, read = layer.weight.detach().clone(), []
    handle = layer.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].detach()))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    nybble.prune_model(model, nm="2:4", method="wanda", batches=[{"input_ids": TOKENS}])
    score = (weight.abs() * read[0].reshape(-1, 64).norm(dim=0)).reshape(-1, 4)
    kept = (layer.weight != 0).reshape(-1, 4)
    assert bool((kept.sum(1) == 2).all())
    assert bool((torch.where(kept, score, torch.inf).amin(1) >= torch.where(kept, 0.0, score).amax(1)).all())


@pytest.mark.unit
def test_a_path_becomes_a_new_folder(llama: Path, tmp_path: Path) -> None:
    out = nybble.prune_model(llama, amount=0.25, output=tmp_path / "out")
    assert out == tmp_path / "out"
    weight = open_checkpoint(out).tensors["layers.0.ffn.up"].to_float32()
    assert (weight == 0).mean() == 0.25
    with pytest.raises(OutputError, match="exists already"):
        nybble.prune_model(str(llama), output=tmp_path / "out")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, "less than 1"),
        ({"amount": -0.5}, "at least 0"),
        ({"amount": 0.5, "nm": "2:4"}, "one of amount"),
        ({"nm": "2:4"}, "is a convolution"),
        ({"amount": 0.5, "method": "sparsegpt"}, "give the path of a model"),
        ({"amount": 0.5, "method": "wanda"}, "needs batches"),
        ({"amount": 0.5, "batches": [torch.ones(1)]}, "no other method has"),
        ({"amount": 0.5, "scope": "all"}, "layer or global"),
        ({"amount": 0.5, "exclude": ("0", "2", "4")}, "no linear layer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_weight_changes(options: dict[str, object], message: str) -> None:
    model, before = small(), small()
    with pytest.raises(ConfigError, match=message):
        nybble.prune_model(model, **options)
    for ours, was in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, was)
    with pytest.raises(ConfigError, match="takes a torch"):
        nybble.prune_model(3)
