"""Models of transformers that a modality stands on: found by hub id or folder, kept in the
modality's own folder, and pinned by a hash.

Beside a modality lie two files of each: NAME.json, its class and configuration, and
NAME.safetensors. No code of strangers runs and no pickle is read; what a configuration asks for is
compared with what the weights hold before memory is taken. Nothing here knows what a model is for.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zipper.errors import DamagedFile, ZipperError
from zipper.saving import hub
from zipper.saving.checkpoint import check_built, without_code
from zipper.saving.files import check_finite, header, place, read_json, replacing, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel as PreTrainedModel
else:
    PreTrainedModel = torch.nn.Module  # transformers takes seconds to import

#: Of a configuration, what differs between copies of one model.
_PASSING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


@final
@dataclass(frozen=True)
class Pinned:
    """A model in eval mode whose parameters are frozen, and the configuration that is saved with
    it, as it was when it was first taken."""

    model: PreTrainedModel
    described: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def take(cls, source: str | Path | PreTrainedModel, classes: Sequence[str]) -> "Pinned":
        """A model of one of these classes of transformers, from a hub id, a folder as
        save_pretrained writes it, or memory, in fp32. Raises ZipperError where there is none."""
        if isinstance(source, torch.nn.Module):
            if type(source).__name__ not in classes:
                raise ZipperError(
                    f"A {type(source).__name__} was given; one of {', '.join(classes)} was wanted."
                )
            return cls._of(source)
        return cls._of(_loaded(source, classes))

    @classmethod
    def _of(cls, model: Any) -> "Pinned":
        config = without_code(json.loads(model.config.to_json_string(use_diff=True)))
        config = {key: value for key, value in config.items() if key not in _PASSING}
        described = {"class": type(model).__name__, "config": config}
        tensors = _tensors(model)
        return cls(_frozen(model), described, content_hash(described, tensors))

    def to(self, device: str | torch.device | None) -> "Pinned":
        """On a device; None leaves it where it is."""
        if device is not None:
            self.model.to(device)  # type: ignore[arg-type]
        return self

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    def save(self, folder: Path, name: str) -> None:
        """Writes NAME.json and NAME.safetensors."""
        with replacing(folder / f"{name}.safetensors") as beside:
            save_file(_tensors(self.model), beside)
        write_json(folder / f"{name}.json", {**self.described, "sha256": self.fingerprint})

    @classmethod
    def load(cls, folder: Path, name: str, classes: Sequence[str]) -> "Pinned":
        """What `save` wrote. Raises ZipperError for anything else."""
        import transformers  # seconds

        path, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
        described = read_json(path)
        pinned = described.pop("sha256", None)
        if described.keys() != {"class", "config"} or described["class"] not in classes:
            raise ZipperError(
                f"{path} describes no model of {', '.join(classes)}. Save the modality again."
            )
        entries = header(weights)
        check_finite(weights, entries)
        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise DamagedFile(f"{weights} cannot be read: {error}. Copy it again.") from error
        if content_hash(described, tensors) != pinned:
            raise DamagedFile(
                f"{weights} and {path} are not the model that was saved: hashes differ. Copy the "
                "folder again."
            )
        kind: Any = getattr(transformers, described["class"])
        config = check_built(kind, described["config"], entries, path, weights)
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
        if report["missing_keys"]:
            raise ZipperError(f"{weights} lacks {sorted(report['missing_keys'])[:3]}.")
        return cls(_frozen(model), described, str(pinned))


def _loaded(source: str | Path, classes: Sequence[str]) -> Any:
    """A model from a hub id or a folder."""
    import transformers  # seconds

    folder = place(source)
    local = folder.is_dir() or isinstance(source, Path) or hub.names_a_path(str(source))
    where = f"the folder {folder}" if local else f"the hub id {source}"
    if local and not (folder / "config.json").is_file():
        raise ZipperError(f"There is no config.json in {where}. Give a folder of a saved model.")
    commit = "" if local else hub.commit(str(source))
    path = folder if local else hub.tower(str(source), commit)
    found = read_json(path / "config.json")
    kinds: dict[str, Any] = {}
    for name in classes:
        if (kind := getattr(transformers, name, None)) is not None:
            kinds[kind.config_class.model_type] = kind
    if (named := found.get("model_type")) not in kinds:  # a type that was renamed since
        named = next(
            (k for k, v in kinds.items() if [v.__name__] == found.get("architectures")), named
        )
    if named not in kinds:
        raise ZipperError(
            f"In {where} is a model of the type {named!a:.80}; one of {sorted(kinds)} was wanted."
        )
    loader = kinds[named]
    try:
        model, report = loader.from_pretrained(
            folder if local else source,
            revision=commit or "main",
            dtype=torch.float32,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a stranger's files lead transformers to
        raise ZipperError(
            f"Cannot load a {loader.__name__} from {where}: {error!s:.500}"
        ) from error
    if missing := sorted(report["missing_keys"]):  # it would go on with random weights
        raise ZipperError(
            f"The checkpoint in {where} lacks {', '.join(missing[:3])} ({len(missing)} in all) of "
            f"a {loader.__name__}. Give one of that class."
        )
    return model


def _frozen(model: Any) -> Any:
    """In eval mode and fp32, without gradients."""
    return model.float().eval().requires_grad_(False)


def _tensors(model: Any) -> dict[str, Tensor]:
    """What a file holds of a model: every tensor with memory of its own."""
    held = model.state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in held.items()}


def content_hash(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a description, such as class and configuration, and every tensor (CPU)."""
    total = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
