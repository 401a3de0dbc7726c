"""Training: one loop for a tower alone (next-token prediction) and for a zip (alignment on pairs).

A run is a function of its TrainConfig: data order, task choice and learning rate depend on (seed, step) alone, noise (dropout,
`corrupt`) on the number of the process too. A checkpoint stands between two steps, never inside one. So a run that was killed and
resumed ends with the weights of the run that was not; on another number of processes with the same ones up to rounding, if it has
no noise.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from zipper import checkpoint, files, hub, inspection, plan
from zipper.baseline import Baseline
from zipper.data import Row
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.extraction import Policy, load
from zipper.files import MOST_INTEGER, held, parse, saving, settle
from zipper.link import InputKind, LinkConfig
from zipper.modality import Modality
from zipper.modality import load as load_modality
from zipper.model import Adapter, LostTower, TowerConfig, Zipper, base
from zipper.packing import lengths, pack
from zipper.pipeline import PINS, Pipeline
from zipper.rows import Rows, draws, mixed_seed
from zipper.sequence import Batch, collate
from zipper.sharding import like, shard, whole
from zipper.tasks import Task, tower_of
from zipper.tower import Tower

if TYPE_CHECKING:
    from accelerate import Accelerator

#: What a recipe may ask for: (least, most) by field.
LIMITS = {
    **dict.fromkeys(("steps", "rows", "eval_every", "save_every", "log_every", "keep", "eval_rows"), (1, MOST_INTEGER)),
    **dict.fromkeys(("warmup", "patience", "calibrate", "seed", "least_ids"), (0, MOST_INTEGER)),
    **dict.fromkeys(("batch", "accumulate"), (1, 1 << 20)),
    **dict.fromkeys(("lr_new", "lr_gate", "lr_tower", "weight_decay"), (0.0, 1e3)),
    **dict.fromkeys(("lr_final", "corrupt", "most_bad"), (0.0, 1.0)),
    "most_ids": (1, MOST_INTEGER),
    "clip": (1e-12, 1e12),
    "betas": (0.0, 1 - 1e-9),
    "loss_weight": (0.0, 1e6),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; saved as config.json beside its results.

    output: folder of the run. towers: name -> folder or hub id of a pre-trained tower, or the configuration of a fresh one
    ({"model_type": "llama", "hidden_size": 128, ...}). modalities: name -> folder. data, dev: sources (`zipper.layouts`: a JSONL
    manifest, a folder of unit files, "librispeech:FOLDER" ...); data may be {source: weight}, a mixture. rows: use only the first
    so many of each source of `data`. bad, most_bad: what becomes of samples that cannot be read (`Policy`). least_ids, most_ids:
    rows with fewer or more ids, over all fields, are left out. tasks: {"speech -> text": share of samples}. train: towers that
    learn; with one tower it always does. every, junctions, link, input_projection, lora: see `Zipper.from_towers`. start: a saved
    zip of these towers to go on from; the shape is then its own. calibrate: rows of each source, at most 1,000, on which links are
    calibrated before the first step (`Link.calibrate`, 0 = not).
    baseline: not a zip but one decoder with an extended vocabulary (`Baseline`), all of which learns: {"base": the tower that is
    extended} and, if wanted, "rows": [towers whose embeddings the new rows start from], "parameters": how many it is to have,
    "positions": room.

    steps, batch: optimizer steps and samples in each, over all processes and micro-batches. accumulate: micro-batches into which a
    process cuts its part of a step; the gradient stays that of the whole batch, up to rounding. lr_*: peak learning rates of new
    parts, of gates and of trained towers; linear warm-up over `warmup` steps, then a cosine down to lr_final of the peak.
    loss_weight: per tower. pack: {tower: most tokens in a row}: samples of a task share rows; the loss stays the same.
    corrupt: per tower, the chance that a token of a segment with loss is read as a random one while the targets stay: against
    overfitting and exposure bias. dropout of links stands in `link`.
    eval_every, patience: dev loss every so many steps; stop after that many evaluations without a new best (0 = never).
    save_every, keep: steps between checkpoints and how many are kept. The best model by mean dev loss is what the run returns.
    save_dtype: "float16" or "bfloat16" halves the returned model on disk; training itself is in float32 (and `mixed_precision`).

    shard: where several processes run, each keeps a piece of every parameter (FSDP2) instead of all of them (DDP); where a task
    has no sample for a process, that one runs a sample of another for nothing. recompute: blocks are run again in the backward
    pass instead of keeping what they computed: less memory, more time, the same bits. compile: the blocks by torch.compile, each
    for itself; a slow start, other rounding. attention: of links, "sdpa" or "flex", which is for packed rows on CUDA.
    frozen_dtype: "bfloat16" keeps frozen weights, and the states between the blocks of such a tower, in half the bytes and to 8
    bits of precision. Dev losses are then those of a slightly other tower (the shipped zip's: 0.0963 -> 0.0962 and 0.1825 -> 0.1826
    nats); what is saved names the tower as it was given.
    """

    output: str
    towers: Mapping[str, Any]
    modalities: Mapping[str, str]
    data: str | Mapping[str, float]
    dev: str
    tasks: Mapping[str, float]
    steps: int
    rows: int | None = None
    bad: str = "error"
    most_bad: float = 0.01
    least_ids: int = 0
    most_ids: int | None = None
    batch: int = 32
    accumulate: int = 1
    train: tuple[str, ...] = ()
    every: Mapping[str, int] | None = None
    junctions: Sequence[Mapping[str, int]] | None = None
    link: LinkConfig = field(default_factory=LinkConfig)
    start: str | None = None
    baseline: Mapping[str, Any] | None = None
    calibrate: int = 0
    input_projection: InputKind | Mapping[str, InputKind] = "residual"
    lora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lr_new: float = 3e-3
    lr_gate: float = 3e-3
    lr_tower: float = 1e-3
    lr_final: float = 0.02
    warmup: int = 40
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)  # the paper's, A.3
    weight_decay: float = 0.01
    loss_weight: Mapping[str, float] = field(default_factory=dict)
    corrupt: Mapping[str, float] = field(default_factory=dict)
    pack: Mapping[str, int] = field(default_factory=dict)
    mixed_precision: str = "no"
    frozen_dtype: str | None = None
    shard: bool = False
    recompute: bool = False
    compile: bool = False
    attention: str = "sdpa"
    eval_every: int = 200
    eval_rows: int = 128
    patience: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    save_dtype: str | None = None
    trackers: tuple[str, ...] = ("tensorboard",)
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ZipperError(f"tasks is {dict(self.tasks)}; it needs at least one task with a positive share.")
        Policy(self.bad, self.most_bad)
        if not isinstance(self.data, str) and (not self.data or min(self.data.values()) < 0 or sum(self.data.values()) <= 0):
            raise ZipperError(f"data is {dict(self.data)}; it needs at least one source with a positive weight.")
        if self.most_ids is not None and self.least_ids > self.most_ids:
            raise ZipperError(f"least_ids is {self.least_ids}, most_ids {self.most_ids}: no row has so many and so few.")
        known = {
            "mixed_precision": ("no", "bf16"),
            "save_dtype": (None, "float32", "float16", "bfloat16"),
            "frozen_dtype": (None, "bfloat16"),
            "attention": ("sdpa", "flex"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ZipperError(f"{name} is {getattr(self, name)!r}; it must be one of {choices}.")
        if set(self.modalities) != set(self.towers):
            raise ZipperError(f"The towers are {sorted(self.towers)}, the modalities {sorted(self.modalities)}. Give one for each.")
        for name in ("train", "lora", "loss_weight", "corrupt", "pack"):
            if unknown := sorted({*getattr(self, name)} - {*self.towers}):
                raise ZipperError(f"{name} names {unknown}; this recipe has the towers {sorted(self.towers)}.")
        for name, source in self.towers.items():
            if isinstance(source, Mapping) and len(self.towers) > 1 and name not in self.train:
                raise ZipperError(f"The tower {name!r} is a fresh one that would never learn. Name it in train, or give a folder.")
        if self.baseline is not None:
            settings = {*self.baseline}
            if "base" not in settings or settings - {"base", "rows", "parameters", "positions"}:
                raise ZipperError(f"baseline is {dict(self.baseline)}; it has base and may have rows, parameters and positions.")
            if unknown := sorted({self.baseline["base"], *self.baseline.get("rows", ())} - {*self.towers}):
                raise ZipperError(f"baseline names {unknown}; this recipe has the towers {sorted(self.towers)}.")
            if any(isinstance(self.towers[name], Mapping) for name in (self.baseline["base"], *self.baseline.get("rows", ()))):
                raise ZipperError("A baseline starts from pre-trained towers: give folders or hub ids.")
            if self.start or self.calibrate or self.lora:
                raise ZipperError("A baseline has no links and no frozen tower: leave out start, calibrate and lora.")
        if self.pack and min(self.pack.values()) < 1:
            raise ZipperError(f"pack is {dict(self.pack)}; a row needs room for at least 1 token.")
        for task in self.tasks:
            for tower in Task.parse(task).towers:
                if tower not in self.towers:
                    raise ZipperError(f"The task {task!r} names the tower {tower!r}; this recipe has {sorted(self.towers)}.")
        for name, adapter in self.lora.items():
            parse(Adapter, adapter, f"lora[{name!r}]")
        self._check_use()

    def _check_use(self) -> None:
        """Raises a ZipperError for a setting that would do nothing."""
        tasks = [Task.parse(task) for task, share in self.tasks.items() if share]
        named, produced = ({tower for task in tasks for tower in part(task)} for part in (lambda t: t.towers, lambda t: t.outputs))
        for option, used, what in (
            ("train", named, "named by"),
            ("lora", named, "named by"),
            ("pack", named, "named by"),
            ("corrupt", produced, "produced in"),
            ("loss_weight", produced, "produced in"),
        ):
            if idle := sorted({*getattr(self, option)} - used):
                raise ZipperError(f"{option} names {idle[0]!r}, which is {what} no task: it would do nothing. Leave it out.")
        if not any(self.loss_weight.get(tower, 1.0) for tower in produced):
            raise ZipperError(f"loss_weight is {dict(self.loss_weight)}: nothing that is produced has a loss. Raise one.")
        for option in ("every", "junctions", "calibrate") if len(self.towers) == 1 else ():
            if getattr(self, option):
                raise ZipperError(f"{option} is {getattr(self, option)}, but one tower has no links: leave it out.")
        if self.calibrate and not self.start and not self.link.projection_depth:
            raise ZipperError("A link without a projection cannot be calibrated: set link.projection_depth to 1 or more.")
        if self.frozen_dtype and (self.baseline or len(self.towers) == 1 or {*self.towers} <= {*self.train}):
            raise ZipperError("frozen_dtype is for frozen towers, and here every tower learns: it would do nothing. Leave it out.")


Model = Zipper | Baseline

#: Fields that say where a run lies and how it is computed, not what: a resumed run may change them.
FREE = (
    "output",
    "log_every",
    "save_every",
    "keep",
    "save_dtype",
    "trackers",
    "accumulate",
    "shard",
    "recompute",
    "compile",
    "attention",
)
#: What a row of metrics says of the clock; all else in it is a function of the recipe.
CLOCK = ("tokens_per_s", "matmul_share", "started", "seconds")


@final
class Stopped(SystemExit):
    """SIGTERM came; the run is saved and goes on with resume. Not caught, it ends the process with 143, as shells know it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Objective(nn.Module):
    """The model as something that turns batches into losses; what DDP wraps: one forward a step, whatever tasks a process drew."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Per tower the weighted sum of -log p(target) in nats; logits only where there is something to predict.

        A weight below 0 counts as 0, but its logits are computed (`_batches` says what for).
        """
        losses: dict[str, Tensor] = {}
        for batch in batches:
            wanted = {name: weight != 0 for name, weight in batch.weights.items() if (weight != 0).any()}
            hidden = self.model.hidden(batch.strands, outputs=tuple(wanted))
            for name, where in wanted.items():
                states = hidden[name]
                where, targets, weights = (x.to(states.device) for x in (where, batch.targets[name], batch.weights[name]))
                each = self.model.nll(name, states[where][None], targets[where][None])[0]
                losses[name] = losses.get(name, 0.0) + (each * weights[where].clamp(min=0)).sum()
        return losses


def build(config: TrainConfig, modalities: Mapping[str, Modality], rows: Sequence[Row]) -> Model:
    """The model that a run starts from. rows: a sample of the data, on which the mean lengths of segments are measured."""
    if config.start is not None:
        started = _started(config.start, config.towers)
        if set(started.towers) != set(config.towers):
            raise ZipperError(
                f"start={config.start!r} has the towers {sorted(started.towers)}, this recipe {sorted(config.towers)}."
            )
        for name, modality in modalities.items():
            _pinned(name, Path(config.start) / "towers" / name, modality)
        for option, said, own in (
            ("train", sorted(config.train), sorted(n for n, tower in started.config.towers.items() if tower.train)),
            ("lora", _adapters(config.lora), _adapters({n: t.lora for n, t in started.config.towers.items() if t.lora})),
        ):
            if said and said != own:
                raise ZipperError(
                    f"{option} is {said}, but in start={config.start!r} it is {own}, and what learns stays as it was. "
                    f"Leave {option} out, or give the same."
                )
        return started
    items = [item for name in config.tasks for task in [Task.parse(name)] for item in task.given + task.produced]
    fields = {tower_of(item): item.partition(":")[0] for item in items}
    tokens = {tower: float(np.mean([len(row.get(name, ())) + 2 for row in rows])) for tower, name in fields.items()}
    ends = {name: (modality.begin, modality.end) for name, modality in modalities.items()}
    if config.baseline is not None:
        base, starts = config.baseline["base"], config.baseline.get("rows", ())
        for name in (base, *starts):
            _pinned(name, Path(config.towers[name]), modalities[name])
        return Baseline.from_tower(
            {base: Tower.load(config.towers[base], dtype=torch.float32)},
            added={name: modality.vocabulary for name, modality in modalities.items() if name != base},
            ends=ends,
            tokens=tokens,
            rows={name: config.towers[name] for name in starts},
            parameters=config.baseline.get("parameters"),
            positions=config.baseline.get("positions", 0),
            seed=config.seed,
        )
    towers: dict[str, Tower] = {}
    for name, source in config.towers.items():
        modality = modalities[name]
        if not isinstance(source, Mapping):
            _pinned(name, Path(source), modality)
            towers[name] = Tower.load(source, dtype=torch.float32)
        else:
            ids = {"vocab_size": modality.vocabulary, "bos_token_id": modality.begin, "eos_token_id": modality.end}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                fresh = AutoConfig.for_model(**{**source, **ids})
                towers[name] = Tower(AutoModelForCausalLM.from_config(fresh))
        if towers[name].vocabulary < modality.vocabulary:
            raise ZipperError(
                f"The tower {name!r} knows {towers[name].vocabulary} ids, its modality in {config.modalities[name]} makes "
                f"{modality.vocabulary}. Give the modality that the tower was trained with."
            )
    model = Zipper.from_towers(
        towers,
        every=config.every,
        junctions=config.junctions,
        train=tuple(towers) if len(towers) == 1 else config.train,
        link=config.link,
        input_projection=config.input_projection,
        lora=config.lora,
        ends=ends,
        tokens=tokens,
        seed=config.seed,
    )
    named = {
        name: dataclasses.replace(t, source="" if isinstance(config.towers[name], Mapping) else hub.absolute(config.towers[name]))
        for name, t in model.config.towers.items()
    }
    model.config = dataclasses.replace(model.config, towers=named)
    return model


def _adapters(lora: Mapping[str, Any]) -> dict[str, Adapter]:
    """Settings of adapters, but for the modules: a word may stand for these."""
    found = {name: parse(Adapter, settings, f"lora[{name!r}]") for name, settings in lora.items()}
    return {name: dataclasses.replace(a, target_modules=None, exclude_modules=None) for name, a in found.items()}


def _started(source: str, towers: Mapping[str, Any]) -> Zipper:
    """The saved zip that a run goes on from. A frozen tower that is not where it was is the recipe's, if it is the same one."""
    found: dict[str, Any] = {}
    while True:
        try:
            return Zipper.from_pretrained(source, found, torch.float32)
        except LostTower as lost:
            if not isinstance(towers.get(lost.name), str | Path):
                raise
            found[lost.name] = towers[lost.name]


def _pinned(name: str, source: Path, modality: Modality) -> None:
    """A tower inside a saved pipeline was trained with one modality; another would give its ids other meanings."""
    pins = source.parent.parent / PINS
    if pins.is_file() and checkpoint.read_json(pins).get(source.name, modality.fingerprint) != modality.fingerprint:
        raise ZipperError(
            f"The tower {name!r} from {source} was trained with another tokenizer or codebook than the one given. "
            f"Give {source.parent.parent / 'modalities' / source.name}."
        )


def _check(path: str, rows: Sequence[Row], tasks: Mapping[str, Task], model: Model) -> None:
    """Every row has what every task wants, and the towers can read it; otherwise a ZipperError names file and line."""
    for number, row in enumerate(rows, 1):
        try:
            for task in tasks.values():
                model.check(task.segments(row))
        except ZipperError as error:
            raise ZipperError(f"{path}, line {number}: {error}") from error


def train(config: TrainConfig, resume: bool = False, report: Callable[[dict[str, Any]], None] | None = None) -> Pipeline:
    """Run a recipe to its end and return the best model by dev loss, which is also saved as `output`/model.

    resume: go on from the newest whole checkpoint in `output`, if there is one. report: called with every metrics row.
    SIGTERM lets the step end, saves a checkpoint and raises Stopped. Raises ZipperError for a recipe or data that do not fit, and
    where the checkpoint is of a run with other numbers, steps or data in its recipe (all but FREE; files count by content).
    """
    accelerate = extra("accelerate")
    if "tensorboard" in config.trackers:
        extra("tensorboard")
    known = [*map(str, accelerate.tracking.get_available_trackers())]
    if absent := sorted({*config.trackers} - {*known}):  # accelerate would go on without a word
        raise ZipperError(f"The trackers {absent} are not installed here, or unknown. There are {known}.")
    accelerator: Accelerator = accelerate.Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=accelerate.utils.ProjectConfiguration(config.output, logging_dir=str(Path(config.output) / "tensorboard")),
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    with _alone(Path(config.output), accelerator):
        return _train(config, resume, report, accelerator)


def _train(
    config: TrainConfig, resume: bool, report: Callable[[dict[str, Any]], None] | None, accelerator: "Accelerator"
) -> Pipeline:
    """`train`, by processes that hold the run's folder."""
    folder = Path(config.output)
    accelerate = extra("accelerate")
    kind = accelerate.DistributedType
    if accelerator.distributed_type in (kind.FSDP, kind.DEEPSPEED, kind.MEGATRON_LM):
        raise ZipperError(f"Launched with {accelerator.distributed_type.value}. Launch plain processes; shard=True cuts the model.")
    if config.batch < accelerator.num_processes * config.accumulate:
        raise ZipperError(
            f"batch is {config.batch}; {accelerator.num_processes} processes need at least one sample each, in each of "
            f"{config.accumulate} micro-batches."
        )
    if not resume and (folder / "config.json").exists():
        raise ZipperError(f"{folder} holds a run already. Pass --resume to go on with it, or choose another output.")
    modalities = {name: load_modality(Path(path)) for name, path in config.modalities.items()}
    tasks = {name: Task.parse(name) for name in config.tasks}
    sources, policy = _weights(config), Policy(config.bad, config.most_bad)
    with accelerator.main_process_first():  # one process makes unit files, the others find them
        parts = [Part(source, load(source, modalities, config.rows, policy), weight) for source, weight in sources.items()]
        dev = load(config.dev, modalities, config.eval_rows, policy)
    parts = [part.within(config.least_ids, config.most_ids) for part in parts]
    rows = [row for part in parts for row in part.rows[:FIRST]]
    model = build(config, modalities, rows)
    for source, some in (*((part.source, part.rows) for part in parts), (config.dev, dev)):
        _check(source, some, tasks, model)
    course = _course(config, model, modalities, parts, dev)
    if config.frozen_dtype:
        for name, p in model.named_parameters():
            if name.startswith("towers.") and not p.requires_grad:
                p.data = p.data.to(getattr(torch, config.frozen_dtype))
    if isinstance(model, Zipper) and config.calibrate:
        looked_at = [row for part in parts for row in part.rows[: min(FIRST, config.calibrate)]]
        samples = [task.segments(row) for task in tasks.values() for row in looked_at]
        with torch.no_grad():
            model.calibrate(collate(samples, model.ends()).strands)
    if isinstance(model, Zipper):
        model.attention = "flex" if config.attention == "flex" else "sdpa"
    bare = Objective(model)
    cut = config.shard and accelerator.num_processes > 1
    complete = copy.deepcopy(model) if cut and accelerator.is_main_process else model  # what is saved
    objective = _spread(bare, config, accelerator, cut)
    optimizer = accelerator.prepare(_optimizer(model, config))
    names = {parameter: name for name, parameter in model.named_parameters()}
    progress = _restore(folder, optimizer, names, course, accelerator.is_main_process) if resume else Progress()
    ended = progress.stopped or progress.step >= config.steps
    if resume and not _kept(folder / "model", progress, model, ended, accelerator.is_main_process):
        progress.best, progress.since_best = math.inf, 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with saving(folder, "The checkpoints in it are as they were."):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folder / "config.json", dataclasses.asdict(config))
            _forget(folder, progress.step)
        if progress.step < config.steps and not progress.stopped:  # what the end needs is tried before the first step
            Pipeline(complete, modalities).rehearse(folder / "model", _record(config, progress, {}))
    accelerator.init_trackers(folder.name)

    def evaluate() -> dict[str, float]:
        bare.eval()
        with torch.no_grad():  # no inference mode: parameters gathered in it would serve no backward
            found = [_mean_loss(bare, task, dev, config, accelerator.device) for task in tasks.values()]
        bare.train()
        # What follows from it is the same everywhere, whatever the processes run on.
        told = accelerate.utils.broadcast(torch.tensor(found, dtype=torch.float64, device=accelerator.device)).tolist()
        return dict(zip(tasks, told, strict=True))

    def look(step: int) -> dict[str, float]:
        """How much each link adds on some dev rows; to trackers also what the model makes of the first of them."""
        if cut:  # a link or tower run for itself would not be gathered
            return {}
        bare.eval()
        batches = [collate([task.segments(row) for row in dev[:16]], model.ends()) for task in tasks.values()]
        links = inspection.activity(model, [batch.to(accelerator.device) for batch in batches]) if isinstance(model, Zipper) else {}
        if accelerator.trackers and accelerator.is_main_process:
            made = inspection.samples(Pipeline(model, modalities), list(tasks.values()), dev[:2])
            inspection.log_samples(accelerator.trackers, made, step)
        bare.train()
        return {f"branch/{name}": link.share for name, link in links.items() if link.seen}

    def keep_model(found: Mapping[str, float]) -> None:
        tensors = _changing(names) if cut else {}
        if accelerator.is_main_process:
            complete.load_state_dict(tensors, strict=False)
            Pipeline(complete, modalities).save_pretrained(folder / "model", record=_record(config, progress, found))

    bare.train()
    begun = progress.step
    begin = since = time.monotonic()
    tokens, rate, stop = 0.0, 0.0, False
    bar = tqdm(total=config.steps, initial=progress.step, desc=folder.name, unit="step", disable=not accelerator.is_main_process)
    with bar, _sigterm() as came:
        while progress.step < config.steps and not progress.stopped and not stop:
            step = progress.step
            torch.manual_seed(mixed_seed(config.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, config)
            turns, counts = _batches(parts, tasks, config, step, model, accelerator)
            sums = dict.fromkeys(counts, 0.0)
            for turn, batches in enumerate(turns, 1):
                with contextlib.nullcontext() if turn == len(turns) else accelerator.no_sync(objective):
                    losses = objective(batches)
                    total = sum(config.loss_weight.get(name, 1.0) * loss / counts[name] for name, loss in losses.items())
                    # Gradients are averaged over processes; counts are global, so the sum is what is wanted.
                    accelerator.backward(total * accelerator.num_processes)
                for name, loss in losses.items():
                    sums[name] += float(loss.detach())
            logs = step + 1 == config.steps or (step + 1) % config.log_every == 0
            norms = inspection.gradient_norms(model) if logs else {}
            norm = whole(accelerator.clip_grad_norm_(list(names), config.clip))
            if not norm.isfinite():  # in all processes alike; after a step by it no weight would be a number
                raise ZipperError(
                    f"The gradient of step {step + 1} is not finite (losses: {sums}). What {folder} holds is from before it. "
                    f"Start anew with smaller learning rates, perhaps from the best model (start={str(folder / 'model')!r})."
                )
            optimizer.step()
            optimizer.zero_grad()
            progress.step = step = step + 1
            bar.update()

            # What the processes saw of this step; all of them must stop at the same one.
            mine = [sums[name] / counts[name] for name in counts]
            read = sum(_tokens(batch) for batches in turns for batch in batches)
            mine += [read, len(came)]
            *found, count, stop = accelerator.reduce(torch.tensor(mine, device=accelerator.device)).tolist()
            tokens += count
            for name, loss in zip(counts, found, strict=True):
                before, steps = progress.seen.get(name, (0.0, 0.0))
                progress.seen[name] = [before + loss, steps + 1.0]
            row: dict[str, Any] = {}
            if logs:
                row |= {f"loss/{name}": loss / steps for name, (loss, steps) in progress.seen.items()}
                row |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
                row |= {f"grad/{part}": value for part, value in norms.items()}
                row["tokens_per_s"] = tokens / (time.monotonic() - since)
                if loads := [plan.Load.of([batch]) for batches in turns for batch in batches if _tokens(batch)]:
                    rate = rate or _rate(model, loads, config, accelerator)
                    work = sum(plan.cost(model, load).flops for load in loads) / read  # a token, in this process and step
                    row["matmul_share"] = work * row["tokens_per_s"] / (rate * accelerator.num_processes)
                row |= {f"gate/{name}": value for name, value in gates(model).items()}
                shown = {name: f"{row[f'loss/{name}']:.3f}" for name in progress.seen}
                bar.set_postfix(shown | {"tokens/s": f"{row['tokens_per_s']:,.0f}"})
                progress.seen, since, tokens = {}, time.monotonic(), 0.0
            if step % config.eval_every == 0 or step == config.steps:
                asked = time.monotonic()
                dev_loss = evaluate()
                row |= {f"dev/{name}": value for name, value in dev_loss.items()} | look(step)
                if progress.saw(float(np.mean(list(dev_loss.values()))), config.patience):
                    keep_model(dev_loss)
                since += time.monotonic() - asked  # tokens per second are those of steps
            if row:
                row |= {"started": begun, "seconds": time.monotonic() - begin}  # zipper show: how long, and where it was resumed
            if row and accelerator.is_main_process:
                with (
                    saving(folder / "metrics.jsonl", "The checkpoints are whole."),
                    (folder / "metrics.jsonl").open("a") as file,
                ):
                    file.write(json.dumps({"step": step, **row}) + "\n")
                accelerator.log(row, step=step)
                if report:
                    report({"step": step, **row})
            last = step == config.steps or progress.stopped or stop
            if step % config.save_every == 0 or last:
                _save(folder, optimizer, names, progress, course, config.keep, write=accelerator.is_main_process)
        stop = bool(stop) and progress.step < config.steps and not progress.stopped
        if stop and accelerator.is_main_process:
            bar.write(f"Stopped at step {progress.step} by SIGTERM; go on with resume.", file=sys.stderr)
    accelerator.wait_for_everyone()
    if not stop and not (folder / "model").is_dir():  # no dev loss was a number
        keep_model({})
    if config.save_dtype and not stop and accelerator.is_main_process:
        best = Pipeline.from_pretrained(folder / "model", _frozen(model))
        best.model.cast(getattr(torch, config.save_dtype))
        best.save_pretrained(folder / "model", record=checkpoint.load(folder / "model")[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if stop:
        raise Stopped
    return Pipeline.from_pretrained(folder / "model", _frozen(model))


def _told(found: Any) -> Any:
    """What the first process found, on every process."""
    return extra("accelerate.utils").broadcast_object_list([found])[0]


@contextmanager
def _alone(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Hold the run's folder, by one process for all of them. A ZipperError says who writes it already, in every process."""
    with contextlib.ExitStack() as stack:
        refused = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(held(folder))
            except ZipperError as error:
                refused = str(error)
        if said := _told(refused):
            raise ZipperError(said)
        yield


def _frozen(model: Model) -> dict[str, Any]:
    """Where the towers lie that a saved model does not hold."""
    towers = model.config.towers.items() if isinstance(model, Zipper) else ()
    return {name: tower.source for name, tower in towers if tower.source and not tower.train}


@dataclass(frozen=True)
class Part:
    """The rows of one source, how many ids each has over all fields, and the weight of the source in the mixture."""

    source: str
    rows: Sequence[Row]
    weight: float
    lengths: Int64[np.ndarray, " rows"] = field(init=False)

    def __post_init__(self) -> None:
        found = self.rows.lengths if isinstance(self.rows, Rows) else np.array([sum(map(len, row.values())) for row in self.rows])
        object.__setattr__(self, "lengths", found)

    def within(self, least: int, most: int | None) -> "Part":
        """Without the rows that have fewer or more ids."""
        kept = np.flatnonzero((self.lengths >= least) & (self.lengths <= (most or self.lengths.max(initial=0))))
        if len(kept) == len(self.lengths):
            return self
        if not len(kept):
            raise ZipperError(f"No row of {self.source} has {least} to {most} ids; they have {self.lengths.min()} and more.")
        rows = self.rows.select(kept) if isinstance(self.rows, Rows) else [self.rows[i] for i in kept.tolist()]
        return Part(self.source, rows, self.weight)


def _weights(config: TrainConfig) -> dict[str, float]:
    return {config.data: 1.0} if isinstance(config.data, str) else dict(config.data)


@dataclass
class Progress:
    """Where a run stands. seen: per tower the sum of its losses since the last row of metrics, and over how many steps."""

    step: int = 0
    best: float = math.inf
    since_best: int = 0
    stopped: bool = False
    seen: dict[str, list[float]] = field(default_factory=dict)

    def saw(self, loss: float, patience: int) -> bool:
        """Take in an evaluation; True if it is the best so far."""
        better = loss < self.best
        self.best, self.since_best = (loss, 0) if better else (self.best, self.since_best + 1)
        self.stopped = bool(patience) and self.since_best >= patience
        return better


def gates(model: Model) -> dict[str, float]:
    """|tanh(gate)| of every link's attention (0 = the link is silent)."""
    return {name: float(whole(link.gate).tanh().abs()) for name, link in model.links.items()}  # type: ignore[arg-type]


def _spread(objective: Objective, config: TrainConfig, accelerator: "Accelerator", cut: bool) -> nn.Module:
    """The objective as this process runs it: on its device, by DDP where there are several, unless it is cut into pieces."""
    towers = dict.fromkeys(tower for tower in objective.model.towers.values() if isinstance(tower, Tower))
    blocks = [block for tower in towers for block in tower.blocks]
    for block in blocks if config.compile else ():
        block.forward = torch.compile(block.forward, dynamic=True)
    if config.recompute:
        # Not public, but transformers' own recomputes nothing in towers that are in eval mode, as frozen ones are.
        from torch.distributed._composable.checkpoint_activation import checkpoint as recomputed

        for block in blocks:
            recomputed(block)
    prepared: nn.Module = accelerator.prepare_model(objective, evaluation_mode=cut)
    if cut:
        shard(objective, blocks, accelerator.device)
    return prepared


def _rate(model: Model, loads: Sequence[plan.Load], config: TrainConfig, accelerator: "Accelerator") -> float:
    """Operations per second of the product that most of a step is, on this process's device."""
    shape = plan.largest_product(model, max(loads, key=lambda load: sum(load.tokens.values())))
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return plan.matmul_rate(*shape, dtype, str(accelerator.device))


def _optimizer(model: Model, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in groups: trained towers, gates, other new parts; weight decay on matrices only."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = config.lr_tower if name.startswith("towers.") else config.lr_gate if name.endswith("gate") else config.lr_new
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((kind, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
        betas=config.betas,
    )


def _schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * done))


FIRST = 1000  # rows of each source that are looked at before the first step
POOL = 16  # batches whose rows are sorted by length together, so that rows of a batch are of like length


def _order(parts: Sequence[Part], batch: int, step: int, seed: int) -> list[Row]:
    """The rows of one step, a function of (seed, step): epochs are permutations; pools of batches are sorted by length and cut."""
    pool, within = divmod(step, POOL)
    which = range(pool * POOL * batch, (pool + 1) * POOL * batch)
    picked = draws(which, seed, [len(part.rows) for part in parts], [part.weight for part in parts])
    picked.sort(key=lambda at: parts[at[0]].lengths[at[1]])
    cut = np.random.default_rng(mixed_seed(seed, pool, 1)).permutation(POOL)[within]
    return [parts[part].rows[row] for part, row in picked[cut * batch : (cut + 1) * batch]]


def _batches(
    parts: Sequence[Part],
    tasks: Mapping[str, Task],
    config: TrainConfig,
    step: int,
    model: Model,
    accelerator: "Accelerator",
) -> tuple[list[list[Batch]], dict[str, float]]:
    """This process's micro-batches of one step, each one batch per task (so that what a task cannot see costs nothing), and the
    global number of target tokens per tower.

    A sharded model wants the same tasks of every process: one without a sample of its own runs another's for nothing.
    """
    random = np.random.default_rng(mixed_seed(config.seed, step, 3))
    names = list(tasks)
    shares = np.array([config.tasks[name] for name in names])
    chosen = random.choice(len(names), size=config.batch, p=shares / shares.sum())
    processes, me = accelerator.num_processes, accelerator.process_index
    mine: list[dict[str, list[Any]]] = [{} for _ in range(config.accumulate)]
    first: list[dict[str, Any]] = [{} for _ in range(config.accumulate)]
    counts: dict[str, float] = {}
    for k, row in enumerate(_order(parts, config.batch, step, config.seed)):
        name = names[chosen[k]]
        segments = tasks[name].segments(row)
        for segment in segments:
            if segment.weight:
                counts[segment.tower] = counts.get(segment.tower, 0.0) + segment.weight * (len(segment.content) + 1)
        place, process = divmod(k, processes)
        turn = place * config.accumulate // len(range(process, config.batch, processes))
        first[turn].setdefault(name, segments)
        if process == me:
            mine[turn].setdefault(name, []).append(segments)
    turns: list[list[Batch]] = [[] for _ in mine]
    for turn, samples in enumerate(mine):
        for name, sample in first[turn].items():
            if name in samples or config.shard:
                drawn = samples.get(name, [sample])
                packed = pack([lengths(one) for one in drawn], config.pack) if config.pack else None
                batch = collate(drawn, model.ends(), packed=packed).to(accelerator.device)
                batch = batch if name in samples else _silent(batch)
                turns[turn].append(_corrupt(batch, config, model))
    return turns, counts


def _silent(batch: Batch) -> Batch:
    """The same batch, to be run and not to count."""
    return dataclasses.replace(batch, weights={name: -weight for name, weight in batch.weights.items()})


def _tokens(batch: Batch) -> int:
    """Tokens that a batch reads, if it counts."""
    counts = any((weight > 0).any() for weight in batch.weights.values())
    return sum(int((strand.document >= 0).sum()) for strand in batch.strands.values()) if counts else 0


def _corrupt(batch: Batch, config: TrainConfig, model: Model) -> Batch:
    """Some ids that carry a loss are read as random ones (never a begin token); targets stay."""
    strands = dict(batch.strands)
    for name, chance in config.corrupt.items():
        if name in strands and chance:
            ids = strands[name].ids
            hit = (
                (torch.rand(ids.shape, device=ids.device) < chance) & (batch.weights[name] > 0) & (ids != model.ends()[name].begin)
            )
            noise = torch.randint(model.config.towers[name].vocabulary, ids.shape, device=ids.device)
            strands[name] = dataclasses.replace(strands[name], ids=torch.where(hit, noise, ids))
    return dataclasses.replace(batch, strands=strands)


def _mean_loss(objective: Objective, task: Task, rows: Sequence[Row], config: TrainConfig, device: torch.device) -> float:
    """Nats per target token of a task on rows, over all its towers."""
    total, count = 0.0, 0.0
    ranked = sorted(rows, key=lambda row: sum(map(len, row.values())))
    for start in range(0, len(ranked), config.batch):
        batch = collate([task.segments(row) for row in ranked[start : start + config.batch]], objective.model.ends()).to(device)
        total += sum(float(loss) for loss in objective([batch]).values())
        count += sum(float(weight.sum()) for weight in batch.weights.values())
    return total / count


def _record(config: TrainConfig, progress: Progress, found: Mapping[str, float]) -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(config), "step": progress.step, "dev": dict(found)}


def _changing(names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """All but the frozen towers, whole; all processes must ask."""
    return {name: whole(p) for p, name in names.items() if p.requires_grad or not name.startswith("towers.")}


def _save(
    folder: Path,
    optimizer: Any,
    names: Mapping[nn.Parameter, str],
    progress: Progress,
    course: Mapping[str, Any],
    keep: int,
    write: bool,
) -> None:
    """One checkpoint, whole or not at all: all but the frozen towers, the optimizer's moments, where the run stands and what
    decides it. No pickle, and nothing that depends on how many processes there are: all take part, one of them writes."""
    tensors = _changing(names)
    for p, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{key}/{names[p]}"] = whole(value)
    if not write:
        return
    with checkpoint.whole(folder / "checkpoints" / f"step-{progress.step:07d}") as temporary:
        save_file(tensors, temporary / "training.safetensors")
        state = dataclasses.asdict(progress) | {"best": None if math.isinf(progress.best) else progress.best, "course": course}
        checkpoint.write_json(temporary / checkpoint.CONFIG, state)
    with saving(folder / "checkpoints", "The newest checkpoint is whole."):
        for old in _checkpoints(folder)[:-keep]:
            checkpoint.remove(old)


def _course(
    config: TrainConfig, model: Model, modalities: Mapping[str, Modality], parts: Sequence[Part], dev: Sequence[Row]
) -> dict[str, Any]:
    """All that decides the numbers of a run, as JSON gives it back: the recipe but for FREE, in place of paths what lies there,
    and which parameters learn."""
    towers = {
        name: source if isinstance(source, Mapping) else model.config.towers[name].digest or source
        for name, source in config.towers.items()
    }
    start = Path(config.start or "") / checkpoint.MANIFEST
    found = {
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in FREE},
        "towers": towers,
        "modalities": {name: modality.fingerprint for name, modality in modalities.items()},
        "start": checkpoint.sha256(start) if config.start and start.is_file() else config.start,
        "data": {_content(part.rows): part.weight for part in parts},
        "dev": _content(dev),
        "learns": sorted(name for name, p in model.named_parameters() if p.requires_grad),
    }
    course: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return course


def _content(rows: Sequence[Row]) -> str:
    """SHA-256 of rows in their order."""
    content = hashlib.sha256()
    for row in rows:
        for name, ids in sorted(row.items()):
            content.update(f"{name} {len(ids)} ".encode() + np.asarray(ids, "<i8").tobytes())
        content.update(b"\n")
    return content.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*"))


def _restore(folder: Path, optimizer: Any, names: Mapping[nn.Parameter, str], course: Mapping[str, Any], write: bool) -> Progress:
    """The newest checkpoint that is whole, put into model and optimizer; an empty Progress where there is none. Raises ZipperError
    for one of a run that goes another way."""
    path = checkpoint.newest(_checkpoints(folder)) if write else None
    path = _told(path)  # all processes go on from the same one
    if path is None:
        return Progress()
    tensors = load_file(path / "training.safetensors")
    state = checkpoint.read_json(path / checkpoint.CONFIG)
    before = state.pop("course", course)  # zipper 0.1 did not say
    if other := sorted(name for name in before.keys() | course.keys() if before.get(name) != course.get(name)):
        first = other[0]
        raise ZipperError(
            f"{path} was made by another recipe: other {', '.join(other)} ({first} was {before.get(first)!s:.80}, is "
            f"{course.get(first)!s:.80}). Resume with the old recipe, or choose another output folder, perhaps with "
            f"start={str(folder / 'model')!r}."
        )
    for p, name in names.items():
        if p.requires_grad or name in tensors:
            if name not in tensors or tensors[name].shape != p.shape:
                raise ZipperError(f"{path} was made by another recipe: {name} differs. Choose another output folder.")
            with torch.no_grad():
                p.copy_(like(tensors[name], p))
            prefix = sorted(key.split("/")[1] for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}"))
            moments = {key: tensors[f"optimizer/{key}/{name}"] for key in prefix}
            if moments:
                optimizer.state[p] = {k: v if k == "step" else like(v, p) for k, v in moments.items()}
    return Progress(**(state | {"best": math.inf if state["best"] is None else state["best"]}))


def _kept(best: Path, progress: Progress, model: Model, ended: bool, write: bool) -> bool:
    """Whether the best model of a run that goes on is there, whole, and on the towers that the run has; those that moved are pinned
    where they are now. Says so where it is not: the next evaluation is the best then, or there is a ZipperError if none will come.
    """
    problem = ""
    if write and not math.isinf(progress.best):
        try:
            pins = checkpoint.load(best)[0]["towers"]
            moved, frozen = {}, _frozen(model)
            for name, source in frozen.items():
                pin = TowerConfig(**pins[name])
                if pin.digest != model.config.towers[name].digest:
                    raise ZipperError(f"{best} was made with another tower {name!r} than {source}.")
                try:
                    base(best, name, pin)
                except LostTower:
                    moved[name] = source
            if moved:
                Zipper.repin(best, moved)
        except ZipperError as error:
            problem = str(error)
    problem = _told(problem)
    if problem and ended:
        raise ZipperError(f"The run is at its end, but its best model is lost. {problem}")
    if problem and write:
        warnings.warn(f"The best model so far is lost, the next evaluation counts as the best. {problem}", stacklevel=3)
    return not problem


def _forget(folder: Path, step: int) -> None:
    """Drop what a run that stands at `step` will do again: later metrics, checkpoints that were damaged or only half written."""
    metrics, kept = folder / "metrics.jsonl", []
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # killed while writing it
            break
    if metrics.exists():
        files.write(metrics, "".join(kept).encode())
    for path in _checkpoints(folder):
        if path.name > f"step-{step:07d}":
            checkpoint.remove(path)
    for place in (folder, folder / "checkpoints"):
        checkpoint.clean(place)


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list that is not empty once SIGTERM has come. Only a main thread can hear signals; elsewhere it stays empty."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
