"""The zip file: a folder that exists whole or not at all, and whose every byte is accounted for.

A saved folder holds zipper.json (the configuration), zip.safetensors (what zipping added), towers/<name>/ (trained towers, as
transformers saves them) and manifest.json (SHA-256 of every other file), which is written last. No pickle anywhere. Nothing here
knows what the tensors mean.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from zipper.errors import ZipperError

CONFIG, TENSORS, MANIFEST = "zipper.json", "zip.safetensors", "manifest.json"


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Write a folder so that a reader sees the old one or the new one, never a mix: yields a temporary sibling, and on success
    adds the manifest, flushes it to the disk and renames it into place. On failure the old folder is untouched.

    Refuses (ZipperError) to replace a folder that is not one of ours.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ZipperError(f"{folder} exists and holds something else than a saved model. Choose another folder or empty it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        files = {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        with _aside(folder):
            os.rename(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take a saved folder away, if there is one: in one rename, so that no reader ever sees half of it."""
    with _aside(folder):
        pass


@contextmanager
def _aside(folder: Path) -> Iterator[None]:
    """Move a folder out of the way, if there is one; it comes back on failure and is deleted on success."""
    if not folder.exists():
        yield
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        yield
    except BaseException:
        os.rename(old / folder.name, folder)
        raise
    finally:
        shutil.rmtree(old)


def check(folder: Path) -> None:
    """Every file of a saved folder is there and has the hash that the manifest names; otherwise a ZipperError names the file."""
    if not (folder / MANIFEST).is_file():
        what = "has no manifest.json, so it is not a saved model or was only half copied" if folder.is_dir() else "does not exist"
        raise ZipperError(f"{folder} {what}. Give the folder that save_pretrained or `zipper train` wrote.")
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or CONFIG not in files:
        raise ZipperError(f"{folder / MANIFEST} is damaged: it does not list the model's files. Copy the folder again.")
    for name, digest in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ZipperError(f"{folder / MANIFEST} names {name!r}, which lies outside its folder. Do not use this file.")
        if not path.is_file():
            raise ZipperError(f"{path} is missing. Copy the folder again.")
        if sha256(path) != digest:
            raise ZipperError(f"{path} is damaged: its content hash is not the one in {MANIFEST}. Copy the folder again.")


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    towers: Mapping[str, PreTrainedModel],
    record: Any,
) -> None:
    """Write a zip's files into an existing folder (use inside `whole`)."""
    for name, tower in towers.items():
        tower.save_pretrained(folder / "towers" / name)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
    write_json(folder / CONFIG, {"format": 1, "config": config, "versions": versions, "record": record})


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, record) of a saved zip, after every file's hash was checked."""
    check(folder)
    data = read_json(folder / CONFIG)
    if data.get("format") != 1 or not isinstance(data.get("config"), dict):
        raise ZipperError(f"{folder / CONFIG} has format {data.get('format')!r}; this version of zipper reads format 1.")
    return data["config"], data.get("record") or {}


def tensors(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new parameters, names and shapes compared with `wanted` before any memory is taken for them."""
    path = folder / TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != wanted.keys():
                odd = sorted(names ^ wanted.keys())[:3]
                raise ZipperError(f"{path} does not hold the tensors that its configuration asks for (differs in {odd}).")
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(wanted[name].shape):
                    raise ZipperError(f"{path}: {name} has shape {shape}, the configuration wants {tuple(wanted[name].shape)}.")
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ZipperError(f"{path} is not a readable safetensors file: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ZipperError names the file if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ZipperError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ZipperError(f"{path} should hold a JSON object; it holds a {type(data).__name__}.")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write JSON, one readable way for the whole project."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Path | torch.dtype):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in JSON")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
