"""Proofs remembered: a zip that was proved on this machine before is loaded without transformers.

Loading imports transformers, builds each tower by its code and compares, which takes longer than
all the rest of a short command. What `fused` needs is less: tensors by their names, a few numbers,
and logits to compare with. That is what a record holds, beside all that it was made with: every
file of the zip, zipper's own code and that of transformers that ran, by their hashes; versions,
processor, dtype. Where any of it differs, or anything at all goes wrong, nothing is recalled and
all is proved as if there were no record. What is recalled is compared with the logits that the
tower had then. Where transformers was imported before, nothing is recalled or written: there is
little to save, and whoever imported it may have changed how it computes.

Records lie in the user's cache, never beside a model: no stranger's file says that it needs no
proof. ZIPPER_PROOFS=0 writes and reads none.
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from zipper.config import TowerConfig, ZipperConfig
from zipper.errors import ZipperError
from zipper.fast.plain import Outline, Proved, Rotary, plain, truth
from zipper.fast.reader import Fused
from zipper.model import Zipper
from zipper.saving import checkpoint, files, hub
from zipper.saving.zips import base
from zipper.tower import Tower, UnsupportedTower, fingerprint

KEPT = 64  # records; the oldest go
COMPARED = 1 << 12  # positions at which rotary tables are compared
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Known:
    """What a record says of a tower.

    name, family, room, outline: see `Proved`. revision: the hub's commit, if it came from there.
    described: hash of its config.json. stored: by its tensors' names, their names in its files.
    factor: of rotary positions.
    """

    name: str
    family: str
    room: int
    revision: str
    described: str
    stored: dict[str, str]
    outline: Outline
    factor: float


@dataclass(frozen=True)
class Record:
    """What a proof was made with, and what it found. code: hashes of the files that ran.

    Beside it lie, by tower, the frequencies of rotary positions and the logits to compare with.
    """

    made_with: dict[str, str]
    code: dict[str, str]
    towers: dict[str, Known]


class Recalled(NamedTuple):
    """A zip whose towers were proved before, what reads it, and the hash of its manifest."""

    model: Zipper
    reader: Fused
    manifest: str


def wanted() -> bool:
    """Whether this process may go by records, and write them."""
    here = torch.get_default_device().type == "cpu" and not torch.is_inference_mode_enabled()
    return here and os.environ.get("ZIPPER_PROOFS") != "0" and not _imported()


def recall(local: hub.Local, dtype: torch.dtype | None) -> Recalled | None:
    """The zip in this folder, where there is a record of it that holds here and now. dtype: of its
    weights in memory; None = as saved."""
    try:
        made_with = _made_with(local.folder, dtype)
        path = files.cached(_file(made_with))
        if path is None:
            return None
        record, tensors = _read(path)
        if record.made_with != made_with or record.code != _hashes(record.code):
            return None
        return _recalled(local, dtype, record, tensors)
    except Exception:  # whatever it is, the proof says it better, or does without the record
        return None


def remember(local: hub.Local, model: Zipper, dtype: torch.dtype | None) -> None:
    """Write a record of a zip that was just loaded from this folder, and was not changed since.

    Nothing is written of a zip with an adapter, or with a tower that `fused` does not know, and
    where no cache can be written.
    """
    if any(pin.lora is not None for pin in model.config.towers.values()):
        return
    towers, tensors, code = dict[str, Known](), dict[str, Tensor](), set[str]()
    with suppress(Exception):  # what loads well may be more than a record can say
        for name, pin in model.config.towers.items():
            tower = model.towers[name]
            assert isinstance(tower, Tower)
            turns = _turns(tower)
            towers[name] = _known(tower, pin, turns, dtype)
            tensors |= {f"{name}.inverse": turns.inverse, f"{name}.truth": truth(tower)}
            code |= _code(tower)
        made_with = _made_with(local.folder, dtype)
        _write(_file(made_with), Record(made_with, _hashes(code), towers), tensors)


def _imported() -> bool:
    return "transformers" in sys.modules


def _made_with(folder: Path, dtype: torch.dtype | None) -> dict[str, str]:
    """All that a proof depends on beside the code that ran; the manifest stands for all files."""
    transformers = find_spec("transformers")
    return {
        "files": files.sha256(folder / checkpoint.MANIFEST),
        "dtype": f"{dtype} where {torch.get_default_dtype()} is the default",
        "zipper": str(_hashes(str(path) for path in PACKAGE.rglob("*.py"))),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": f"{version('transformers')} {transformers and transformers.origin}",
        "python": sys.version,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _file(made_with: Mapping[str, str]) -> str:
    return f"proof-{hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()}"


def _hashes(paths: Iterable[str]) -> dict[str, str]:
    return {path: files.sha256(Path(path)) for path in sorted(paths)}


def _code(tower: Tower) -> set[str]:
    """The files, but torch's, of the model's classes and of what these files import."""
    kinds = set(chain.from_iterable(type(module).__mro__ for module in tower.model.modules()))
    homes = {sys.modules[kind.__module__] for kind in kinds}
    homes = {home for home in homes if home.__name__.partition(".")[0] not in ("torch", "builtins")}
    for home in [*homes]:
        for value in [*vars(home).values()]:
            name = (
                value.__name__
                if isinstance(value, ModuleType)
                else getattr(value, "__module__", None)
            )
            if isinstance(name, str) and name.startswith("transformers.") and name in sys.modules:
                homes.add(sys.modules[name])
    return {file for home in homes if (file := getattr(home, "__file__", None))}


def _known(tower: Tower, pin: TowerConfig, turns: Rotary, dtype: torch.dtype | None) -> Known:
    """What there is to know of a tower. Raises UnsupportedTower where its files do not hold it."""
    found, place = plain(tower), _place(pin.source, pin.revision)
    if not found.silu:
        raise UnsupportedTower(f"{tower.name} has another activation than SiLU.")
    return Known(
        name=tower.name,
        family=tower.family,
        room=tower.room,
        revision=pin.revision,
        described=files.sha256(place / "config.json"),
        stored=_stored(tower, place, getattr(torch, pin.dtype), dtype),
        outline=found.outline,
        factor=turns.factor,
    )


def _turns(tower: Tower) -> Rotary:
    """Its rotary positions by our formula. Raises UnsupportedTower where a bit of them differs."""
    given = plain(tower).turns
    inverse, factor = getattr(given, "inv_freq", None), getattr(given, "attention_scaling", None)
    if isinstance(inverse, Tensor) and isinstance(factor, int | float):
        turns, like = (
            Rotary(inverse.detach().float(), float(factor)),
            next(tower.parameters()).detach(),
        )
        position = torch.arange(min(tower.room, COMPARED))[None]
        pairs = zip(turns(like, position), given(like, position), strict=True)
        if all(torch.equal(ours, own) for ours, own in pairs):
            return turns
    raise UnsupportedTower(f"{tower.name} computes its rotary positions in another way.")


def _stored(
    tower: Tower, place: Path, kept: torch.dtype, dtype: torch.dtype | None
) -> dict[str, str]:
    """Under which name its files hold each of its tensors, tied ones perhaps once. Raises
    UnsupportedTower where they are not there as they were loaded."""
    there, held, found = _where(place), tower.base(), {}
    for name, tensor in held.items():
        names = [name, *(other for other, same in held.items() if same is tensor)]
        stored = next((other for other in names if other in there), None)
        if stored is None or not isinstance(tensor, nn.Parameter):
            raise UnsupportedTower(f"{tower.name} is stored under other names than it has.")
        found[name] = stored
    read = _tensors(place, found.values(), kept)
    if not all(
        torch.equal(read[found[name]].to(dtype or kept), tensor) for name, tensor in held.items()
    ):
        raise UnsupportedTower(f"{tower.name} is not stored as it is.")
    return found


def _place(source: str | Path, revision: str) -> Path:
    """The folder of a tower that was loaded before."""
    return hub.as_folder(source) or hub.tower(str(source), revision)


def _where(place: Path) -> dict[str, Path]:
    """By tensor, the file that transformers reads it from."""
    names = {"model.safetensors"}
    if not (place / "model.safetensors").is_file():
        names = {*files.read_json(place / checkpoint.INDEX)["weight_map"].values()}
    found = dict[str, Path]()
    for name in names:
        found |= dict.fromkeys(files.header(place / name), place / name)
    return found


def _tensors(place: Path, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a tower's files, in a dtype."""
    wanted, where = {*names}, _where(place)
    found = dict[str, Tensor]()
    for path in {where[name] for name in wanted}:
        with safe_open(path, framework="pt") as file:
            found |= {
                name: file.get_tensor(name).to(dtype) for name in wanted if where[name] == path
            }
    return found


def _recalled(
    local: hub.Local, dtype: torch.dtype | None, record: Record, tensors: Mapping[str, Tensor]
) -> Recalled | None:
    """The zip of a record; None where a tower of it lies elsewhere and is another one now."""
    checkpoint.check(local.folder, local.root)
    config = ZipperConfig.from_dict(files.read_json(local.folder / checkpoint.CONFIG)["config"])
    towers, pins = {}, {}
    for name, pin in config.towers.items():
        known = record.towers[name]
        source = base(local.folder, name, pin)
        place = _place(source, known.revision)
        if files.sha256(place / "config.json") != known.described:
            return None
        stored = _tensors(place, known.stored.values(), getattr(torch, pin.dtype))
        weights = {tensor: stored[name] for tensor, name in known.stored.items()}
        inside = pin.source == f"towers/{name}"  # there it was checked with all files
        if not inside and fingerprint(weights) != pin.digest:
            return None
        turns = Rotary(tensors[f"{name}.inverse"], known.factor)
        towers[name] = Proved(
            known.name,
            known.family,
            known.room,
            known.outline,
            weights,
            turns,
            tensors[f"{name}.truth"],
        )
        pins[name] = replace(pin, source=hub.absolute(source), relative="", revision=known.revision)
    model = Zipper.assemble(local.folder, towers, replace(config, towers=pins), dtype)
    return Recalled(model, Fused(model), record.made_with["files"])


def _read(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """What `_write` wrote; raises whatever it raises where that was not this."""
    content = path.read_bytes()
    if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
        raise ZipperError(f"{path} is damaged.")
    tensors = load(content[64:])
    return files.parse(
        Record, json.loads(tensors.pop("record").numpy().tobytes()), str(path), {}
    ), tensors


def _write(name: str, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """In one step, for others may read it meanwhile; behind a hash of all the rest, for others may
    write it too."""
    said = torch.frombuffer(bytearray(json.dumps(asdict(record)).encode()), dtype=torch.uint8)
    content = save({"record": said, **tensors})
    place = files.cache_folder()
    with files.replacing(place / name) as beside:
        beside.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
        beside.chmod(0o600)
    for old in sorted(place.glob("proof-*"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
        old.unlink(missing_ok=True)
