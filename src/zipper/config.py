"""Configuration: the shape of a zip as plain data, what that shape allows, and the order in which
it runs.

Nothing here holds a tensor. Links are named by `LinkKey`; `Route` is the one place that walks the
schedule of a zip.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.junctions import Junction, check_junctions, known, named
from zipper.link import InputKind, LinkConfig
from zipper.saving.files import MOST_LAYERS, parse, settle
from zipper.strand import Ends, Segment, read_ids

#: What a zip may ask for, in a program as in a file: (least, most) by field. No model lies beyond.
LIMITS = {
    "width": (1, 1 << 20),
    "layers": (1, MOST_LAYERS),
    "vocabulary": (1, 1 << 27),
    "begin": (0, 1 << 27),
    "end": (0, 1 << 27),
    "tokens": (0.0, 1e6),
    "junctions": (0, MOST_LAYERS),
    "shows": (0, MOST_LAYERS),
}
DTYPES = ("float32", "float16", "bfloat16", "float64")


class LinkKey(NamedTuple):
    """Which link: at which junction, from which tower, into which."""

    junction: int
    source: str
    target: str

    def __str__(self) -> str:
        """What the link is called in files, and among the modules of a model: "0:text>speech"."""
        return f"{self.junction}:{self.source}>{self.target}"

    @classmethod
    def of(cls, name: str) -> "LinkKey":
        """The link of a name; the inverse of `str`."""
        junction, _, pair = name.partition(":")
        source, _, target = pair.partition(">")
        return cls(int(junction), source, target)


@dataclass(frozen=True)
class Adapter:
    """Settings of an adapter that a zip can keep: those of peft's LoraConfig that import no module,
    name no file and leave the base as it is. Others that peft knows are refused, and so are those
    by which an adapter would do nothing.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        settle(self, {"r": (1, 1 << 20), "lora_alpha": (1e-6, 1e6), "lora_dropout": (0.0, 0.999)})
        if self.bias != "none":
            raise ZipperError(
                f"bias is {self.bias!r}; only 'none' can be kept: an adapter leaves its base as it "
                "is, biases too. Leave it out."
            )


@dataclass(frozen=True)
class TowerConfig:
    """What a zip knows of one tower.

    source: hub id or folder it came from ("" for an object in memory).
    relative: that folder as it is seen from the zip's own, where it is looked for first, so that
    both may move together ("" in memory).
    revision: the hub commit it came from.
    digest: SHA-256 of what its checkpoint holds, in `dtype` (`Tower.pin`).
    train: it learns in alignment; otherwise it is frozen for ever.
    lora: settings of peft's LoraConfig; the base stays frozen, its adapter learns.
    tokens: mean tokens of a segment, of use only as a ratio between towers: it scales rotary
    positions in links and caps the length of what is generated (0 = unknown).
    """

    source: str
    width: int
    layers: int
    vocabulary: int
    begin: int
    end: int
    train: bool = False
    input_projection: InputKind = "residual"
    tokens: float = 0.0
    dtype: str = "float32"
    digest: str = ""
    revision: str = ""
    lora: dict[str, Any] | None = None
    relative: str = ""

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        if max(self.begin, self.end) >= self.vocabulary:
            raise ZipperError(
                f"Its ids {self.begin} and {self.end}, begin and end, are not all below "
                f"{self.vocabulary}, their number."
            )
        if self.dtype not in DTYPES:
            raise ZipperError(
                f"dtype is {self.dtype!r}; a tower in a zip is one of {', '.join(DTYPES)}."
            )
        if self.lora is not None:
            adapter = parse(Adapter, self.lora, "lora")
            if adapter.r > self.width:
                raise ZipperError(
                    f"lora: r is {adapter.r}; it must be at most {self.width}, the width of the "
                    "tower."
                )
            object.__setattr__(self, "lora", {name: getattr(adapter, name) for name in self.lora})

    @property
    def learns(self) -> bool:
        """Whether anything in this tower changes in training."""
        return self.train or self.lora is not None

    @property
    def ends(self) -> Ends:
        """The ids that begin and end a segment."""
        return Ends(self.begin, self.end)


def usual_rate(source: TowerConfig, target: TowerConfig) -> float:
    """Tokens of one tower per token of another, by their usual numbers; 1 where these are
    unknown."""
    return source.tokens / target.tokens if source.tokens and target.tokens else 1.0


@dataclass(frozen=True)
class ZipperConfig:
    """The whole shape of a zip.

    junctions: for each, {tower that is fused there: number of its blocks that run before}.
    shows: for each junction, {tower that is read there: number of its blocks that run before it is
        shown}; None = the towers of the junction, each where it is fused (the paper).
    dropped: names of links that are not there ("0:text>speech", see `zipper prune`).
    shapes: links that look otherwise than `link`, by name (see `link_of`).
    frozen_links: names of links that no longer learn.
    kept: towers whose input projection and adapter no longer learn.
    company: {tower: (partners, ...)} for towers that have several input projections, one for the
        company of these partners and one for that of others (see `inputs`); those of a composed
        zip have, so that each pair is what it was.

    chooses: towers among which heads of the zip choose what comes next; none: it has no such heads.

    A state is shown before it is fused. Any links that close no circle will do: a state may not
    depend on itself.
    """

    towers: dict[str, TowerConfig]
    junctions: tuple[Junction, ...]
    link: LinkConfig = field(default_factory=LinkConfig)
    dropped: tuple[str, ...] = ()
    shows: tuple[Junction, ...] | None = None
    shapes: dict[str, LinkConfig] = field(default_factory=dict)
    frozen_links: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    company: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    chooses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        known("chooses", self.chooses, self.towers)
        known("kept", self.kept, self.towers)
        self._check_company()
        layers = {name: tower.layers for name, tower in self.towers.items()}
        check_junctions(layers, self.junctions, self.shows)
        possible = {str(key) for key in self._possible()}
        for does, names in (
            ("drops", self.dropped),
            ("gives a shape to", self.shapes),
            ("freezes", self.frozen_links),
        ):
            if foreign := {*names} - possible:
                raise ZipperError(
                    f"It {does} {sorted(foreign)[0]!a:.80}, which is no link between its towers."
                )
        Route.of(self)  # raises where links close a circle

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "This is not the configuration of a zip"
    ) -> "ZipperConfig":
        """The inverse of `to_dict`. Raises a ZipperError that begins with `where` for keys, types
        and numbers that do not fit."""
        return parse(cls, data, where)

    @cached_property
    def links(self) -> tuple[LinkKey, ...]:
        """Every link, in an order that is not that of the dicts."""
        there = (key for key in self._possible() if str(key) not in self.dropped)
        return tuple(sorted(there, key=lambda key: (key.junction, key.target, key.source)))

    @cached_property
    def inputs(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """By tower the names of its input projections, and for each the towers in whose company
        embeddings go through it. One tower alone has none."""
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        for name, tower in self.towers.items():
            others = tuple(other for other in self.towers if other != name)
            there = others and tower.input_projection != "none"
            if name in self.company:
                parts = self.company[name] if there else ()
                found[name] = {f"{name}:{'+'.join(part)}": part for part in parts}
            else:
                found[name] = {name: others} if there else {}
        return found

    @cached_property
    def route(self) -> "Route":
        """The order in which the towers of this zip run and exchange."""
        return Route.of(self)

    def link_of(self, key: LinkKey) -> LinkConfig:
        """What one link looks like: its own shape where it has one, else that of all links."""
        return self.shapes.get(str(key), self.link)

    def rate(self, key: LinkKey) -> float:
        """Source tokens per target token, by which a link scales rotary positions."""
        usual = usual_rate(self.towers[key.source], self.towers[key.target])
        return self.link_of(key).rate or usual

    def shown(self, key: LinkKey) -> int:
        """Behind how many blocks of its source a link reads it."""
        return (self.shows or self.junctions)[key.junction][key.source]

    def fused(self, key: LinkKey) -> int:
        """Behind how many blocks of its target a link is fused."""
        return self.junctions[key.junction][key.target]

    def _check_company(self) -> None:
        """Raises a ZipperError for company that names other towers, or one twice."""
        known("company", self.company, self.towers)
        for name, parts in self.company.items():
            partners = [*chain.from_iterable(parts)]
            known("company", partners, self.towers)
            if name in partners or len({*partners}) < len(partners) or not all(parts):
                raise ZipperError(
                    f"company of {name!r} is {parts!r}; each of its partners is another tower, and "
                    "named once."
                )

    def _possible(self) -> Iterator[LinkKey]:
        for n, fused in enumerate(self.junctions):
            for target in fused:
                sources = (self.shows or self.junctions)[n]
                yield from (LinkKey(n, source, target) for source in sources if source != target)


class Stop(NamedTuple):
    """Where a tower halts: behind `layer` of its blocks it is shown to the links in `shows`, then
    it reads by those in `reads`."""

    tower: str
    layer: int
    shows: tuple[LinkKey, ...]
    reads: tuple[LinkKey, ...]


@dataclass(frozen=True)
class Route:
    """The schedule of a zip: which towers halt together, and where.

    halts: in order; at each, all its towers are shown before any of them reads. Where every tower
    is shown where it is fused, these are the paper's junctions.
    """

    halts: tuple[tuple[Stop, ...], ...]

    @classmethod
    def of(cls, config: ZipperConfig) -> "Route":
        """The schedule that follows from the links of a configuration. Raises a ZipperError that
        names the links that close a circle."""
        return cls(tuple(_halts(config)))

    def stops(self, tower: str) -> tuple[Stop, ...]:
        """Where one tower halts, in order."""
        return tuple(stop for stop in chain(*self.halts) if stop.tower == tower)

    def last_shown(self, tower: str, towers: Collection[str]) -> int:
        """Behind how many blocks a tower is last read by one of these; -1 where it is not."""
        layers = [
            stop.layer
            for stop in self.stops(tower)
            if any(key.target in towers for key in stop.shows)
        ]
        return max(layers, default=-1)


def _halts(config: ZipperConfig) -> list[tuple[Stop, ...]]:
    """Every tower goes on to its next stop, and reads there once all that it reads was shown."""
    waiting = {name: _stops(config, name) for name in config.towers}
    shown: set[LinkKey] = set()
    halts = []
    while any(waiting.values()):
        here = {name: stops[0] for name, stops in waiting.items() if stops}
        shown.update(*(stop.shows for stop in here.values()))
        ready = {name for name, stop in here.items() if shown.issuperset(stop.reads)}
        if not ready:
            wanted = set(chain(*(stop.reads for stop in here.values())))
            circle = sorted(map(str, wanted - shown))
            raise ZipperError(
                f"The links {', '.join(circle)} close a circle: each reads a state that comes "
                "after the others. Show one of the towers earlier, or fuse one later."
            )
        halt = []
        for name, stop in here.items():
            if name in ready:
                waiting[name] = waiting[name][1:]
                halt.append(stop)
            elif stop.shows:  # it is shown now, and reads later
                waiting[name] = (stop._replace(shows=()), *waiting[name][1:])
                halt.append(stop._replace(reads=()))
        halts.append(tuple(sorted(halt)))
    return halts


def _stops(config: ZipperConfig, tower: str) -> tuple[Stop, ...]:
    """Where a tower is shown or fused, by depth."""
    shows: dict[int, list[LinkKey]] = {}
    reads: dict[int, list[LinkKey]] = {}
    for key in config.links:
        if key.source == tower:
            shows.setdefault(config.shown(key), []).append(key)
        if key.target == tower:
            reads.setdefault(config.fused(key), []).append(key)
    return tuple(
        Stop(tower, layer, tuple(shows.get(layer, ())), tuple(reads.get(layer, ())))
        for layer in sorted({*shows, *reads})
    )


def limit(
    config: ZipperConfig, room: int, tower: str, given: Mapping[str, int], wanted: int | None = None
) -> int:
    """The cap on a produced segment of a tower that was made for `room` positions.

    given: tokens that each tower has had so far. wanted: what the user asks for, granted where the
    tower can still read so many. Raises ZipperError where it can read no more at all.
    """
    left = room - given.get(tower, 0) - 2
    if left < 1:
        raise ZipperError(
            f"{tower!r} has read {given.get(tower, 0)} of its {room} tokens: no room for another "
            "segment."
        )
    if wanted is not None:
        return min(wanted, left)
    usual = {
        name: (count, config.towers[name].tokens) for name, count in given.items() if name != tower
    }
    return default_limit(config.towers[tower].tokens, usual, left)


def default_limit(own: float, given: Mapping[str, tuple[int, float]], room: int) -> int:
    """A cap for a segment from what was given: three times the length that the usual token rates
    make likely, plus 16.

    own: usual tokens of a segment of this tower. given: {tower: (tokens so far, usual tokens of its
    segment)}; 0 = unknown. room: what the tower can still read.
    """
    ratios = [tokens * own / usual if own and usual else tokens for tokens, usual in given.values()]
    # Rounded: where all lengths are given in other units, ratios differ in their last bits.
    likely = round(3 * max(ratios, default=own or 64), 6)
    return max(1, min(math.ceil(likely) + 16, room))


def check(config: ZipperConfig, room: Callable[[str], int], segments: Sequence[Segment]) -> None:
    """Raises ZipperError for a sample that a zip cannot read: unknown tower, contents that
    `read_ids` refuses, more than its positions. room: positions that a tower was made for."""
    read: dict[str, int] = {}
    for segment in segments:
        tower = named(segment.tower, config.towers)
        ids = read_ids(segment.content, segment.tower, tower.ends, tower.vocabulary)
        read[segment.tower] = read.get(segment.tower, 0) + len(ids) + 2
    for name, count in read.items():
        if count > room(name):
            raise ZipperError(
                f"{name!r} would read {count} tokens, begin and end of segments included, but it "
                f"can read at most {room(name)}. Give it shorter pieces."
            )


__getattr__ = names_of(__name__, ("zipper.junctions",))
