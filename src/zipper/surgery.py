"""Surgery: another tower in a zip that was trained already, or fewer links. The zip that is
operated on is not changed.

What is kept is kept bit for bit; what has to be born again starts closed (gates 0): until it is
trained, a new tower that hears only such links says what it says alone. Frozen towers are shared by
the old zip and the new one, all that learns is copied.
"""

import copy
import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from zipper.config import LinkKey, TowerConfig, ZipperConfig
from zipper.data.manifests import Row
from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.growth import add as add
from zipper.growth import inherit, rebuilt
from zipper.inspection import Activity as Activity
from zipper.inspection import activity as activity
from zipper.junctions import Junction
from zipper.loss import batch_losses, per_token
from zipper.modality import Modality
from zipper.modality.speech import SpeechUnits
from zipper.model import Zipper
from zipper.pipeline import Pipeline, check_pinned
from zipper.sampling import check_seed
from zipper.saving import hub
from zipper.saving.zips import TowerSource
from zipper.strand import Batch, collate
from zipper.tasks import Task
from zipper.tower import Tower

__getattr__ = names_of(__name__, ())

# `kinship`: 0.00 between towers trained apart, 0.89 between the shipped speech tower and what it
# was before alignment
KIN = 0.5

# What the parts of a link work with: the states of a tower, or what stands on either side of them.
FACE_SOURCE = ("source_norm", "whiten", "projection")
FACE_TARGET = ("norm", "query", "out", "feedforward")
BETWEEN = {"key": ("projection", "query"), "value": ("projection", "out")}


@dataclass(frozen=True)
class Change:
    """One tower that was swapped. kinship: see `kinship`; a relative is the old tower trained on,
    or what it was before."""

    before: TowerConfig
    after: TowerConfig
    kinship: float

    @property
    def related(self) -> bool:
        """Whether the states of the new tower have the coordinates of the old one's."""
        return self.kinship > KIN


@dataclass(frozen=True)
class Fate:
    """What became of a link or an input projection that touches a swapped tower. was, name: in the
    old zip and in the new one, "" where its junction is gone. kept: parts as they were. reborn:
    part -> why; if there are any, the gates are closed.
    """

    was: str
    name: str
    kept: tuple[str, ...] = ()
    reborn: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did. junctions: (before, after), None for one that is gone. fates: of all that
    touches a swapped tower; every other link is as it was, only the number of its junction may be
    another.
    """

    towers: Mapping[str, Change]
    junctions: tuple[tuple[Junction, Junction | None], ...]
    fates: tuple[Fate, ...]

    def text(self) -> str:
        """The report as text."""
        lines = []
        for name, change in self.towers.items():
            a, b = change.before, change.after
            kind = "a relative of the old one" if change.related else "another tower"
            lines.append(
                f"{name}: {_shape(a)} -> {_shape(b)}, {kind} (kinship {change.kinship:.2f})"
            )
            if a.vocabulary != b.vocabulary and a.tokens == b.tokens:
                lines.append(
                    f"  {a.tokens:g} mean tokens per segment were counted with the old "
                    "vocabulary; tokens= sets them"
                )
            if a.lora:
                lines.append("  the adapter of the old tower is gone with it")
        lines.append("junctions")
        lines += [
            f"  {before} -> {after or 'gone: no block is left for it'}"
            for before, after in self.junctions
        ]
        lines.append("links and input projections")
        for fate in self.fates:
            lines.append(
                f"  {fate.was}" + ("" if fate.name == fate.was else f" -> {fate.name or 'gone'}")
            )
            if fate.name:
                lines.append(
                    f"    kept: {', '.join(fate.kept) or 'nothing'}"
                    + ("" if fate.reborn else ", and its gates")
                )
            for why in dict.fromkeys(fate.reborn.values()):
                lines.append(
                    f"    born again, {why}: "
                    f"{', '.join(part for part, w in fate.reborn.items() if w == why)}"
                )
        return "\n".join(lines)

    table = text  # its name before


class _Move(NamedTuple):
    """What a swap does to a configuration. junctions: as in `SwapReport`. names: by the name of
    each link, also of one that was dropped, its new one, "" where its junction is gone."""

    config: ZipperConfig
    junctions: tuple[tuple[Junction, Junction | None], ...]
    names: Mapping[str, str]


def swap(
    model: Zipper,
    towers: Mapping[str, TowerSource],
    train: Sequence[str] = (),
    ends: Mapping[str, tuple[int, int]] | None = None,
    tokens: Mapping[str, float] | None = None,
    gate: float = 0.0,
    seed: int = 0,
) -> tuple[Zipper, SwapReport]:
    """The zip with other towers in the place of those named: of another width, depth, family or
    vocabulary.

    A junction moves to the same share of the new depth. A part of a link stays if its shapes fit
    and what it was trained beside is still there; a relative of the old tower leaves everything as
    it is. A link with a part born again gets the gates `gate` (before the tanh), and calibration
    (`TrainConfig.calibrate`) whitens it anew. train: swapped towers that learn, the others of
    `towers` are frozen; towers that stay keep what they have. ends, tokens: as in
    `Zipper.from_towers`; by default mean tokens stay the old tower's, and so do the ends for a
    relative with as many ids. seed: of what is born again.

    Raises ZipperError: unknown names, a tower that cannot be run part way or has no room for a
    junction.
    """
    check_seed(seed)
    _check_names("swap", towers, model.config.towers)
    for option, given in (("train", train), ("ends", ends), ("tokens", tokens)):
        _check_names(option, given or (), towers)
    alone: dict[str, Tower] = {}
    changes: dict[str, Change] = {}
    for name, source in towers.items():
        own, mean = (ends or {}).get(name), (tokens or {}).get(name)
        alone[name], changes[name] = _changed(model, name, source, name in train, own, mean)
    move = _move(model.config, changes)
    new = rebuilt(model, move.config, alone, seed)
    fates = tuple(_grafted(model, new, changes, move.names, gate))
    new.train(model.training)
    return new, SwapReport(changes, move.junctions, fates)


def swap_pipeline(
    pipeline: Pipeline,
    towers: Mapping[str, TowerSource],
    modalities: Mapping[str, Modality] | None = None,
    train: Sequence[str] = (),
    tokens: Mapping[str, float] | None = None,
    gate: float = 0.0,
    seed: int = 0,
) -> tuple[Pipeline, SwapReport]:
    """`swap` with the modalities of the new towers, which say how segments begin and end. A tower
    that `modalities` does not name
    keeps the old one, which must be its own too: a ZipperError where ids, ends or pins say that it
    is not.
    """
    given = dict(modalities or {})
    if unknown := sorted({*given} - {*towers}):
        raise ZipperError(
            f"The modality {unknown[0]!r} is given, but that tower stays. Give modalities of "
            f"{sorted(towers)} only."
        )
    ends = {name: (modality.begin, modality.end) for name, modality in given.items()}
    model, report = swap(pipeline.zip, towers, train, ends, tokens, gate, seed)
    new = pipeline.modalities | given
    for name, change in report.towers.items():
        if name not in given and change.before.vocabulary != change.after.vocabulary:
            raise ZipperError(
                f"The new {name!r} knows {change.after.vocabulary} ids, the old one "
                f"{change.before.vocabulary}: the old modality would give them other meanings. "
                f"Give the new tower's own tokenizer or codebook (--modality {name}=FOLDER)."
            )
        check_pinned(name, change.after.source, new[name])
    return Pipeline(model, new), report


@torch.inference_mode()
def kinship(old: Tower, new: Tower) -> float:
    """Cosine between all matrices of two towers, but those whose shapes differ; 0 where they differ
    in width, depth or family.

    Towers that were trained apart are orthogonal, however alike their shapes; one that was trained
    on stays close to what it was.
    """
    before, after = old.base(), new.base()
    if old.width != new.width or before.keys() != after.keys():
        return 0.0
    product, lengths = 0.0, [0.0, 0.0]
    for name, a in before.items():
        b = after[name]
        if a.ndim > 1 and a.shape == b.shape:
            a, b = a.float().flatten(), b.to(a.device).float().flatten()
            product += float(a @ b)
            lengths = [lengths[0] + float(a @ a), lengths[1] + float(b @ b)]
    return product / (lengths[0] * lengths[1]) ** 0.5 if all(lengths) else 0.0


def batches(model: Zipper, rows: Sequence[Row], size: int = 16) -> dict[str, list[Batch]]:
    """Rows of `zipper.data.manifests` as samples of every ordered pair of towers that they have
    fields for: {"speech -> text": batches}."""
    named = [name for name in model.config.towers if all(name in row for row in rows)]
    voice = SpeechUnits.prefixed
    produced = {
        name: f"{voice}~{name}"
        if name == SpeechUnits.name and all(voice in row for row in rows)
        else name
        for name in named
    }
    tasks = [Task((source,), (produced[target],)) for source, target in permutations(named, 2)]
    if not rows or not tasks:
        raise ZipperError(
            f"The rows have no two of the fields {sorted(model.config.towers)} in common. Give "
            "rows of pairs."
        )
    ranked = sorted(rows, key=lambda row: sum(map(len, row.values())))
    parts = [ranked[start : start + size] for start in range(0, len(ranked), size)]
    return {
        str(task): [collate([task.segments(row) for row in part], model.ends()) for part in parts]
        for task in tasks
    }


def idle(found: Mapping[str, Activity], below: float) -> list[str]:
    """Names of the links whose share is less than `below`; one that saw nothing was not measured
    and is not idle."""
    return [name for name, link in found.items() if link.seen and link.share < below]


@torch.inference_mode()
def losses(model: Zipper, samples: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """Nats per produced token of each task of `batches`, given what is true."""
    each = partial(batch_losses, model)
    return {task: per_token(each, some) for task, some in samples.items()}


def costs(model: Zipper, samples: Mapping[str, Sequence[Batch]]) -> dict[str, float]:
    """What each link is worth: how much `losses`, summed over tasks, grow if that link alone is not
    there. Look at it before you
    prune: a link with a small share may be worth much (docs/log.md).
    """
    trial = copy.copy(model)  # the same modules under another configuration
    whole = sum(losses(model, samples).values())
    found = {}
    for name in map(str, model.config.links):
        trial.config = dataclasses.replace(model.config, dropped=(*model.config.dropped, name))
        found[name] = sum(losses(trial, samples).values()) - whole
    return found


def text(
    found: Mapping[str, Activity], cost: Mapping[str, float], dropped: Container[str] = ()
) -> str:
    """`activity` and `costs` as text."""
    lines = [
        f"{'link':24} {'attention':>9} {'feed-forward':>12} {'share':>7} {'seen':>7} {'cost':>7}"
    ]
    for name, link in found.items():
        ffw = "" if link.feedforward is None else f"{link.feedforward:+.3f}"
        gone = "  dropped" if name in dropped else ""
        lines.append(
            f"{name:24} {link.attention:+9.3f} {ffw:>12} {link.share:7.4f} {link.seen:7d} "
            f"{cost[name]:+7.3f}{gone}"
        )
    return "\n".join(lines)


def prune(model: Zipper, links: Sequence[str]) -> Zipper:
    """The zip without these links ("0:text>speech"); everything else is as it was, to the bit."""
    there = [str(key) for key in model.config.links]
    if unknown := sorted({*links} - {*there}):
        raise ZipperError(f"This model has no link {unknown[0]!r}; it has {', '.join(there)}.")
    config = dataclasses.replace(
        model.config, dropped=tuple(sorted({*model.config.dropped, *links}))
    )
    new = rebuilt(model, config, {})
    inherit(new, model)
    return new.train(model.training)


def inside(model: Zipper, folder: Path) -> list[str]:
    """Frozen towers that lie in the folder that this model was loaded from: another folder must
    hold them too."""
    return model.inside(folder)


def _check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ZipperError for a tower that an option may not name."""
    if unknown := sorted({*names} - {*known}):
        raise ZipperError(f"{option} names the tower {unknown[0]!r}; it may name {sorted(known)}.")


def _changed(
    model: Zipper,
    name: str,
    source: TowerSource,
    learns: bool,
    ends: tuple[int, int] | None,
    tokens: float | None,
) -> tuple[Tower, Change]:
    """A tower in the place of another, where the other is. ends, tokens: None as in `swap`."""
    old, before = model.towers[name], model.config.towers[name]
    assert isinstance(old, Tower)
    tower = source if isinstance(source, Tower) else Tower.load(source)
    kin = kinship(old, tower)
    if ends is None and kin > KIN and tower.vocabulary == before.vocabulary:
        ends = (before.begin, before.end)
    born = Zipper.from_towers(
        {name: tower}, train=[name] if learns else [], ends={name: ends} if ends else None
    ).config.towers[name]
    after = dataclasses.replace(
        born,
        source=hub.absolute(source) if isinstance(source, str | Path) else "",
        input_projection=before.input_projection,
        tokens=before.tokens if tokens is None else tokens,
    )
    return tower.to(next(old.parameters()).device), Change(before, after, kin)


def _move(config: ZipperConfig, changes: Mapping[str, Change]) -> _Move:
    """Where everything is in the new zip. Raises a ZipperError where no junction is left."""
    junctions = _moved(config.junctions, changes)
    shows = _shown(config, junctions, changes)
    junctions = [
        junction if _pairs(junction, shown) else {}
        for junction, shown in zip(junctions, shows, strict=True)
    ]
    places = [n for n, junction in enumerate(junctions) if junction]  # their old numbers
    if config.junctions and not places:
        raise ZipperError(
            f"No junction fits inside {', '.join(sorted(changes))} of so few blocks. Give towers "
            "of at least 2 blocks."
        )

    names = {}
    for key in dataclasses.replace(config, dropped=()).links:
        n = key.junction
        stays = key.target in junctions[n] and key.source in shows[n]
        names[str(key)] = str(key._replace(junction=places.index(n))) if stays else ""
    new = dataclasses.replace(
        config,
        towers={
            name: changes[name].after if name in changes else tower
            for name, tower in config.towers.items()
        },
        junctions=tuple(junctions[n] for n in places),
        shows=tuple(shows[n] for n in places) if config.shows else None,
        dropped=tuple(now for was, now in names.items() if was in config.dropped and now),
        shapes={
            now: config.shapes[was] for was, now in names.items() if was in config.shapes and now
        },
        # What is born again beside a new tower has to learn.
        frozen_links=tuple(
            now
            for was, now in names.items()
            if was in config.frozen_links and now and not {*LinkKey.of(was)[1:]} & changes.keys()
        ),
        kept=tuple(name for name in config.kept if name not in changes),
    )
    left = (junction or None for junction in junctions)
    return _Move(new, tuple(zip(config.junctions, left, strict=True)), names)


def _grafted(
    model: Zipper, new: Zipper, changes: Mapping[str, Change], names: Mapping[str, str], gate: float
) -> Iterator[Fate]:
    """Give the new zip what still fits of the old one's links and input projections. names: see
    `_Move`."""
    strangers = {
        name: f"{name} is another tower" for name, change in changes.items() if not change.related
    }
    for part, projection in model.inputs.items():
        name = part.partition(":")[0]
        meaningless = {"mlp": strangers[name]} if name in strangers else {}
        reborn = _graft(projection, new.inputs[part], meaningless, gate)
        if name in changes:
            yield _fate(f"inputs.{part}", f"inputs.{part}", projection, reborn)
    for name, chooser in model.choosers.items():
        why = dict.fromkeys(("norm", "out"), strangers[name]) if name in strangers else {}
        reborn = _graft(chooser, new.choosers[name], why, gate)
        if name in changes:
            yield _fate(f"choosers.{name}", f"choosers.{name}", chooser, reborn)
    for key in model.config.links:
        link, was, name = model.link(*key), str(key), names[str(key)]
        faces = dict.fromkeys(_facing_source(link), key.source)
        faces |= dict.fromkeys(FACE_TARGET, key.target)
        meaningless = {
            part: strangers[tower] for part, tower in faces.items() if tower in strangers
        }
        reborn = _graft(link, new.links[name], meaningless, gate) if name else {}
        if {key.source, key.target} & changes.keys():
            yield _fate(was, name, link, reborn) if name else Fate(was, "")


def _moved(junctions: Sequence[Junction], changes: Mapping[str, Change]) -> list[Junction]:
    """Junctions at the same share of each new depth: depths that differ still do, in their order,
    none is behind the last block, and what is in front of the first stays there. Where a tower has
    too few blocks it leaves some, evenly.
    """
    moved = [dict(junction) for junction in junctions]
    for name, change in changes.items():
        depths = sorted({junction[name] for junction in junctions if junction.get(name)})
        room = change.after.layers - 1
        fits = min(len(depths), room)
        staying = {round(i * (len(depths) - 1) / max(1, fits - 1)) for i in range(fits)}
        places = {0: 0}
        for left, i in zip(reversed(range(fits)), sorted(staying), strict=True):
            share = round(depths[i] / change.before.layers * change.after.layers)
            places[depths[i]] = min(max(share, max(places.values()) + 1), room - left)
        for junction in moved:
            if name in junction and junction[name] in places:
                junction[name] = places[junction[name]]
            else:
                junction.pop(name, None)
    return moved


def _shown(
    config: ZipperConfig, junctions: Sequence[Junction], changes: Mapping[str, Change]
) -> list[Junction]:
    """Where towers are shown now: embeddings stay embeddings and what is behind the last block
    stays there; a tower that is shown where it is fused goes along with the junction."""
    if config.shows is None:
        return list(junctions)
    shows = [dict(shown) for shown in config.shows]
    for name, change in changes.items():
        old, new = change.before.layers, change.after.layers
        places = {0: 0, old: new}
        for before, after in zip(config.junctions, junctions, strict=True):
            if name in before and name in after:
                places.setdefault(before[name], after[name])
        for shown in shows:
            if name in shown:
                share = round(shown[name] / old * new)
                shown[name] = places.get(shown[name], min(max(share, 1), new))
    return shows


def _pairs(targets: Junction, sources: Junction) -> bool:
    """Whether any tower reads another there."""
    return any({*targets} - {source} for source in sources)


def _facing_source(link: nn.Module) -> tuple[str, ...]:
    """Parts that work with the source's states; without a projection, keys and values read them
    directly."""
    if any(name.startswith("projection.") for name, _ in link.named_parameters()):
        return FACE_SOURCE
    return *FACE_SOURCE, *BETWEEN


def _graft(
    old: nn.Module, new: nn.Module, meaningless: Mapping[str, str], gate: float
) -> dict[str, str]:
    """Give a newly born module the parts of an old one that fit; returns those that do not: part ->
    why.

    A part stays or is born again as a whole. It is born again if a shape is another, if
    `meaningless` names it (it faces a tower whose states have other coordinates now), or if it
    stands between two that are born again. If only one of the two is, it stays: a new projection
    can learn to land where the old keys read, as a new query can learn to ask what they answer.
    Both gates get `gate` if anything is born again, also that of a feed-forward that stays, for it
    reads what attention adds.
    """
    held, made = old.state_dict(), new.state_dict()
    why = {}
    for key, tensor in made.items():
        part = key.partition(".")[0]
        if tensor.shape != held[key].shape:
            why[part] = "its shape does not fit"
        elif part in meaningless:
            why.setdefault(part, meaningless[part])
    for part, neighbours in BETWEEN.items():
        if (
            part in _parts(new)
            and part not in why
            and all(neighbour in why for neighbour in neighbours)
        ):
            why[part] = "nothing that it works with is kept"
    for key, tensor in made.items():
        reborn = torch.full_like(tensor, gate) if key.endswith("gate") and why else tensor
        kept = key.partition(".")[0] not in why and not (key.endswith("gate") and why)
        made[key] = held[key].clone() if kept else reborn.to(held[key].device, held[key].dtype)
    new.load_state_dict(made, assign=True)
    return why


def _parts(module: nn.Module) -> list[str]:
    """Names of the parts that have parameters, without the gates."""
    return [
        name for name, part in module.named_children() if next(part.parameters(), None) is not None
    ]


def _fate(was: str, name: str, old: nn.Module, reborn: Mapping[str, str]) -> Fate:
    return Fate(was, name, tuple(part for part in _parts(old) if part not in reborn), reborn)


def _shape(tower: TowerConfig) -> str:
    return f"{tower.layers} blocks of width {tower.width}, {tower.vocabulary} ids"
