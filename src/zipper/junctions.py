"""Junctions: where towers are fused and where they are shown, from what a user asks for.

Knows towers by their names and numbers of blocks only.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, product
from numbers import Integral
from typing import Any, Literal, TypeVar

from zipper.errors import ZipperError

T = TypeVar("T")

#: {name of a tower: number of its blocks that run before the exchange}.
Junction = dict[str, int]
#: Where a tower is shown: "same" as it is fused, at the depth of the junction "before" (its
#: embeddings at the first), at one depth, or at one for each junction.
Shows = Literal["same", "before"] | int | Sequence[int]
#: (source, blocks before it is shown, target, blocks before it is fused).
Directed = tuple[str, int, str, int]


def shape(
    layers: Mapping[str, int],
    every: Mapping[str, int] | None = None,
    junctions: Sequence[Mapping[str, int]] | None = None,
    shows: Mapping[str, Shows] | None = None,
    links: Sequence[Directed] | None = None,
) -> tuple[tuple[Junction, ...], tuple[Junction, ...] | None]:
    """Where towers are fused, and where they are shown (`ZipperConfig.junctions`, `shows`).

    layers: blocks of each tower. every: intervals between junctions. junctions: the same as a list.
    shows: for towers that are not shown where they are fused. links: each by itself, instead of
    all of these. Raises a ZipperError for what does not fit.
    """
    if [every is not None, junctions is not None, links is not None].count(True) > 1:
        raise ZipperError("Give one of every=..., junctions=... and links=..., not several.")
    by_name("every", every or {}, layers)
    if links is not None:
        if shows:
            raise ZipperError("links=... says where towers are shown; leave shows=... out.")
        for link in _listed("links", links):
            if isinstance(link, str) or not isinstance(link, Sequence) or len(link) != 4:
                raise ZipperError(
                    f"A link is {link!r}; four were wanted: who is shown, behind how many of its "
                    "blocks, who is fused, behind how many of its own."
                )
        fused = tuple({target: depth} for _, _, target, depth in links)
        shown = tuple({source: depth} for source, depth, _, _ in links)
        check_junctions(layers, fused, shown)
        return fused, shown
    for junction in _listed("junctions", junctions or ()):
        by_name("junctions", junction, layers)
    fused = tuple(dict(junction) for junction in junctions or _paired(layers, every or {}))
    check_junctions(layers, fused, None)
    if not shows:
        return fused, None
    by_name("shows", shows, layers)
    shown = tuple(dict(junction) for junction in fused)
    for name, where in shows.items():
        mine = [junction for junction in shown if name in junction]
        for junction, depth in zip(mine, _depths(name, where, mine), strict=True):
            junction[name] = depth
    check_junctions(layers, fused, shown)
    return fused, shown


def _depths(name: str, where: Shows, junctions: Sequence[Junction]) -> list[int]:
    """At which depth a tower is shown at each of its junctions."""
    fused = [junction[name] for junction in junctions]
    if where == "same":
        return fused
    if where == "before":
        return [0, *fused[:-1]]
    depths: Any = [where] * len(fused) if isinstance(where, int) else where
    if isinstance(depths, str) or not isinstance(depths, Sequence) or len(depths) != len(fused):
        raise ZipperError(
            f"shows[{name!r}] is {where!r}; it must be 'same', 'before', one depth, or a list of "
            f"{len(fused)}, one for each junction."
        )
    return [*depths]


def check_junctions(
    layers: Mapping[str, int],
    fused: Sequence[Mapping[str, int]],
    shown: Sequence[Mapping[str, int]] | None,
) -> None:
    """Raises a ZipperError for junctions that do not fit towers of so many blocks.

    Without `shown`, each has at least two towers and they rise; a tower is never fused behind its
    last block. It may be shown there.
    """
    for name, depth in chain.from_iterable(each.items() for each in (*fused, *(shown or ()))):
        _check_whole(f"A depth of {name!r}", depth)
    if shown is not None:
        _check_directed(layers, fused, shown)
        return
    before = dict.fromkeys(layers, 0)
    for junction in fused:
        if len(junction) < 2:
            raise ZipperError(f"The junction {dict(junction)} names fewer than two towers.")
        known("junctions", junction, layers)
        for name, layer in junction.items():
            if not before[name] < layer < layers[name]:
                raise ZipperError(
                    f"The junction {dict(junction)} stands after block {layer} of {name!r}; it "
                    f"must come after block {before[name]} and before block {layers[name]}, the "
                    "last."
                )
            before[name] = layer


def _check_directed(
    layers: Mapping[str, int],
    fused: Sequence[Mapping[str, int]],
    shown: Sequence[Mapping[str, int]],
) -> None:
    if len(shown) != len(fused):
        raise ZipperError(f"There are {len(fused)} junctions, but {len(shown)} are shown.")
    seen: set[Directed] = set()
    for targets, sources in zip(fused, shown, strict=True):
        known("links", [*targets, *sources], layers)
        for name, layer in targets.items():
            if not 0 <= layer < layers[name]:
                raise ZipperError(
                    f"A link is fused behind block {layer} of {name!r}; it must come before block "
                    f"{layers[name]}, the last."
                )
            if not layer:
                warnings.warn(
                    f"A link is fused before the first block of {name!r}: what a frozen tower "
                    "knows at its input is overwritten there (docs/log.md).",
                    stacklevel=5,
                )
        for name, layer in sources.items():
            if not 0 <= layer <= layers[name]:
                raise ZipperError(
                    f"{name!r} is shown behind block {layer}; it has {layers[name]} blocks."
                )
        every = product(sources.items(), targets.items())
        pairs = [(*shown, *fused) for shown, fused in every if shown[0] != fused[0]]
        if not pairs:
            raise ZipperError(f"The junction {dict(targets)} reads no other tower.")
        if twice := [pair for pair in pairs if pair in seen]:
            raise ZipperError(f"The link {twice[0]} is there twice.")
        seen.update(pairs)


def _check_whole(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ZipperError(f"{what} is {value!r}; a whole number of blocks was wanted.")


def _listed(option: str, given: Sequence[T]) -> Sequence[T]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ZipperError(f"{option} is {given!r:.80}; a list was wanted.")
    return given


def _paired(layers: Mapping[str, int], every: Mapping[str, int]) -> list[Junction]:
    """The n-th junction after block n * i of each tower (paper, sec. 3: k = n i_A, l = n i_B),
    never after the last."""
    intervals = {name: every.get(name, 1) for name in layers}
    for name, interval in intervals.items():
        _check_whole(f"every[{name!r}]", interval)
        if interval < 1:
            raise ZipperError(
                f"every[{name!r}] is {interval}; an interval is a number of blocks, at least 1."
            )
    paired = [
        {name: n * i for name, i in intervals.items() if n * i < layers[name]}
        for n in range(1, max(layers.values()))
    ]
    found = [junction for junction in paired if len(junction) > 1]
    if not found and len(layers) > 1:
        raise ZipperError(
            f"every={intervals} gives no junction inside towers of {dict(layers)} blocks. Use "
            "smaller intervals."
        )
    return found


def named(name: str, towers: Mapping[str, T]) -> T:
    """The tower of a name, or whatever there is of it. Raises a ZipperError where there is none."""
    if name not in towers:
        raise ZipperError(f"This model has no tower {name!r}; it has {sorted(towers)}.")
    return towers[name]


def known(option: str, given: Collection[str], towers: Mapping[str, Any]) -> None:
    """Raises a ZipperError where an option names a tower that is not there, or no tower."""
    if isinstance(given, str) or not isinstance(given, Collection):
        raise ZipperError(f"{option} is {given!r:.80}; names of towers were wanted.")
    for name in given:
        if name not in towers:
            raise ZipperError(
                f"{option} names the tower {name!r}; this model has {sorted(towers)}."
            )


def by_name(option: str, given: Mapping[str, Any], towers: Mapping[str, Any]) -> None:
    """The same for an option that says something of towers, by their names."""
    if not isinstance(given, Mapping):
        raise ZipperError(f"{option} is {given!r:.80}; {{name of a tower: ...}} was wanted.")
    known(option, given, towers)
