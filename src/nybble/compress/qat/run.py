"""Training with quantisation in the loop from end to end: a float model in, the trained file out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nybble.backends.torch.trainable import TrainableDecoder
from nybble.checkpoint import open_checkpoint
from nybble.compress.distil.run import teacher_of
from nybble.compress.distil.task import DistilTask
from nybble.compress.distil.teacher import shared_vocab
from nybble.compress.gguf.collect import collect
from nybble.compress.gguf.imatrix import ImportanceMatrix, read_imatrix
from nybble.compress.methods import Progress, Silent
from nybble.compress.qat.lora import run_lora
from nybble.compress.qat.options import INTEGERS, QatOptions
from nybble.compress.qat.plan import BlockPlan, GridPlan, IntegerPlan
from nybble.compress.stage import StageResult, partial
from nybble.compress.train.data import Sequences
from nybble.compress.train.group import Group, joined
from nybble.compress.train.loop import Trainer, log_path
from nybble.compress.train.model import TrainModel, open_train_model
from nybble.compress.train.setup import check_paths, computing, identity, keep_log, load_data, settled, stage_result
from nybble.compress.train.state import RunFolder
from nybble.core.errors import ConfigError

_IMPORTANCE_TOKENS = 4096


def run_qat(
    src: Path,
    dst: Path,
    options: QatOptions,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train the model at `src` on the grid of `options.to` and write it to `dst`.

    A folder for integers and nf4, a GGUF file (a name that ends in .gguf) for GGUF types. resume: go on with what an
    interrupted run left in `DST.partial`. force: replace what is at `dst`.

    Raises:
        ConfigError: the options cannot be used, or the teacher has another tokenizer.
        CheckpointError, TokenizerError, ModelNotFoundError: a model cannot be read.
        TrainingError: the loss is not a number any more.
        OutputError: the result or a checkpoint cannot be written.
    """
    check_paths(src, dst, force=force)
    is_gguf = dst.suffix.lower() == ".gguf"
    if is_gguf and options.mix is None:
        raise ConfigError(f"{dst} ends in .gguf, but {options.to} writes a folder: choose another name")
    if not is_gguf and options.mix is not None:
        raise ConfigError(f"{options.to} writes a GGUF file: let the name of {dst} end in .gguf")
    with joined() as group, computing(options.threads):
        options = replace(options, bf16=settled(options, group).bf16)
        told = progress if progress is not None and group.leads else Silent()
        if options.lora is not None:
            return run_lora(src, dst, options, group, told, resume=resume, force=force)
        return _Training(src, dst, options, group, told, force).run(resume)


class _Training:
    def __init__(
        self, src: Path, dst: Path, options: QatOptions, group: Group, progress: Progress, force: bool
    ) -> None:
        self._force = force
        self._src, self._dst, self._options, self._group, self._progress = src, dst, options, group, progress
        self._model = open_train_model(src, dst)
        self._plan = _plan(self._model, options)
        self._teacher = open_checkpoint(src if options.teacher is None else options.teacher)
        self._vocab = shared_vocab(self._model.checkpoint, self._teacher)

    def run(self, resume: bool) -> StageResult:
        options, group = self._options, self._group
        for note in (*(self._model.folder.notes if self._model.folder is not None else ()), *self._plan.notes):
            self._progress.note(note)
        data = load_data(self._teacher, options, group, self._progress)
        if not group.leads:
            model = self._make_model(data)
            self._trainer(model, data, None).run()
            self._plan.write(model, self._dst, self._progress, group, force=self._force)
            return StageResult()
        about = identity("qat", self._src, _said(options), options, data, group.size)
        with RunFolder(partial(self._dst), about, resume=resume) as folder:
            model = self._make_model(data)
            trained = self._trainer(model, data, folder).run()
            size = self._plan.write(model, self._dst, self._progress, group, force=self._force)
            log = keep_log(log_path(folder.path), self._dst)
            folder.remove()
        return stage_result(trained, log, {"to": options.to, "bytes": size}, tuple(self._plan.notes))

    def _make_model(self, data: Sequences) -> TrainableDecoder:
        options = self._options
        imatrix = self._importance(data)
        prepared = self._plan.prepare(imatrix)
        model = TrainableDecoder(
            self._model.checkpoint.spec,
            prepared.weights,
            transforms=prepared.transforms,
            recompute=options.recompute,
        )
        for name, parameter in model.named_weights():
            if name in prepared.frozen:
                parameter.requires_grad_(False)
        self._group.shard(model)
        return model

    def _importance(self, data: Sequences) -> ImportanceMatrix | None:
        if self._options.imatrix is not None:
            return read_imatrix(self._options.imatrix)
        windows = data.token_ids[: max(1, _IMPORTANCE_TOKENS // data.token_ids.shape[1]), :-1]
        return collect(self._model.checkpoint, windows.tolist(), Silent())

    def _trainer(self, model: TrainableDecoder, data: Sequences, folder: RunFolder | None) -> Trainer:
        options = self._options
        teacher = None
        if options.alpha > 0:
            teacher = teacher_of(
                self._teacher,
                data,
                folder,
                self._group,
                self._progress,
                temperature=options.temperature,
                vocab_size=self._vocab,
                top_k=options.top_k,
                cache=options.cache,
                bf16=bool(options.bf16),
            )
        task = DistilTask(
            model,
            teacher,
            alpha=options.alpha,
            temperature=options.temperature,
            rate=lambda name: options.scale_rate if ".transforms." in name else 1.0,
        )
        return Trainer(task, data, options, folder, self._group, self._progress)


def _plan(model: TrainModel, options: QatOptions) -> GridPlan:
    if options.to.lower() in INTEGERS:
        return IntegerPlan(model, options)
    assert options.mix is not None
    return BlockPlan(model, options, options.mix)


def _said(options: QatOptions) -> Mapping[str, object]:
    """What decides the grid and the loss, for who takes the run up again."""
    names = ("to", "group_size", "symmetric", "teacher", "alpha", "temperature", "top_k", "imatrix", "scale_rate",
             "tensor", "lora", "rank", "lora_alpha")  # fmt: skip
    return {name: str(getattr(options, name)) for name in names}
