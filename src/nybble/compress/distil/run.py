"""Distillation from end to end: a student and a teacher in, the trained student out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nybble.backends.torch.trainable import TrainableDecoder
from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.compress.distil.fit import counterparts, fit_layers
from nybble.compress.distil.task import DistilTask, pairs
from nybble.compress.distil.teacher import LiveTeacher, Teacher, keep_answers, shared_vocab
from nybble.compress.methods import Progress, Silent
from nybble.compress.stage import StageResult, partial
from nybble.compress.train.data import Sequences
from nybble.compress.train.group import Group, full, joined
from nybble.compress.train.loop import Trained, Trainer, log_path
from nybble.compress.train.model import (
    Floats,
    TrainModel,
    float_bytes,
    gguf_source,
    matrix_formats,
    open_train_model,
    plain_linear,
    write_trained_folder,
    write_trained_gguf,
)
from nybble.compress.train.options import TrainOptions
from nybble.compress.train.setup import (
    check_paths,
    computing,
    files_of,
    identity,
    keep_log,
    load_data,
    settled,
    stage_result,
)
from nybble.compress.train.state import RunFolder, unfinished
from nybble.core.errors import ConfigError
from nybble.families.common import GGUF_NAMES

_FIT_TOKENS = 32768


@dataclass(frozen=True, slots=True)
class DistilOptions(TrainOptions):
    """teacher: a model with the student's tokenizer. alpha, temperature: as in `nybble.distillation_loss`.

    hidden: weight of the hidden-state terms; 0: none. top_k: keep so many of the teacher's likeliest tokens for each
    position on the disk and run it once only, in `cache` if that is given, where the next run finds them; None: it runs
    along. fit: on so many tokens each layer is fitted to the teacher's before training (`fit_layers`); 0: none; None:
    32768, if the student is the teacher with parts taken out, and alpha or hidden lets the teacher teach.
    """

    teacher: Path | None = None
    alpha: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    top_k: int | None = None
    cache: Path | None = None
    fit: int | None = None

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be from 0 (only the text) to 1 (only the teacher), not {self.alpha:g}")
        if not 0.05 <= self.temperature <= 100:
            raise ConfigError(f"temperature must be from 0.05 to 100, not {self.temperature:g}")
        if not 0 <= self.hidden <= 1e4:
            raise ConfigError(f"hidden must be from 0 to 10000, not {self.hidden:g}")
        if self.top_k is not None and not 1 <= self.top_k <= 4096:
            raise ConfigError(f"top_k must be 1 to 4096, not {self.top_k}")
        if self.fit is not None and not 0 <= self.fit <= 1 << 24:
            raise ConfigError(f"fit must be 0 to {1 << 24} tokens, not {self.fit}")
        if self.cache is not None and self.top_k is None:
            raise ConfigError("cache keeps the teacher's top_k tokens: give top_k too")
        if self.top_k is not None and self.hidden:
            raise ConfigError("hidden needs the teacher's layers, top_k keeps only what it says: give one of them")


def run_distil(
    src: Path,
    dst: Path,
    options: DistilOptions,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    force: bool = False,
) -> StageResult:
    """Train the student at `src` and write it to `dst`: a folder, or a GGUF file if its name ends so.

    resume: go on with what an interrupted run left in `DST.partial`. force: replace what is at `dst`.

    Raises:
        ConfigError: the options cannot be used, or the two models have different tokenizers.
        CheckpointError, TokenizerError, ModelNotFoundError: a model cannot be read.
        TrainingError: the loss is not a number any more.
        OutputError: the result or a checkpoint cannot be written.
    """
    if options.teacher is None:
        raise ConfigError("distillation needs a teacher: give the model that was made smaller")
    check_paths(src, dst, force=force)
    with joined() as group, computing(options.threads):
        options = replace(options, bf16=settled(options, group).bf16)
        told = progress if progress is not None and group.leads else Silent()
        return _Distillation(src, dst, options, group, told, force).run(resume)


class _Distillation:
    def __init__(
        self, src: Path, dst: Path, options: DistilOptions, group: Group, progress: Progress, force: bool
    ) -> None:
        self._force = force
        assert options.teacher is not None
        self._src, self._dst, self._options, self._group, self._progress = src, dst, options, group, progress
        self._model = open_train_model(src, dst)
        self._teacher = open_checkpoint(options.teacher)
        self._vocab = shared_vocab(self._model.checkpoint, self._teacher)
        self._counterparts = counterparts(self._model.checkpoint, self._teacher)
        self._fit_tokens = self._tokens_to_fit()
        if options.hidden and self._teacher.spec.hidden_size != self._model.checkpoint.spec.hidden_size:
            raise ConfigError(
                f"hidden compares states of {self._model.checkpoint.spec.hidden_size} and "
                f"{self._teacher.spec.hidden_size} numbers, which differ in meaning too: leave it out"
            )

    def _tokens_to_fit(self) -> int:
        """Raises ConfigError if layers cannot be fitted, and that was asked for."""
        asked = self._options.fit
        why = ""
        if self._counterparts is None:
            why = "needs a student that is the teacher with layers, neurons or heads taken out, not trained since"
        elif any(layer.post_norms for layer in self._model.checkpoint.spec.layers):
            why = f"has no closed form for {self._teacher.spec.family}, which has norms behind its linears"
        elif self._group.size > 1:
            why = "computes in one process: leave it out with torchrun, or fit first with --steps 1"
        if why and asked:
            raise ConfigError(f"fit {why}")
        if why or (asked is None and not self._options.alpha and not self._options.hidden):
            return 0
        return _FIT_TOKENS if asked is None else asked

    def run(self, resume: bool) -> StageResult:
        options, group = self._options, self._group
        data = load_data(self._teacher, options, group, self._progress)
        said = [str(options.teacher), options.alpha, options.temperature, options.hidden, options.top_k]
        said.append(self._fit_tokens)
        about = identity("distil", self._src, said, options, data, group.size)
        if not group.leads:
            trained, model = self._train(data, None)
            _collect(model, group)
            return StageResult()
        with RunFolder(partial(self._dst), about, resume=resume) as folder:
            trained, model = self._train(data, folder)
            values = _collect(model, group)
            write_plain(self._model, self._dst, values, self._progress, force=self._force)
            log = keep_log(log_path(folder.path), self._dst)
            folder.remove()
        return stage_result(trained, log, {"teacher": str(options.teacher)}, ())

    def _train(self, data: Sequences, folder: RunFolder | None) -> tuple[Trained, TrainableDecoder]:
        options, group = self._options, self._group
        ours: tuple[int, ...] = ()
        theirs: tuple[int, ...] = ()
        if options.hidden:
            ours, theirs = pairs(len(self._model.checkpoint.spec.layers), len(self._teacher.spec.layers))
            theirs = self._counterparts or theirs
        teacher = None
        if options.alpha > 0 or options.hidden:
            teacher = teacher_of(
                self._teacher,
                data,
                folder,
                group,
                self._progress,
                temperature=options.temperature,
                vocab_size=self._vocab,
                top_k=options.top_k,
                cache=options.cache,
                bf16=bool(options.bf16),
                keep=theirs,
            )
        model = TrainableDecoder(self._model.checkpoint.spec, self._model.weights(), recompute=options.recompute)
        group.shard(model)
        if self._fit_tokens and (folder is None or unfinished(folder.path) is None):
            self._fit(model, teacher, data)
        task = DistilTask(
            model,
            teacher,
            alpha=options.alpha,
            temperature=options.temperature,
            hidden=options.hidden,
            keep=ours,
        )
        return Trainer(task, data, options, folder, group, self._progress).run(), model

    def _decoder(self) -> TrainableDecoder:
        return _decoder(self._teacher, self._group, bf16=bool(self._options.bf16))

    def _fit(self, model: TrainableDecoder, teacher: Teacher | None, data: Sequences) -> None:
        assert self._counterparts is not None
        rows = -(-self._fit_tokens // (data.token_ids.shape[1] - 1))
        token_ids = torch.from_numpy(data.token_ids[:rows, :-1]).to(self._group.device)
        running = teacher.model if isinstance(teacher, LiveTeacher) else self._decoder()
        kind = self._group.device.type
        # The cache would go on multiplying by what weights were before they were fitted.
        with torch.autocast(kind, torch.bfloat16, enabled=bool(self._options.bf16), cache_enabled=False):
            found = fit_layers(model, running, self._counterparts, token_ids)
        self._progress.note(
            f"layers fitted to the teacher's on {token_ids.numel()} tokens: error of the hidden states "
            f"{found.before:.4f} before, {found.after:.4f} after"
        )


def teacher_of(
    checkpoint: Checkpoint,
    data: Sequences,
    folder: RunFolder | None,
    group: Group,
    progress: Progress,
    *,
    temperature: float,
    vocab_size: int,
    top_k: int | None,
    cache: Path | None,
    bf16: bool,
    keep: tuple[int, ...] = (),
) -> Teacher:
    """A teacher that runs along, or with top_k one whose words are on the disk: in `cache`, else in the run's folder.

    Raises ConfigError for top_k with several processes.
    """
    if top_k is None:
        return LiveTeacher(_decoder(checkpoint, group, bf16=bf16), temperature, vocab_size=vocab_size, keep=keep)
    if group.size > 1 or folder is None:
        raise ConfigError("top_k keeps the teacher's words of one process: leave it out with torchrun")
    return keep_answers(
        cache or folder.path / "teacher",
        lambda: _decoder(checkpoint, group, bf16=bf16),
        data,
        k=min(top_k, vocab_size),
        temperature=temperature,
        vocab_size=vocab_size,
        identity={"teacher": files_of(checkpoint.path)},
        progress=progress,
        bf16=bf16,
        device=group.device,
    )


def _decoder(checkpoint: Checkpoint, group: Group, *, bf16: bool) -> TrainableDecoder:
    """A teacher. With bf16 its layers' matrices are what autocast would make of them in every pass."""
    weights = TrainModel(checkpoint, None).weights()
    if bf16 and group.size == 1:  # shards of a layer are of one type
        narrow = (name for name, weight in weights.items() if name.startswith("layers.") and weight.dim() > 1)
        weights |= {name: weights[name].bfloat16() for name in narrow}
    model = TrainableDecoder(checkpoint.spec, weights).requires_grad_(False)
    group.shard(model)
    return model


def _collect(model: TrainableDecoder, group: Group) -> dict[str, Floats]:
    """All weights of the model. Every process must come."""
    return {name: np.asarray(full(weight).float().cpu().numpy()) for name, weight in model.named_weights()}


def write_plain(model: TrainModel, target: Path, values: dict[str, Floats], progress: Progress, *, force: bool) -> None:
    """Unquantised, in the types of a folder, or matrices in 16 bits in a GGUF file. Raises as its two writers."""
    if model.folder is not None:
        write_trained_folder(
            model.folder,
            target,
            vectors=values,
            linear=plain_linear(model.folder, values),
            config=None,
            force=force,
        )
        return
    checkpoint = model.checkpoint
    formats = matrix_formats(gguf_source(checkpoint))
    trained = {}
    for name, array in values.items():
        fmt = formats[file_name(checkpoint, name)]
        trained[name] = fmt, float_bytes(array, fmt).reshape(len(array), -1)
    file_type = 32 if any(fmt.name == "BF16" for fmt in formats.values()) else 1
    write_trained_gguf(checkpoint, target, trained, progress, file_type=file_type, force=force)


def file_name(checkpoint: Checkpoint, name: str) -> str:
    """What a GGUF file calls a tensor."""
    if checkpoint.container == "gguf":
        return checkpoint.sources[name].name
    layer, inner = "", name
    if name.startswith("layers."):
        _, layer, inner = name.split(".", 2)
    if checkpoint.spec.family == "phi3":
        inner = {"attn.q": "qkv", "attn.k": "qkv", "attn.v": "qkv", "ffn.gate": "ffn.up"}.get(inner, inner)
        if inner == "qkv":
            return f"blk.{layer}.attn_qkv.weight"
    return GGUF_NAMES[inner].format(i=layer)
