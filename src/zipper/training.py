"""Training: one loop for a tower alone (next-token prediction) and for a zip (alignment on pairs).

A run is a function of its TrainConfig: data order, task choice, dropout and learning rate depend on (seed, step) alone, so a run
that was killed and resumed ends with the weights of the run that was not.
"""

import dataclasses
import json
import math
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from zipper import checkpoint
from zipper.baseline import Baseline
from zipper.data import Row, read
from zipper.errors import ZipperError
from zipper.link import InputKind, LinkConfig
from zipper.modality import Modality
from zipper.modality import load as load_modality
from zipper.model import Zipper
from zipper.pipeline import PINS, Pipeline
from zipper.sequence import Batch, collate
from zipper.tasks import Task, tower_of
from zipper.tower import Tower


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; saved as config.json beside its results.

    output: folder of the run. towers: name -> folder or hub id of a pre-trained tower, or the configuration of a fresh one
    ({"model_type": "llama", "hidden_size": 128, ...}). modalities: name -> folder. data, dev: JSONL manifests; rows: use only the
    first so many of `data`. tasks: {"speech -> text": share of samples}. train: towers that learn; with one tower it always does.
    every, junctions, link, input_projection, lora: see `Zipper.from_towers`. start: a saved zip of these towers to go on from; the
    shape is then its own. calibrate: rows on which links are calibrated before the first step (`Link.calibrate`, 0 = not).
    baseline: not a zip but one decoder with an extended vocabulary (`Baseline`), all of which learns: {"base": the tower that is
    extended} and, if wanted, "rows": [towers whose embeddings the new rows start from], "parameters": how many it is to have,
    "positions": room.

    steps, batch: optimizer steps and samples in each, over all processes. lr_*: peak learning rates of new parts, of gates and of
    trained towers; linear warm-up over `warmup` steps, then a cosine down to lr_final of the peak. loss_weight: per tower.
    corrupt: per tower, the chance that a token of a segment with loss is read as a random one while the targets stay: against
    overfitting and exposure bias. dropout of links stands in `link`.
    eval_every, patience: dev loss every so many steps; stop after that many evaluations without a new best (0 = never).
    save_every, keep: steps between checkpoints and how many are kept. The best model by mean dev loss is what the run returns.
    save_dtype: "float16" or "bfloat16" halves the returned model on disk; training itself is in float32 (and `mixed_precision`).
    """

    output: str
    towers: Mapping[str, Any]
    modalities: Mapping[str, str]
    data: str
    dev: str
    tasks: Mapping[str, float]
    steps: int
    rows: int | None = None
    batch: int = 32
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
    mixed_precision: str = "no"
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
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ZipperError(f"tasks is {dict(self.tasks)}; it needs at least one task with a positive share.")
        for name in ("steps", "batch", "rows", "eval_every", "save_every", "log_every", "keep", "eval_rows"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ZipperError(f"{name} is {number}; it must be at least 1.")
        for name in ("warmup", "patience", "calibrate", "seed"):
            if (number := getattr(self, name)) < 0:
                raise ZipperError(f"{name} is {number}; it must be at least 0.")
        for name, choices in {"mixed_precision": ("no", "bf16"), "save_dtype": (None, "float32", "float16", "bfloat16")}.items():
            if getattr(self, name) not in choices:
                raise ZipperError(f"{name} is {getattr(self, name)!r}; it must be one of {choices}.")
        if set(self.modalities) != set(self.towers):
            raise ZipperError(f"The towers are {sorted(self.towers)}, the modalities {sorted(self.modalities)}. Give one for each.")
        for name in ("train", "lora", "loss_weight", "corrupt"):
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
        for task in self.tasks:
            for tower in Task.parse(task).towers:
                if tower not in self.towers:
                    raise ZipperError(f"The task {task!r} names the tower {tower!r}; this recipe has {sorted(self.towers)}.")


Model = Zipper | Baseline


class Objective(nn.Module):
    """The model as something that turns batches into losses; what DDP wraps: one forward a step, whatever tasks a process drew."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Per tower the weighted sum of -log p(target) in nats; logits only where there is something to predict."""
        losses: dict[str, Tensor] = {}
        for batch in batches:
            wanted = {name: weight > 0 for name, weight in batch.weights.items() if (weight > 0).any()}
            hidden = self.model.hidden(batch.strands, outputs=tuple(wanted))
            for name, where in wanted.items():
                states = hidden[name]
                where, targets, weights = (x.to(states.device) for x in (where, batch.targets[name], batch.weights[name]))
                each = self.model.nll(name, states[where][None], targets[where][None])[0]
                losses[name] = losses.get(name, 0.0) + (each * weights[where]).sum()
        return losses


def build(config: TrainConfig, modalities: Mapping[str, Modality], rows: Sequence[Row]) -> Model:
    """The model that a run starts from. Mean segment lengths (for positions and caps) are measured on the first 1,000 rows."""
    if config.start is not None:
        started = Zipper.from_pretrained(config.start, dtype=torch.float32)
        if set(started.towers) != set(config.towers):
            raise ZipperError(
                f"start={config.start!r} has the towers {sorted(started.towers)}, this recipe {sorted(config.towers)}."
            )
        for name, modality in modalities.items():
            _pinned(name, Path(config.start) / "towers" / name, modality)
        return started
    items = [item for name in config.tasks for task in [Task.parse(name)] for item in task.given + task.produced]
    fields = {tower_of(item): item.partition(":")[0] for item in items}
    tokens = {tower: float(np.mean([len(row.get(name, ())) + 2 for row in rows[:1000]])) for tower, name in fields.items()}
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
        name: dataclasses.replace(t, source="" if isinstance(config.towers[name], Mapping) else str(config.towers[name]))
        for name, t in model.config.towers.items()
    }
    model.config = dataclasses.replace(model.config, towers=named)
    return model


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
    SIGTERM saves a checkpoint and stops. Raises ZipperError for a recipe or data that do not fit.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    folder = Path(config.output)
    if config.batch < accelerator.num_processes:
        raise ZipperError(f"batch is {config.batch}; {accelerator.num_processes} processes need at least one sample each.")
    if not resume and (folder / "config.json").exists():
        raise ZipperError(f"{folder} holds a run already. Pass --resume to go on with it, or choose another output.")
    modalities = {name: load_modality(Path(path)) for name, path in config.modalities.items()}
    tasks = {name: Task.parse(name) for name in config.tasks}
    rows = read(Path(config.data), modalities, limit=config.rows)
    dev = read(Path(config.dev), modalities, limit=config.eval_rows)
    model = build(config, modalities, rows)
    for path, some in ((config.data, rows), (config.dev, dev)):
        _check(path, some, tasks, model)
    if isinstance(model, Zipper) and config.calibrate:
        samples = [task.segments(row) for task in tasks.values() for row in rows[: config.calibrate]]
        with torch.no_grad():
            model.calibrate(collate(samples, model.ends()).strands)
    bare = Objective(model)
    objective, optimizer = accelerator.prepare(bare, _optimizer(model, config))
    names = {parameter: name for name, parameter in model.named_parameters()}
    progress = _restore(folder, model, optimizer, names) if resume else Progress()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "config.json", dataclasses.asdict(config))
        _forget(folder, progress.step)
    accelerator.init_trackers("tensorboard")

    def evaluate() -> dict[str, float]:
        bare.eval()
        with torch.inference_mode():
            found = {name: _mean_loss(bare, task, dev, config, accelerator.device) for name, task in tasks.items()}
        bare.train()
        return found

    bare.train()
    since, tokens, stop = time.monotonic(), 0.0, False
    bar = tqdm(total=config.steps, initial=progress.step, desc=folder.name, unit="step", disable=not accelerator.is_main_process)
    with bar, _sigterm() as came:
        while progress.step < config.steps and not progress.stopped and not stop:
            step = progress.step
            torch.manual_seed(_mix(config.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, config)
            batches, counts = _batches(rows, tasks, config, step, model, accelerator)
            losses = objective(batches)
            total = sum(config.loss_weight.get(name, 1.0) * loss / counts[name] for name, loss in losses.items())
            # DDP averages gradients over processes; counts are global, so the sum is what is wanted.
            accelerator.backward(total * accelerator.num_processes)
            norm = accelerator.clip_grad_norm_(objective.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            progress.step = step = step + 1
            bar.update()

            # What the processes saw of this step; all of them must stop at the same one.
            mine = [float(losses[name].detach()) / counts[name] if name in losses else 0.0 for name in counts]
            mine += [sum(int((s.document >= 0).sum()) for batch in batches for s in batch.strands.values()), len(came)]
            *found, count, stop = accelerator.reduce(torch.tensor(mine, device=accelerator.device)).tolist()
            tokens += count
            for name, loss in zip(counts, found, strict=True):
                before, steps = progress.seen.get(name, (0.0, 0.0))
                progress.seen[name] = [before + loss, steps + 1.0]
            row: dict[str, Any] = {}
            if step % config.log_every == 0 or step == config.steps:
                row |= {f"loss/{name}": loss / steps for name, (loss, steps) in progress.seen.items()}
                row |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
                row |= {"tokens_per_s": tokens / (time.monotonic() - since)}
                row |= {f"gate/{name}": value for name, value in gates(model).items()}
                bar.set_postfix({name: f"{row[f'loss/{name}']:.3f}" for name in progress.seen})
                progress.seen, since, tokens = {}, time.monotonic(), 0.0
            if step % config.eval_every == 0 or step == config.steps:
                dev_loss = evaluate()
                row |= {f"dev/{name}": value for name, value in dev_loss.items()}
                if progress.saw(float(np.mean(list(dev_loss.values()))), config.patience) and accelerator.is_main_process:
                    Pipeline(model, modalities).save_pretrained(folder / "model", record=_record(config, progress, dev_loss))
            if row and accelerator.is_main_process:
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
                accelerator.log(row, step=step)
                if report:
                    report({"step": step, **row})
            last = step == config.steps or progress.stopped or stop
            if (step % config.save_every == 0 or last) and accelerator.is_main_process:
                _save(folder, model, optimizer, names, progress, config.keep)
        if stop:
            bar.write(f"Stopped at step {progress.step} by SIGTERM; go on with resume.", file=sys.stderr)
    if accelerator.is_main_process:
        if not (folder / "model").is_dir():  # stopped before the first evaluation
            Pipeline(model, modalities).save_pretrained(folder / "model", record=_record(config, progress, {}))
        if config.save_dtype:
            best = Pipeline.from_pretrained(folder / "model")
            best.model.cast(getattr(torch, config.save_dtype))
            best.save_pretrained(folder / "model", record=checkpoint.load(folder / "model")[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Pipeline.from_pretrained(folder / "model")


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
    return {name: float(link.gate.detach().tanh().abs()) for name, link in model.links.items()}  # type: ignore[operator]


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


POOL = 16  # batches whose rows are sorted by length together, so that rows of a batch are of like length


def _order(rows: Sequence[Row], batch: int, step: int, seed: int) -> list[Row]:
    """The rows of one step, a function of (seed, step): epochs are permutations; pools of batches are sorted by length and cut."""
    pool, within = divmod(step, POOL)
    picked = []
    for k in range(pool * POOL * batch, (pool + 1) * POOL * batch):
        epoch, place = divmod(k, len(rows))
        picked.append(_permutation(seed, epoch, len(rows))[place])
    picked.sort(key=lambda i: sum(map(len, rows[i].values())))
    which = np.random.default_rng(_mix(seed, pool, 1)).permutation(POOL)[within]
    return [rows[i] for i in picked[which * batch : (which + 1) * batch]]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> Any:
    return np.random.default_rng(_mix(seed, epoch, 2)).permutation(n)


def _batches(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    config: TrainConfig,
    step: int,
    model: Model,
    accelerator: Accelerator,
) -> tuple[list[Batch], dict[str, float]]:
    """This process's batches of one step, one per task (so that what a task cannot see costs nothing), and the global number of
    target tokens per tower."""
    random = np.random.default_rng(_mix(config.seed, step, 3))
    names = list(tasks)
    shares = np.array([config.tasks[name] for name in names])
    chosen = random.choice(len(names), size=config.batch, p=shares / shares.sum())
    mine: dict[str, list[Any]] = {}
    counts: dict[str, float] = {}
    for k, row in enumerate(_order(rows, config.batch, step, config.seed)):
        name = names[chosen[k]]
        segments = tasks[name].segments(row)
        for segment in segments:
            if segment.weight:
                counts[segment.tower] = counts.get(segment.tower, 0.0) + segment.weight * (len(segment.content) + 1)
        if k % accelerator.num_processes == accelerator.process_index:
            mine.setdefault(name, []).append(segments)
    batches = [collate(samples, model.ends()).to(accelerator.device) for samples in mine.values()]
    return [_corrupt(batch, config, model) for batch in batches], counts


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


def _save(folder: Path, model: Model, optimizer: Any, names: Mapping[nn.Parameter, str], progress: Progress, keep: int) -> None:
    """One checkpoint, whole or not at all: all but the frozen towers, the optimizer's moments, where the run stands. No pickle."""
    kept = {name: p for p, name in names.items() if p.requires_grad or not name.startswith("towers.")}
    tensors = {name: p.detach().cpu().contiguous() for name, p in kept.items()}
    for p, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{key}/{names[p]}"] = value.detach().cpu().contiguous()
    with checkpoint.whole(folder / "checkpoints" / f"step-{progress.step:07d}") as temporary:
        save_file(tensors, temporary / "training.safetensors")
        state = dataclasses.asdict(progress) | {"best": None if math.isinf(progress.best) else progress.best}
        checkpoint.write_json(temporary / checkpoint.CONFIG, state)
    for old in _checkpoints(folder)[:-keep]:
        checkpoint.remove(old)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*"))


def _restore(folder: Path, model: Model, optimizer: Any, names: Mapping[nn.Parameter, str]) -> Progress:
    """The newest checkpoint that is whole, put into model and optimizer; an empty Progress where there is none."""
    for path in reversed(_checkpoints(folder)):
        try:
            checkpoint.check(path)
        except ZipperError as error:
            warnings.warn(f"Skipping a checkpoint that is not whole. {error}", stacklevel=3)
            continue
        tensors = load_file(path / "training.safetensors")
        state = checkpoint.read_json(path / checkpoint.CONFIG)
        for p, name in names.items():
            if p.requires_grad or name in tensors:
                if name not in tensors or tensors[name].shape != p.shape:
                    raise ZipperError(f"{path} was made by another recipe: {name} differs. Choose another output folder.")
                p.data.copy_(tensors[name])
                prefix = {key.split("/")[1] for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}")}
                moments = {key: tensors[f"optimizer/{key}/{name}"] for key in prefix}
                if moments:
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        return Progress(**(state | {"best": math.inf if state["best"] is None else state["best"]}))
    return Progress()


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
        metrics.write_text("".join(kept))
    for path in _checkpoints(folder):
        if path.name > f"step-{step:07d}":
            checkpoint.remove(path)
    for path in (folder / "checkpoints").glob(".step-*"):
        shutil.rmtree(path)


def _mix(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


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
