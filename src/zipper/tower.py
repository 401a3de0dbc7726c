"""Towers: pre-trained causal language models that can be run part way.

How a model is run part way is the driver's business. This file says what a tower reads and what it
has read, and compares with the model's own logits: what cannot be run bit for bit is refused, never
guessed. It knows nothing of modalities, links or other towers.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from zipper.environment import extra
from zipper.errors import ZipperError as ZipperError
from zipper.former import names_of
from zipper.saving import checkpoint, hub
from zipper.saving.files import place
from zipper.strand import Strand as Strand
from zipper.towers import mapping
from zipper.towers.driver import Pass, Reading, Recorded, Way
from zipper.towers.driver import PreTrainedModel as PreTrainedModel
from zipper.towers.driver import UnsupportedTower as UnsupportedTower
from zipper.towers.proof import ROWS as ROWS
from zipper.towers.proof import Proof, Rows, evaluating


def precision(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name, as transformers takes it; None = as saved. Raises a
    ZipperError for what is no dtype of parameters."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ZipperError(
        f"dtype is {dtype!r}; torch.float32, torch.bfloat16 or another of numbers with a point was "
        "wanted, itself or its name, or None, which is as saved."
    )


@final
class Past:
    """The keys and values of what a tower has read, one slot (column) per token, padding included.

    A forward with a past appends to it: `Tower.start` replaces `document` and `position`, then each
    block appends to `cache` in place. Sliding-window layers keep every slot too, so that slots can
    be gathered alike in every layer.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.document: Int[Tensor, "batch slots"] | None = None  # None until something was read
        self.position: Int[Tensor, "batch slots"] | None = None

    @property
    def length(self) -> int:
        """Slots held, padding included."""
        return 0 if self.document is None else self.document.shape[1]

    def extended(
        self, document: Int[Tensor, "batch new"], position: Int[Tensor, "batch new"]
    ) -> tuple[Int[Tensor, "batch slots"], Int[Tensor, "batch slots"]]:
        """Documents and positions of the slots held and of these behind them. Raises ZipperError
        for other rows."""
        if self.document is None or self.position is None:
            return document, position
        if len(self.document) != len(document):
            given, held = len(document), len(self.document)
            raise ZipperError(
                f"The strand has {given} rows, the past {held}. Use Past.select to bring it to "
                f"{given}."
            )
        return torch.cat([self.document, document], 1), torch.cat([self.position, position], 1)

    def compact(self) -> None:
        """Moves every row's valid slots to the right end, in order; drops the columns that are
        padding in all rows."""
        if self.document is None or self.position is None:
            return
        valid = self.document >= 0
        if valid.all():
            return
        width = int(valid.sum(1).max())
        # Padding sorts first.
        slots = torch.sort(valid, dim=1, stable=True).indices[:, self.length - width :]
        self.document, self.position = (
            self.document.gather(1, slots),
            self.position.gather(1, slots),
        )
        for layer in self._written():
            index = slots[:, None, :, None].to(layer.keys.device)
            layer.keys, layer.values = (
                torch.take_along_dim(held, index, 2) for held in (layer.keys, layer.values)
            )

    def select(self, rows: Sequence[int] | Int[Tensor, " chosen"]) -> None:
        """Keeps these rows in this order; a row may come several times."""
        if self.document is None or self.position is None:
            return
        index = torch.as_tensor(rows, device=self.document.device)
        self.document, self.position = self.document[index], self.position[index]
        for layer in self._written():
            there = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[there], layer.values[there]

    def _written(self) -> list[Any]:
        """The layers of the cache that hold something: a block that reads another block's keys has
        none of its own."""
        return [layer for layer in self.cache.layers if layer.is_initialized]


@final
class Tower(nn.Module):
    """A Hugging Face causal LM, run part way: `embed`, `start`, `run` some blocks, `run` the rest,
    `unembed`.

    The model is used as it is: not copied, not changed, no hooks. A few tokens decide which way it
    is run, the same way every time. Raises UnsupportedTower where neither way repeats the model's
    own logits; `check` looks closer.

    layers: number of blocks. width: of the hidden states between them. vocabulary: number of ids.
    rows: the most that it can read of ROWS, else there is a ZipperError. revision: the commit of
    the hub that it was loaded from, "" where it came from elsewhere.
    """

    def __init__(self, model: PreTrainedModel, revision: str = "") -> None:
        super().__init__()
        self.model = model
        self.revision = revision
        config = model.config.get_text_config()
        if config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedTower(
                f"{self.name} is no causal language model. Give a decoder-only model such as "
                "GPT-2 or Llama."
            )
        if not isinstance(model.get_output_embeddings(), nn.Module):
            raise UnsupportedTower(
                f"{self.name} has no output head. Give the causal language model, not its bare "
                "body."
            )
        with Proof(self).refusing("its configuration is of no known kind"):
            self.layers: int = config.num_hidden_layers
            self.width: int = config.hidden_size
            self.vocabulary: int = config.vocab_size
        self.way: Way
        self.rows: Rows = "packed"
        with evaluating(self), torch.no_grad():
            Proof(self).find()

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> "Tower":
        """A tower from a local folder, a hub id or a loaded model; dtype None keeps the
        checkpoint's. revision: branch, tag or commit of a hub id, None = main; a folder or a model
        has none, and it is not looked at.

        Runs no remote code and reads no pickle. Raises ZipperError where there is no such model,
        UnsupportedTower where there is one that the driver cannot run.
        """
        dtype = precision(dtype)
        if in_memory(source):
            if dtype not in (None, source.dtype):
                raise ZipperError(
                    f"The loaded model is {source.dtype}, not {dtype}. Convert it first, or give "
                    "its folder."
                )
            return cls(source)
        if not isinstance(source, str | Path):
            raise ZipperError(
                f"A tower was given as a {type(source).__name__}; a folder, a hub id or a "
                "transformers model was wanted. "
                "For adapters give the base, and their settings as lora=..."
            )
        folder = place(source)
        local = folder.is_dir() or isinstance(source, Path) or hub.names_a_path(source)
        if local and not (folder / "config.json").is_file():
            problem = "has no config.json" if folder.is_dir() else "does not exist"
            inside = sorted(folder.glob("towers/*/config.json"))
            what = f"such as {inside[0].parent}" if inside else "or a hub id like gpt2"
            raise ZipperError(
                f"The folder {folder} {problem}. Give one written by save_pretrained, {what}."
            )
        where = f"the folder {folder}" if local else f"the hub id {source}"
        # Resolved once, so that all files are of one commit; transformers no longer says which one
        # it took.
        commit = "" if local else hub.commit(str(source), revision)
        loader = mapping.auto()
        try:
            with checkpoint.without_bars():
                model, report = loader.from_pretrained(
                    folder if local else source,
                    revision=commit or "main",
                    dtype=dtype or "auto",
                    local_files_only=local,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except (
            OSError,
            ValueError,
            LookupError,
            RuntimeError,
            TypeError,
            SafetensorError,
        ) as error:
            raise ZipperError(
                f"Cannot load a causal language model from {where}: {error}"
            ) from error
        # Transformers would go on with random weights.
        if missing := sorted(report["missing_keys"]):
            raise ZipperError(
                f"The checkpoint in {where} lacks {', '.join(missing[:3])} ({len(missing)} in all)."
            )
        return cls(model, commit)

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @property
    def recorded(self) -> bool:
        """Whether its own forward says what its blocks are given; else attributes do."""
        return isinstance(self.way, Recorded)

    @property
    def blocks(self) -> Any:
        """The model's decoder layers, in order."""
        return self.way.blocks

    @property
    def cache_argument(self) -> str:
        """The name by which the model's own forward takes a cache (transformers renamed it more
        than once)."""
        return self.way.cache_argument

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def family(self) -> str:
        """What transformers calls its architecture."""
        return str(self.model.config.model_type)

    @property
    def room(self) -> int:
        """Positions that it was made for; models without a limit have a large number."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def dtype(self) -> str:
        """Of its parameters, e.g. "float32"."""
        return str(next(self.parameters()).dtype).removeprefix("torch.")

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
        """The end-of-sequence id, the first where the model has several; where it has none, that
        which its head cannot say (ImageGPT's sos)."""
        end = self.config.eos_token_id
        if end is None:
            said = getattr(self.model.get_output_embeddings(), "out_features", self.vocabulary)
            end = said if said < self.vocabulary else None
        return end[0] if isinstance(end, list) else end

    def new_past(self) -> Past:
        """An empty past."""
        return Past()

    def forward(
        self, strand: Strand, past: Past | None = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        """The tower alone: the model's own logits."""
        h = self.embed(strand, past)
        return self.unembed(self.run(h, range(self.layers), self.start(strand, h, past)))

    def embed(
        self, strand: Strand, past: Past | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Everything before the first block: token embedding, its scale and norm, learned
        positions, dropout.

        Towers that read no left padding need the past of rows that go on; to others it makes no
        difference.
        """
        return self.way.embed(self._reading(strand, past))

    def start(
        self, strand: Strand, h: Float[Tensor, "batch length width"], past: Past | None = None
    ) -> Pass:
        """What the blocks of this forward need. With a past, adds the strand's slots to it (`run`
        adds the rest)."""
        reading = self._reading(strand, past)
        if past is not None:
            past.document, past.position = reading.document, reading.slot_position
        return self.way.start(reading, h)

    def run(
        self, h: Float[Tensor, "batch length width"], layers: range, run: Pass
    ) -> Float[Tensor, "batch length width"]:
        """Blocks layers.start .. layers.stop - 1. With a past, each appends its keys and values to
        the cache."""
        blocks = self.blocks
        for index in layers:
            given, named = run.calls[index]
            output = blocks[index](h, *given, **named)
            h = output[0] if isinstance(output, tuple) else output
        return h

    def unembed(
        self, h: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Everything after the last block: final norm, head, and the scale or soft-cap of the
        logits."""
        return self.way.unembed(h)

    def check(self, seed: int = 0) -> None:
        """Compares with the model's own logits on random ids: unpadded and left-padded rows, at
        once and in steps with a past.

        There every bit must agree. Rows in steps must be close to rows at once, and documents in
        padded and packed rows to
        those documents alone: the matrices have other shapes there. Runs in eval mode, restores the
        training mode of every module, and leaves the global random state alone. Windows of more
        than 256 tokens are not reached. Raises UnsupportedTower.
        """
        with evaluating(self), torch.no_grad():
            proof = Proof(self)
            proof.prove(proof.sample(seed))

    def adapt(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a LoRA adapter (arXiv:2106.09685) to the model in place, by peft: the base is
        frozen, the adapter learns.

        settings: of peft's LoraConfig, e.g. {"r": 8, "target_modules": ["q_proj", "v_proj"]}. The
        function does not change at birth. An adapted tower keeps the adapter that it has; settings
        other than that one's are a ZipperError, as unknown ones. Returns the settings, with a word
        such as "all-linear" as the modules that it stands for here.
        """
        peft, config = extra("peft"), self.adapter(settings)
        if getattr(self.model, "peft_config", None) is None:
            peft.inject_adapter_in_model(peft.LoraConfig(**settings), self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        modules = config.target_modules
        named = {"target_modules": sorted(modules) if isinstance(modules, set) else modules}
        return {key: named.get(key, value) for key, value in settings.items()}

    def adapter(self, settings: Mapping[str, Any]) -> Any:
        """What `adapt` would add, as peft's LoraConfig; nothing is changed. Raises a ZipperError as
        `adapt` does."""
        peft = extra("peft")
        adapted = getattr(self.model, "peft_config", None)
        try:
            config = peft.LoraConfig(**settings)
            with (
                torch.device("meta"),
                warnings.catch_warnings(action="ignore"),
            ):  # a bare twin without memory shows what it comes to
                peft.inject_adapter_in_model(config, type(self.model)(self.model.config))
        except (TypeError, ValueError) as error:
            raise ZipperError(
                f"{self.name} cannot be adapted by lora={dict(settings)}: {error}"
            ) from error
        if adapted is not None and any(
            adapted["default"].to_dict()[key] != config.to_dict()[key] for key in settings
        ):
            raise ZipperError(
                f"{self.name} has an adapter with other settings than lora={dict(settings)}. Load "
                "its base anew."
            )
        return config

    def save(self, folder: Path) -> None:
        """Writes the model, without its adapter, as transformers does, and such that it can be
        loaded (`checkpoint.save_tower`)."""
        checkpoint.save_tower(folder, self.model, self.base())

    def check_saving(self) -> None:
        """Raises a ZipperError where what `save` writes could not be loaded again."""
        checkpoint.check_tower(self.model, self.base())

    def digest(self) -> str:
        """SHA-256 over every parameter and buffer, also buffers that a checkpoint does not hold:
        did this tower change?"""
        return fingerprint(
            dict(self.model.named_parameters(remove_duplicate=False))
            | dict(self.model.named_buffers(remove_duplicate=False))
        )

    def pin(self, dtype: torch.dtype | None = None) -> str:
        """SHA-256 over what a checkpoint of this tower holds, its parameters in `dtype`: is this
        the same tower?

        Unlike `digest` it leaves out what transformers computes when it loads a model: rotary
        frequencies may differ in their last bits from machine to machine, and some grow with the
        longest row that was read. Adapters (LoRA) are left out.
        """
        return fingerprint(self.base(), dtype)

    def base(self) -> dict[str, Tensor]:
        """What a checkpoint of this tower holds, under the names it has without adapters (peft
        wraps what it adapts)."""
        held = self.model.state_dict(keep_vars=True)
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in held.items()
            if ".lora_" not in name
        }

    def _reading(self, strand: Strand, past: Past | None) -> Reading:
        """The strand with the past before it. Raises ZipperError for rows that the model cannot
        read."""
        position = strand.position.clamp(min=0)
        slots = (
            (strand.document, position)
            if past is None
            else past.extended(strand.document, position)
        )
        reading = Reading(strand.ids, position, *slots, None if past is None else past.cache)
        if self.rows != "packed" and not reading.plain:
            raise ZipperError(
                f"{self.name} reads no packed rows and no padding inside a row. Give each "
                "document its own row."
            )
        if self.rows == "unpadded" and not reading.by_slots:
            raise ZipperError(
                f"{self.name} counts positions by slots: it reads no padding on the left, and to "
                "go on with a row it needs its past. Pad rows on the right."
            )
        return reading


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Over name, dtype, shape and bytes of each tensor, in the order of their names; parameters are
    turned into `dtype` first."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, nn.Parameter):
            tensor = tensor.to(dtype)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def in_memory(source: object) -> TypeGuard[PreTrainedModel]:
    """Whether a tower is given as a transformers model."""
    if not isinstance(source, nn.Module):
        return False
    from transformers import PreTrainedModel as Model

    return isinstance(source, Model)


__getattr__ = names_of(__name__, ("zipper.towers.proof", "zipper.towers.driver"))
