"""Growth: one tower more in a zip that was trained already. The zip that grows is not changed.

What was there stays as it was, to the bit, and by default no longer learns, but for the heads that
choose what comes next. New links are born closed (gates 0): until it is trained, the new zip says
what the old one and the new tower say.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zipper.config import LinkKey, TowerConfig, ZipperConfig
from zipper.errors import ZipperError
from zipper.junctions import Directed, known, shape
from zipper.link import InputKind, LinkConfig
from zipper.modality import Modality
from zipper.modality.kind import shown_by_kind
from zipper.model import Zipper
from zipper.pipeline import Pipeline, check_pinned
from zipper.sampling import check_seed
from zipper.saving import hub
from zipper.saving.zips import TowerSource
from zipper.tower import Tower


def add(
    model: Zipper,
    name: str,
    source: TowerSource,
    *,
    partners: Sequence[str] | None = None,
    every: int = 1,
    shows: Mapping[str, int] | None = None,
    links: Sequence[Directed] | None = None,
    link: LinkConfig | None = None,
    train: bool = False,
    freeze: bool = True,
    input_projection: InputKind = "residual",
    ends: tuple[int, int] | None = None,
    tokens: float = 0.0,
    seed: int = 0,
) -> Zipper:
    """The zip with one tower more.

    name, source: of the new tower. partners: old towers that it reads and that read it; None = all.
    every: blocks of the new tower between its junctions, which are those of its partners. shows:
    {tower: depth at which the new links read it}, where that is not where it is fused. links: each
    link by itself, instead of partners, every and shows (see `Zipper.from_towers`); each must touch
    the new tower. link: what the new links look like, None = as the old ones; their gates are
    closed whatever it says. train: the new tower learns. freeze: all that was there stays as it is
    in training too. input_projection, ends, tokens: of the new tower, as in `Zipper.from_towers`.
    seed: of the new parameters.

    Raises ZipperError: a name that is taken or unknown, links that do not fit, a tower that cannot
    be run part way.
    """
    check_seed(seed)
    old = model.config
    if name in old.towers:
        raise ZipperError(
            f"This model has a tower {name!r} already; it has {sorted(old.towers)}. Give the new "
            "one another name, or use `zipper swap` to put it in the old one's place."
        )
    tower = source if isinstance(source, Tower) else Tower.load(source)
    alone = Zipper.from_towers(
        {name: tower},
        train=[name] if train else [],
        ends={name: ends} if ends else None,
        tokens={name: tokens},
        input_projection=input_projection,
    ).config.towers[name]
    place = hub.absolute(source) if isinstance(source, str | Path) else ""
    born = dataclasses.replace(alone, source=place)
    wanted = _new_links(old, name, born.layers, partners, every, shows, links)
    pins = dict(old.towers)
    if freeze:
        pins = {other: model.frozen_config(other) for other in pins}
    config = _grown(old, pins | {name: born}, wanted, link, freeze)
    new = rebuilt(model, config, {name: tower}, seed)
    inherit(new, model)
    new._join_towers()
    return new.train(model.training)


def add_pipeline(
    pipeline: Pipeline, name: str, source: TowerSource, modality: Modality, **options: Any
) -> Pipeline:
    """`add` with the modality of the new tower, which says how its segments begin and end.

    options: of `add`, but ends. Without `shows` or `links` the new links read each tower where its
    modality's kind says (`Kind.shows`: text at its embeddings). Raises a ZipperError for a tower
    that was trained with another tokenizer or codebook.
    """
    if isinstance(source, str | Path):
        check_pinned(name, source, modality)
    modalities = pipeline.modalities | {name: modality}
    if options.get("shows") is None and options.get("links") is None:
        options["shows"] = shown_by_kind(modalities)
    model = add(pipeline.zip, name, source, ends=(modality.begin, modality.end), **options)
    return Pipeline(model, modalities)


def rebuilt(
    model: Zipper, config: ZipperConfig, others: Mapping[str, Tower], seed: int = 0
) -> Zipper:
    """A zip of another configuration on the towers of this one, but `others`: those that learn are
    copied, frozen ones are the same objects. What lies between towers is newborn."""
    towers: dict[str, Tower] = {}
    for name, held in model.towers.items():
        assert isinstance(held, Tower)
        if name not in others:
            towers[name] = copy.deepcopy(held) if model.config.towers[name].learns else held
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = Zipper({**towers, **others}, config)
    new.attention = model.attention
    return new


def inherit(new: Zipper, model: Zipper) -> None:
    """Give a zip what it shares with another: links, input projections and heads of the same name,
    to the bit."""
    kinds = ((new.inputs, model.inputs), (new.links, model.links), (new.choosers, model.choosers))
    for made, parts in kinds:
        copy_into(made, {name: part for name, part in parts.items() if name in made})


def copy_into(made: nn.ModuleDict, parts: Mapping[str, nn.Module]) -> None:
    """Modules become copies of those of the same name."""
    for name, part in parts.items():
        tensors = {key: tensor.clone() for key, tensor in part.state_dict().items()}
        made[name].load_state_dict(tensors, assign=True)


def _new_links(
    old: ZipperConfig,
    name: str,
    layers: int,
    partners: Sequence[str] | None,
    every: int,
    shows: Mapping[str, int] | None,
    links: Sequence[Directed] | None,
) -> list[Directed]:
    """The links of a new tower. Raises a ZipperError where there is none."""
    if links is not None:
        if partners is not None or shows is not None:
            raise ZipperError(
                "partners or shows and links both say what the new tower reads. Give one."
            )
        if foreign := [link for link in links if name not in (link[0], link[2])]:
            raise ZipperError(
                f"The link {foreign[0]} does not touch {name!r}; the links of the old towers stay "
                "as they are. Give links to or from the new tower only."
            )
        return [*links]
    if every < 1:
        raise ZipperError(f"every is {every}; an interval is a number of blocks, at least 1.")
    known("partners", partners or (), old.towers)
    shown = shows or {}
    known("shows", shown, {**old.towers, name: None})
    found: list[Directed] = []
    for partner in old.towers if partners is None else partners:
        for n, depth in _depths(old, name, layers, partner, every):
            if (here := n * every) < layers:
                found += [
                    (name, shown.get(name, here), partner, depth),
                    (partner, shown.get(partner, depth), name, here),
                ]
    if not found:
        raise ZipperError(
            f"The new tower {name!r} of {layers} blocks has no junction with an old one at every="
            f"{every}. Name partners, use a smaller interval, or give links."
        )
    return found


def _depths(
    old: ZipperConfig, name: str, layers: int, partner: str, every: int
) -> list[tuple[int, int]]:
    """Numbers of junctions from 1, and behind how many blocks of an old tower they stand. Where
    the old towers exchange in lock-step so does the new one, which closes no circle."""
    if not old.junctions:
        sizes = {partner: old.towers[partner].layers, name: layers}
        fused, _ = shape(sizes, every={name: every})
        return [(n, junction[partner]) for n, junction in enumerate(fused, 1)]
    mine = [(n, junction) for n, junction in enumerate(old.junctions, 1) if partner in junction]
    if old.shows is None:
        return [(n, junction[partner]) for n, junction in mine]
    return [*enumerate(sorted({junction[partner] for _, junction in mine}), 1)]


def _grown(
    old: ZipperConfig,
    towers: dict[str, TowerConfig],
    wanted: Sequence[Directed],
    link: LinkConfig | None,
    freeze: bool,
) -> ZipperConfig:
    """The configuration of the new zip: old links keep their names, new junctions come behind."""
    fused, shown = shape({n: t.layers for n, t in towers.items()}, links=wanted)
    first = len(old.junctions)
    names = [
        str(LinkKey(first + n, source, target)) for n, (source, _, target, _) in enumerate(wanted)
    ]
    closed = dataclasses.replace(link or old.link, gate_init=0.0)
    shapes = dict(old.shapes)
    if closed != old.link:
        shapes |= dict.fromkeys(names, closed)
    was = tuple(map(str, old.links)) if freeze else ()
    return dataclasses.replace(
        old,
        towers=towers,
        junctions=(*old.junctions, *fused),
        shows=(*(old.shows or old.junctions), *(shown or ())),
        shapes=shapes,
        frozen_links=tuple(sorted({*old.frozen_links, *was})),
        kept=tuple(sorted({*old.kept, *(old.towers if freeze else ())})),
    )
