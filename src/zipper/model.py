"""Zipper: towers and links as one model. Born from towers, run by the lock-step loop, saved and
loaded as a folder.

This file is a facade: what is computed stands in `lockstep`, how is generated in `generation`, what
lies on disk in `saving.zips`.
"""

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zipper import config as configuration
from zipper import loss
from zipper.config import Adapter, LinkKey, TowerConfig, ZipperConfig
from zipper.environment import MissingExtra
from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.generation import Limits, generate
from zipper.junctions import Directed, Shows, by_name, known, named, shape
from zipper.link import PAPER_LINK, Chooser, InputKind, InputProjection, Link, LinkConfig
from zipper.lockstep import Parts, State, Tap, advance
from zipper.sampling import Sampling, check_seed
from zipper.saving import checkpoint, hub, zips
from zipper.saving.card import card
from zipper.saving.files import place
from zipper.saving.zips import TowerSource
from zipper.strand import Ends, Produced, Segment, Strand
from zipper.tower import PreTrainedModel, Tower, precision

Preset = Literal["default", "paper"]
CALIBRATED = 64  # rows at once, of which links are given states


class Zipper(nn.Module):
    """Towers zipped by links. Build it with `from_towers`, load it with `from_pretrained`.

    attention: how links attend where nothing is cached, as in training: "sdpa", or "flex" for
    FlexAttention, which passes over the blocks of packed rows in which nothing is visible. "flex"
    is for CUDA; on a CPU it has no backward (not measured on CUDA).
    """

    attention: Literal["sdpa", "flex"] = "sdpa"

    def __init__(self, towers: Mapping[str, nn.Module], config: ZipperConfig) -> None:
        super().__init__()
        self.config = config
        self.towers = nn.ModuleDict(towers)
        self.inputs, self.links, self.choosers = _inputs(config), _links(config), _choosers(config)
        self.config = self._settled(config)
        self.train(False)

    @classmethod
    def from_towers(
        cls,
        towers: Mapping[str, TowerSource],
        every: Mapping[str, int] | None = None,
        junctions: Sequence[Mapping[str, int]] | None = None,
        train: Sequence[str] = (),
        preset: Preset = "default",
        link: LinkConfig | None = None,
        input_projection: InputKind | Mapping[str, InputKind] | None = None,
        ends: Mapping[str, tuple[int, int]] | None = None,
        tokens: Mapping[str, float] | None = None,
        lora: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        shows: Mapping[str, Shows] | None = None,
        links: Sequence[Directed] | None = None,
    ) -> "Zipper":
        """Zip towers that were pre-trained alone.

        towers: name -> hub id, folder or loaded causal LM.
        every: name -> interval i; the n-th junction stands after block n * i of each tower (paper,
            sec. 3: k = n i_A, l = n i_B), never after the last block.
        junctions: the same as an explicit list of {name: blocks before the exchange}.
        shows: towers that others do not read where they are fused: name -> "before" (the depth of
            the junction before, embeddings at the first), one depth, or a list of one for each
            junction. {"text": 0} shows a frozen LM's embeddings, where its words differ most.
        links: (source, blocks before it is shown, target, blocks before it is fused) of each,
            instead of all of these. Any set without a circle.
        train: the towers that learn, all others are frozen.
        preset: "default" is what trained best, "paper" follows the paper to the letter (link and
            input projection).
        ends: name -> (begin id, end id) where the tower's own configuration does not say.
        tokens: name -> mean tokens per segment.
        lora: name -> settings of peft's LoraConfig (r, lora_alpha, target_modules ...): the frozen
            tower's adapter learns; a tower given as an object is adapted in place.
        seed: of the new parameters.

        Raises ZipperError: unknown names, junctions that do not fit, a tower that cannot be run
        part way.
        """
        if preset not in ("default", "paper"):
            raise ZipperError(f"preset={preset!r} is unknown; it must be 'default' or 'paper'.")
        check_seed(seed)
        by_name("towers", towers, towers)
        if not towers:
            raise ZipperError("No tower was given. Give at least one, {name: model}.")
        known("train", train, towers)
        for option, given in {"every": every, "ends": ends, "tokens": tokens, "lora": lora}.items():
            by_name(option, given or {}, towers)
        _check_adapters(train, lora or {})
        kinds = _input_kinds(input_projection, preset, towers)
        loaded = {name: _loaded(name, source, name in train) for name, source in towers.items()}
        _check_shared(loaded, [*train, *(lora or {})])
        configs = {}
        for name, tower in loaded.items():
            source = towers[name]
            settings = (lora or {}).get(name)
            configs[name] = _tower_config(
                name,
                tower,
                (ends or {}).get(name, (tower.begin, tower.end)),
                source=hub.absolute(source) if isinstance(source, str | Path) else "",
                train=name in train,
                input_projection=kinds[name],
                tokens=(tokens or {}).get(name, 0.0),
                lora=None if settings is None else dict(settings),
            )
        layers = {name: tower.layers for name, tower in loaded.items()}
        fused, shown = shape(layers, every, junctions, shows, links)
        wanted = link or (PAPER_LINK if preset == "paper" else LinkConfig())
        config = ZipperConfig(configs, fused, wanted, shows=shown)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(loaded, config)
        model._join_towers()
        return model

    def learn(
        self, train: Sequence[str] = (), lora: Mapping[str, Mapping[str, Any]] | None = None
    ) -> "Zipper":
        """From now on the towers in `train` learn and all others are frozen as they are, in place;
        what the model computes stays.

        lora: name -> settings of adapters for frozen towers that have none yet, as in
        `from_towers`; those that are there stay, and learn. Links learn as before
        (`ZipperConfig.frozen_links`). Raises a ZipperError for unknown towers, and for one that
        would learn beside its adapter. A frozen tower that another zip shares (`surgery.prune`,
        `compose`, `add`) learns there too.
        """
        lora = lora or {}
        known("train", train, self.config.towers)
        known("lora", lora, self.config.towers)
        adapters = {n: t.lora for n, t in self.config.towers.items() if t.lora}
        adapters |= {name: {**settings} for name, settings in lora.items()}
        _check_adapters(train, adapters)
        for name in train:
            self._tower(name).check_saving()
        towers = {
            name: dataclasses.replace(
                tower if name in train else self.frozen_config(name),
                train=name in train,
                lora=adapters.get(name),
            )
            for name, tower in self.config.towers.items()
        }
        self.config = self._settled(dataclasses.replace(self.config, towers=towers))
        return self.train(self.training)

    def frozen_config(self, name: str) -> TowerConfig:
        """What is to be known of a tower that learns no more: one that has learnt is pinned as it
        is now, and lies nowhere until it is saved."""
        pin = self.config.towers[name]
        if not pin.train:
            return pin
        tower, still = self._tower(name), dataclasses.replace(pin, train=False)
        if tower.pin(precision(pin.dtype)) == pin.digest:
            return still
        return dataclasses.replace(
            still, source="", relative="", revision="", digest=tower.pin(), dtype=tower.dtype
        )

    def train(self, mode: bool = True) -> "Zipper":
        """Training mode for links, projections and towers that learn; frozen towers stay in eval
        mode for ever."""
        super().train(mode)
        for name, tower in self.config.towers.items():
            if not tower.learns:
                self.towers[name].eval()
        return self

    def forward(
        self, strands: Mapping[str, Strand], outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch length vocabulary"]]:
        """Logits of every tower in `outputs` (default: all that take part); softmax over its own
        vocabulary each (sec. 3)."""
        return {name: self.unembed(name, h) for name, h in self.hidden(strands, outputs).items()}

    def hidden(
        self,
        strands: Mapping[str, Strand],
        outputs: Sequence[str] | None = None,
        company: Sequence[str] = (),
    ) -> dict[str, Float[Tensor, "batch length width"]]:
        """States after the last block, before the head. Towers not in `outputs` run no further than
        their last junction. company: the towers of a plan that all documents follow, whether they
        have segments of each or not, as in `step`; else a document is read by the towers it
        has."""
        names = tuple(strands)
        wanted = names if outputs is None else tuple(outputs)
        for name in (*names, *wanted):
            named(name, self.config.towers)
        if absent := sorted({*wanted} - {*names}):
            raise ZipperError(
                f"The outputs {absent} read nothing here; the input has tokens for "
                f"{sorted(names)} only."
            )
        rows = {name: len(strand.ids) for name, strand in strands.items()}
        if len({*rows.values()}) > 1:
            raise ZipperError(
                f"The towers have {rows} rows; each row is one sample of all of them."
            )
        plan = tuple(dict.fromkeys([*names, *company]))
        state = State(plan, wanted)
        return advance(self._parts, strands, state, False, planned=bool(company))[0]

    def taps(self, strands: Mapping[str, Strand]) -> dict[LinkKey, Tap]:
        """What every link between these towers is given: states of both from before the exchange;
        for looking at."""
        found: dict[LinkKey, Tap] = {}
        advance(self._parts, strands, State(tuple(strands), ()), cached=False, taps=found)
        return found

    @torch.no_grad()
    def calibrate(self, strands: Mapping[str, Strand]) -> None:
        """Give every link typical states of its source to whiten (`Link.calibrate`), some rows at
        a time; the model's function does not change."""
        learn = [key for key in self.config.links if str(key) not in self.config.frozen_links]
        linked = chain.from_iterable((key.source, key.target) for key in learn)
        if absent := sorted({*linked} - strands.keys()):
            raise ZipperError(
                f"Links were to be calibrated without tokens of {absent}, which they join. Give "
                "samples of all these towers at once."
            )
        moments: dict[LinkKey, Tensor] = {}
        for rows in torch.arange(len(next(iter(strands.values())).ids)).split(CALIBRATED):
            some = {name: strand.select(rows).narrowed() for name, strand in strands.items()}
            taps = self.taps(some)
            for key in learn:  # those that are frozen stay what they are, to the bit
                read = taps[key].source[some[key.source].document >= 0]
                moments[key] = moments.get(key, 0.0) + self.link(*key).moments(read)
        for key in learn:
            self.link(*key).calibrate(moments[key])
        shapes = {str(key): self.link(*key).config for key in self.config.links}
        whitened = dataclasses.replace(self.config.link, whiten=True)
        own = {
            name: dataclasses.replace(self.config.link_of(LinkKey.of(name)), whiten=shape.whiten)
            for name, shape in shapes.items()
        }
        self.config = dataclasses.replace(
            self.config,
            link=whitened,
            shapes={name: shape for name, shape in own.items() if shape != whitened},
        )

    def choose(self, among: Sequence[str]) -> None:
        """Give the zip heads that choose what comes next among these towers, or none; they are
        new, and what else the zip says does not change."""
        self.config = dataclasses.replace(self.config, chooses=tuple(among))
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten by zeros
            self.choosers = _choosers(self.config)
        self._join_towers()

    def choice(
        self, tower: str, state: Float[Tensor, "*tokens width"]
    ) -> Float[Tensor, "*tokens choices"]:
        """What comes behind the end tokens of segments of a tower, from their states: logits of all
        towers, sorted by name, -inf for those that are not chosen, and at last that it is over.
        Raises a ZipperError for a zip that has no such heads."""
        self.choices(())
        said: Tensor = self.choosers[tower](state).float()
        names = sorted(self.config.towers)
        where = torch.tensor([names.index(n) for n in self.config.chooses] + [len(names)])
        found = said.new_full((*said.shape[:-1], len(names) + 1), -torch.inf)
        return found.index_copy(-1, where.to(said.device), said)

    def choices(self, among: Sequence[str]) -> tuple[str, ...]:
        """The towers of a choice among these, "*" standing for all among which this zip chooses.
        Raises a ZipperError where it does not."""
        chooses = self.config.chooses
        if not chooses or not {*among} <= {*chooses, "*"}:
            raise ZipperError(
                f"A choice among {', '.join(among) or 'towers'} was asked for; "
                + (
                    f"this zip chooses among {', '.join(chooses)}."
                    if chooses
                    else "this zip has "
                    "not learnt to choose. Train it on a task such as 'NAME -> NAME|OTHER'."
                )
            )
        return chooses if "*" in among else tuple(among)

    def start(self, towers: Sequence[str], outputs: Sequence[str]) -> State:
        """An empty state for a plan that reads and writes `towers`; only `outputs` will be asked
        for logits."""
        for name in (*towers, *outputs):
            named(name, self.config.towers)
        return State(tuple(towers), tuple(outputs))

    def step(
        self, strands: Mapping[str, Strand], state: State
    ) -> tuple[dict[str, Float[Tensor, "batch length width"]], State]:
        """Read more tokens, from any device: states after the last block of each tower in the
        plan's outputs, and the new state.

        All rows follow the plan: where it names several towers, every row takes the multi-modal
        path, also one that has read a single tower so far. The self-attention caches in `state` are
        extended in place, so a state is stepped from once.
        """
        if foreign := sorted(strands.keys() - {*state.towers}):
            raise ZipperError(
                f"The towers {foreign} are not in this plan; start one that names them, beside "
                f"{list(state.towers)}."
            )
        return advance(self._parts, strands, state, cached=True)

    def unembed(
        self, tower: str, hidden: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of one tower's states."""
        return self._tower(tower).unembed(hidden)

    def nll(
        self,
        tower: str,
        hidden: Float[Tensor, "batch length width"],
        targets: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length"]:
        """-log p(target) in nats, by the softmax of the tower's own vocabulary (sec. 3)."""
        vocabulary = self._tower(tower).vocabulary
        flat = loss.nll(
            lambda h: self.unembed(tower, h[None])[0],
            hidden.flatten(0, 1),
            targets.flatten(),
            vocabulary,
        )
        return flat.view_as(targets)

    def generate(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[Produced]:
        """Read `segments`, then produce one segment per name in `outputs`, in that order (sec.
        3.2).

        segments: contents are ids without begin and end. limits: {tower: most tokens per segment};
        default from the input. For many inputs see `zipper.generation.generate`, for speed
        `zipper.fast.engine`.
        """
        return generate(self, [segments], outputs, sampling or Sampling(), limits)[0]

    def ends(self) -> dict[str, Ends]:
        """Begin and end ids of every tower."""
        return {name: tower.ends for name, tower in self.config.towers.items()}

    def limit(self, tower: str, given: Mapping[str, int], wanted: int | None = None) -> int:
        """The cap on a produced segment; see `zipper.config.limit`."""
        return configuration.limit(self.config, self._room(tower), tower, given, wanted)

    def check(self, segments: Sequence[Segment]) -> None:
        """Raises ZipperError for a sample this model cannot read; see `zipper.config.check`."""
        configuration.check(self.config, self._room, segments)

    def pads(self, tower: str) -> bool:
        """Whether rows of a tower may have padding on their left."""
        named(tower, self.config.towers)
        held: Any = self.towers[tower]
        return bool(held.rows != "unpadded")

    def tower(self, name: str) -> PreTrainedModel:
        """The bare tower as the transformers model it is."""
        return self._tower(name).model

    def link(self, junction: int, source: str, target: str) -> Link:
        """The link by which `target` reads `source` at a junction."""
        return cast(Link, self.links[str(LinkKey(junction, source, target))])

    def sizes(self) -> dict[str, int]:
        """{tower: number of its parameters}, adapters left out."""
        found = {}
        for name, tower in self.towers.items():
            found[name] = sum(p.numel() for n, p in tower.named_parameters() if ".lora_" not in n)
        return found

    def new_parameters(self) -> dict[str, Tensor]:
        """Links, input projections and adapters by name: what zipping added."""
        held = self.state_dict(keep_vars=True)
        return {
            name: p
            for name, p in held.items()
            if not name.startswith("towers.") or ".lora_" in name
        }

    def pin(self, tower: str, dtype: torch.dtype) -> str:
        """Content hash of a tower as it is now, in `dtype`; a frozen one keeps the `digest` of its
        configuration."""
        return self._tower(tower).pin(dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Turn all parameters into `dtype`, in place; not the buffers, for transformers keeps
        rotary frequencies in float32."""
        _cast(self, dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        include: Sequence[str] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the zip: links, projections and trained towers; frozen towers are named and pinned
        by their hash.

        include: frozen towers to copy into the folder as well; one that lies in it already stays.
        record: anything JSON to keep beside it (how it was trained). The folder appears whole and
        such as can be loaded, or not at all; an older zip in its place is replaced.
        """
        with checkpoint.whole(place(folder), self.prove) as temporary:
            self.write(temporary, {*include, *self.inside(place(folder))}, record)
            (temporary / checkpoint.CARD).write_text(
                card(temporary, self.sizes()), encoding="utf-8"
            )

    def push_to_hub(
        self,
        repo: str,
        private: bool = False,
        revision: str | None = None,
        include: Sequence[str] = (),
    ) -> str:
        """Save the zip and upload it to a repository of the hub, in one commit; returns the
        commit's URL. See `zipper.saving.hub.push`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "zip", include)
            return hub.push(Path(folder) / "zip", repo, private, revision)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        towers: Mapping[str, TowerSource] | None = None,
        dtype: torch.dtype | str | None = None,
        allow_mismatch: bool = False,
        revision: str | None = None,
    ) -> "Zipper":
        """Load a zip.

        source: its folder or a repository of the hub. revision: a branch, tag or commit of that.
        towers: where a base lies now, for those that moved; a model that is in memory is shared,
            not copied, and keeps its dtype.
        dtype: of all other parts; default as saved.

        Raises ZipperError when a file is damaged or a base is not the one that the zip was trained
        on (hashes are compared); allow_mismatch makes the second a warning.
        """
        wanted = precision(dtype)
        opened = zips.open_zip(source, towers or {}, allow_mismatch, revision)
        return cls.assemble(opened.folder, opened.towers, opened.config, wanted, opened.shared)

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
        try:
            for name, pin in config.towers.items():
                tower = towers[name]
                # Not below: peft makes no adapter without memory; one of this rank takes little.
                if pin.lora is not None and isinstance(tower, Tower):
                    tower.adapt(pin.lora)
            # No memory, no random numbers for what the file will bring, or will not.
            with torch.device("meta"):
                model = cls(towers, config)
        except MissingExtra:
            raise
        except ZipperError as error:
            raise ZipperError(f"{folder / checkpoint.CONFIG} does not fit: {error}") from error
        model.load_state_dict(
            checkpoint.tensors(folder, model.new_parameters()), strict=False, assign=True
        )
        model._join_towers()
        if dtype is not None:
            own = [tower for name, tower in model.towers.items() if name not in shared]
            for part in (model.inputs, model.links, model.choosers, *own):
                _cast(part, dtype)
        return model

    def write(
        self, folder: Path, include: Collection[str] = (), record: Mapping[str, Any] | None = None
    ) -> None:
        """The files of `save_pretrained`, written into an existing folder."""
        towers = {name: self._tower(name) for name in self.towers}
        zips.write(folder, self.config, towers, self.new_parameters(), include, record)

    def prove(self, folder: Path) -> None:
        """Raises the ZipperError in which loading what `write` wrote would end; takes no memory for
        tensors."""
        path = folder / checkpoint.CONFIG
        config = ZipperConfig.from_dict(
            checkpoint.examine(folder)[0], f"{path} is not the configuration of a zip"
        )
        with torch.device("meta"):
            parts = {"inputs": _inputs(config), "links": _links(config)}
            born = nn.ModuleDict(parts | {"choosers": _choosers(config)}).state_dict()
        adapters = {
            name: p for name, p in self.new_parameters().items() if name.startswith("towers.")
        }
        checkpoint.compare(folder, born | adapters)

    def inside(self, folder: Path) -> list[str]:
        """Frozen towers that lie in a folder, as those do that were included in the zip there."""
        return zips.included(self.config, folder)

    @property
    def _parts(self) -> Parts:
        shape, flex = self.config, self.attention == "flex"
        return Parts(self.towers, self.inputs, self.links, shape.route, shape.inputs, flex)

    def _tower(self, name: str) -> Tower:
        named(name, self.config.towers)
        tower = self.towers[name]
        assert isinstance(tower, Tower)
        return tower

    def _room(self, name: str) -> int:
        """Positions a tower was made for."""
        named(name, self.config.towers)
        tower: Any = self.towers[name]
        return int(tower.room)

    def _settled(self, config: ZipperConfig) -> ZipperConfig:
        """Adapters, and what learns, as a configuration says; it comes back with the modules of
        its adapters by name. Towers first, then links, input projections and adapters that no
        longer learn."""
        towers = dict(config.towers)
        for name, tower in config.towers.items():  # all that may fail, before anything is changed
            if tower.lora is not None:
                self._tower(name).adapter(tower.lora)
        for name, tower in config.towers.items():
            if tower.lora is not None:
                adapted = self._tower(name).adapt(tower.lora)
                towers[name] = dataclasses.replace(tower, lora=adapted)
            elif any(".lora_" in each for each, _ in self.towers[name].named_parameters()):
                raise ZipperError(
                    f"The model given as {name!r} has an adapter. Name its settings in lora, or "
                    "load its base anew."
                )
        for name, tower in config.towers.items():
            if tower.lora is None:  # an adapter has settled what learns of its tower
                self.towers[name].requires_grad_(tower.train)
        for name in {*config.frozen_links} & {*self.links}:
            self.links[name].requires_grad_(False)
        for name in config.kept:
            for part in config.inputs[name]:
                self.inputs[part].requires_grad_(False)
            if config.towers[name].lora is not None:
                self.towers[name].requires_grad_(False)
        return dataclasses.replace(config, towers=towers)

    def _join_towers(self) -> None:
        """Put what reads into a tower, its links and input projection, on the device of the
        tower."""
        for name, tower in self.towers.items():
            device = next(tower.parameters()).device
            reading = [self.links[str(key)] for key in self.config.links if key.target == name]
            entrances = [self.inputs[part] for part in self.config.inputs[name]]
            for part in (
                *reading,
                *entrances,
                *(self.choosers[n] for n in self.choosers if n == name),
            ):
                part.to(device)


def _inputs(config: ZipperConfig) -> nn.ModuleDict:
    """The input projections of a zip."""
    found = nn.ModuleDict()
    for name, tower in sorted(config.towers.items()):
        for part in config.inputs[name]:
            found[part] = InputProjection(tower.width, tower.input_projection)
    return found


def _choosers(config: ZipperConfig) -> nn.ModuleDict:
    """What chooses behind a segment of each tower, in a zip that does."""
    towers = config.towers.items() if config.chooses else ()
    return nn.ModuleDict({n: Chooser(t.width, len(config.chooses)) for n, t in towers})


def _links(config: ZipperConfig) -> nn.ModuleDict:
    """The links of a zip."""
    found = nn.ModuleDict()
    for key in config.links:
        source, target = config.towers[key.source], config.towers[key.target]
        rate = config.rate(key)
        found[str(key)] = Link(target.width, source.width, config.link_of(key), rate)
    return found


def _loaded(name: str, source: TowerSource, train: bool) -> Tower:
    """A tower that can be run part way, and saved if it learns. Raises a ZipperError where not."""
    tower = source if isinstance(source, Tower) else Tower.load(source)
    check_name(name)
    tower.check()
    if train:
        tower.check_saving()
    return tower


def _check_shared(towers: Mapping[str, Tower], learn: Sequence[str]) -> None:
    """Raises a ZipperError where a model that is several towers is to learn as one of them."""
    one = Counter(id(tower.model) for tower in towers.values())
    if twice := [name for name in learn if one[id(towers[name].model)] > 1]:
        raise ZipperError(
            f"The model given as {twice[0]!r}, which is to learn, is another tower too, and would "
            "learn there. Give each its own (copy.deepcopy)."
        )


def check_name(name: str) -> None:
    """Raises a ZipperError for what cannot name a tower."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ZipperError(
            f"{name!r} cannot name a tower; use lower-case letters, digits and _, e.g. 'speech'."
        )
    if name in dir(nn.ModuleDict()):
        raise ZipperError(
            f"{name!r} cannot name a tower, torch uses that word; take another, e.g. "
            f"'{name}_tower'."
        )


def _check_adapters(train: Sequence[str], lora: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises a ZipperError for adapters that a zip could not keep."""
    if both := sorted({*train} & {*lora}):
        raise ZipperError(
            f"train and lora both name {both}. An adapter stands on a frozen tower: name it in "
            "one of them."
        )
    kept = [field.name for field in dataclasses.fields(Adapter)]
    for name, settings in lora.items():
        if not isinstance(settings, Mapping):
            raise ZipperError(
                f"lora[{name!r}] is {settings!r}; {{name of a setting: ...}} was wanted."
            )
        if unknown := sorted({*settings} - {*kept}):
            raise ZipperError(f"lora[{name!r}] sets {unknown}; a zip can keep {', '.join(kept)}.")


def _input_kinds(
    given: InputKind | Mapping[str, InputKind] | None, preset: Preset, towers: Mapping[str, Any]
) -> dict[str, InputKind]:
    """The input projection of every tower; a mapping leaves out those that have none."""
    if isinstance(given, Mapping):
        known("input_projection", given, towers)
        kinds = {name: given.get(name, "none") for name in towers}
    else:
        kinds = dict.fromkeys(towers, given or ("paper" if preset == "paper" else "residual"))
    if unknown := [kind for kind in kinds.values() if kind not in get_args(InputKind)]:
        raise ZipperError(
            f"Input projection {unknown[0]!r} is unknown; it must be 'residual', 'paper' or 'none'."
        )
    return kinds


def _tower_config(name: str, tower: Tower, ends: Sequence[Any], **settings: Any) -> TowerConfig:
    """What a zip knows of a tower at birth. settings: fields of TowerConfig that the tower itself
    does not tell."""
    if not isinstance(ends, Sequence) or len(ends) != 2:
        raise ZipperError(f"ends[{name!r}] is {ends!r}; (begin id, end id) was wanted.")
    begin, end = ends
    if begin is None or end is None:
        raise ZipperError(
            f"The tower {name!r} has no begin and end token in its configuration. Pass "
            f"ends={{{name!r}: (begin, end)}}."
        )
    for token in (begin, end):
        if not isinstance(token, SupportsIndex) or not 0 <= int(token) < tower.vocabulary:
            raise ZipperError(
                f"The token {token!r} that begins or ends {name!r} is outside its vocabulary of "
                f"{tower.vocabulary}."
            )
    try:
        return TowerConfig(
            width=tower.width,
            layers=tower.layers,
            vocabulary=tower.vocabulary,
            begin=begin,
            end=end,
            dtype=tower.dtype,
            digest=tower.pin(),
            revision=tower.revision,
            **settings,
        )
    except ZipperError as error:
        raise ZipperError(f"The tower {name!r}: {error}") from error


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


__getattr__ = names_of(
    __name__, ("zipper.config", "zipper.lockstep", "zipper.saving.zips", "zipper.strand")
)
