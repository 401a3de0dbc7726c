"""Towers: pre-trained causal language models that can be run part way.

This file is the only one that knows how Hugging Face models are built. One driver reads attribute names and signatures,
never model families, and `Tower.check` compares it with the model's own forward: what it cannot run bit for bit is
refused, never guessed. It knows nothing of modalities, links or other towers.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from zipper.errors import ZipperError as ZipperError

# Names of the parts around the blocks in Hugging Face's models. A part under another name makes `check` fail.
LEARNED_POSITIONS = ("wpe", "embed_positions")
EMBEDDING_NORMS = ("word_embeddings_layernorm", "embed_norm", "embedding_norm")
EMBEDDING_DROPOUTS = ("drop", "emb_dropout", "embd_dropout", "embed_dropout", "embedding_dropout")
EMBEDDING_SCALES = ("embedding_multiplier", "embedding_scale")  # numbers; most models scale inside the embedding module
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f")
PAST_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")  # GPT-NeoX swallows past_key_values silently
LAYER_ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings", "use_cache", *PAST_ARGUMENTS)
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
LONGEST_CHECKED_WINDOW = 256  # tokens; check() reads past windows of up to this, so that it stays cheap for real models


class UnsupportedTower(ZipperError):
    """A model that the driver cannot run exactly as the model runs itself."""


@final
@dataclass(frozen=True)
class Strand:
    """What one tower reads. Slots (columns) of document -1 are padding, their other values mean nothing.

    ids: tokens, within the vocabulary also in padding. position: rank among this tower's own tokens of the document, its
    rotary or learned position. time: rank in the document's interleaved sequence of all towers. document: which sample
    of a packed row. Within a tower a slot reads itself and those before it of the same document.
    """

    ids: Int[Tensor, "batch length"]
    position: Int[Tensor, "batch length"]
    time: Int[Tensor, "batch length"]
    document: Int[Tensor, "batch length"]

    @classmethod
    def alone(cls, ids: Int[Tensor, "batch length"], document: Int[Tensor, "batch length"] | None = None) -> "Strand":
        """A strand of unimodal documents: time is position. Without `document` each row is one, without padding."""
        if document is None:
            document = torch.zeros_like(ids)
        slot = torch.arange(ids.shape[1], device=ids.device)
        earlier = (document[:, :, None] == document[:, None, :]) & (slot[None, :] < slot[:, None])
        rank = torch.where(document >= 0, earlier.sum(-1), 0)
        return cls(ids, rank, rank, document)

    def to(self, device: torch.device | str) -> "Strand":
        """The same strand on another device."""
        return Strand(self.ids.to(device), self.position.to(device), self.time.to(device), self.document.to(device))


@final
class Past:
    """The keys and values of what a tower has read, one slot (column) per token, padding included.

    A forward with a past appends to it: `Tower.start` replaces `document` and `position`, then each block appends to
    `cache` in place. Sliding-window layers keep every slot too, so that slots can be gathered alike in every layer.
    """

    def __init__(self) -> None:
        self.cache: Any = DynamicCache()
        self.document: Int[Tensor, "batch slots"] | None = None  # None until something was read
        self.position: Int[Tensor, "batch slots"] | None = None

    @property
    def length(self) -> int:
        """Slots held, padding included."""
        return 0 if self.document is None else self.document.shape[1]

    def append(self, document: Int[Tensor, "batch new"], position: Int[Tensor, "batch new"]) -> None:
        """Adds slots behind those held; the blocks add the keys and values. Raises ZipperError for other rows."""
        if self.document is not None and self.position is not None:
            if len(self.document) != len(document):
                given, held = len(document), len(self.document)
                raise ZipperError(f"The strand has {given} rows, the past {held}. Use Past.select to bring it to {given}.")
            document, position = torch.cat([self.document, document], 1), torch.cat([self.position, position], 1)
        self.document, self.position = document, position

    def compact(self) -> None:
        """Moves every row's valid slots to the right end, in order; drops the columns that are padding in all rows."""
        if self.document is None or self.position is None:
            return
        valid = self.document >= 0
        if valid.all():
            return
        width = int(valid.sum(1).max())
        slots = torch.sort(valid, dim=1, stable=True).indices[:, self.length - width :]  # padding sorts first
        self.document, self.position = self.document.gather(1, slots), self.position.gather(1, slots)
        for layer in self.cache.layers:
            index = slots[:, None, :, None].to(layer.keys.device)
            layer.keys, layer.values = (torch.take_along_dim(held, index, 2) for held in (layer.keys, layer.values))

    def select(self, rows: Sequence[int] | Int[Tensor, " chosen"]) -> None:
        """Keeps these rows in this order; a row may come several times."""
        if self.document is None or self.position is None:
            return
        index = torch.as_tensor(rows, device=self.document.device)
        self.document, self.position = self.document[index], self.position[index]
        for layer in self.cache.layers:
            there = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[there], layer.values[there]

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` slots."""
        if not 0 <= length <= self.length:
            raise ZipperError(f"A past of {self.length} slots cannot be cropped to {length}. Give 0 to {self.length}.")
        if self.document is None or self.position is None:
            return
        self.document, self.position = self.document[:, :length], self.position[:, :length]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


@final
@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward need beside the hidden states; masks and rotary positions by layer type."""

    mask: dict[str, Tensor | None]
    rotary: dict[str, Any]
    position: Int[Tensor, "batch length"]
    past: Past | None


@final
class Tower(nn.Module):
    """A Hugging Face causal LM, run part way: `embed`, `start`, `run` some blocks, `run` the rest, `unembed`.

    The model is used as it is: not copied, not changed, no hooks. Raises UnsupportedTower where its structure is none
    that the driver knows; `check` finds the rest.

    layers: number of blocks. width: of the hidden states between them. vocabulary: number of ids.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        name = self.name
        if config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedTower(f"{name} is no causal language model. Give a decoder-only model such as GPT-2 or Llama.")
        self.layers: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.vocabulary: int = config.vocab_size
        self._body, self._blocks = _find_blocks(model, self.layers)
        self._kinds = tuple(getattr(config, "layer_types", None) or ["all"] * self.layers)
        self._accepts = tuple(_layer_arguments(name, block) for block in self.blocks)
        if unknown := set(self._kinds) - {*LAYER_TYPES, "all"}:
            raise UnsupportedTower(f"{name} has blocks of type {sorted(unknown)}; a tower needs attention in every block.")
        if not isinstance(model.get_output_embeddings(), nn.Module):
            raise UnsupportedTower(f"{name} has no output head. Give the causal language model, not its bare body.")

    @classmethod
    def load(cls, source: str | Path | PreTrainedModel, dtype: torch.dtype | None = None) -> "Tower":
        """A tower from a local folder, a hub id or a loaded model; dtype None keeps the checkpoint's.

        Runs no remote code and reads no pickle. Raises ZipperError where there is no such model, UnsupportedTower where
        there is one that the driver cannot run.
        """
        if isinstance(source, PreTrainedModel):
            if dtype not in (None, source.dtype):
                raise ZipperError(f"The loaded model is {source.dtype}, not {dtype}. Convert it first, or give its folder.")
            return cls(source)
        if not isinstance(source, str | Path):
            raise ZipperError(
                f"A tower was given as a {type(source).__name__}; a folder, a hub id or a transformers model was wanted. "
                "For adapters give the base, and their settings as lora=..."
            )
        folder = Path(source).expanduser()
        local = folder.is_dir() or isinstance(source, Path) or _names_a_path(source)
        if local and not (folder / "config.json").is_file():
            problem = "has no config.json" if folder.is_dir() else "does not exist"
            raise ZipperError(f"The folder {folder} {problem}. Give one written by save_pretrained, or a hub id like gpt2.")
        where = f"the folder {folder}" if local else f"the hub id {source}"
        loader: Any = AutoModelForCausalLM
        try:
            model, report = loader.from_pretrained(
                folder if local else source,
                dtype=dtype or "auto",
                local_files_only=local,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, LookupError, RuntimeError, TypeError, SafetensorError) as error:
            raise ZipperError(f"Cannot load a causal language model from {where}: {error}") from error
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random weights
            raise ZipperError(f"The checkpoint in {where} lacks {', '.join(missing[:3])} ({len(missing)} in all).")
        return cls(model)

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def body(self) -> Any:
        """The module that owns the blocks, the embeddings and the final norm."""
        return self.model.get_submodule(self._body)

    @property
    def blocks(self) -> Any:
        """The model's decoder layers, in order."""
        return self.model.get_submodule(self._blocks)

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    @property
    def begin(self) -> int | None:
        """The begin-of-sequence id; where the model has none, its end id."""
        return self.end if self.config.bos_token_id is None else self.config.bos_token_id

    @property
    def end(self) -> int | None:
        """The end-of-sequence id, the first where the model has several."""
        end = self.config.eos_token_id
        return end[0] if isinstance(end, list) else end

    def new_past(self) -> Past:
        """An empty past."""
        return Past()

    def forward(self, strand: Strand, past: Past | None = None) -> Float[Tensor, "batch length vocabulary"]:
        """The tower alone: the model's own logits."""
        h = self.embed(strand)
        return self.unembed(self.run(h, range(self.layers), self.start(strand, h, past)))

    def embed(self, strand: Strand) -> Float[Tensor, "batch length width"]:
        """Everything before the first block: token embedding, its scale and norm, learned positions, dropout."""
        body, position = self.body, strand.position.clamp(min=0)
        h = self.model.get_input_embeddings()(strand.ids)
        if scale := _first(body, EMBEDDING_SCALES):
            h = h * scale
        if project := _first(body, ("project_in",)):
            h = project(h)
        if norm := _first(body, EMBEDDING_NORMS):
            h = norm(h)
        if table := _first(body, LEARNED_POSITIONS):
            h = h + _learned_positions(table, position, strand.document >= 0)
        if dropout := _first(body, EMBEDDING_DROPOUTS):
            h = dropout(h)
        return h

    def start(self, strand: Strand, h: Float[Tensor, "batch length width"], past: Past | None = None) -> Pass:
        """What the blocks of this forward need. With a past, adds the strand's slots to it (`run` adds the rest)."""
        position = strand.position.clamp(min=0)
        slots, slot_positions = strand.document, position
        cache = None
        if past is not None:
            past.append(strand.document, position)
            assert past.document is not None and past.position is not None
            slots, slot_positions, cache = past.document, past.position, past.cache
        kinds = set(self._kinds)
        if _is_plain(slots, slot_positions):
            # Always a padding mask, never positions: without a mask transformers takes positions that do not step by 1
            # for a packed row. Where every slot is valid it drops the mask itself: the kernel is the bare model's.
            made = create_masks_for_generate(self.config, h, slots >= 0, cache, position_ids=None)
            mask = {kind: made[kind] if isinstance(made, dict) else made for kind in kinds}
        else:
            mask = {kind: self._mask(kind, slots, slot_positions, h) for kind in kinds}
        return Pass(mask, {kind: self._rotary(kind, h, position) for kind in kinds}, position, past)

    def run(self, h: Float[Tensor, "batch length width"], layers: range, run: Pass) -> Float[Tensor, "batch length width"]:
        """Blocks layers.start .. layers.stop - 1. With a past, each appends its keys and values to the cache."""
        blocks = self.blocks
        cache = None if run.past is None else run.past.cache
        for index in layers:
            kind = self._kinds[index]
            given = {
                "attention_mask": run.mask[kind],
                "position_ids": run.position,
                "position_embeddings": run.rotary[kind],
                "use_cache": cache is not None,
            } | dict.fromkeys(PAST_ARGUMENTS, cache)
            output = blocks[index](h, **{name: given[name] for name in self._accepts[index]})
            h = output[0] if isinstance(output, tuple) else output
        return h

    def unembed(self, h: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length vocabulary"]:
        """Everything after the last block: final norm, head, and the scale or soft-cap of the logits."""
        body, config = self.body, self.config
        if norm := _first(body, FINAL_NORMS):
            h = norm(h)
        if project := _first(body, ("project_out",)):
            h = project(h)
        head: Any = self.model.get_output_embeddings()
        logits = head(h)
        if (scale := _first(self.model, ("logit_scale",))) is not None:
            logits = logits * scale
        if (divisor := _first(config, ("logits_scaling",))) is not None:
            logits = logits / divisor
        if (cap := _first(config, ("final_logit_softcapping",))) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def check(self, seed: int = 0) -> None:
        """Compares the driver with the model's own forward on random ids: unpadded, left-padded, in steps with a past.

        Runs in eval mode, restores the training mode of every module, and leaves the global random state alone. Sliding
        windows of more than 256 tokens are not reached. Raises UnsupportedTower where any logit differs in any bit.
        """
        windows = [getattr(self.config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
        window = max((size for size in windows if size <= LONGEST_CHECKED_WINDOW), default=0)
        length = min(window + 13, getattr(self.config, "max_position_embeddings", None) or window + 13)
        ids = torch.randint(self.vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))
        unpadded = Strand.alone(ids.to(next(self.parameters()).device))
        document = unpadded.document.clone()
        document[1, :3] = -1
        padded = Strand.alone(unpadded.ids, document)
        with _evaluating(self), torch.no_grad():
            for case, strand in (("unpadded", unpadded), ("left-padded", padded)):
                self._compare(f"{case} rows", strand, steps=())
                self._compare(f"{case} rows read in steps", strand, steps=(length - 3, 1, 2))

    def adapt(self, settings: Mapping[str, Any]) -> None:
        """Adds a LoRA adapter (arXiv:2106.09685) to the model in place, by peft: the base is frozen, the adapter learns.

        settings: of peft's LoraConfig, e.g. {"r": 8, "target_modules": ["q_proj", "v_proj"]}. The function does not change at
        birth. An adapted tower keeps the adapter that it has; other settings than that one's are a ZipperError, as unknown ones are.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ZipperError("LoRA needs the package peft. Install zipper-lm[lora].") from error
        adapted = getattr(self.model, "peft_config", None)
        try:
            config = LoraConfig(**settings)
            if adapted is None:
                inject_adapter_in_model(config, self.model)
        except (TypeError, ValueError) as error:
            raise ZipperError(f"{self.name} cannot be adapted by lora={dict(settings)}: {error}") from error
        if adapted is not None and any(adapted["default"].to_dict()[key] != config.to_dict()[key] for key in settings):
            raise ZipperError(f"{self.name} has an adapter with other settings than lora={dict(settings)}. Load its base anew.")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def save(self, folder: Path) -> None:
        """Writes the model, without its adapter, as transformers does."""
        self.model.save_pretrained(folder, state_dict=self.base())

    def digest(self) -> str:
        """SHA-256 over every parameter and buffer, also buffers that a checkpoint does not hold: did this tower change?"""
        return _sha256(
            dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers(remove_duplicate=False))
        )

    def pin(self, dtype: torch.dtype | None = None) -> str:
        """SHA-256 over what a checkpoint of this tower holds, its parameters in `dtype`: is this the same tower?

        Unlike `digest` it leaves out what transformers computes when it loads a model: rotary frequencies may differ in
        their last bits from machine to machine, and some grow with the longest row that was read. Adapters (LoRA) are left out.
        """
        return _sha256(self.base(), dtype)

    def base(self) -> dict[str, Tensor]:
        """What a checkpoint of this tower holds, under the names it has without adapters (peft wraps what it adapts)."""
        held = self.model.state_dict(keep_vars=True)
        return {name.replace(".base_layer.", "."): tensor for name, tensor in held.items() if ".lora_" not in name}

    def _rotary(self, kind: str, h: Tensor, position: Tensor) -> Any:
        rotary = _first(self.body, ("rotary_emb",))
        if rotary is None:
            return None
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        return rotary(h, position, kind) if by_type else rotary(h, position)

    def _mask(self, kind: str, document: Tensor, position: Tensor, h: Tensor) -> Tensor:
        """The mask of packed rows and of rows with gaps, as separate rows would have it: windows count positions."""
        config = self.config
        length, slots = h.shape[1], document.shape[1]
        slot = torch.arange(slots, device=document.device)
        reader = slice(slots - length, slots)
        allowed = (document[:, reader, None] == document[:, None, :]) & (document >= 0)[:, None, :]
        allowed &= slot[None, None, :] <= slot[None, reader, None]
        if kind == "sliding_attention" or (kind == "all" and getattr(config, "sliding_window", None)):
            allowed &= position[:, reader, None] - position[:, None, :] < config.sliding_window
        if kind == "chunked_attention" or (kind == "all" and getattr(config, "attention_chunk_size", None)):
            chunk = position // config.attention_chunk_size
            allowed &= chunk[:, reader, None] == chunk[:, None, :]
        if config._attn_implementation == "sdpa":
            return allowed[:, None]
        if config._attn_implementation == "eager":
            return torch.where(allowed, 0.0, torch.finfo(h.dtype).min).to(h.dtype)[:, None]
        raise ZipperError(
            f"{self.name} attends by '{config._attn_implementation}'; packed rows and rows with padding inside need "
            "'sdpa' or 'eager'. Call model.set_attn_implementation('sdpa') first."
        )

    def _compare(self, case: str, strand: Strand, steps: tuple[int, ...]) -> None:
        """Raises UnsupportedTower unless driver and model agree in every bit. steps: lengths read one by one."""
        takes = inspect.signature(self.model.forward).parameters
        model: Any = self.model
        past, cache = (self.new_past(), DynamicCache()) if steps else (None, None)
        stop = 0
        for length in steps or (strand.ids.shape[1],):
            start, stop = stop, stop + length
            part = Strand(*(getattr(strand, field.name)[:, start:stop] for field in fields(Strand)))
            given = {
                "attention_mask": (strand.document[:, :stop] >= 0).long(),
                "position_ids": part.position,
                "past_key_values": cache,
                "use_cache": cache is not None,
            }
            own = model(part.ids, **{name: value for name, value in given.items() if name in takes}).logits
            try:
                ours = self(part, past)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise UnsupportedTower(f"{self.name} cannot be a tower: on {case} its blocks fail: {error}") from error
            if ours.shape != own.shape or not torch.equal(ours[part.document >= 0], own[part.document >= 0]):
                gap = f"{(ours - own).abs().max():.3g}" if ours.shape == own.shape else "their shape"
                raise UnsupportedTower(
                    f"{self.name} cannot be a tower: on {case} its logits differ by {gap} from those of its parts run "
                    "one by one, so it does something around its blocks that zipper does not know. Use another model."
                )
            if past is not None and [layer.get_seq_length() for layer in past.cache.layers] != [stop] * self.layers:
                raise UnsupportedTower(f"{self.name} cannot be a tower: not every block writes the key/value cache.")


def _sha256(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Over name, dtype, shape and bytes of each tensor, in the order of their names; parameters are turned into `dtype` first."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, nn.Parameter):
            tensor = tensor.to(dtype)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _first(owner: Any, names: tuple[str, ...]) -> Any:
    """The first of these attributes that is there and not None."""
    return next((found for name in names if (found := getattr(owner, name, None)) is not None), None)


def _find_blocks(model: PreTrainedModel, layers: int) -> tuple[str, str]:
    """Names of the body and of its list of blocks: the outermost list of as many modules as the model has layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return name.rpartition(".")[0], name
    raise UnsupportedTower(f"{type(model).__name__} has no list of {layers} blocks. Give a decoder-only transformer.")


def _layer_arguments(name: str, block: nn.Module) -> tuple[str, ...]:
    """Which of LAYER_ARGUMENTS a block takes."""
    _, *parameters = inspect.signature(block.forward).parameters.values()  # the first one is the hidden states
    takes = tuple(p.name for p in parameters if p.name in LAYER_ARGUMENTS)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in takes]:
        raise UnsupportedTower(f"{name}'s blocks want {', '.join(missing)}, which zipper does not know how to give.")
    if "attention_mask" not in takes or not set(takes) & set(PAST_ARGUMENTS):
        raise UnsupportedTower(f"{name}'s blocks take no attention mask or no key/value cache. Give an attention model.")
    return takes


def _learned_positions(table: Any, position: Tensor, valid: Tensor) -> Tensor:
    takes = inspect.signature(table.forward).parameters
    if "position_ids" not in takes:
        return table(position)
    given = {"attention_mask": valid.long(), "position_ids": position}
    return table(**{name: value for name, value in given.items() if name in takes})


def _is_plain(document: Tensor, position: Tensor) -> bool:
    """Whether each row is one document whose positions step with its slots: then slots are as good as positions."""
    valid = document >= 0
    shift = position - torch.arange(position.shape[1], device=position.device)
    far = torch.iinfo(position.dtype).max
    # The least of a row's values is not below its greatest: all are equal, or there are none.
    same = [x.masked_fill(~valid, far).amin(1) >= x.masked_fill(~valid, -far).amax(1) for x in (document, shift)]
    return bool(torch.stack(same).all())


def _names_a_path(source: str) -> bool:
    """Whether a source is meant as a folder, not as a hub id: ./x, ../x, ~/x, /x, a/b/c, or x in a folder there is."""
    parent = Path(source).parent
    return source.startswith((".", "~", "/")) or source.count("/") > 1 or (parent != Path() and parent.is_dir())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module has its own mode back (a half-frozen tower has both)."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
