"""The model that a run starts from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from transformers import AutoConfig

from zipper.data.rows import Row
from zipper.errors import ZipperError
from zipper.junctions import shape
from zipper.modality import Modality
from zipper.modality.kind import shown_by_kind
from zipper.model import Zipper
from zipper.pipeline import check_pinned
from zipper.saving import hub
from zipper.saving.zips import LostTower
from zipper.strand import Segment
from zipper.tasks import Task, content, has, lanes, tower_of
from zipper.tower import Tower
from zipper.towers import mapping
from zipper.training.config import TrainConfig


@runtime_checkable
class Build(Protocol):
    """Makes the model of a run: a zip (`build`), or what another package trains by the same
    loop."""

    @property
    def course(self) -> Mapping[str, Any]:
        """What it adds to the recipe, as plain data: a resumed run must be of the same."""

    def __call__(
        self, config: TrainConfig, modalities: Mapping[str, Modality], rows: Sequence[Row]
    ) -> Any:
        """The model. rows: a sample of the data, on which the mean lengths of segments are
        measured."""


@final
class BuildZip:
    """A zip of a recipe's towers, or one tower alone."""

    course: Mapping[str, Any] = {}

    def __call__(
        self, config: TrainConfig, modalities: Mapping[str, Modality], rows: Sequence[Row]
    ) -> Zipper:
        """See `Build`."""
        if config.start is not None:
            model = _continued(config, modalities)
        else:
            model = _zipped(config, modalities, mean_tokens(config, rows))
        chosen = dict.fromkeys(chain.from_iterable(Task.parse(t).chosen for t in config.tasks))
        if not {*chosen} <= {*model.config.chooses}:
            model.choose(sorted({*chosen, *model.config.chooses}))
        return model


build = BuildZip()


def mean_tokens(config: TrainConfig, rows: Sequence[Row]) -> dict[str, float]:
    """{tower: mean tokens of its segments, begin and end included}, by the tasks of a recipe; where
    these name several fields of a tower, by the last of them that there are rows of."""
    tasks = map(Task.parse, config.tasks)
    found = chain.from_iterable(lanes(task.given + task.produced) for task in tasks)
    items = chain.from_iterable(lane.among or (lane.item,) for lane in found)
    lengths: dict[str, list[int]] = {}
    for item in items:
        # Where a model chooses, a row has the field of what is chosen, and no other.
        some = [len(content(row, item)) + 2 for row in rows if has(row, item)]
        lengths[tower_of(item)] = some or lengths.get(tower_of(item), [])
    return {tower: float(np.mean(some or [2])) for tower, some in lengths.items()}


def _continued(config: TrainConfig, modalities: Mapping[str, Modality]) -> Zipper:
    """The saved zip that a recipe goes on from. Raises a ZipperError where the two do not fit."""
    assert config.start is not None
    started = _started(config.start, config.towers)
    if set(started.towers) != set(config.towers):
        raise ZipperError(
            f"start={config.start!r} has the towers {sorted(started.towers)}, this recipe "
            f"{sorted(config.towers)}."
        )
    for name, modality in modalities.items():
        check_pinned(name, Path(config.start) / "towers" / name, modality)
    if asked := [name for name in ("every", "junctions", "links") if getattr(config, name)]:
        layers = {name: tower.layers for name, tower in started.config.towers.items()}
        shows = _shows(config, modalities)
        wanted = shape(layers, config.every, config.junctions, shows, config.links)
        if wanted != (started.config.junctions, started.config.shows):
            raise ZipperError(
                f"start={config.start!r} has links of its own, and this recipe asks for others by "
                f"{asked[0]}. Leave it out, or begin without start."
            )
    if config.train or config.lora or config.freeze:
        learned = {name for name, tower in started.config.towers.items() if tower.train}
        learns = {*config.train} if config.train else learned - {*config.lora}
        started.learn(sorted(learns - {*config.freeze}), config.lora)
    return started


def _zipped(
    config: TrainConfig, modalities: Mapping[str, Modality], tokens: Mapping[str, float]
) -> Zipper:
    """A new zip. tokens: mean tokens of a segment, by tower."""
    towers = {name: _tower(config, name, modalities[name]) for name in config.towers}
    model = Zipper.from_towers(
        towers,
        every=config.every,
        junctions=config.junctions,
        shows=_shows(config, modalities),
        links=config.links,
        train=tuple(towers) if len(towers) == 1 else config.train,
        link=config.link,
        input_projection=config.input_projection,
        lora=config.lora,
        ends={name: (modality.begin, modality.end) for name, modality in modalities.items()},
        tokens=tokens,
        seed=config.seed,
    )
    pins = {}
    for name, pin in model.config.towers.items():
        source = config.towers[name]
        pins[name] = dataclasses.replace(
            pin, source="" if isinstance(source, Mapping) else hub.absolute(source)
        )
    model.config = dataclasses.replace(model.config, towers=pins)
    return model


def _shows(config: TrainConfig, modalities: Mapping[str, Modality]) -> Mapping[str, Any] | None:
    """Where others read each tower, of a recipe: said, or as its modality's kind says."""
    if config.shows != "kind":
        return config.shows
    if config.links is not None or len(config.towers) == 1:
        return None
    return shown_by_kind(modalities)


def _tower(config: TrainConfig, name: str, modality: Modality) -> Tower:
    """A tower of a recipe, fresh or pre-trained. Raises a ZipperError where it knows fewer ids than
    its modality."""
    source = config.towers[name]
    if isinstance(source, Mapping):
        ids = {
            "vocab_size": modality.vocabulary,
            "bos_token_id": modality.begin,
            "eos_token_id": modality.end,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fresh = AutoConfig.for_model(**{**source, **ids})
            tower = Tower(mapping.auto().from_config(fresh))
    else:
        check_pinned(name, source, modality)
        tower = Tower.load(source, dtype=torch.float32)
    if tower.vocabulary < modality.vocabulary:
        raise ZipperError(
            f"The tower {name!r} knows {tower.vocabulary} ids, its modality in "
            f"{config.modalities[name]} makes "
            f"{modality.vocabulary}. Give the modality that the tower was trained with."
        )
    return tower


def _started(source: str, towers: Mapping[str, Any]) -> Zipper:
    """The saved zip that a run goes on from. A frozen tower that is not where it was is the
    recipe's, if it is the same one."""
    found: dict[str, Any] = {}
    while True:
        try:
            return Zipper.from_pretrained(source, found, torch.float32)
        except LostTower as lost:
            if not isinstance(towers.get(lost.name), str | Path):
                raise
            found[lost.name] = towers[lost.name]


def served(
    source: str,
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    check: Callable[[Sequence[Segment]], None],
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """The tasks that a source is for: those whose fields its first row has. Every row has what
    these want, and bears `check`; otherwise a ZipperError names the source and the row, by its
    place in `numbers` where some rows of the source were left out."""
    names = [name for name, task in tasks.items() if rows and task.fits(rows[0])]
    wanted = [tasks[name] for name in names] or [*tasks.values()]  # of none: say what is missing
    for place, row in enumerate(rows):
        try:
            for task in wanted:
                check(task.segments(row))
        except ZipperError as error:
            number = 1 + int(place if numbers is None else numbers[place])
            raise ZipperError(f"{source}, row {number}: {error}") from error
    return names
