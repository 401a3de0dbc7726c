"""Zipper: towers and links, one forward.

The core is one explicit lock-step loop: every tower runs its blocks up to a junction, then the towers exchange, all of them
reading the states from before the exchange (Zipper, arXiv:2405.18669, sec. 3). Input that names a single tower takes the
unimodal path: the bare tower, no projection, no link.
"""

import dataclasses
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from zipper import checkpoint, hub, loss
from zipper.card import card
from zipper.environment import MissingExtra
from zipper.errors import ZipperError
from zipper.files import parse, settle
from zipper.generation import Limits, default_limit, generate
from zipper.link import PAPER_LINK, InputKind, InputProjection, Link, LinkConfig, Memory, block_mask
from zipper.sampling import Sampling, check_seed
from zipper.sequence import Ends, Segment, read_ids
from zipper.tower import Past, PreTrainedModel, Strand, Tower, UnsupportedTower, in_memory

Junction = dict[str, int]
TowerSource = str | Path | PreTrainedModel | Tower

#: What a zip may ask for, in a program as in a file: (least, most) by field. No model lies beyond.
LIMITS = {
    "width": (1, 1 << 20),
    "layers": (1, checkpoint.MOST_LAYERS),
    "vocabulary": (1, 1 << 27),
    "begin": (0, 1 << 27),
    "end": (0, 1 << 27),
    "tokens": (0.0, 1e6),
    "junctions": (1, checkpoint.MOST_LAYERS),
}
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Adapter:
    """Settings of an adapter that a zip can keep: those of peft's LoraConfig that import no module, name no file and leave the base
    as it is. Others that peft knows are refused, and so are those by which an adapter would do nothing."""

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
                f"bias is {self.bias!r}; only 'none' can be kept: an adapter leaves its base as it is, biases too. Leave it out."
            )


class LostTower(ZipperError):
    """A frozen tower of a saved zip is in none of its places. name: the tower's."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class TowerConfig:
    """What a zip knows of one tower.

    source: hub id or folder it came from ("" for an object in memory). relative: that folder as it is seen from the zip's own,
    where it is looked for first, so that both may move together ("" in memory). digest: SHA-256 of what its checkpoint holds, in
    `dtype` (`Tower.pin`). train: it learns in alignment; otherwise it is frozen for ever. tokens: mean tokens of a segment, of use
    only as a ratio between towers: it scales rotary positions in links and caps the length of what is generated (0 = unknown).
    revision: the hub commit it came from. lora: settings of peft's LoraConfig; the base stays frozen, its adapter learns.
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
                f"Its ids {self.begin} and {self.end}, begin and end, are not all below {self.vocabulary}, their number."
            )
        if self.dtype not in DTYPES:
            raise ZipperError(f"dtype is {self.dtype!r}; a tower in a zip is one of {', '.join(DTYPES)}.")
        if self.lora is not None:
            adapter = parse(Adapter, self.lora, "lora")
            if adapter.r > self.width:
                raise ZipperError(f"lora: r is {adapter.r}; it must be at most {self.width}, the width of the tower.")
            object.__setattr__(self, "lora", {name: getattr(adapter, name) for name in self.lora})

    @property
    def learns(self) -> bool:
        """Whether anything in this tower changes in training."""
        return self.train or self.lora is not None


@dataclass(frozen=True)
class ZipperConfig:
    """The whole shape of a zip. junctions: for each, {tower: number of its blocks that run before the exchange}. dropped: links
    that are not there ("0:text>speech", see `zipper prune`)."""

    towers: dict[str, TowerConfig]
    junctions: tuple[Junction, ...]
    link: LinkConfig = field(default_factory=LinkConfig)
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        _junctions({name: tower.layers for name, tower in self.towers.items()}, None, self.junctions)
        if foreign := {*self.dropped} - {link_name(*link) for link in self._pairs()}:
            raise ZipperError(f"It drops {sorted(foreign)[0]!a:.80}, which is no link between its towers.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "This is not the configuration of a zip") -> "ZipperConfig":
        """The inverse of `to_dict`. Raises a ZipperError that begins with `where` for keys, types and numbers that do not fit."""
        return parse(cls, data, where)

    def link_names(self) -> list[tuple[int, str, str]]:
        """(junction, source, target) of every link, in an order that is not that of the dicts."""
        there = (link for link in self._pairs() if link_name(*link) not in self.dropped)
        return sorted(there, key=lambda link: (link[0], link[2], link[1]))

    def _pairs(self) -> Iterator[tuple[int, str, str]]:
        yield from ((n, s, t) for n, junction in enumerate(self.junctions) for t in junction for s in junction if s != t)


def link_name(junction: int, source: str, target: str) -> str:
    """What the link at a junction by which `target` reads `source` is called."""
    return f"{junction}:{source}>{target}"


@dataclass(frozen=True)
class State:
    """What a zipped model has read so far; a value that `Zipper.step` takes and returns.

    towers: those the plan names, read or written. outputs: those that will produce. past: self-attention caches. read: every
    token read. memory: keys and values per link. unread: source states that a link has not turned into keys and values yet; it
    does so in one batch when its target next reads.
    """

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    past: dict[str, Past] = field(default_factory=dict)
    read: dict[str, Strand] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    unread: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def compact(self, tower: str) -> "State":
        """Close the gaps that rows which ended early left in a tower's self-attention cache."""
        if tower in self.past:
            self.past[tower].compact()
        return self

    def select(self, rows: Tensor) -> "State":
        """Keep, reorder or repeat rows of the batch; `rows` are indices."""
        for past in self.past.values():
            past.select(rows)
        return dataclasses.replace(
            self,
            read={name: Strand(*(getattr(s, f.name)[rows] for f in dataclasses.fields(Strand))) for name, s in self.read.items()},
            memory={name: Memory(m.keys[rows], m.values[rows]) for name, m in self.memory.items()},
            unread={name: tuple(h[rows] for h in parts) for name, parts in self.unread.items()},
        )


class Zipper(nn.Module):
    """Towers zipped by links. Build it with `from_towers`, load it with `from_pretrained`.

    attention: how links attend where nothing is cached, as in training: "sdpa", or "flex" for FlexAttention, which passes over the
    blocks of packed rows in which nothing is visible. "flex" is for CUDA; on a CPU it has no backward (not measured on CUDA).
    """

    attention: Literal["sdpa", "flex"] = "sdpa"

    def __init__(self, towers: Mapping[str, nn.Module], config: ZipperConfig) -> None:
        super().__init__()
        self.config = config
        self.towers = nn.ModuleDict(towers)
        self.inputs, self.links = _inputs(config), _links(config)
        for name, tower in config.towers.items():
            self.towers[name].requires_grad_(tower.train)
            if tower.lora is not None:
                adapted = {name: dataclasses.replace(tower, lora=self._tower(name).adapt(tower.lora))}
                self.config = dataclasses.replace(self.config, towers=self.config.towers | adapted)
            elif any(".lora_" in parameter for parameter, _ in towers[name].named_parameters()):
                raise ZipperError(f"The model given as {name!r} has an adapter. Name its settings in lora, or load its base anew.")
        self.train(False)

    @classmethod
    def from_towers(
        cls,
        towers: Mapping[str, TowerSource],
        every: Mapping[str, int] | None = None,
        junctions: Sequence[Mapping[str, int]] | None = None,
        train: Sequence[str] = (),
        preset: Literal["default", "paper"] = "default",
        link: LinkConfig | None = None,
        input_projection: InputKind | Mapping[str, InputKind] | None = None,
        ends: Mapping[str, tuple[int, int]] | None = None,
        tokens: Mapping[str, float] | None = None,
        lora: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> "Zipper":
        """Zip towers that were pre-trained alone.

        towers: name -> hub id, folder or loaded causal LM. every: name -> interval i; the n-th junction stands after block n * i
        of each tower (paper, sec. 3: k = n i_A, l = n i_B), never after the last block. junctions: the same as an explicit list of
        {name: blocks before the exchange}. train: the towers that learn, all others are frozen. preset: "default" is what trained
        best, "paper" follows the paper to the letter (link and input projection). ends: name -> (begin id, end id) where the
        tower's own configuration does not say. tokens: name -> mean tokens per segment. lora: name -> settings of peft's LoraConfig
        (r, lora_alpha, target_modules ...): the frozen tower's adapter learns; a tower given as an object is adapted in place.
        seed: of the new parameters.

        Raises ZipperError: unknown names, junctions that do not fit, a tower that cannot be run part way.
        """
        if preset not in ("default", "paper"):
            raise ZipperError(f"preset={preset!r} is unknown; it must be 'default' or 'paper'.")
        check_seed(seed)
        for option, given in {"every": every, "ends": ends, "tokens": tokens, "train": train, "lora": lora}.items():
            _known(option, given or (), towers)
        if both := sorted({*train} & {*(lora or ())}):
            raise ZipperError(f"train and lora both name {both}. An adapter stands on a frozen tower: name it in one of them.")
        for name, settings in (lora or {}).items():
            kept = [field.name for field in dataclasses.fields(Adapter)]
            if unknown := sorted({*settings} - {*kept}):
                raise ZipperError(f"lora[{name!r}] sets {unknown}; a zip can keep {', '.join(kept)}.")
        if isinstance(input_projection, Mapping):
            _known("input_projection", input_projection, towers)
        loaded = {name: source if isinstance(source, Tower) else Tower.load(source) for name, source in towers.items()}
        for name, tower in loaded.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ZipperError(f"{name!r} cannot name a tower; use lower-case letters, digits and _, e.g. 'speech'.")
            if name in dir(nn.ModuleDict()):
                raise ZipperError(f"{name!r} cannot name a tower, torch uses that word; take another, e.g. '{name}_tower'.")
            tower.check()
        kind = input_projection or ("paper" if preset == "paper" else "residual")
        if unknown := [one for one in ([kind] if isinstance(kind, str) else kind.values()) if one not in get_args(InputKind)]:
            raise ZipperError(f"Input projection {unknown[0]!r} is unknown; it must be 'residual', 'paper' or 'none'.")
        configs = {}
        for name, tower in loaded.items():
            begin, end = (ends or {}).get(name, (tower.begin, tower.end))
            if begin is None or end is None:
                raise ZipperError(
                    f"The tower {name!r} has no begin and end token in its configuration. Pass ends={{{name!r}: (begin, end)}}."
                )
            for token in (begin, end):
                if not 0 <= token < tower.vocabulary:
                    raise ZipperError(
                        f"The token {token} that begins or ends {name!r} is outside its vocabulary of {tower.vocabulary}."
                    )
            source = towers[name]
            if name in train:
                tower.check_saving()
            try:
                configs[name] = TowerConfig(
                    source=hub.absolute(source) if isinstance(source, str | Path) else "",
                    width=tower.width,
                    layers=tower.layers,
                    vocabulary=tower.vocabulary,
                    begin=begin,
                    end=end,
                    train=name in train,
                    input_projection=kind if isinstance(kind, str) else kind.get(name, "none"),
                    tokens=(tokens or {}).get(name, 0.0),
                    dtype=_dtype(tower),
                    digest=tower.pin(),
                    revision=tower.revision,
                    lora=dict(lora[name]) if lora and name in lora else None,
                )
            except ZipperError as error:
                raise ZipperError(f"The tower {name!r}: {error}") from error
        config = ZipperConfig(
            configs,
            _junctions({name: tower.layers for name, tower in loaded.items()}, every, junctions),
            link or (PAPER_LINK if preset == "paper" else LinkConfig()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(loaded, config)
        model.place({name: tower.device for name, tower in loaded.items()})
        return model

    def train(self, mode: bool = True) -> "Zipper":
        """Training mode for links, projections and towers that learn; frozen towers stay in eval mode for ever."""
        super().train(mode)
        for name, tower in self.config.towers.items():
            if not tower.learns:
                self.towers[name].eval()
        return self

    def forward(
        self, strands: Mapping[str, Strand], outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch length vocabulary"]]:
        """Logits of every tower in `outputs` (default: all that take part); softmax over its own vocabulary each (sec. 3)."""
        return {name: self.unembed(name, h) for name, h in self.hidden(strands, outputs).items()}

    def hidden(
        self, strands: Mapping[str, Strand], outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch length width"]]:
        """States after the last block, before the head. Towers not in `outputs` run no further than their last junction."""
        names = tuple(strands)
        wanted = names if outputs is None else tuple(outputs)
        for name in (*names, *wanted):
            self._part(name)
        if absent := sorted({*wanted} - {*names}):
            raise ZipperError(f"The outputs {absent} read nothing here; the input has tokens for {sorted(names)} only.")
        return self._advance(strands, State(names, wanted), cached=False)[0]

    def taps(self, strands: Mapping[str, Strand]) -> list[dict[str, Float[Tensor, "batch length width"]]]:
        """States of every tower just before each exchange, one dict per junction; for looking at."""
        found: list[dict[str, Tensor]] = []
        self._advance(strands, State(tuple(strands), ()), cached=False, taps=found)
        return found

    @torch.no_grad()
    def calibrate(self, strands: Mapping[str, Strand]) -> None:
        """Give every link typical states of its source to whiten (`Link.calibrate`); the model's function does not change."""
        taps = self.taps(strands)
        for n, source, target in self.config.link_names():
            self.link(n, source, target).calibrate(taps[n][source][strands[source].document >= 0])
        self.config = dataclasses.replace(self.config, link=dataclasses.replace(self.config.link, whiten=True))

    def start(self, towers: Sequence[str], outputs: Sequence[str]) -> State:
        """An empty state for a plan that reads and writes `towers`; only `outputs` will be asked for logits."""
        for name in (*towers, *outputs):
            self._part(name)
        return State(tuple(towers), tuple(outputs))

    def step(self, strands: Mapping[str, Strand], state: State) -> tuple[dict[str, Float[Tensor, "batch length width"]], State]:
        """Read more tokens, from any device: states after the last block of each tower in the plan's outputs, and the new state.

        All rows follow the plan: where it names several towers, every row takes the multi-modal path, also one that has read a
        single tower so far. The self-attention caches in `state` are extended in place, so a state is stepped from once.
        """
        if foreign := sorted(strands.keys() - {*state.towers}):
            raise ZipperError(f"The towers {foreign} are not in this plan; start one that names them, beside {list(state.towers)}.")
        return self._advance(strands, state, cached=True)

    def unembed(self, tower: str, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of one tower's states."""
        return self._tower(tower).unembed(hidden)

    def nll(
        self, tower: str, hidden: Float[Tensor, "batch length width"], targets: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """-log p(target) in nats, by the softmax of the tower's own vocabulary (sec. 3)."""
        vocabulary = self._tower(tower).vocabulary
        flat = loss.nll(lambda h: self.unembed(tower, h[None])[0], hidden.flatten(0, 1), targets.flatten(), vocabulary)
        return flat.view_as(targets)

    def ends(self) -> dict[str, Ends]:
        """Begin and end ids of every tower."""
        return {name: Ends(tower.begin, tower.end) for name, tower in self.config.towers.items()}

    def limit(self, tower: str, given: Mapping[str, int], wanted: int | None = None) -> int:
        """The cap on a produced segment, from the tokens that each tower has had so far; `wanted` where the tower can still read
        so many. Raises ZipperError where it can read no more at all."""
        room = self._room(tower) - given.get(tower, 0) - 2
        if room < 1:
            raise ZipperError(f"{tower!r} has read {given[tower]} of its {self._room(tower)} tokens: no room for another segment.")
        if wanted is not None:
            return min(wanted, room)
        usual = {name: (count, self.config.towers[name].tokens) for name, count in given.items() if name != tower}
        return default_limit(self.config.towers[tower].tokens, usual, room)

    def check(self, segments: Sequence[Segment]) -> None:
        """Raises ZipperError for a sample this model cannot read: unknown tower, contents that `read_ids` refuses, more than its
        positions."""
        read: dict[str, int] = {}
        for segment in segments:
            self._part(segment.tower)
            known = self.config.towers[segment.tower]
            ids = read_ids(segment.content, segment.tower, Ends(known.begin, known.end), known.vocabulary)
            read[segment.tower] = read.get(segment.tower, 0) + len(ids) + 2
        for tower, count in read.items():
            if count > self._room(tower):
                raise ZipperError(
                    f"{tower!r} would read {count} tokens, begin and end of segments included, but it can read at most "
                    f"{self._room(tower)}. Give it shorter pieces."
                )

    def place(self, devices: Mapping[str, torch.device | str]) -> None:
        """Put towers on devices, {name: device}; what reads into a tower (its links and input projection) goes with it."""
        _known("place", devices, self.config.towers)
        for name, device in devices.items():
            parts = [self.towers[name], *(link for n, link in self.links.items() if n.endswith(f">{name}"))]
            for part in (*parts, *(self.inputs[n] for n in self.inputs if n == name)):
                part.to(device)

    def tower(self, name: str) -> PreTrainedModel:
        """The bare tower as the transformers model it is."""
        return self._tower(name).model

    def link(self, junction: int, source: str, target: str) -> Link:
        """The link by which `target` reads `source` at a junction."""
        link = self.links[link_name(junction, source, target)]
        assert isinstance(link, Link)
        return link

    def generate(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[Segment]:
        """Read `segments`, then produce one segment per name in `outputs`, in that order (sec. 3.2).

        segments: contents are ids without begin and end. limits: {tower: most tokens per segment}; default from the input.
        For batches see `zipper.generation.generate`.
        """
        return generate(self, [segments], outputs, sampling or Sampling(), limits)[0]

    def save_pretrained(self, folder: str | Path, include: Sequence[str] = (), record: Mapping[str, Any] | None = None) -> None:
        """Save the zip: links, projections and trained towers; frozen towers are named and pinned by their hash.

        include: frozen towers to copy into the folder as well; one that lies in it already stays. record: anything JSON to keep
        beside it (how it was trained). The folder appears whole and such as can be loaded, or not at all; an older zip in its place
        is replaced.
        """
        with checkpoint.whole(Path(folder), self.prove) as temporary:
            self.write(temporary, {*include, *self.inside(Path(folder))}, record)
            (temporary / checkpoint.CARD).write_text(card(temporary, self.sizes()), encoding="utf-8")

    def prove(self, folder: Path) -> None:
        """Raises the ZipperError in which loading what `write` wrote would end; takes no memory for tensors."""
        path = folder / checkpoint.CONFIG
        config = ZipperConfig.from_dict(checkpoint.examine(folder)[0], f"{path} is not the configuration of a zip")
        with torch.device("meta"):
            born = nn.ModuleDict({"inputs": _inputs(config), "links": _links(config)}).state_dict()
        checkpoint.compare(folder, born | {n: p for n, p in self.new_parameters().items() if n.startswith("towers.")})

    @staticmethod
    def repin(folder: Path, towers: Mapping[str, str | Path]) -> None:
        """Write into a saved zip where frozen towers lie now, {name: folder or hub id}; everything else stays as it is."""
        saved = checkpoint.read_json(folder / checkpoint.CONFIG)
        with checkpoint.whole(folder, checkpoint.examine) as temporary:
            for name, source in towers.items():
                saved["config"]["towers"][name] |= {"source": hub.absolute(source), "relative": _relative(str(source), temporary)}
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            checkpoint.write_json(temporary / checkpoint.CONFIG, saved)

    def inside(self, folder: Path) -> list[str]:
        """Frozen towers that lie in a folder, as those do that were included in the zip there."""
        frozen = {name: Path(t.source) for name, t in self.config.towers.items() if t.source and not t.train}
        return [name for name, place in frozen.items() if place.is_dir() and place.resolve().is_relative_to(folder.resolve())]

    def write(self, folder: Path, include: Collection[str] = (), record: Mapping[str, Any] | None = None) -> None:
        """The files of `save_pretrained`, written into an existing folder."""
        _known("include", include, self.config.towers)
        inside = {name: self._tower(name) for name, t in self.config.towers.items() if t.train or name in include}
        towers = {}
        for name, tower in self.config.towers.items():
            if name in inside:
                towers[name] = dataclasses.replace(
                    tower, source=f"towers/{name}", relative="", revision="", digest=inside[name].pin(), dtype=_dtype(inside[name])
                )
                inside[name].save(folder / "towers" / name)
            elif tower.source:
                towers[name] = dataclasses.replace(
                    tower, source=hub.absolute(tower.source), relative=_relative(tower.source, folder)
                )
            else:
                raise ZipperError(
                    f"The frozen tower {name!r} was given as an object, so the zip has no place to name for it. "
                    f"Pass include=[{name!r}], or build the zip from a folder or hub id."
                )
        config = dataclasses.replace(self.config, towers=towers)
        checkpoint.save(folder, config.to_dict(), self.new_parameters(), dict(record or {}))

    def push_to_hub(self, repo: str, private: bool = False, revision: str | None = None, include: Sequence[str] = ()) -> str:
        """Save the zip and upload it to a repository of the hub, in one commit; returns the commit's URL. See `zipper.hub.push`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "zip", include)
            return hub.push(Path(folder) / "zip", repo, private, revision)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        towers: Mapping[str, TowerSource] | None = None,
        dtype: torch.dtype | None = None,
        allow_mismatch: bool = False,
        revision: str | None = None,
    ) -> "Zipper":
        """Load a zip. source: its folder or a repository of the hub. towers: where a base lies now, for those that moved; a model
        that is in memory is shared, not copied, and keeps its dtype. dtype: of all other parts; default as saved. revision: a
        branch, tag or commit of the repository.

        Raises ZipperError when a file is damaged or a base is not the one that the zip was trained on (hashes are compared);
        allow_mismatch makes the second a warning.
        """
        local = hub.fetch(source, revision)
        folder = local.folder
        path = folder / checkpoint.CONFIG
        config = ZipperConfig.from_dict(checkpoint.load(folder, local.root)[0], f"{path} is not the configuration of a zip")
        _known("towers", towers or (), config.towers)
        loaded, found = {}, {}
        for name, pin in config.towers.items():
            where, kept = (towers or {}).get(name) or base(folder, name, pin), getattr(torch, pin.dtype)
            commit = pin.revision or None if where == pin.source else None
            try:
                loaded[name] = (
                    where if isinstance(where, Tower) else Tower.load(where, *(() if _in_memory(where) else (kept, commit)))
                )
            except UnsupportedTower:
                raise
            except ZipperError as error:
                raise ZipperError(f"The tower {name!r} of {folder} could not be loaded. {error} {_elsewhere(name)}") from error
            digest = loaded[name].pin(kept)
            if digest != pin.digest:
                mismatch = (
                    f"The tower {name!r} from {where if isinstance(where, str | Path) else 'memory'} is not the one this zip was "
                    f"trained on: its content hash is {digest[:16]}, the zip wants {pin.digest[:16]}."
                )
                if not allow_mismatch:
                    raise ZipperError(
                        f"{mismatch} {_elsewhere(name)} Or allow the mismatch (allow_mismatch=True, --allow-mismatch)."
                    )
                warnings.warn(f"{mismatch} It was allowed: what the links say may be noise to it.", stacklevel=2)
            sizes = [(getattr(pin, size), getattr(loaded[name], size)) for size in checkpoint.SIZES]
            if any(said != real for said, real in sizes):
                raise ZipperError(
                    f"{path} says of the tower {name!r} that {' and '.join(checkpoint.SIZES)} are {[said for said, _ in sizes]}; "
                    f"of that from {where if isinstance(where, str | Path) else 'memory'} they are {[real for _, real in sizes]}."
                )
            found[name] = dataclasses.replace(pin, digest=digest)
            if isinstance(where, str | Path):
                found[name] = dataclasses.replace(
                    found[name], source=hub.absolute(where), relative="", revision=loaded[name].revision
                )
        shared = [name for name, given in (towers or {}).items() if _in_memory(given)]
        return cls.assemble(folder, loaded, dataclasses.replace(config, towers=found), dtype, shared)

    @classmethod
    def assemble(
        cls,
        folder: Path,
        towers: Mapping[str, nn.Module],
        config: ZipperConfig,
        dtype: torch.dtype | None,
        shared: Sequence[str] = (),
    ) -> "Zipper":
        """Towers with what a saved zip adds to them. dtype: as in `from_pretrained`, but not of the
        towers in `shared`."""
        path = folder / checkpoint.CONFIG
        try:
            for name, pin in config.towers.items():
                tower = towers[name]
                # Not below: peft makes no adapter without memory; one of this rank takes little.
                if pin.lora is not None and isinstance(tower, Tower):
                    tower.adapt(pin.lora)
            with torch.device("meta"):  # no memory, no random numbers for what the file will bring, or will not
                model = cls(towers, config)
        except MissingExtra:
            raise
        except ZipperError as error:
            raise ZipperError(f"{path} does not fit: {error}") from error
        model.load_state_dict(checkpoint.tensors(folder, model.new_parameters()), strict=False, assign=True)
        model.place({name: next(tower.parameters()).device for name, tower in towers.items()})
        if dtype is not None:
            for part in (model.inputs, model.links, *(tower for name, tower in model.towers.items() if name not in shared)):
                _cast(part, dtype)
        return model

    def cast(self, dtype: torch.dtype) -> None:
        """Turn all parameters into `dtype`, in place; not the buffers, for transformers keeps rotary frequencies in float32."""
        _cast(self, dtype)

    def pin(self, tower: str, dtype: torch.dtype) -> str:
        """Content hash of a tower as it is now, in `dtype`; a frozen one keeps the `digest` of its configuration."""
        return self._tower(tower).pin(dtype)

    def sizes(self) -> dict[str, int]:
        """{tower: number of its parameters}, adapters left out."""
        towers = self.towers.items()
        return {name: sum(p.numel() for n, p in tower.named_parameters() if ".lora_" not in n) for name, tower in towers}

    def new_parameters(self) -> dict[str, Tensor]:
        """Links, input projections and adapters by name: what zipping added."""
        held = self.state_dict(keep_vars=True)
        return {name: p for name, p in held.items() if not name.startswith("towers.") or ".lora_" in name}

    def _part(self, name: str) -> nn.Module:
        if name not in self.towers:
            raise ZipperError(f"This model has no tower {name!r}; it has {sorted(self.towers)}.")
        return self.towers[name]

    def _tower(self, name: str) -> Tower:
        tower = self._part(name)
        assert isinstance(tower, Tower)
        return tower

    def _room(self, name: str) -> int:
        """Positions a tower was made for."""
        tower: Any = self._part(name)
        return int(tower.room)

    def _advance(
        self, strands: Mapping[str, Strand], state: State, cached: bool, taps: list[dict[str, Tensor]] | None = None
    ) -> tuple[dict[str, Tensor], State]:
        """The lock-step loop. Towers that are not in `strands` do not run; what they said before is in `state`."""
        towers = {name: self._tower(name) for name in strands}
        strands = {name: strand.to(towers[name].device) for name, strand in strands.items()}
        past = {name: state.past.get(name) or towers[name].new_past() for name in strands} if cached else {}
        read = {**state.read, **{n: _append(state.read.get(n), s) for n, s in strands.items()}}
        masks = {
            (source, target): mask
            for target in strands
            for source in read
            if source != target and (mask := visible(strands[target], read[source].to(towers[target].device))).any()
        }
        flex = self.attention == "flex" and not cached
        blocks = {pair: block_mask(mask) for pair, mask in masks.items()} if flex else {}
        state = dataclasses.replace(
            state, read=read, past={**state.past, **past}, memory=dict(state.memory), unread=dict(state.unread)
        )

        hidden, passes, done = {}, {}, {}
        for name, strand in strands.items():
            h = towers[name].embed(strand, past.get(name))
            if name in self.inputs and len(state.towers) > 1:
                fused = torch.ones_like(strand.ids, dtype=torch.bool) if cached else _shared(name, strands)
                h = torch.where(fused[..., None], self.inputs[name](h), h)
            hidden[name], passes[name], done[name] = h, towers[name].start(strand, h, past.get(name)), 0
        live = {n for n, _, _ in self.config.link_names()}  # a junction without links is none
        for n, junction in enumerate(self.config.junctions if len(state.towers) > 1 else ()):
            for name in (name for name in junction if name in strands and n in live):
                hidden[name] = towers[name].run(hidden[name], range(done[name], junction[name]), passes[name])
                done[name] = junction[name]
            if taps is not None:
                taps.append(hidden)
            hidden = self._exchange(n, hidden, strands, state, masks, blocks)
        for name in [name for name in strands if name in state.outputs]:
            hidden[name] = towers[name].run(hidden[name], range(done[name], towers[name].layers), passes[name])
        return {name: h for name, h in hidden.items() if name in state.outputs}, state

    def _exchange(
        self,
        n: int,
        hidden: dict[str, Tensor],
        strands: Mapping[str, Strand],
        state: State,
        masks: Mapping[tuple[str, str], Bool[Tensor, "batch target source"]],
        blocks: Mapping[tuple[str, str], BlockMask],
    ) -> dict[str, Tensor]:
        """One junction: every target reads the states that its sources had before it; the new dict is made from the old one.

        Several sources add up. A pair in which nothing is visible is skipped, which is exact: it would add 0 everywhere.
        """
        new = dict(hidden)
        for target in self.config.junctions[n]:
            for source in sorted(self.config.junctions[n]):  # the same sum to the last bit whatever the order of the dict
                if source == target:
                    continue
                name = link_name(n, source, target)
                if name in self.config.dropped:
                    continue
                if source in strands and target in state.towers:
                    state.unread[name] = (*state.unread.get(name, ()), hidden[source])
                if (source, target) in masks:
                    link = self.link(n, source, target)
                    state.memory[name] = _read(link, state.read[source], state.memory.get(name), state.unread.pop(name, ()))
                    strand = strands[target]
                    seen = masks[source, target], strand.position, blocks.get((source, target))
                    new[target] = new[target] + link(hidden[target], state.memory[name], *seen)
        return new


def _inputs(config: ZipperConfig) -> nn.ModuleDict:
    towers = sorted(config.towers.items()) if len(config.towers) > 1 else []
    kinds = {name: (tower.width, tower.input_projection) for name, tower in towers if tower.input_projection != "none"}
    return nn.ModuleDict({name: InputProjection(*kind) for name, kind in kinds.items()})


def _links(config: ZipperConfig) -> nn.ModuleDict:
    links = nn.ModuleDict()
    for n, source, target in config.link_names():
        a, b = config.towers[target], config.towers[source]
        scale = b.tokens / a.tokens if a.tokens and b.tokens else 1.0
        links[link_name(n, source, target)] = Link(a.width, b.width, config.link, scale)
    return links


def visible(target: Strand, source: Strand) -> Bool[Tensor, "batch target source"]:
    """The one mask rule (sec. 3.1): source.time < target.time and same document. Padding (document -1) sees and shows nothing."""
    same = (target.document[:, :, None] == source.document[:, None, :]) & (source.document >= 0)[:, None, :]
    return same & (source.time[:, None, :] < target.time[:, :, None])


def _shared(name: str, strands: Mapping[str, Strand]) -> Bool[Tensor, "batch length"]:
    """Which tokens belong to a document that other towers read too; the others take the unimodal path."""
    mine = strands[name].document
    shared = torch.zeros_like(mine, dtype=torch.bool)
    for other, strand in strands.items():
        if other != name:
            shared |= (mine[:, :, None] == strand.document.to(mine.device)[:, None, :]).any(-1)
    return shared


def _append(before: Strand | None, new: Strand) -> Strand:
    if before is None:
        return new
    fields = (f.name for f in dataclasses.fields(Strand))
    return Strand(*(torch.cat([getattr(before, name), getattr(new, name)], dim=1) for name in fields))


def _read(link: Link, read: Strand, memory: Memory | None, unread: tuple[Tensor, ...]) -> Memory:
    """A link's memory, extended by the source states it had not read yet."""
    if unread:
        states = torch.cat(unread, dim=1)
        fresh = link.read(states, read.position[:, read.position.shape[1] - states.shape[1] :])
        memory = fresh if memory is None else Memory(*(torch.cat(pair, dim=2) for pair in zip(memory, fresh, strict=True)))
    assert memory is not None
    return memory


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _in_memory(source: TowerSource) -> bool:
    return isinstance(source, Tower) or in_memory(source)


def _dtype(tower: Tower) -> str:
    return str(next(tower.parameters()).dtype).removeprefix("torch.")


def _relative(source: str, folder: Path) -> str:
    """The folder of a tower as it is seen from another folder; "" for a hub id, and where there is no way from there."""
    place = hub.as_folder(source)
    try:
        return "" if place is None else Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return ""


def base(folder: Path, name: str, pin: TowerConfig) -> str | Path:
    """Where a tower of the zip in a folder lies now. Raises a LostTower that says what to do where it is in none of its places."""
    if pin.source == f"towers/{name}":
        return folder / pin.source
    place = hub.as_folder(pin.source)
    if place is None:
        return pin.source
    places = [Path(os.path.normpath(folder.resolve() / pin.relative))] if pin.relative else []
    places += [place] if place not in places else []
    for found in places:
        if (found / "config.json").is_file():
            return found
    looked = "".join(f"no model lies in {found}, and " for found in places[:-1])
    what = "has no config.json" if place.is_dir() else "does not exist"
    raise LostTower(f"The frozen tower {name!r} of {folder} was not found: {looked}{place} {what}. {_elsewhere(name)}", name)


def _elsewhere(name: str) -> str:
    return f"Say where the right one lies now: --tower {name}=PATH, in Python towers={{{name!r}: PATH}}."


def _known(option: str, given: Collection[str], towers: Mapping[str, Any]) -> None:
    for name in given:
        if name not in towers:
            raise ZipperError(f"{option} names the tower {name!r}; this model has {sorted(towers)}.")


def _junctions(
    layers: Mapping[str, int], every: Mapping[str, int] | None, explicit: Sequence[Mapping[str, int]] | None
) -> tuple[Junction, ...]:
    """Junctions from intervals or an explicit list, checked: at least two towers, rising, inside the blocks."""
    if explicit is not None and every is not None:
        raise ZipperError("Give either every=... or junctions=..., not both.")
    if explicit is None:
        intervals = {name: (every or {}).get(name, 1) for name in layers}
        for name, interval in intervals.items():
            if interval < 1:
                raise ZipperError(f"every[{name!r}] is {interval}; an interval is a number of blocks, at least 1.")
        most = max(layers.values())
        paired = [{x: n * i for x, i in intervals.items() if n * i < layers[x]} for n in range(1, most)]
        explicit = [junction for junction in paired if len(junction) > 1]
        if not explicit and len(layers) > 1:
            raise ZipperError(f"every={intervals} gives no junction inside towers of {dict(layers)} blocks. Use smaller intervals.")
    before = dict.fromkeys(layers, 0)
    for junction in explicit:
        if len(junction) < 2:
            raise ZipperError(f"The junction {dict(junction)} names fewer than two towers.")
        _known("junctions", junction, layers)
        for name, layer in junction.items():
            if not before[name] < layer < layers[name]:
                raise ZipperError(
                    f"The junction {dict(junction)} stands after block {layer} of {name!r}; it must come after block "
                    f"{before[name]} and before block {layers[name]}, the last."
                )
            before[name] = layer
    return tuple(dict(junction) for junction in explicit)
