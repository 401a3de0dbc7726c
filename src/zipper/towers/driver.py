"""The two ways to run a Hugging Face causal LM part way: what comes before its blocks, what each is
called with, what comes after.

This file is the only one that knows how such models are built, and it knows no families of them.
`Attributes` goes by names and signatures, as most models are alike. `Recorded` lets the model's own
forward say it, with stubs in the place of the blocks. Neither is sure to be right: `tower`
compares.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zipper import environment
from zipper.errors import UnsupportedTower as UnsupportedTower
from zipper.errors import ZipperError
from zipper.saving.checkpoint import PreTrainedModel as PreTrainedModel

# Names of the parts around the blocks in Hugging Face's models. A part under another name leaves
# the model to `Recorded`.
LEARNED_POSITIONS = ("wpe", "embed_positions")
EMBEDDING_NORMS = ("word_embeddings_layernorm", "embed_norm", "embedding_norm")
SUM_NORMS = ("layernorm_embedding",)  # of token embedding and learned position together
EMBEDDING_DROPOUTS = ("drop", "emb_dropout", "embd_dropout", "embed_dropout", "embedding_dropout")
EMBEDDING_SCALES = (
    "embedding_multiplier",
    "embedding_scale",
)  # numbers; most models scale inside the embedding module
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f")
LAYER_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings", "use_cache")
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def refusal(what: str, todo: str = "Use another model.") -> UnsupportedTower:
    """Says what is wrong and what to do; where torch or transformers is newer than any that was
    tried, not the model is blamed."""
    return UnsupportedTower(f"{what} {environment.moved() or todo}")


FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Arguments of a block after the state: in order, by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]
Answer = Callable[[int, Tensor, Call], Any]


@final
@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward are called with beside the hidden states: for each, in order
    and by name."""

    calls: tuple[Call, ...]


@final
@dataclass(frozen=True)
class Reading:
    """A strand, positions 0 in padding, and all slots that its blocks see: those of the past, then
    its own."""

    ids: Int[Tensor, "batch length"]
    position: Int[Tensor, "batch length"]
    document: Int[Tensor, "batch slots"]
    slot_position: Int[Tensor, "batch slots"]
    cache: Any

    @property
    def valid(self) -> Bool[Tensor, "batch slots"]:
        """Which slots are no padding."""
        return self.document >= 0

    @property
    def plain(self) -> bool:
        """Whether each row is one document whose positions step with its slots: then slots are as
        good as positions."""
        far = torch.iinfo(self.slot_position.dtype).max
        shift = self.slot_position - torch.arange(
            self.slot_position.shape[1], device=self.slot_position.device
        )
        # The least of a row's values is not below its greatest: all are equal, or there are none.
        same = [
            x.masked_fill(~self.valid, far).amin(1) >= x.masked_fill(~self.valid, -far).amax(1)
            for x in (self.document, shift)
        ]
        return bool(torch.stack(same).all())

    @property
    def by_slots(self) -> bool:
        """Whether every token's position is the number of its slot."""
        slot = torch.arange(self.slot_position.shape[1], device=self.slot_position.device)
        return bool((self.slot_position == slot)[self.valid].all())


class _Enough(Exception):
    """Ends a dry pass that has said what was asked of it."""


class Way(ABC):
    """How one model is run part way, beside its blocks.

    takes: the names of what the model's forward takes. cache_argument: that by which it takes a
    cache.
    """

    offset = 0  # what the model's own positions begin with
    told = True  # whether it is told positions; else it counts them by itself

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path
        self.config = model.config.get_text_config()
        self.kinds = tuple(getattr(self.config, "layer_types", None) or ["all"] * len(self.blocks))
        self.takes = tuple(inspect.signature(model.forward).parameters)
        self.cache_argument = ""

    @property
    def blocks(self) -> Any:
        """The model's decoder layers, in order."""
        return self.model.get_submodule(self.path)

    @abstractmethod
    def embed(self, reading: Reading) -> Float[Tensor, "batch length width"]:
        """Everything before the first block."""

    @abstractmethod
    def start(self, reading: Reading, h: Float[Tensor, "batch length width"]) -> Pass:
        """What each block is called with."""

    @abstractmethod
    def unembed(
        self, h: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Everything after the last block."""

    def masks(self, reading: Reading, h: Tensor) -> dict[str, Tensor]:
        """By kind of block, the masks of packed rows and of rows with gaps as separate rows have
        them: windows count positions."""
        config, document, position = self.config, reading.document, reading.slot_position
        if unknown := {*self.kinds} - {*LAYER_TYPES, "all"}:
            raise refusal(f"{type(self.model).__name__} has blocks of type {sorted(unknown)}.")
        slot = torch.arange(document.shape[1], device=document.device)
        reader = slice(document.shape[1] - h.shape[1], None)
        allowed = (document[:, reader, None] == document[:, None, :]) & reading.valid[:, None, :]
        allowed &= slot[None, None, :] <= slot[None, reader, None]
        made = {}
        for kind in {*self.kinds}:
            mask = allowed
            if kind == "sliding_attention" or (
                kind == "all" and getattr(config, "sliding_window", None)
            ):
                mask = mask & (
                    position[:, reader, None] - position[:, None, :] < config.sliding_window
                )
            if kind == "chunked_attention" or (
                kind == "all" and getattr(config, "attention_chunk_size", None)
            ):
                chunk = position // config.attention_chunk_size
                mask = mask & (chunk[:, reader, None] == chunk[:, None, :])
            if config._attn_implementation == "sdpa":
                made[kind] = mask[:, None]
            elif config._attn_implementation == "eager":
                made[kind] = torch.where(mask, 0.0, torch.finfo(h.dtype).min).to(h.dtype)[:, None]
            else:
                raise ZipperError(
                    f"{type(self.model).__name__} attends by '{config._attn_implementation}'; "
                    "packed rows and rows with padding inside need 'sdpa' or 'eager'. Call "
                    "model.set_attn_implementation('sdpa') first."
                )
        return made

    def _few(self) -> Int[Tensor, "1 4"]:
        """Ids that no model takes for padding."""
        padding = getattr(self.config, "pad_token_id", None)
        id = 0 if padding is None else (padding + 1) % self.config.vocab_size
        return torch.full((1, 4), id, device=next(self.model.parameters()).device)

    def _cache_arguments(self) -> tuple[str, tuple[str, ...]]:
        """By which name the model's forward takes a cache, and by which each block is then given
        it.

        Releases of transformers name it differently, and a block another way than its model, so no
        name stands here: a cache is given to one argument after the other, until it is seen to
        arrive in every block.
        """
        from transformers import DynamicCache

        found: list[str] = []

        def note(index: int, h: Tensor, call: Call) -> Any:
            block = self.blocks[index]
            names = list(inspect.signature(block.forward).parameters)[1:]
            arguments = {**dict(zip(names, call[0], strict=False)), **call[1]}
            arrived = [name for name, value in arguments.items() if _holds(value, cache)]
            if len(arrived) != 1:
                raise _Enough
            found.extend(arrived)
            return block(h, *call[0], **call[1])

        ids, (_, *arguments) = (
            self._few(),
            inspect.signature(self.model.forward).parameters.values(),
        )
        named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        # Those whose name or type speaks of a cache first: most models are done after one pass.
        for argument in sorted(named, key=lambda argument: "cache" not in str(argument).lower()):
            cache = DynamicCache()
            found.clear()
            try:
                self._dry(note, ids, {"use_cache": True, argument.name: cache})
            except FAILURES:
                continue
            if len(found) == len(self.blocks):
                return argument.name, tuple(found)
        raise self._refusal("no cache of keys and values given to its forward reaches its blocks")

    def _dry(self, answer: Answer, ids: Tensor, given: dict[str, Any]) -> Any:
        """Output of the model's forward with stubs for blocks that return what `answer` says; None
        where that was _Enough."""
        *path, last = self.path.split(".")
        skeleton = owner = _shallow(self.model)
        for name in path:
            owner._modules[name] = owner = _shallow(owner._modules[name])
        owner._modules[last] = nn.ModuleList(
            _Stub(block, index, answer) for index, block in enumerate(self.blocks)
        )
        try:
            return skeleton(
                ids, **{name: value for name, value in given.items() if name in self.takes}
            )
        except _Enough:
            return None

    def _refusal(self, reason: str) -> UnsupportedTower:
        return refusal(f"{type(self.model).__name__} cannot be a tower: {reason}.")


@final
class Attributes(Way):
    """By attribute names and signatures: everything around the blocks is done here, as most models
    do it."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        super().__init__(model, path)
        if unknown := {*self.kinds} - {*LAYER_TYPES, "all"}:
            raise refusal(f"{type(model).__name__} has blocks of type {sorted(unknown)}.")
        self.cache_argument, self._cached_as = self._cache_arguments()
        self._accepts = tuple(
            _layer_arguments(type(model).__name__, block, cache)
            for block, cache in zip(self.blocks, self._cached_as, strict=True)
        )

    @property
    def body(self) -> Any:
        """The module that owns the blocks, the embeddings and the final norm."""
        return self.model.get_submodule(self.path.rpartition(".")[0])

    def embed(self, reading: Reading) -> Float[Tensor, "batch length width"]:
        """Token embedding, its scale and norm, learned positions, dropout where it is a module."""
        body = self.body
        h = self.model.get_input_embeddings()(reading.ids)
        if scale := _first(body, EMBEDDING_SCALES):
            h = h * scale
        if project := _first(body, ("project_in",)):
            h = project(h)
        if norm := _first(body, EMBEDDING_NORMS):
            h = norm(h)
        if table := _first(body, LEARNED_POSITIONS):
            h = h + _learned_positions(table, reading)
        if norm := _first(body, SUM_NORMS):
            h = norm(h)
        if dropout := _first(body, EMBEDDING_DROPOUTS):
            h = dropout(h)
        return h

    def start(self, reading: Reading, h: Float[Tensor, "batch length width"]) -> Pass:
        """Masks and rotary positions by kind of block."""
        from transformers.masking_utils import create_masks_for_generate

        kinds, cache = {*self.kinds}, reading.cache
        if reading.plain:
            # Always a padding mask, never positions: without a mask transformers takes positions
            # that do not step by 1 for a packed row. Where every slot is valid it drops the mask
            # itself: the kernel is the bare model's.
            made = create_masks_for_generate(
                self.config, h, reading.valid, cache, position_ids=None
            )
            masks = {kind: made[kind] if isinstance(made, dict) else made for kind in kinds}
        else:
            masks = self.masks(reading, h)
        rotary = {kind: self._rotary(kind, h, reading.position) for kind in kinds}
        shared = {"position_ids": reading.position, "use_cache": cache is not None}
        calls = []
        for kind, names, cached_as in zip(self.kinds, self._accepts, self._cached_as, strict=True):
            given = shared | {"attention_mask": masks[kind], "position_embeddings": rotary[kind]}
            calls.append(((), {name: given[name] for name in names} | {cached_as: cache}))
        return Pass(tuple(calls))

    def unembed(
        self, h: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Final norm, head, and the scale or soft-cap of the logits."""
        if norm := _first(self.body, FINAL_NORMS):
            h = norm(h)
        if project := _first(self.body, ("project_out",)):
            h = project(h)
        head: Any = self.model.get_output_embeddings()
        logits = head(h)
        if (scale := _first(self.model, ("logit_scale",))) is not None:
            logits = logits * scale
        if (divisor := _first(self.config, ("logits_scaling",))) is not None:
            logits = logits / divisor
        if (cap := _first(self.config, ("final_logit_softcapping",))) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _rotary(self, kind: str, h: Tensor, position: Tensor) -> Any:
        rotary = _first(self.body, ("rotary_emb",))
        if rotary is None:
            return None
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary(h, position, kind) if by_type else rotary(h, position)


@final
class Recorded(Way):
    """By dry passes of the model's own forward, in which stubs take the place of the blocks.

    What is before and after the blocks is the model's own code, and each block is given what that
    code gives it. A dry pass
    runs on a skeleton made for it: copies of the few modules on the way to the list of blocks, with
    all else shared.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        from transformers import Cache, EncoderDecoderCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        super().__init__(model, path)
        # What each block returns: a tuple of so many, or 0 for the state itself.
        self._forms: list[int] = []
        layers, width = len(self.blocks), self.config.hidden_size
        ids, first = self._few(), getattr(self.config, "pad_token_id", None)

        def learn(index: int, h: Tensor, call: Call) -> Any:
            if index != len(self._forms):
                raise self._refusal("its forward does not run its blocks once each, in order")
            if h.shape != (*ids.shape, width):
                raise self._refusal(
                    f"the state between its blocks has the shape {tuple(h.shape)} for "
                    f"{ids.shape[1]} tokens"
                )
            output = self.blocks[index](h, *call[0], **call[1])
            self._forms.append(len(output) if isinstance(output, tuple) else 0)
            return output

        output = self._dry(learn, ids, {"use_cache": True})
        if len(self._forms) != layers:
            raise self._refusal(f"its forward runs {len(self._forms)} of its {layers} blocks")
        cache = next((value for value in output.values() if isinstance(value, Cache)), None)
        if cache is None:
            raise self._refusal("it keeps no keys and values of what it has read")
        kept = (
            cache.self_attention_cache.layers
            if isinstance(cache, EncoderDecoderCache)
            else cache.layers
        )
        if other := {
            type(layer).__name__
            for layer in kept
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        }:
            raise self._refusal(
                "of what it has read it keeps more than keys and values "
                f"({', '.join(sorted(other))})"
            )
        self.cache_argument, _ = self._cache_arguments()
        self.told = "position_ids" in self.takes
        if first is not None and self.told:
            bare = self._first(ids, {})
            for start in (first + 1, 0):
                if torch.equal(
                    bare,
                    self._first(
                        ids,
                        {"position_ids": torch.arange(start, start + 4, device=ids.device)[None]},
                    ),
                ):
                    self.offset = start

    def embed(self, reading: Reading) -> Float[Tensor, "batch length width"]:
        """The state that the first block is given."""
        return self._first(reading.ids, self._given(reading))

    def start(self, reading: Reading, h: Float[Tensor, "batch length width"]) -> Pass:
        """What each block is given beside the state."""
        calls: list[Call] = []
        state = None

        def note(index: int, given: Tensor, call: Call) -> Any:
            nonlocal state
            if index != len(calls) or (calls and given is not state):
                raise self._refusal("its forward does something between its blocks")
            state = given
            calls.append(call)
            if index == len(self.blocks) - 1:
                raise _Enough
            return self._returned(index, given)

        self._dry(note, reading.ids, self._given(reading))
        if not reading.plain:
            masks = self.masks(reading, h)
            calls = [
                self._masked(index, call, masks[self.kinds[index]])
                for index, call in enumerate(calls)
            ]
        return Pass(tuple(calls))

    def unembed(
        self, h: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """What the model makes of the state after its last block; what it reads here means
        nothing."""

        def answer(index: int, given: Tensor, call: Call) -> Any:
            return self._returned(index, h if index == len(self.blocks) - 1 else given)

        logits: Tensor = self._dry(
            answer, h.new_zeros(h.shape[:2], dtype=torch.long), {"use_cache": False}
        ).logits
        return logits

    def _given(self, reading: Reading) -> dict[str, Any]:
        """Arguments of the model's forward. Without padding it is called as simply as possible: it
        counts by itself."""
        given = {self.cache_argument: reading.cache, "use_cache": reading.cache is not None}
        if not (reading.valid.all() and reading.by_slots):
            given |= {
                "attention_mask": reading.valid.long(),
                "position_ids": reading.position + self.offset,
            }
        return given

    def _first(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        """The state that the first block is given."""
        found = []

        def note(index: int, h: Tensor, call: Call) -> Any:
            found.append(h)
            raise _Enough

        self._dry(note, ids, given)
        return found[0]

    def _returned(self, index: int, h: Tensor) -> Any:
        """A state in the form in which this block returns one."""
        if not self._forms[index]:
            return h
        return h, *[None] * (self._forms[index] - 1)

    def _masked(self, index: int, call: Call, mask: Tensor) -> Call:
        """A block's call with another mask."""
        given, named = call
        names = list(inspect.signature(self.blocks[index].forward).parameters)[1 : 1 + len(given)]
        if "attention_mask" in names:
            place = names.index("attention_mask")
            return (*given[:place], mask, *given[place + 1 :]), named
        if "attention_mask" not in named:
            raise self._refusal("its blocks take no attention mask")
        return given, named | {"attention_mask": mask}


@final
class _Stub(nn.Module):
    """Stands in a skeleton where a block stands in the model, and has its attributes."""

    def __init__(self, block: nn.Module, index: int, answer: Answer) -> None:
        super().__init__()
        self.block, self.index, self.answer = block, index, answer
        self.training = block.training

    def forward(self, *given: Any, **named: Any) -> Any:
        """What `answer` says to this state and the other arguments."""
        state = (
            given[0]
            if given
            else named.pop(next(iter(inspect.signature(self.block.forward).parameters)))
        )
        return self.answer(self.index, state, (given[1:], named))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _shallow(module: Any) -> Any:
    """A copy of this module alone: parameters and sub-modules are shared, which ones it has is its
    own."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _first(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of these attributes that is there and not None."""
    return next(
        (found for name in names if (found := getattr(owner, name, None)) is not None), None
    )


def block_lists(model: PreTrainedModel, layers: int) -> list[str]:
    """Names of the outermost lists of as many modules as the model has blocks: its blocks, maybe an
    encoder's."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == layers and not inside:
            found.append(name)
    return found


def _holds(value: Any, cache: Any) -> bool:
    """Whether an argument is this cache, or the pair of caches of a model that could also have an
    encoder."""
    from transformers import EncoderDecoderCache

    return value is cache or (
        isinstance(value, EncoderDecoderCache) and value.self_attention_cache is cache
    )


def _layer_arguments(name: str, block: nn.Module, cache: str) -> tuple[str, ...]:
    """Which of LAYER_ARGUMENTS a block takes beside the state and its cache."""
    # The first one is the hidden states.
    _, *parameters = inspect.signature(block.forward).parameters.values()
    takes = tuple(p.name for p in parameters if p.name in LAYER_ARGUMENTS)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in (*takes, cache)]:
        raise refusal(
            f"{name}'s blocks want {', '.join(missing)}, which zipper does not know how to give."
        )
    if "attention_mask" not in takes:
        raise refusal(f"{name}'s blocks take no attention mask.", "Give an attention model.")
    return takes


def _learned_positions(table: Any, reading: Reading) -> Tensor:
    position = reading.position
    takes = inspect.signature(table.forward).parameters
    if "position_ids" not in takes:
        return table(position)
    given = {"input_ids": reading.ids, "input_ids_shape": position.shape, "position_ids": position}
    given["attention_mask"] = reading.valid[:, -position.shape[1] :].long()
    found: Tensor = table(**{name: value for name, value in given.items() if name in takes})
    return found.view(*position.shape, -1)
