"""Options that go together, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nybble.cli.app import _application
from nybble.compress.prune.options import PruneOptions
from nybble.compress.stage import parse_options
from nybble.core.errors import ConfigError


@pytest.mark.unit
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "there is nothing to prune"),
        ({"method": "wanda"}, "needs one of amount"),
        ({"amount": 0.5}, "amount needs a method"),
        ({"nm": "2:4"}, "nm needs a method"),
        ({"method": "magnitude", "amount": 1.0}, "amount is 1, but must be at least 0 and less than 1"),
        ({"method": "magnitude", "amount": -0.1}, "amount is -0.1"),
        ({"method": "magnitude", "amount": 0.5, "nm": "2:4"}, "needs one of amount"),
        ({"method": "magnitude", "nm": "4:2"}, "must be like 2:4"),
        ({"method": "wanda", "amount": 0.5, "scope": "global"}, "only goes with method magnitude"),
        ({"method": "magnitude", "amount": 0.5, "calibrate": "x.txt"}, "looks at no text"),
        ({"method": "magnitude", "amount": 0.5, "drop_layers": 2}, "do not go together"),
        ({"drop_layers": 2, "ffn_width": 0.5}, "do not go together"),
        ({"drop_layers": 0}, "must be a whole number from 1"),
        ({"drop_layers": 1.5}, "must be a whole number from 1"),
        ({"drop_layers": 2, "scope": "global"}, "scope does not go with drop_layers"),
        ({"ffn_width": 0.5, "by": "loss"}, "by does not go with ffn_width"),
        ({"ffn_width": 0.0}, "must be above 0 and up to 1"),
        ({"heads": 1.5}, "must be above 0 and up to 1"),
        ({"heads": 0.5, "round_to": 8}, "goes with ffn_width"),
        ({"ffn_width": 0.5, "compensate": "bias"}, "has no bias to hold it"),
        ({"method": "lottery", "amount": 0.5}, "must be one of magnitude, wanda, sparsegpt"),
        ({"amuont": 0.5}, "did you mean 'amount'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(PruneOptions, values, where="here")


@pytest.mark.unit
def test_a_share_of_the_layers_is_at_least_one() -> None:
    assert [PruneOptions(drop_layers=n).num_dropped(30) for n in (3, 0.1, 0.2, 0.001)] == [3, 3, 6, 1]
    for count in (30, 40, 0.99):
        with pytest.raises(ConfigError, match="at least one must stay"):
            PruneOptions(drop_layers=count).num_dropped(30)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(_application(["prune"]), ["prune", *arguments])
    return result.exit_code, result.output if result.exception is None else str(result.exception)


@pytest.mark.unit
def test_the_command_prunes_and_says_what_came_out(llama: Path, tmp_path: Path) -> None:
    code, said = run(str(llama), str(tmp_path / "dry"), "--ffn-width", "0.5", "--dry-run")
    assert code == 0 and "would be written" in said and not (tmp_path / "dry").exists()
    code, said = run(str(llama), str(tmp_path / "out"), "--method", "magnitude", "--amount", "0.5")
    assert code == 0 and "sparsity: 0.5" in said and "M parameters instead of" in said
    code, said = run(str(llama), str(tmp_path / "out"), "--method", "magnitude", "--amount", "0.5")
    assert code != 0 and "replace it with --force" in said
    code, said = run(str(llama), str(tmp_path / "out2"), "--drop-layers", "4")
    assert code != 0 and "has 4 layers, of which at least one must stay" in said
    code, said = run(str(llama), str(tmp_path / "out2"), "--drop-layers", "1", "--heads", "0.5")
    assert code != 0 and "do not go together" in said
