"""A zip's folder: links, projections and trained towers in it; frozen towers named and pinned by
their hash.

It knows configurations, towers and tensors; how they are run is the model's business
(`zipper.model`).
"""

import dataclasses
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zipper.config import TowerConfig, ZipperConfig
from zipper.errors import LostTower as LostTower
from zipper.errors import Mismatch, ZipperError
from zipper.junctions import known
from zipper.saving import checkpoint, hub
from zipper.tower import PreTrainedModel, Tower, UnsupportedTower, in_memory

#: Where a tower comes from: a folder, a hub id, or what is in memory already.
TowerSource = str | Path | PreTrainedModel | Tower


@dataclass(frozen=True)
class Opened:
    """A saved zip: its configuration, its towers as they lie now, and which of these are somebody
    else's objects."""

    folder: Path
    config: ZipperConfig
    towers: dict[str, Tower]
    shared: tuple[str, ...]


def open_zip(
    source: str | Path,
    towers: Mapping[str, TowerSource],
    allow_mismatch: bool = False,
    revision: str | None = None,
) -> Opened:
    """What lies in a folder or a repository of the hub, its towers loaded; see
    `Zipper.from_pretrained`.

    Raises ZipperError when a file is damaged or a base is not the one that the zip was trained on
    (hashes are compared); allow_mismatch makes the second a warning.
    """
    local = hub.fetch(source, revision)
    path = local.folder / checkpoint.CONFIG
    saved = checkpoint.load(local.folder, local.root)[0]
    config = ZipperConfig.from_dict(saved, f"{path} is not the configuration of a zip")
    known("towers", towers, config.towers)
    loaded, pins = {}, {}
    for name, pin in config.towers.items():
        where = towers.get(name) or base(local.folder, name, pin)
        loaded[name] = _loaded(local.folder, name, pin, where)
        pins[name] = _compared(path, name, pin, loaded[name], where, allow_mismatch)
    shared = tuple(
        name for name, given in towers.items() if isinstance(given, Tower) or in_memory(given)
    )
    return Opened(local.folder, dataclasses.replace(config, towers=pins), loaded, shared)


def _loaded(folder: Path, name: str, pin: TowerConfig, where: TowerSource) -> Tower:
    """A tower from where it lies now, in the dtype in which it was pinned."""
    if isinstance(where, Tower):
        return where
    try:
        if not isinstance(where, str | Path):
            return Tower.load(where)
        commit = pin.revision or None if where == pin.source else None
        return Tower.load(where, getattr(torch, pin.dtype), commit)
    except UnsupportedTower:
        raise
    except ZipperError as error:
        raise ZipperError(
            f"The tower {name!r} of {folder} could not be loaded. {error} {_elsewhere(name)}"
        ) from error


def _compared(
    path: Path, name: str, pin: TowerConfig, tower: Tower, where: TowerSource, allow_mismatch: bool
) -> TowerConfig:
    """What a zip knows of a tower that was loaded. Raises a ZipperError where it is another than
    the one pinned."""
    place = where if isinstance(where, str | Path) else "memory"
    digest = tower.pin(getattr(torch, pin.dtype))
    if digest != pin.digest:
        mismatch = (
            f"The tower {name!r} from {place} is not the one this zip was trained on: its content "
            f"hash is {digest[:16]}, the zip wants {pin.digest[:16]}."
        )
        if not allow_mismatch:
            raise Mismatch(
                f"{mismatch} {_elsewhere(name)} Or allow the mismatch (allow_mismatch=True, "
                "--allow-mismatch)."
            )
        warnings.warn(
            f"{mismatch} It was allowed: what the links say may be noise to it.", stacklevel=4
        )
    said = [getattr(pin, size) for size in checkpoint.SIZES]
    real = [getattr(tower, size) for size in checkpoint.SIZES]
    if said != real:
        raise ZipperError(
            f"{path} says of the tower {name!r} that {' and '.join(checkpoint.SIZES)} are {said}; "
            f"of that from {place} they are {real}."
        )
    pin = dataclasses.replace(pin, digest=digest)
    if isinstance(where, str | Path):
        pin = dataclasses.replace(
            pin, source=hub.absolute(where), relative="", revision=tower.revision
        )
    return pin


def write(
    folder: Path,
    config: ZipperConfig,
    towers: Mapping[str, Tower],
    tensors: Mapping[str, Tensor],
    include: Collection[str] = (),
    record: Mapping[str, Any] | None = None,
) -> None:
    """The files of a zip, into an existing folder. tensors: links, projections and adapters by
    name. include: frozen towers to copy into the folder as well."""
    known("include", include, config.towers)
    pins = {}
    for name, pin in config.towers.items():
        if pin.train or name in include:
            inside = f"towers/{name}"
            pins[name] = dataclasses.replace(
                pin,
                source=inside,
                relative="",
                revision="",
                digest=towers[name].pin(),
                dtype=towers[name].dtype,
            )
            towers[name].save(folder / inside)
        elif pin.source:
            place = hub.absolute(pin.source)
            pins[name] = dataclasses.replace(
                pin, source=place, relative=_relative(pin.source, folder)
            )
        else:
            raise ZipperError(
                f"The frozen tower {name!r} was given as an object, or has learnt, so the zip has "
                f"no place to name for it. Pass include=[{name!r}], or build the zip from a folder "
                "or hub id."
            )
    checkpoint.save(
        folder, dataclasses.replace(config, towers=pins).to_dict(), tensors, dict(record or {})
    )


def included(config: ZipperConfig, folder: Path) -> list[str]:
    """Frozen towers that lie in a folder, as those do that were included in the zip there."""
    frozen = {
        name: Path(pin.source)
        for name, pin in config.towers.items()
        if pin.source and not pin.train
    }
    inside = folder.resolve()
    return [
        name
        for name, place in frozen.items()
        if place.is_dir() and place.resolve().is_relative_to(inside)
    ]


def repin(folder: Path, towers: Mapping[str, str | Path]) -> None:
    """Write into a saved zip where frozen towers lie now, {name: folder or hub id}; everything else
    stays as it is."""
    saved = checkpoint.read_json(folder / checkpoint.CONFIG)
    listed = checkpoint.read_json(folder / checkpoint.MANIFEST)["files"]
    own = {checkpoint.CARD, *(name.partition("/")[0] for name in listed)}

    def others(place: str, names: list[str]) -> set[str]:  # `whole` takes them along
        return {*names} - own if Path(place) == folder else set()

    with checkpoint.whole(folder, checkpoint.examine) as temporary:
        for name, source in towers.items():
            place = {"source": hub.absolute(source), "relative": _relative(str(source), temporary)}
            saved["config"]["towers"][name] |= place
        shutil.copytree(folder, temporary, ignore=others, dirs_exist_ok=True)
        checkpoint.write_json(temporary / checkpoint.CONFIG, saved)


def base(folder: Path, name: str, pin: TowerConfig) -> str | Path:
    """Where a tower of the zip in a folder lies now. Raises a LostTower that says what to do where
    it is in none of its places."""
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
    raise LostTower(
        f"The frozen tower {name!r} of {folder} was not found: {looked}{place} {what}. "
        f"{_elsewhere(name)}",
        name,
    )


def _relative(source: str, folder: Path) -> str:
    """The folder of a tower as it is seen from another folder; "" for a hub id, and where there is
    no way from there."""
    place = hub.as_folder(source)
    try:
        return (
            ""
            if place is None
            else Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
        )
    except ValueError:  # another drive
        return ""


def _elsewhere(name: str) -> str:
    return (
        f"Say where the right one lies now: --tower {name}=PATH, in Python "
        f"towers={{{name!r}: PATH}}."
    )
