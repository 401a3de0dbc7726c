"""Configuration: the shape of a zip as plain data, what that shape allows, and the order in which
it runs.

Nothing here holds a tensor. Links are named by `LinkKey`; `Route` is the one place that walks the
schedule of a zip.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from zipper.errors import ZipperError
from zipper.link import InputKind, LinkConfig
from zipper.saving.files import MOST_LAYERS, parse, settle
from zipper.strand import Ends, Segment, read_ids

T = TypeVar("T")

#: {name of a tower: number of its blocks that run before the exchange}.
Junction = dict[str, int]

#: What a zip may ask for, in a program as in a file: (least, most) by field. No model lies beyond.
LIMITS = {
    "width": (1, 1 << 20),
    "layers": (1, MOST_LAYERS),
    "vocabulary": (1, 1 << 27),
    "begin": (0, 1 << 27),
    "end": (0, 1 << 27),
    "tokens": (0.0, 1e6),
    "junctions": (1, MOST_LAYERS),
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
                f"bias is {self.bias!r}; only 'none' can be kept: an adapter leaves its base as "
                "it is, biases too. "
                "Leave it out."
            )


@dataclass(frozen=True)
class TowerConfig:
    """What a zip knows of one tower.

    source: hub id or folder it came from ("" for an object in memory).
    relative: that folder as it is seen from the zip's own, where it is looked for first, so that
    both may move
        together ("" in memory).
    revision: the hub commit it came from.
    digest: SHA-256 of what its checkpoint holds, in `dtype` (`Tower.pin`).
    train: it learns in alignment; otherwise it is frozen for ever.
    lora: settings of peft's LoraConfig; the base stays frozen, its adapter learns.
    tokens: mean tokens of a segment, of use only as a ratio between towers: it scales rotary
    positions in links and
        caps the length of what is generated (0 = unknown).
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


@dataclass(frozen=True)
class ZipperConfig:
    """The whole shape of a zip.

    junctions: for each, {tower: number of its blocks that run before the exchange}.
    dropped: names of links that are not there ("0:text>speech", see `zipper prune`).
    """

    towers: dict[str, TowerConfig]
    junctions: tuple[Junction, ...]
    link: LinkConfig = field(default_factory=LinkConfig)
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        junctions_of(
            {name: tower.layers for name, tower in self.towers.items()}, None, self.junctions
        )
        if foreign := {*self.dropped} - {str(key) for key in self._possible()}:
            raise ZipperError(
                f"It drops {sorted(foreign)[0]!a:.80}, which is no link between its towers."
            )

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
    def route(self) -> "Route":
        """The order in which the towers of this zip run and exchange."""
        return Route.of(self)

    def _possible(self) -> Iterator[LinkKey]:
        for n, junction in enumerate(self.junctions):
            for target in junction:
                yield from (LinkKey(n, source, target) for source in junction if source != target)


class Stop(NamedTuple):
    """Where a tower halts: behind `layer` of its blocks it is read by the links in `shows`, then it
    reads by those in `reads`."""

    tower: str
    layer: int
    shows: tuple[LinkKey, ...]
    reads: tuple[LinkKey, ...]


@dataclass(frozen=True)
class Route:
    """The schedule of a zip. halts: for each exchange the stops of the towers that take part, in an
    order that is not that of the dicts; all of them show their states before any of them reads."""

    halts: tuple[tuple[Stop, ...], ...]

    @classmethod
    def of(cls, config: ZipperConfig) -> "Route":
        """The junctions of a configuration that have links, in their order."""
        halts = []
        for n, junction in enumerate(config.junctions):
            here = [key for key in config.links if key.junction == n]
            stops = [
                Stop(
                    tower,
                    layer,
                    tuple(key for key in here if key.source == tower),
                    tuple(key for key in here if key.target == tower),
                )
                for tower, layer in junction.items()
            ]
            if here:
                halts.append(tuple(stop for stop in stops if stop.shows or stop.reads))
        return cls(tuple(halts))

    def stops(self, tower: str) -> tuple[Stop, ...]:
        """Where one tower halts, in order."""
        return tuple(stop for halt in self.halts for stop in halt if stop.tower == tower)


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
            f"{tower!r} has read {given[tower]} of its {room} tokens: no room for another segment."
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
    return max(1, min(math.ceil(3 * max(ratios, default=own or 64)) + 16, room))


def check(config: ZipperConfig, rooms: Mapping[str, int], segments: Sequence[Segment]) -> None:
    """Raises ZipperError for a sample that a zip cannot read: unknown tower, contents that
    `read_ids` refuses, more than its positions. rooms: positions that each tower was made for."""
    read: dict[str, int] = {}
    for segment in segments:
        tower = named(segment.tower, config.towers)
        ids = read_ids(segment.content, segment.tower, tower.ends, tower.vocabulary)
        read[segment.tower] = read.get(segment.tower, 0) + len(ids) + 2
    for name, count in read.items():
        if count > rooms[name]:
            raise ZipperError(
                f"{name!r} would read {count} tokens, begin and end of segments included, but it "
                "can read at most "
                f"{rooms[name]}. Give it shorter pieces."
            )


def named(name: str, towers: Mapping[str, T]) -> T:
    """The tower of a name, or whatever there is of it. Raises a ZipperError where there is none."""
    if name not in towers:
        raise ZipperError(f"This model has no tower {name!r}; it has {sorted(towers)}.")
    return towers[name]


def known(option: str, given: Collection[str], towers: Mapping[str, Any]) -> None:
    """Raises a ZipperError where an option names a tower that is not there."""
    for name in given:
        if name not in towers:
            raise ZipperError(
                f"{option} names the tower {name!r}; this model has {sorted(towers)}."
            )


def junctions_of(
    layers: Mapping[str, int],
    every: Mapping[str, int] | None,
    explicit: Sequence[Mapping[str, int]] | None,
) -> tuple[Junction, ...]:
    """Junctions from intervals or an explicit list, checked: at least two towers, rising, inside
    the blocks."""
    if explicit is not None and every is not None:
        raise ZipperError("Give either every=... or junctions=..., not both.")
    if explicit is None:
        explicit = _paired(layers, every or {})
    before = dict.fromkeys(layers, 0)
    for junction in explicit:
        if len(junction) < 2:
            raise ZipperError(f"The junction {dict(junction)} names fewer than two towers.")
        known("junctions", junction, layers)
        for name, layer in junction.items():
            if not before[name] < layer < layers[name]:
                raise ZipperError(
                    f"The junction {dict(junction)} stands after block {layer} of {name!r}; it "
                    "must come after block "
                    f"{before[name]} and before block {layers[name]}, the last."
                )
            before[name] = layer
    return tuple(dict(junction) for junction in explicit)


def _paired(layers: Mapping[str, int], every: Mapping[str, int]) -> list[Junction]:
    """The n-th junction after block n * i of each tower (paper, sec. 3: k = n i_A, l = n i_B),
    never after the last."""
    intervals = {name: every.get(name, 1) for name in layers}
    for name, interval in intervals.items():
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
