"""A recipe, read and checked: which stages, with which options, and what the report measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nybble.compress.distil import DistilOptions, run_distil
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.run import run_prune
from nybble.compress.qat import QatOptions, run_qat
from nybble.compress.recipe.document import Mapped, read_document
from nybble.compress.recipe.quantise import QuantiseOptions, run_quantise
from nybble.compress.stage import StageResult, nearest, parse_options
from nybble.core.errors import ConfigError

_READY = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to make a model smaller. run: of the shape of `nybble.compress.stage.Run`."""

    options: type[Any]
    run: Callable[..., StageResult]


KINDS: Mapping[str, Kind] = {
    "prune": Kind(PruneOptions, run_prune),
    "distil": Kind(DistilOptions, run_distil),
    "qat": Kind(QatOptions, run_qat),
    "quantise": Kind(QuantiseOptions, run_quantise),
}
_SPELLINGS = {"quantize": "quantise", "distill": "distil"}


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What is measured before and after every stage.

    text: what the models read, a file in UTF-8 that they were not calibrated or trained on; None: parts of Python's
    standard library that nothing here calibrates on. ctx: tokens of a window; tokens: of the text. speed: measure
    tokens per second too.
    """

    text: Path | None = None
    ctx: int = 512
    tokens: int = 8192
    speed: bool = True

    def __post_init__(self) -> None:
        if not 16 <= self.ctx <= 1 << 16:
            raise ConfigError(f"ctx is {self.ctx}, but must be from 16 to 65536")
        if self.tokens < self.ctx:
            raise ConfigError(f"tokens is {self.tokens}, but must be at least one window of {self.ctx}")
        if self.text is not None and not self.text.is_file():
            raise ConfigError(f"text is {self.text}, but there is no such file")


@dataclass(frozen=True, slots=True)
class Stage:
    """number: counted from 1."""

    number: int
    kind: str
    options: Any

    @property
    def name(self) -> str:
        return f"{self.number}-{self.kind}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """name: of the file."""

    name: str
    stages: tuple[Stage, ...]
    report: ReportOptions

    def measured_on(self, text: Path) -> Recipe:
        """The same with another text for the report. Raises ConfigError if there is no such file."""
        return replace(self, report=replace(self.report, text=text))

    def targets(self, source: Path, target: Path) -> list[str]:
        """The name of what each stage writes: a GGUF file where its type or the layers it leaves need one.

        Raises ConfigError if `target` is not the kind of thing that the last stage writes.
        """
        is_file = source.is_file()
        names = []
        for stage in self.stages:
            wanted = _container(stage)
            if wanted is not None:
                is_file = wanted == "gguf"
            elif stage is self.stages[-1]:
                is_file = target.suffix.lower() == ".gguf"
            elif not (is_file and stage.number > 1):
                is_file = False  # a model that is trained or pruned further lies in a folder
            names.append(f"{stage.name}.gguf" if is_file else stage.name)
        if is_file != (target.suffix.lower() == ".gguf"):
            what = (
                "a GGUF file, so the name must end in .gguf"
                if is_file
                else "a folder, so the name must not end in .gguf"
            )
            raise ConfigError(f"{target}: the last stage of {self.name} writes {what}")
        return names


def _container(stage: Stage) -> str | None:
    """What a stage writes; None: what is asked for."""
    options = stage.options
    if isinstance(options, QuantiseOptions):
        return options.method().container
    if isinstance(options, QatOptions):
        return "gguf" if options.mix is not None else "safetensors"
    if isinstance(options, PruneOptions) and options.kind == "width" and options.scope == "global":
        return "gguf"  # layers that differ
    return None


def ready_recipes() -> list[str]:
    """Names of those that come with the package."""
    return sorted(path.stem for path in _READY.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A path, or the name of a ready one. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise ConfigError(f"{path} does not exist: give a recipe, or one of {', '.join(ready_recipes())}")
    if name not in ready_recipes():
        raise ConfigError(f"there is no recipe {name!r}: {nearest(name, ready_recipes())}")
    return _READY / f"{name}.yaml"


def load_recipe(path: Path) -> Recipe:
    """Raises ConfigError for what cannot be read, and for every key or value that is not known, with its line."""
    document = read_document(path)
    where = str(path)
    for key, line in document.lines.items():
        if key not in ("stages", "report", "about"):
            raise ConfigError(
                f"{where}, line {line}: the key {key!r} is not known, {nearest(key, ('stages', 'report', 'about'))}"
            )
    listed = document.values.get("stages")
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{where}: the key stages is missing: a list of what to do, see docs/compress.md")
    stages = tuple(_stage(number, one, where) for number, one in enumerate(listed, 1))
    said = document.values.get("report")
    if said is not None and not isinstance(said, Mapped):
        raise ConfigError(f"{where}, line {document.lines['report']}: report is a mapping of options")
    report = ReportOptions()
    if isinstance(said, Mapped):
        report = parse_options(ReportOptions, said.values, where=f"{where}, report", lines=said.lines)
    return Recipe(path.name, stages, report)


def _stage(number: int, value: object, where: str) -> Stage:
    if isinstance(value, str):
        value = Mapped({value: None}, {}, 0)
    if not isinstance(value, Mapped) or len(value.values) != 1:
        raise ConfigError(f"{where}, stage {number}: a stage is one word with its options, for example `prune:`")
    ((word, said),) = value.values.items()
    kind = _SPELLINGS.get(word, word)
    place = f"{where}, line {value.line}" if value.line else where
    if kind not in KINDS:
        raise ConfigError(f"{place}: the stage {word!r} is not known, {nearest(word, KINDS)}")
    if said is not None and not isinstance(said, Mapped):
        raise ConfigError(f"{place}: the options of {word} are a mapping, one key in each line")
    options = Mapped({}, {}, value.line) if said is None else said
    parsed = parse_options(
        KINDS[kind].options, options.values, where=f"{where}, stage {number} ({word})", lines=options.lines
    )
    return Stage(number, kind, parsed)


def with_teacher(stage: Stage, source: Path) -> Stage:
    """Who learns without being told from whom learns from the model that the recipe began with."""
    options = stage.options
    if stage.kind == "distil" and options.teacher is None:
        return replace(stage, options=replace(options, teacher=source))
    return stage
