"""Composition: zips that share a tower become one; each pair answers as before, to the bit.

Towers are the same where their content hash is. What stands between a shared tower and its
partners is kept for each of them: links by pair, and input projections by company
(`ZipperConfig.company`). What chooses among towers is not kept: it is learnt anew. No parent is
changed, and of its towers those alone are copied that learn in it: all are frozen in the composed
zip, which names and pins those that its parents hold.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zipper.config import LinkKey, TowerConfig, ZipperConfig, usual_rate
from zipper.errors import Mismatch, ZipperError
from zipper.growth import copy_into
from zipper.junctions import known
from zipper.model import Zipper, check_name
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint, hub
from zipper.saving.zips import TowerSource
from zipper.tower import Tower

Names = dict[str, str]


def compose(first: Zipper, second: Zipper, names: Mapping[str, str] | None = None) -> Zipper:
    """Two zips that share a tower, as one.

    names: {tower of the second: its name in the composed zip}; a tower that both have keeps its
    name in the first. Usual lengths (`tokens`) are those of the first, those of the second's other
    towers in proportion to them. Towers are shared with the parents, all of them frozen; links,
    input projections and towers that learnt are copies.

    Raises a ZipperError with the reason: no tower in common, one name for two contents, other begin
    and end, an adapter that the other has not, links of both between the same two towers. A
    Mismatch where a tower holds another content than its parent pinned.
    """
    a, b = _now(first), _now(second)
    shared, named = _named(a, b, names or {})
    for mine, theirs in shared.items():
        _check_shared(first, second, mine, theirs)
    pairs = {(key.source, key.target) for key in a.links}
    for key in b.links:
        if (pair := (named[key.source], named[key.target])) in pairs:
            raise ZipperError(
                f"Both zips link {pair[0]!r} and {pair[1]!r}: what these two would say is neither "
                "what they say in the one nor in the other. Compose zips of other pairs, or prune "
                "these links from one."
            )
    inputs = _company(first, second, shared, named)
    config = _joined(a, b, shared, named, {name: [*parts] for name, parts in inputs.items()})
    towers = {named[name]: held for name, held in _still(second).items()} | _still(first)
    with torch.device("meta"):
        new = Zipper(towers, config)
    new.attention = first.attention
    made = {str(key): first.links[str(key)] for key in a.links}
    made |= {str(_moved(key, a, named)): second.links[str(key)] for key in b.links}
    copy_into(new.links, made)
    parts = dict[str, nn.Module]()
    for name, entrances in config.inputs.items():
        parts |= dict(zip(entrances, inputs[name].values(), strict=True))
    copy_into(new.inputs, parts)
    new._join_towers()
    return new


def compose_pipelines(
    first: Pipeline, second: Pipeline, names: Mapping[str, str] | None = None
) -> Pipeline:
    """`compose` with modalities. Raises a ZipperError where a shared tower was trained with two
    tokenizers or codebooks."""
    shared, named = _named(first.zip.config, second.zip.config, names or {})
    for mine, theirs in shared.items():
        if first.modalities[mine].fingerprint != second.modalities[theirs].fingerprint:
            raise Mismatch(
                f"The tower {mine!r} is the same in both zips, but its modality is not: their "
                "tokenizers or codebooks differ, and so do their ids. Fit one, and train the other "
                "zip with it."
            )
    model = compose(first.zip, second.zip, names)
    others = {named[name]: modality for name, modality in second.modalities.items()}
    return Pipeline(model, others | first.modalities)


def compose_saved(
    first: str | Path,
    second: str | Path,
    names: Mapping[str, str] | None = None,
    towers: Mapping[str, TowerSource] | None = None,
) -> Pipeline:
    """`compose_pipelines` of two saved ones, their shared tower loaded once. towers: where bases
    lie now, by their names in the composed zip."""
    places = [hub.fetch(source).folder / checkpoint.CONFIG for source in (first, second)]
    a, b = (
        ZipperConfig.from_dict(checkpoint.read_json(place)["config"], f"{place} does not fit")
        for place in places
    )
    shared, named = _named(a, b, names or {})
    given = dict(towers or {})
    known("towers", given, dict.fromkeys([*a.towers, *named.values()]))
    own = {name: given[name] for name in a.towers if name in given}
    one = Pipeline.from_pretrained(first, own, dtype=None)
    own = {theirs: given[name] for theirs, name in named.items() if name in given}
    for mine, theirs in shared.items():
        held = one.zip.towers[mine]
        assert isinstance(held, Tower)
        own[theirs] = held
    return compose_pipelines(one, Pipeline.from_pretrained(second, own, dtype=None), names)


def _named(a: ZipperConfig, b: ZipperConfig, names: Mapping[str, str]) -> tuple[Names, Names]:
    """{shared tower in the first: in the second} and {tower of the second: its name}. Raises a
    ZipperError where nothing is shared, and for one name of two contents."""
    known("names", names, b.towers)
    for name in names.values():
        check_name(name)
    shared: Names = {}
    for theirs, pin in b.towers.items():
        same = [mine for mine in a.towers if _content(a.towers[mine]) == _content(pin)]
        free = [mine for mine in same if mine not in shared]
        if free:
            shared[theirs if theirs in free else free[0]] = theirs
    if not shared:
        raise ZipperError(
            f"These zips share no tower: {_told(a)} and {_told(b)}. A tower is shared where both "
            "were trained on the same frozen content (its hash); one that learned in a zip is "
            "another."
        )
    back = {theirs: mine for mine, theirs in shared.items()}
    named = {name: back.get(name) or names.get(name, name) for name in b.towers}
    for theirs, name in named.items():
        if theirs not in back and name in a.towers:
            pins = {"the first": a.towers[name], "the second": b.towers[theirs]}
            trained = [which for which, pin in pins.items() if pin.train]
            why = f"{' and '.join(trained)} trained its own" if trained else "they came so"
            raise ZipperError(
                f"Both zips have a tower {name!r}, of other content ({_told(a, name)} and "
                f"{_told(b, theirs)}): {why}. Give the second's another name (--name "
                f"{theirs}=NAME, in Python names={{{theirs!r}: NAME}})."
            )
    if len({*named.values()}) < len(named):
        raise ZipperError(f"names={dict(names)} gives two towers of the second zip one name.")
    return shared, named


def _content(pin: TowerConfig) -> tuple[str, str]:
    return pin.digest, pin.dtype


def _told(config: ZipperConfig, *towers: str) -> str:
    """Towers with the beginnings of their hashes."""
    chosen = towers or tuple(config.towers)
    return ", ".join(f"{name} {config.towers[name].digest[:12]}" for name in chosen)


def _check_shared(first: Zipper, second: Zipper, mine: str, theirs: str) -> None:
    """Raises a ZipperError where a shared tower is not used alike in both zips."""
    a, b = first.config.towers[mine], second.config.towers[theirs]
    if a.ends != b.ends:
        raise ZipperError(
            f"Segments of the shared tower {mine!r} begin and end with {tuple(a.ends)} in the "
            f"first zip and with {tuple(b.ends)} in the second: what one writes the other cannot "
            "read. Train both with the same ends."
        )
    kinds = {a.input_projection, b.input_projection} - {"none"}
    if len(kinds) > 1:
        raise ZipperError(
            f"The shared tower {mine!r} has input projections of two kinds, {sorted(kinds)}, which "
            "do not add up in the company of both. Train both zips with one kind."
        )
    adapters = [_adapter(model, name) for model, name in ((first, mine), (second, theirs))]
    same = a.lora == b.lora and adapters[0].keys() == adapters[1].keys()
    if not same or not all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0]):
        raise ZipperError(
            f"The shared tower {mine!r} has an adapter that is not the same in both zips: it "
            "answers in one as it does not in the other. Compose zips that left it as it was."
        )
    for model, name in ((first, mine), (second, theirs)):
        pin = model.config.towers[name]
        if model.pin(name, getattr(torch, pin.dtype)) != pin.digest:
            raise Mismatch(
                f"The shared tower {name!r} is no longer what its zip pinned "
                f"({pin.digest[:12]}): it was changed since it was loaded. Load the zip anew."
            )


def _now(model: Zipper) -> ZipperConfig:
    """A parent's configuration, with towers that learn as they are now."""
    pins = {
        name: dataclasses.replace(model.frozen_config(name), train=pin.train)
        for name, pin in model.config.towers.items()
    }
    return dataclasses.replace(model.config, towers=pins)


def _still(model: Zipper) -> dict[str, nn.Module]:
    """The towers of a parent, which goes on learning: those that learn as copies."""
    pins = model.config.towers
    return {n: copy.deepcopy(held) if pins[n].train else held for n, held in model.towers.items()}


def _adapter(model: Zipper, tower: str) -> dict[str, Any]:
    held = model.towers[tower].named_parameters()
    return {name: parameter.detach() for name, parameter in held if ".lora_" in name}


def _company(
    first: Zipper, second: Zipper, shared: Names, named: Names
) -> dict[str, dict[tuple[str, ...], nn.Module]]:
    """Input projections by tower and by partners: those of a shared tower once where both parents
    have the same, in numbers too."""
    found: dict[str, dict[tuple[str, ...], nn.Module]] = {}
    for model, called in ((first, {name: name for name in first.towers}), (second, named)):
        for name, parts in model.config.inputs.items():
            mine = found.setdefault(called[name], {})
            for part, partners in parts.items():
                who = tuple(called[partner] for partner in partners)
                module = model.inputs[part]
                alike = [old for old, held in mine.items() if _same(held, module)]
                taken = {*chain.from_iterable(mine)}
                rest = tuple(partner for partner in who if partner not in taken)
                if alike:
                    mine[(*alike[0], *rest)] = mine.pop(alike[0])
                elif rest == who:
                    mine[who] = module
                else:
                    raise ZipperError(
                        f"Both zips have an input projection of {called[name]!r} for the company "
                        f"of {sorted({*who} & taken)}. Compose zips of other pairs."
                    )
    return found


def _same(one: nn.Module, other: nn.Module) -> bool:
    held = other.state_dict()
    return all(torch.equal(tensor, held[name]) for name, tensor in one.state_dict().items())


def _joined(
    a: ZipperConfig,
    b: ZipperConfig,
    shared: Names,
    named: Names,
    inputs: Mapping[str, Sequence[tuple[str, ...]]],
) -> ZipperConfig:
    """The configuration of both: junctions of the second come behind those of the first."""
    towers = {name: dataclasses.replace(pin, train=False) for name, pin in a.towers.items()}
    mine, theirs = next(iter(shared.items()))
    own, other = a.towers[mine].tokens, b.towers[theirs].tokens
    for name, pin in b.towers.items():
        if name not in shared.values():
            usual = pin.tokens * own / other if own and other and own != other else pin.tokens
            towers[named[name]] = dataclasses.replace(pin, train=False, tokens=usual)
    for name, there in shared.items():
        if towers[name].input_projection == "none":
            kind = b.towers[there].input_projection
            towers[name] = dataclasses.replace(towers[name], input_projection=kind)
    moved = {
        str(key): str(_moved(key, a, named)) for key in dataclasses.replace(b, dropped=()).links
    }
    shapes = dict(a.shapes)
    for key in b.links:
        source, target = towers[named[key.source]], towers[named[key.target]]
        was = b.rate(key)
        same = was == usual_rate(source, target)
        fitted = dataclasses.replace(b.link_of(key), rate=None if same else was)
        if fitted != a.link:
            shapes[moved[str(key)]] = fitted
    everyone = len(towers) - 1
    company = {
        name: tuple(parts) for name, parts in inputs.items() if parts and len(parts[0]) < everyone
    }
    return ZipperConfig(
        towers,
        junctions=(*a.junctions, *(_called(junction, named) for junction in b.junctions)),
        link=a.link,
        dropped=(*a.dropped, *(moved[name] for name in b.dropped)),
        shows=(
            *(a.shows or a.junctions),
            *(_called(junction, named) for junction in b.shows or b.junctions),
        ),
        shapes=shapes,
        frozen_links=(*a.frozen_links, *(moved[name] for name in b.frozen_links)),
        kept=tuple(sorted({*a.kept, *(named[name] for name in b.kept)})),
        company=company,
    )


def _called(junction: Mapping[str, int], named: Names) -> dict[str, int]:
    return {named[name]: depth for name, depth in junction.items()}


def _moved(key: LinkKey, a: ZipperConfig, named: Names) -> LinkKey:
    """What a link of the second zip is called in the composed one."""
    return LinkKey(len(a.junctions) + key.junction, named[key.source], named[key.target])
