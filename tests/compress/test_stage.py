"""Options of stages from mappings: what is accepted, and what is refused in which words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from nybble.compress.stage import parse_options, partial
from nybble.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    amount: float
    method: Literal["magnitude", "wanda"] = "wanda"
    steps: int | None = None
    text: Path | None = None
    names: tuple[str, ...] = ()
    fast: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise ConfigError(f"amount is {self.amount:g}, but must be at least 0 and less than 1")


@pytest.mark.unit
def test_values_get_the_types_of_their_fields() -> None:
    values = {"amount": 0, "steps": 3, "text": "a/b.txt", "names": ["x", "y"], "fast": True, "method": "magnitude"}
    found = parse_options(Example, values, where="stage 1 (prune)")
    assert found == Example(0.0, "magnitude", 3, Path("a/b.txt"), ("x", "y"), True)
    assert isinstance(found.amount, float)
    assert parse_options(Example, {"amount": 0.5, "steps": None}, where="x").steps is None


@pytest.mark.unit
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"amout": 0.5}, "r.yaml, line 7: the key 'amout' is not known, did you mean 'amount'?"),
        ({"zzz": 1}, "r.yaml: the key 'zzz' is not known, there is amount, method, steps, text, names, fast"),
        ({"method": "wanda"}, "r.yaml: the key 'amount' is missing"),
        ({"amount": "much"}, "r.yaml, line 3: amount is 'much', but must be a number"),
        ({"amount": True}, "r.yaml, line 3: amount is True, but must be a number"),
        ({"amount": 1.5}, "r.yaml, line 3: amount is 1.5, but must be at least 0 and less than 1"),
        ({"amount": 0.5, "steps": 2.5}, "r.yaml: steps is 2.5, but must be a whole number"),
        ({"amount": 0.5, "method": "best"}, "r.yaml: method is 'best', but must be one of magnitude, wanda"),
        ({"amount": 0.5, "names": "x"}, "r.yaml: names is 'x', but must be a list"),
        ({"amount": 0.5, "fast": 1}, "r.yaml: fast is 1, but must be true or false"),
        ({"amount": 0.5, "text": ""}, "r.yaml: text is '', but must be a path"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_options(Example, values, where="r.yaml", lines={"amout": 7, "amount": 3})
    assert str(refused.value) == message


@pytest.mark.unit
def test_unfinished_work_lies_beside_the_result() -> None:
    assert partial(Path("a/small")) == Path("a/small.partial")
    assert partial(Path("a/small.gguf")) == Path("a/small.gguf.partial")
