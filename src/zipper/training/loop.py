"""Training: one loop for a tower alone (next-token prediction) and for a zip (alignment on pairs).

A run is a function of its TrainConfig: data order, task choice and learning rate depend on (seed,
step) alone, noise (dropout, `corrupt`) on the number of the process too. A checkpoint stands
between two steps, never inside one. So a run that was killed and resumed ends with the weights of
the run that was not; on another number of processes with the same ones up to rounding, if it has no
noise.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from zipper import inspection
from zipper.data.extraction import Policy, load
from zipper.data.rows import Row, mixed_seed
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.loss import batch_losses, per_token
from zipper.modality import load as load_modality
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint
from zipper.saving.files import held, saving
from zipper.strand import Batch, Segment, collate
from zipper.tasks import Task
from zipper.tower import Tower
from zipper.training import cost as plan
from zipper.training.batches import FIRST, Drawn, Part, Steps, corrupted, tokens_read
from zipper.training.building import Build, served
from zipper.training.building import build as build_zip
from zipper.training.config import TrainConfig, frozen_alone
from zipper.training.packing import lengths
from zipper.training.resume import (
    Progress,
    agreed,
    changing,
    checkpoints,
    course_of,
    forget,
    frozen_sources,
    is_run,
    kept,
    restore,
    save,
)
from zipper.training.sharding import shard, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

#: What a row of metrics says of the clock; all else in it is a function of the recipe.
CLOCK = ("tokens_per_s", "matmul_share", "started", "seconds")


@final
class Stopped(SystemExit):
    """SIGTERM or Ctrl-C came; the run is saved and goes on with resume. Not caught, it ends the
    process with 143 or 130, as shells know it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


class Objective(nn.Module):
    """The model as something that turns batches into losses; what DDP wraps: one forward a step,
    whatever tasks a process drew."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Per tower the weighted sum of -log p(target) in nats; logits only where there is
        something to predict.

        A weight below 0 counts as 0, but its logits are computed (`batches.silent` makes such).
        """
        losses: dict[str, Tensor] = {}
        for batch in batches:
            for name, each in batch_losses(self.model, batch).items():
                losses[name] = losses.get(name, 0.0) + each
        return losses


def train(
    config: TrainConfig,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    build: Build = build_zip,
) -> Pipeline:
    """Run a recipe to its end and return the best model by dev loss, which is also saved as
    `output`/model.

    resume: go on from the newest whole checkpoint in `output`, if there is one. report: called with
    every metrics row.
    build: makes the model, by default a zip.

    SIGTERM, or Ctrl-C once, lets the step end, saves a checkpoint and raises Stopped. Raises
    ZipperError for a recipe or data that do not fit, and where the checkpoint is of a run with
    other numbers, steps or data in its recipe (all but FREE; files count by content).
    """
    accelerate = extra("accelerate")
    if "tensorboard" in config.trackers:
        extra("tensorboard")
    known = [*map(str, accelerate.tracking.get_available_trackers())]
    if absent := sorted({*config.trackers} - {*known}):  # accelerate would go on without a word
        raise ZipperError(
            f"The trackers {absent} are not installed here, or unknown. There are {known}."
        )
    accelerator: Accelerator = accelerate.Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=accelerate.utils.ProjectConfiguration(
            config.output, logging_dir=str(Path(config.output) / "tensorboard")
        ),
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    with alone(Path(config.output), accelerator):
        return _train(config, resume, report, build, accelerator)


def _check_place(folder: Path, resume: bool) -> None:
    """Raises a ZipperError for an output that holds something else than a run, or one that is not
    to be gone on with."""
    if (folder / checkpoint.MANIFEST).exists():
        raise ZipperError(f"{folder} is a saved model; a run wants a folder of its own.")
    if (folder / "config.json").exists():
        if not is_run(folder):
            raise ZipperError(f"{folder} holds a config.json of no run. Choose another output.")
        if not resume:
            raise ZipperError(
                f"{folder} holds a run already. Pass --resume to go on with it, or choose another "
                "output."
            )
        return
    for name in ("metrics.jsonl", "checkpoints", "model"):
        if (folder / name).exists():
            raise ZipperError(
                f"{folder / name} is of no run, and would be lost. Move it, or choose another "
                "output."
            )


def _train(
    config: TrainConfig,
    resume: bool,
    report: Callable[[dict[str, Any]], None] | None,
    build: Build,
    accelerator: "Accelerator",
) -> Pipeline:
    """`train`, by processes that hold the run's folder."""
    folder = Path(config.output)
    accelerate = extra("accelerate")
    kind = accelerate.DistributedType
    if accelerator.distributed_type in (kind.FSDP, kind.DEEPSPEED, kind.MEGATRON_LM):
        raise ZipperError(
            f"Launched with {accelerator.distributed_type.value}. Launch plain processes; "
            "shard=True cuts the model."
        )
    if config.batch < accelerator.num_processes * config.accumulate:
        raise ZipperError(
            f"batch is {config.batch}; {accelerator.num_processes} processes need at least one "
            f"sample each, in each of {config.accumulate} micro-batches."
        )
    _check_place(folder, resume)
    if (folder / "config.json").exists() and not checkpoints(folder):
        warnings.warn(f"{folder} has no checkpoint yet: the run begins anew.", stacklevel=3)
    modalities = {name: load_modality(Path(path)) for name, path in config.modalities.items()}
    tasks = {name: Task.parse(name) for name in config.tasks}
    sources, policy = weights(config), Policy(config.bad, config.most_bad)
    with accelerator.main_process_first():  # one process makes unit files, the others find them
        parts = [
            Part(source, load(source, modalities, config.rows, policy), weight)
            for source, weight in sources.items()
        ]
        dev = load(config.dev, modalities, config.eval_rows, policy)
    parts = [part.within(config.least_ids, config.most_ids) for part in parts]
    rows = list(chain.from_iterable(part.rows[:FIRST] for part in parts))
    model = build(config, modalities, rows)
    _check_learning(config, tasks, model)
    for_dev = judged(config, tasks, parts, dev, model)
    course = course_of(config, model, modalities, parts, dev) | dict(build.course)
    if config.frozen_dtype:
        for name, p in model.named_parameters():
            if name.startswith("towers.") and not p.requires_grad:
                p.data = p.data.to(getattr(torch, config.frozen_dtype))
    cut = config.shard and accelerator.num_processes > 1
    if isinstance(model, Zipper) and config.calibrate:
        most = min(FIRST, config.calibrate)
        looked_at = chain.from_iterable(part.rows[:most] for part in parts)
        each = product(tasks.values(), looked_at)
        samples = [task.segments(row) for task, row in each if task.fits(row)]
        # It takes long on a CPU (docs/log.md), but a model that is to be cut may be larger than one
        # device.
        where = torch.device("cpu") if cut else accelerator.device
        model.to(where)
        with torch.no_grad():
            model.calibrate(collate(samples, model.ends()).to(where).strands)
    if isinstance(model, Zipper):
        model.attention = "flex" if config.attention == "flex" else "sdpa"
    bare = Objective(model)
    # What is saved.
    complete = copy.deepcopy(model) if cut and accelerator.is_main_process else model
    objective = spread(bare, config, accelerator, cut)
    optimizer = accelerator.prepare(optimizer_of(model, config))
    names = {parameter: name for name, parameter in model.named_parameters()}
    progress = (
        restore(folder, optimizer, names, course, accelerator.is_main_process)
        if resume
        else Progress()
    )
    ended = progress.stopped or progress.step >= config.steps
    if resume and not kept(folder / "model", progress, model, ended, accelerator.is_main_process):
        progress.best, progress.since_best = math.inf, 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # What the end needs is tried before anything is written.
        if progress.step < config.steps and not progress.stopped:
            Pipeline(complete, modalities).rehearse(
                folder / "model", record_of(config, build, progress, {})
            )
        with saving(folder, "The checkpoints in it are as they were."):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(
                folder / "config.json", dataclasses.asdict(config) | dict(build.course)
            )
            forget(folder, progress.step)
    accelerator.init_trackers(folder.name)

    def evaluate() -> dict[str, float]:
        bare.eval()
        # No inference mode: parameters gathered in it would serve no backward.
        with torch.no_grad():
            found = [
                mean_loss(bare, task, dev, config, accelerator.device) for task in for_dev.values()
            ]
        bare.train()
        # What follows from it is the same everywhere, whatever the processes run on.
        told = accelerate.utils.broadcast(
            torch.tensor(found, dtype=torch.float64, device=accelerator.device)
        ).tolist()
        return dict(zip(for_dev, told, strict=True))

    def look(step: int) -> dict[str, float]:
        """How much each link adds on some dev rows; to trackers also what the model makes of the
        first of them."""
        if cut:  # a link or tower run for itself would not be gathered
            return {}
        bare.eval()
        batches = [
            collate([task.segments(row) for row in dev[:16]], model.ends())
            for task in for_dev.values()
        ]
        links = (
            inspection.activity(model, [batch.to(accelerator.device) for batch in batches])
            if isinstance(model, Zipper)
            else {}
        )
        if accelerator.trackers and accelerator.is_main_process:
            made = inspection.samples(Pipeline(model, modalities), [*for_dev.values()], dev[:2])
            inspection.log_samples(accelerator.trackers, made, step, modalities)
        bare.train()
        return {f"branch/{name}": link.share for name, link in links.items() if link.seen}

    def keep_model(found: Mapping[str, float]) -> None:
        tensors = changing(names) if cut else {}
        if accelerator.is_main_process:
            complete.load_state_dict(tensors, strict=False)
            Pipeline(complete, modalities).save_pretrained(
                folder / "model", record=record_of(config, build, progress, found)
            )

    bare.train()
    me, all_of_us = accelerator.process_index, accelerator.num_processes
    reads = Steps(parts, tasks, config, model.ends(), me, all_of_us)
    begun = progress.step
    begin = since = time.monotonic()
    tokens, rate, stop = 0.0, 0.0, False
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc=folder.name,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with bar, asked_to_stop() as came, contextlib.closing(drawn(reads, progress.step)) as coming:
        while progress.step < config.steps and not progress.stopped and not stop:
            step = progress.step
            torch.manual_seed(mixed_seed(config.seed, step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, config)
            turns, counts = next(coming)
            sums = dict.fromkeys(counts, 0.0)
            for turn, mine in enumerate(turns, 1):
                batches = [corrupted(b.to(accelerator.device), config, model) for b in mine]
                with (
                    contextlib.nullcontext()
                    if turn == len(turns)
                    else accelerator.no_sync(objective)
                ):
                    losses = objective(batches)
                    total = sum(
                        config.loss_weight.get(name, 1.0) * loss / counts[name]
                        for name, loss in losses.items()
                    )
                    # Gradients are averaged over processes; counts are global, so the sum is what
                    # is wanted.
                    accelerator.backward(total * accelerator.num_processes)
                for name, loss in losses.items():
                    sums[name] += float(loss.detach())
            logs = step + 1 == config.steps or (step + 1) % config.log_every == 0
            norms = inspection.gradient_norms(model) if logs else {}
            norm = whole(accelerator.clip_grad_norm_(list(names), config.clip))
            # In all processes alike; after a step by it no weight would be a number.
            if not norm.isfinite():
                raise ZipperError(
                    f"The gradient of step {step + 1} is not finite (losses: {sums}). What "
                    f"{folder} holds is from before it. Start anew with smaller learning rates, "
                    f"perhaps from the best model (start={str(folder / 'model')!r})."
                )
            optimizer.step()
            optimizer.zero_grad()
            progress.step = step = step + 1
            bar.update()

            # What the processes saw of this step; all of them must stop at the same one.
            told = [sums[name] / counts[name] for name in counts]
            read = sum(map(tokens_read, chain(*turns)))  # on the CPU: nothing waits for it
            told += [read, len(came)]
            *found, count, stop = accelerator.reduce(
                torch.tensor(told, device=accelerator.device)
            ).tolist()
            tokens += count
            for name, loss in zip(counts, found, strict=True):
                before, steps = progress.seen.get(name, (0.0, 0.0))
                progress.seen[name] = [before + loss, steps + 1.0]
            row: dict[str, Any] = {}
            if logs:
                row |= {
                    f"loss/{name}": loss / steps for name, (loss, steps) in progress.seen.items()
                }
                row |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
                row |= {f"grad/{part}": value for part, value in norms.items()}
                row["tokens_per_s"] = tokens / (time.monotonic() - since)
                if loads := [plan.Load.of([b]) for b in chain(*turns) if tokens_read(b)]:
                    rate = rate or machine_rate(model, loads, config, accelerator)
                    # Of a token, in this process and step.
                    work = sum(plan.cost(model, load).flops for load in loads) / read
                    row["matmul_share"] = (
                        work * row["tokens_per_s"] / (rate * accelerator.num_processes)
                    )
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
                row |= {
                    "started": begun,
                    "seconds": time.monotonic() - begin,
                }  # zipper show: how long, and where it was resumed
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
                save(
                    folder,
                    optimizer,
                    names,
                    progress,
                    course,
                    config.keep,
                    write=accelerator.is_main_process,
                )
        stop = bool(stop) and progress.step < config.steps and not progress.stopped
        by = signal.Signals(came[0] if came else signal.SIGTERM)  # another process may have heard
        if stop and accelerator.is_main_process:
            bar.write(
                f"Stopped at step {progress.step} by {by.name}; go on with resume.",
                file=sys.stderr,
            )
    accelerator.wait_for_everyone()
    if not stop and not (folder / "model").is_dir():  # no dev loss was a number
        keep_model({})
    if config.save_dtype and not stop and accelerator.is_main_process:
        best = Pipeline.from_pretrained(folder / "model", frozen_sources(model))
        best.model.cast(getattr(torch, config.save_dtype))
        best.save_pretrained(folder / "model", record=checkpoint.load(folder / "model")[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if stop:
        raise Stopped(by)
    return Pipeline.from_pretrained(folder / "model", frozen_sources(model))


@contextmanager
def alone(folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Hold the run's folder, by one process for all of them. A ZipperError says who writes it
    already, in every process."""
    with contextlib.ExitStack() as stack:
        refused = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(held(folder))
            except ZipperError as error:
                refused = str(error)
        if said := agreed(refused):
            raise ZipperError(said)
        yield


def weights(config: TrainConfig) -> dict[str, float]:
    """{source: its weight in the mixture}."""
    return {config.data: 1.0} if isinstance(config.data, str) else dict(config.data)


def _check_learning(config: TrainConfig, tasks: Mapping[str, Task], model: Any) -> None:
    """Raises a ZipperError where nothing learns, at all or by one of the tasks."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ZipperError(
            "Nothing learns in this recipe. Name a tower in train, or leave freeze out."
        )
    alone = [t for name, t in tasks.items() if config.tasks[name] and len(t.towers) == 1]
    for task in alone if isinstance(model, Zipper) else ():
        if not model.config.towers[task.towers[0]].learns:
            raise frozen_alone(task)


def judged(
    config: TrainConfig,
    tasks: Mapping[str, Task],
    parts: Sequence[Part],
    dev: Sequence[Row],
    model: Any,
) -> dict[str, Task]:
    """The tasks by which dev judges. Looks at all rows: raises ZipperError for a task that no
    source of `data` is for, a source that is for none, and rows that lack what others of their
    source have."""

    def check(sample: Sequence[Segment]) -> None:
        model.check(sample)
        read, room = lengths(sample), config.pack or {}
        if long := [tower for tower, most in room.items() if read.get(tower, 0) > most]:
            raise ZipperError(
                f"it has {read[long[0]]} tokens of {long[0]!r}; a packed row has room for "
                f"{room[long[0]]}. Give more (pack), or leave out what is so long."
            )

    learnt, for_data = {name: tasks[name] for name in tasks if config.tasks[name]}, set[str]()
    for part in parts:
        for_data.update(served(part.source, part.rows, learnt, check, part.numbers))
    for name, task in learnt.items():
        if name not in for_data:
            served(parts[0].source, parts[0].rows[:1], {name: task}, check)
    names = served(config.dev, dev, tasks, model.check)
    if left := [name for name in tasks if name not in names]:
        warnings.warn(
            f"{config.dev} lacks what {', '.join(map(repr, left))} wants: what counts is the loss "
            "of the other tasks.",
            stacklevel=2,
        )
    return {name: tasks[name] for name in names}


def drawn(steps: Steps, begin: int) -> Generator[Drawn, None, None]:
    """What is read from step `begin` on, made by the recipe's workers, which end when this is
    closed."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(begin, len(steps)),
        num_workers=steps.config.workers,
        collate_fn=_as_it_is,
        worker_init_fn=_undisturbed,
        generator=torch.Generator(),  # its seeds for workers, which draw nothing, are of no step
    )
    coming = iter(loader)
    try:
        yield from coming
    finally:
        # A traceback keeps the iterator, and a process that ends would wait for its workers.
        getattr(coming, "_shutdown_workers", lambda: None)()


def _as_it_is(read: Any) -> Any:
    return read


def _undisturbed(worker: int) -> None:
    """Whoever asks a group of processes to end means the run, which ends its workers itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def gates(model: Any) -> dict[str, float]:
    """|tanh(gate)| of every link's attention (0 = the link is silent)."""
    return {name: float(whole(link.gate).tanh().abs()) for name, link in model.links.items()}


def spread(
    objective: Objective, config: TrainConfig, accelerator: "Accelerator", cut: bool
) -> nn.Module:
    """The objective as this process runs it: on its device, by DDP where there are several, unless
    it is cut into pieces."""
    towers = dict.fromkeys(
        tower for tower in objective.model.towers.values() if isinstance(tower, Tower)
    )
    blocks = list(chain.from_iterable(tower.blocks for tower in towers))
    for block in blocks if config.compile else ():
        block.forward = torch.compile(block.forward, dynamic=True)
    if config.recompute:
        # Not public, but transformers' own recomputes nothing in towers that are in eval mode, as
        # frozen ones are.
        from torch.distributed._composable.checkpoint_activation import checkpoint as recomputed

        for block in blocks:
            recomputed(block)
    prepared: nn.Module = accelerator.prepare_model(objective, evaluation_mode=cut)
    if cut:
        shard(objective, blocks, accelerator.device)
    return prepared


def machine_rate(
    model: Any, loads: Sequence[plan.Load], config: TrainConfig, accelerator: "Accelerator"
) -> float:
    """Operations per second of the product that most of a step is, on this process's device."""
    shape = plan.largest_product(model, max(loads, key=lambda load: sum(load.tokens.values())))
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return plan.machine_rate(shape, dtype, str(accelerator.device))


def optimizer_of(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in groups: trained towers, gates, other new parts; weight decay on matrices only."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (
                config.lr_tower
                if name.startswith("towers.")
                else config.lr_gate
                if name.endswith("gate")
                else config.lr_new
            )
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((kind, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": p, "lr": lr, "peak": lr, "weight_decay": decay}
            for (lr, decay), p in groups.items()
        ],
        betas=config.betas,
    )


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * done))


def mean_loss(
    objective: Objective, task: Task, rows: Sequence[Row], config: TrainConfig, device: torch.device
) -> float:
    """Nats per target token of a task on rows, over all its towers."""
    ranked = sorted(rows, key=lambda row: sum(map(len, row.values())))
    at_once = max(1, config.batch // config.accumulate)
    batches = (
        collate(
            [task.segments(row) for row in ranked[start : start + at_once]],
            objective.model.ends(),
            company=task.company,
        ).to(device)
        for start in range(0, len(ranked), at_once)
    )
    return per_token(lambda batch: objective([batch]), batches)


def record_of(
    config: TrainConfig, build: Build, progress: Progress, found: Mapping[str, float]
) -> dict[str, Any]:
    """What is kept beside a saved model: how it was trained."""
    return {
        "recipe": dataclasses.asdict(config) | dict(build.course),
        "step": progress.step,
        "dev": dict(found),
    }


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list of the signals that came: SIGTERM, or the first Ctrl-C; another interrupts as ever.
    Only a main thread can hear signals; elsewhere it stays empty."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in came:
                signal.default_int_handler(number, frame)
            # No stream can be written to from a handler.
            os.write(2, b"\nThe step ends and is saved. Ctrl-C again ends at once.\n")
        came.append(number)

    before: dict[int, Any] = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody else hears it
        before[signal.SIGINT] = signal.default_int_handler
    try:
        for number in before:
            signal.signal(number, ask)
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
