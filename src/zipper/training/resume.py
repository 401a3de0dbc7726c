"""Checkpoints between two steps: a run that was killed and resumed ends with the weights of the run
that was not."""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zipper.config import TowerConfig
from zipper.data.rows import Row
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.model import Zipper
from zipper.saving import checkpoint, files
from zipper.saving.files import saving
from zipper.saving.zips import LostTower, base, repin
from zipper.training.batches import Part
from zipper.training.config import FREE, PATHS, TrainConfig
from zipper.training.sharding import like, whole


@dataclass
class Progress:
    """Where a run stands. seen: per tower the sum of its losses since the last row of metrics, and
    over how many steps."""

    step: int = 0
    best: float = math.inf
    since_best: int = 0
    stopped: bool = False
    seen: dict[str, list[float]] = field(default_factory=dict)

    def saw(self, loss: float, patience: int) -> bool:
        """Take in an evaluation; True if it is the best so far."""
        better = loss < self.best
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best = loss
        self.stopped = bool(patience) and self.since_best >= patience
        return better


def agreed(found: Any) -> Any:
    """What the first process found, on every process."""
    return extra("accelerate.utils").broadcast_object_list([found])[0]


def frozen_sources(model: Any) -> dict[str, Any]:
    """Where the towers lie that a saved model does not hold."""
    towers = model.config.towers.items() if isinstance(model, Zipper) else ()
    return {name: tower.source for name, tower in towers if tower.source and not tower.train}


def changing(names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """All but the frozen towers, whole; all processes must ask."""
    return {
        name: whole(p)
        for p, name in names.items()
        if p.requires_grad or not name.startswith("towers.")
    }


def save(
    folder: Path,
    optimizer: Any,
    names: Mapping[nn.Parameter, str],
    progress: Progress,
    course: Mapping[str, Any],
    keep: int,
    write: bool,
) -> None:
    """One checkpoint, whole or not at all: all but the frozen towers, the optimizer's moments,
    where the run stands and what decides it. No pickle, and nothing that depends on how many
    processes there are: all take part, one of them writes.
    """
    tensors = changing(names)
    for p, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer/{key}/{names[p]}"] = whole(value)
    if not write:
        return
    with checkpoint.whole(step_folder(folder, progress.step)) as temporary:
        save_file(tensors, temporary / "training.safetensors")
        state = dataclasses.asdict(progress) | {
            "best": None if math.isinf(progress.best) else progress.best,
            "course": course,
        }
        checkpoint.write_json(temporary / checkpoint.CONFIG, state)
    with saving(folder / "checkpoints", "The newest checkpoint is whole."):
        for old in checkpoints(folder)[:-keep]:
            checkpoint.remove(old)


def course_of(
    config: TrainConfig,
    model: Any,
    modalities: Mapping[str, Modality],
    parts: Sequence[Part],
    dev: Sequence[Row],
) -> dict[str, Any]:
    """All that decides the numbers of a run, as JSON gives it back: the recipe but for FREE, in
    place of paths what lies there, and which parameters learn."""
    towers = {
        name: source if isinstance(source, Mapping) else model.config.towers[name].digest or source
        for name, source in config.towers.items()
    }
    start = Path(config.start or "") / checkpoint.MANIFEST
    found = {
        **_options(config),
        "towers": towers,
        "modalities": {name: modality.fingerprint for name, modality in modalities.items()},
        "start": checkpoint.sha256(start) if config.start and start.is_file() else config.start,
        "data": [[_content(part.rows), part.weight] for part in parts],
        "dev": _content(dev),
        "learns": sorted(name for name, p in model.named_parameters() if p.requires_grad),
    }
    return _plain(found)


def _options(config: TrainConfig) -> dict[str, Any]:
    """What a recipe itself says of the course of a run; of files it knows the paths alone."""
    said = dataclasses.asdict(config)
    found = {name: value for name, value in said.items() if name not in (*FREE, *PATHS)}
    return found | {"tasks": [*config.tasks.items()]}  # in their order, by which they are drawn


def _plain(found: Any) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _content(rows: Sequence[Row]) -> str:
    """SHA-256 of rows in their order."""
    content = hashlib.sha256()
    for row in rows:
        for name, ids in sorted(row.items()):
            content.update(f"{name} {len(ids)} ".encode() + np.asarray(ids, "<i8").tobytes())
        content.update(b"\n")
    return content.hexdigest()


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step of a run lies."""
    return folder / "checkpoints" / f"step-{step:07d}"


def is_run(folder: Path) -> bool:
    """Whether a run's recipe lies there. Raises ZipperError for a config.json that is no JSON."""
    path = folder / "config.json"
    return path.is_file() and "tasks" in checkpoint.read_json(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoints").glob("step-*"), key=_age)


def _age(path: Path) -> tuple[int, str]:
    """For order: beyond seven digits a step's name is longer."""
    return len(path.name), path.name


def finished(config: TrainConfig) -> bool:
    """Whether a run is at its end, by its newest whole checkpoint; nothing is built for it. Raises
    ZipperError for one of another recipe, as far as this can be said without its data."""
    path = checkpoint.newest(checkpoints(Path(config.output)))
    if path is None:
        return False
    state = checkpoint.read_json(path / checkpoint.CONFIG)
    wanted = _plain(_options(config))
    before = state.get("course", wanted)
    _check_course(path, {name: before.get(name) for name in wanted}, wanted)
    return bool(state["stopped"]) or int(state["step"]) >= config.steps


def _check_course(path: Path, before: dict[str, Any], course: Mapping[str, Any]) -> None:
    """Raises ZipperError for the checkpoint of a run that goes another way."""
    for name in ("tasks", "data"):  # an older zipper kept no order of what is drawn from
        if isinstance(before.get(name), dict):
            before[name] = [list(item) for item in before[name].items()]
    # What a recipe did not know of in an older zipper, or does not any more, was at its default:
    # nothing.
    if other := sorted(
        name for name in before.keys() | course.keys() if before.get(name) != course.get(name)
    ):
        first = other[0]
        raise ZipperError(
            f"{path} was made by another recipe: other {', '.join(other)} ({first} was "
            f"{before.get(first)!s:.80}, is {course.get(first)!s:.80}). Resume with the old "
            "recipe, or choose another output folder, perhaps with "
            f"start={str(path.parents[1] / 'model')!r}."
        )


def restore(
    folder: Path,
    optimizer: Any,
    names: Mapping[nn.Parameter, str],
    course: Mapping[str, Any],
    write: bool,
) -> Progress:
    """The newest checkpoint that is whole, put into model and optimizer; an empty Progress where
    there is none. Raises ZipperError for one of a run that goes another way."""
    path = checkpoint.newest(checkpoints(folder)) if write else None
    path = agreed(path)  # all processes go on from the same one
    if path is None:
        return Progress()
    tensors = load_file(path / "training.safetensors")
    state = checkpoint.read_json(path / checkpoint.CONFIG)
    _check_course(path, state.pop("course", course), course)  # zipper 0.1 did not say
    for p, name in names.items():
        if p.requires_grad or name in tensors:
            if name not in tensors or tensors[name].shape != p.shape:
                raise ZipperError(
                    f"{path} was made by another recipe: {name} differs. Choose another output "
                    "folder."
                )
            with torch.no_grad():
                p.copy_(like(tensors[name], p))
            prefix = sorted(
                key.split("/")[1]
                for key in tensors
                if key.startswith("optimizer/") and key.endswith(f"/{name}")
            )
            moments = {key: tensors[f"optimizer/{key}/{name}"] for key in prefix}
            if moments:
                optimizer.state[p] = {
                    k: v if k == "step" else like(v, p) for k, v in moments.items()
                }
    return Progress(**(state | {"best": math.inf if state["best"] is None else state["best"]}))


def kept(best: Path, progress: Progress, model: Any, ended: bool, write: bool) -> bool:
    """Whether the best model of a run that goes on is there, whole, and on the towers that the run
    has; those that moved are pinned where they are now. Says so where it is not: the next
    evaluation is the best then, or there is a ZipperError if none will come.
    """
    problem = ""
    if write and not math.isinf(progress.best):
        try:
            pins = checkpoint.load(best)[0]["towers"]
            moved, frozen = {}, frozen_sources(model)
            for name, source in frozen.items():
                pin = TowerConfig(**pins[name])
                if pin.digest != model.config.towers[name].digest:
                    raise ZipperError(f"{best} was made with another tower {name!r} than {source}.")
                try:
                    base(best, name, pin)
                except LostTower:
                    moved[name] = source
            if moved:
                repin(best, moved)
        except ZipperError as error:
            problem = str(error)
    problem = agreed(problem)
    if problem and ended:
        raise ZipperError(f"The run is at its end, but its best model is lost. {problem}")
    if problem and write:
        warnings.warn(
            f"The best model so far is lost, the next evaluation counts as the best. {problem}",
            stacklevel=3,
        )
    return not problem


def forget(folder: Path, step: int) -> None:
    """Drop what a run that stands at `step` will do again: later metrics, checkpoints that were
    damaged or only half written."""
    metrics, kept = folder / "metrics.jsonl", []
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # killed while writing it
            break
    if metrics.exists():
        files.write(metrics, "".join(kept).encode())
    for path in checkpoints(folder):
        if _age(path) > _age(step_folder(folder, step)):
            checkpoint.remove(path)
    for place in (folder, folder / "checkpoints"):
        checkpoint.clean(place)
