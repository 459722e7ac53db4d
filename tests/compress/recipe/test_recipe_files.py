"""Reading recipes: what is accepted, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.compress.calibration.text import _MODULES
from nybble.compress.prune.options import PruneOptions
from nybble.compress.recipe.document import parse_document
from nybble.compress.recipe.measure import _HELD_OUT
from nybble.compress.recipe.plan import find_recipe, load_recipe, ready_recipes
from nybble.core.errors import ConfigError

GOOD = """\
about: a test
stages:
  - prune:
      nm: 2:4
      method: wanda
  - distil:
      steps: 5
      learning_rate: 1e-5
  - quantize:
      type: Q4_K_M
report:
  ctx: 64
  tokens: 128
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.unit
def test_a_recipe_is_its_stages_with_their_options(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert [stage.name for stage in recipe.stages] == ["1-prune", "2-distil", "3-quantise"]
    assert recipe.stages[0].options == PruneOptions(method="wanda", nm="2:4")
    assert recipe.stages[1].options.learning_rate == 1e-5
    assert (recipe.report.ctx, recipe.report.tokens) == (64, 128)
    assert recipe.targets(tmp_path, Path("x.gguf")) == ["1-prune", "2-distil", "3-quantise.gguf"]
    with pytest.raises(ConfigError, match=r"the name must end in \.gguf"):
        recipe.targets(tmp_path, Path("x"))


@pytest.mark.unit
def test_a_stage_may_train_on_several_texts(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "stages:\n- distil: {teacher: x, data: [a.txt, self]}\n"))
    assert recipe.stages[0].options.data == ("a.txt", "self")
    with pytest.raises(ConfigError, match=r"line 2: data is an empty list"):
        load_recipe(write(tmp_path, "stages:\n- distil: {teacher: x, data: []}\n"))


@pytest.mark.unit
@pytest.mark.parametrize("name", ["narrow-q8", "shallow-q4", "trained-q2"])
def test_ready_recipes_are_found_and_good(name: str) -> None:
    assert name in ready_recipes()
    assert load_recipe(find_recipe(name)).stages


@pytest.mark.unit
def test_layers_that_differ_go_from_stage_to_stage_as_gguf_files(tmp_path: Path) -> None:
    text = "stages:\n- prune: {ffn_width: 0.5, scope: global}\n- distil:\n- quantise: {type: Q8_0}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.targets(tmp_path, Path("x.gguf")) == ["1-prune.gguf", "2-distil.gguf", "3-quantise.gguf"]
    recipe = load_recipe(write(tmp_path, "stages:\n- prune: {drop_layers: 1}\n- quantise: {type: int4}\n"))
    assert recipe.targets(tmp_path, Path("x")) == ["1-prune", "2-quantise"]
    with pytest.raises(ConfigError, match=r"must not end in \.gguf"):
        recipe.targets(tmp_path, Path("x.gguf"))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: wanda", "metod: wanda", r"line 5: the key 'metod' is not known, did you mean 'method'\?"),
        ("- distil", "- distill_it", r"line 6: the stage 'distill_it' is not known, did you mean 'distil'\?"),
        ("report:", "reprot:", r"line 11: the key 'reprot' is not known, did you mean 'report'\?"),
        ("ctx: 64", "ctx: lots", "line 12: ctx is 'lots', but must be a whole number"),
        ("ctx: 64", "ctxx: 64", "line 12: the key 'ctxx' is not known"),
        ("steps: 5", "steps: 0", "stage 2 .distil..*steps must be"),
        ("steps: 5", "steps: 5\n      steps: 6", "line 8: the key 'steps' is there twice, first in line 7"),
        ("nm: 2:4", "nm: 4:2", "line 4: nm is '4:2', but must be like 2:4"),
        ("type: Q4_K_M", "type: Q4_K_L", "Q4_K_L is not a type nybble knows"),
        ("tokens: 128", "tokens: 8", "line 13: tokens is 8, but must be at least one window"),
        ("tokens: 128", "text: missing.txt", "line 13: text is missing.txt, but there is no such file"),
        ("stages:", "stages: &a", "line 2: anchors, aliases and tags"),
        ("about: a test", "about: !!python/name:os.system x", "line 1: anchors, aliases and tags"),
        ("  - prune:", "  - prune: [", "this is not YAML"),
        ("stages:", "phases:", "line 2: the key 'phases' is not known"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.unit
@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "stages: []\n", "stages:\n- 3\n", "stages:\n- {prune: 3}\n", "[" * 5000]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(write(tmp_path, text))
    for name in ("missing.yaml", "shalow-q4"):
        with pytest.raises(ConfigError, match="shallow-q4"):
            find_recipe(name)


@pytest.mark.unit
def test_scalars_mean_what_people_write() -> None:
    found = parse_document("a: 2:4\nb: 1e-5\nc: on\nd: true\ne: '3'\nf: 0.5\ng: ~\nh: -3\n", "x").values
    assert found == {"a": "2:4", "b": 1e-5, "c": "on", "d": True, "e": "3", "f": 0.5, "g": None, "h": -3}


@pytest.mark.unit
def test_the_report_reads_nothing_that_was_calibrated_on() -> None:
    assert not set(_HELD_OUT) & set(_MODULES)
