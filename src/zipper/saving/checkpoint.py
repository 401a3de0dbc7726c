"""The zip file: a folder that exists whole or not at all, whose every byte is accounted for, and
that asks for nothing absurd.

A saved folder holds zipper.json (the configuration), zip.safetensors (what zipping added),
towers/<name>/ (trained towers, as transformers saves them), modalities/<name>/ and modalities.json,
and manifest.json (SHA-256 of every other file), which is written last. README.md is for people and
not in the manifest. No pickle anywhere. Nothing here knows what the tensors mean.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zipper.errors import DamagedFile, ZipperError
from zipper.saving.files import (
    MOST_LAYERS,
    Entry,
    check_finite,
    flush,
    header,
    read_through,
    refuse_infinite,
    saving,
)
from zipper.saving.files import read_json as read_json
from zipper.saving.files import sha256 as sha256
from zipper.saving.files import write_json as write_json
from zipper.towers import mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel as PreTrainedModel
else:
    # What it is: transformers takes seconds to import, and what was proved before goes without.
    PreTrainedModel = nn.Module

CONFIG, TENSORS, MANIFEST, PINS, CARD = (
    "zipper.json",
    "zip.safetensors",
    "manifest.json",
    "modalities.json",
    "README.md",
)

#: What lies at the top of a saved folder, also of one whose manifest is lost.
TOP = (CONFIG, TENSORS, MANIFEST, PINS, CARD, "towers", "modalities")
INDEX = "model.safetensors.index.json"
SIZES = ("width", "layers", "vocabulary")

Headers = dict[str, dict[str, Entry]]  # by file, by tensor

_NAME = r"[a-z][a-z0-9_]*"  # of a tower
_TOWER_FILE = (
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json"
)
# Settings by which a config.json could bring in code, another file or another kernel. `save_tower`
# writes none of them, except of a model with compressed weights, which no tower that is trained or
# taken along can be.
_CODE = re.compile(r"auto_map|custom_|transformers_weights|_?(attn|experts)_implementation")
_FOREIGN = re.compile(rf"{_CODE.pattern}|quantization_config|compression_config")
# What a killed save leaves: the folder being written (or, after its place was taken, the one
# before), the one before where there is no exchange, the one being removed; then eight random
# letters. Nobody's own backup is called that.
_LEFT = re.compile(r"\.(?P<name>.+)\.zipper-(?P<kind>new|old|gone)\.\w{8}")
#: Of a file in a saved folder: nothing that leads out of it.
_LISTED = re.compile(r"(\w[\w.-]*/)*\w[\w.-]*")
_DEPTH = re.compile(r"layer|block|depth")  # of such things a model has at most MOST_LAYERS
MOST_COMPUTED_BYTES = 160 << 20  # of buffers that no file holds; GPT-Neo 2.7B has 128 MiB of masks


@contextmanager
def whole(folder: Path, prove: Callable[[Path], Any] | None = None) -> Iterator[Path]:
    """Write a folder so that a reader sees the old one or the new one, never a mix: yields a
    temporary sibling, and on success adds the manifest, flushes everything to the disk and puts it
    into place. On failure the old folder is untouched.

    prove: looks at the new folder before that, and raises a ZipperError for one that could not be
    loaded.

    On Linux the old folder and the new one change places in one step. Elsewhere, and on file
    systems that cannot, there is a moment
    without either: killed in it, the old one is put back by the next `whole` or `clean`. A
    ZipperError refuses to replace a folder that is not one of ours, and says what is safe where the
    disk is full, read-only or broken.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one
    with saving(folder, "What was saved before is as it was."):
        _check_free(folder)
        _make(folder.parent)
        clean(folder.parent)
        with _beside(folder, "new") as temporary:
            try:
                temporary.chmod(0o755)
                yield temporary
                for path in inside(temporary):
                    flush(path)
                seal(temporary)
                if prove is not None:
                    proven(temporary, folder, prove)
                _carry(folder, temporary)
                flush(temporary / MANIFEST)
                flush(temporary)
                _place(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    with saving(
        folder, "It is whole and in its place, but a power cut may bring back the one before."
    ):
        flush(folder.parent)
    # The old one; not before the new one is sure to stay.
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def rehearsal(folder: Path, prove: Callable[[Path], Any]) -> Iterator[Path]:
    """As `whole`, but nothing takes the folder's place: what a save would end in is known before
    there is anything to lose."""
    folder = Path(os.path.realpath(folder))
    with saving(folder, "Nothing was changed."):
        _check_free(folder)
        _make(folder.parent)
        with _beside(folder, "new") as temporary:
            try:
                yield temporary
                seal(temporary)
                proven(temporary, folder, prove)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def proven(temporary: Path, folder: Path, prove: Callable[[Path], Any]) -> None:
    """A ZipperError, in words of the folder that is to be, where what lies in another could not be
    loaded."""
    try:
        prove(temporary)
    except ZipperError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT):
                raise cause from None  # the disk's fault, not the model's: `saving` says so
            cause = cause.__cause__
        said = str(error).replace(str(temporary), str(folder))
        raise ZipperError(
            f"{folder} was not saved, for it could not be loaded again: {said}"
        ) from error


def _check_free(folder: Path) -> None:
    """A ZipperError for a place that holds what is none of ours."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    # One of both may be damaged or lost.
    listed, config = _named_in(folder / MANIFEST), (folder / CONFIG).is_file()
    if not (folder / MANIFEST).is_file() or not (listed or config):
        raise ZipperError(
            f"{folder} exists and holds something else than a saved model. Choose another folder "
            "or empty it."
        )


def _carry(folder: Path, temporary: Path) -> None:
    """What somebody put beside the files of a saved folder (git does) stays beside the new ones."""
    known = {name.partition("/")[0] for name in (*TOP, *_named_in(folder / MANIFEST))}
    for path in folder.iterdir() if folder.is_dir() else ():
        place = temporary / path.name
        if path.name in known or place.exists():
            continue
        copies = [place]
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, place, symlinks=True)
            copies += inside(place)
        else:
            shutil.copy2(path, place, follow_symlinks=False)
        for copy in copies:
            if not copy.is_symlink():
                flush(copy)


def _named_in(manifest: Path) -> set[str]:
    """The files that a manifest of ours names; none where it is no such."""
    try:
        found = json.loads(manifest.read_bytes())["files"]
        return {*found} if CONFIG in found else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def seal(folder: Path) -> None:
    """Write the manifest of a folder: the hash of every file in it, but not of README.md and of
    hidden ones (the hub's)."""
    found = ((path, path.relative_to(folder)) for path in sorted(inside(folder)) if path.is_file())
    own = {
        name.as_posix(): path
        for path, name in found
        if name.parts[0][0] != "." and str(name) not in (MANIFEST, CARD)
    }
    if strange := [name for name in own if not _LISTED.fullmatch(name)]:
        raise ZipperError(
            f"A model cannot hold the file {strange[0]!r}: names are of letters, digits, '_', '-' "
            "and '.', and do not begin with '.' or '-'. Have it written under another name."
        )
    (folder / MANIFEST).write_bytes(_manifest({name: sha256(path) for name, path in own.items()}))


def remove(folder: Path) -> None:
    """Take a saved folder away, if there is one: in one rename, so that no reader ever sees half of
    it."""
    if folder.exists():
        with (
            saving(folder, "Nothing else was touched.", "removed"),
            _beside(folder, "gone") as gone,
        ):
            try:
                os.rename(folder, gone / folder.name)
            finally:
                shutil.rmtree(gone, ignore_errors=True)


def clean(place: Path) -> None:
    """Take away what killed saves and removals left in a folder; what a live process is writing
    stays.

    An old folder whose successor did not come into its place goes back there.
    """
    left = [(path, name) for path in place.glob(".*") if (name := _LEFT.fullmatch(path.name))]
    if left:
        flush(place)  # what was put into its place stays there, before what was in it is deleted
    for path, name in left:
        with _locked(path, alone=True) as dead:
            if not dead:
                continue
            if (
                name["kind"] == "old"
                and (path / name["name"]).exists()
                and not (place / name["name"]).exists()
            ):
                os.rename(path / name["name"], place / name["name"])
                flush(place)
            shutil.rmtree(path, ignore_errors=True)


def newest(folders: Iterable[Path]) -> Path | None:
    """The last of these saved folders that is whole, with a warning for each that is passed over;
    None if there is none.

    Raises a ZipperError for one that cannot be read: it may be whole, and whoever goes on without
    it would lose it.
    """
    for folder in reversed([*folders]):
        try:
            check(folder)
        except (ZipperError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise ZipperError(
                    f"{folder} cannot be read: {cause}. It may be whole, so none before it is "
                    "taken instead. Make it readable and try again, or delete it."
                ) from error
            warnings.warn(f"Skipping a checkpoint that is not whole. {error}", stacklevel=2)
        else:
            return folder
    return None


def inside(folder: Path) -> Iterator[Path]:
    """Every file and folder in a folder. One that cannot be listed is an error (Path.rglob passes
    over it)."""

    def stop(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=stop):
        yield from (Path(place) / name for name in (*folders, *names))


def _make(folder: Path) -> None:
    """Make a folder and those above it, and flush that they are there."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


@contextmanager
def _beside(folder: Path, kind: str) -> Iterator[Path]:
    """A new folder beside another, which `clean` leaves alone for as long as this process lives."""
    with ExitStack() as stack:
        while True:
            place = Path(
                tempfile.mkdtemp(prefix=f".{folder.name}.zipper-{kind}.", dir=folder.parent)
            )
            with suppress(FileNotFoundError):  # another's `clean` came before the lock: once more
                stack.enter_context(_locked(place, alone=False))
                if place.exists():
                    break
        yield place


@contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[bool]:
    """Hold a folder, with others or alone; whether that could be had. Whoever holds it alone is
    waited for. The system lets go when the process dies."""
    import fcntl  # not on Windows, where a model can be read but not saved

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        if not alone:
            raise
        yield False  # whoever wrote it is done with it, or it is somebody else's
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
            held = True
        except OSError:  # somebody holds it; or the file system has no locks, and nobody can know
            held = False
        yield held
    finally:
        os.close(descriptor)


def _place(new: Path, folder: Path) -> None:
    """Put a folder in the place of another, if there is one; in one step where the system can."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        with _beside(folder, "old") as aside:
            old = aside / folder.name
            try:
                os.rename(folder, old)
                _follow(old, new, folder)
            finally:
                with suppress(OSError):
                    # unless the old one lies there still: `clean` will know what to do
                    aside.rmdir()


def _follow(old: Path, new: Path, folder: Path) -> None:
    """Put a new folder where an old one was, the old one where the new one was; on failure the old
    one back."""
    try:
        os.rename(new, folder)
    except BaseException as error:
        try:
            os.rename(old, folder)
        except OSError:
            raise ZipperError(
                f"{folder} could not be saved: {error}. What was saved before lies in {old}; the "
                "next save puts it back."
            ) from None
        raise
    with suppress(OSError):
        os.rename(old, new)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step (renameat2, Linux 3.15); False where the system or
    the file system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28, musl 1.2.6
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def check(folder: Path, root: Path | None = None) -> tuple[Headers, dict[str, str]]:
    """Every file of a saved folder is there and has the hash that the manifest names, and no other
    lies where one would be read.

    root: the files may really lie anywhere in it; a snapshot in the hub's cache holds links.
    Default: the folder itself. Returns the headers of the safetensors files, and by file the first
    tensor that holds NaN or infinity, "" for none: a file is read once. A ZipperError names the
    file that is damaged, missing, foreign or elsewhere.
    """
    if not os.path.isfile(folder / MANIFEST):
        what = (
            "has no manifest.json, so it is not a saved model or was only half copied"
            if os.path.isdir(folder)
            else "does not exist"
        )
        raise ZipperError(
            f"{folder} {what}. Give the folder that save_pretrained or `zipper train` wrote."
        )
    roots = [place.resolve() for place in (folder, root) if place is not None]
    _check_place(folder / MANIFEST, roots)
    files = read_json(folder / MANIFEST).get("files")
    if (
        not isinstance(files, dict)
        or CONFIG not in files
        or _manifest(files) != (folder / MANIFEST).read_bytes()
    ):
        raise DamagedFile(
            f"{folder / MANIFEST} is damaged: it is no list of the model's files. Copy the folder "
            "again."
        )
    for name in files:
        if not _LISTED.fullmatch(name):
            raise ZipperError(
                f"{folder / MANIFEST} names {name!a}, which lies outside its folder. Do not use "
                "this file."
            )
        if not (folder / name).is_file():
            raise ZipperError(
                f"{folder / name} is missing, {MANIFEST} lists it. Copy the folder again."
            )
        _check_place(folder / name, roots)
    for name in _readable(folder):
        if name not in (*files, MANIFEST):
            raise ZipperError(
                f"{folder / name} is not in {MANIFEST}: it did not come with this model. Take it "
                "away."
            )
    headers = {name: header(folder / name) for name in files if name.endswith(".safetensors")}
    infinite = {}
    for name, digest in files.items():
        if name in headers:
            seen = hashlib.sha256()
            infinite[name] = read_through(folder / name, headers[name], seen.update)
            found = seen.hexdigest()
        else:
            found = sha256(folder / name)
        if found != digest:
            raise DamagedFile(
                f"{folder / name} is damaged: its content hash is not the one in {MANIFEST}. Copy "
                "the folder again."
            )
    return headers, infinite


def save(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], record: Any
) -> None:
    """Write a zip's own files into an existing folder (use inside `whole`)."""
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS
    )
    versions = {package: version(package) for package in ("torch", "transformers", "safetensors")}
    write_json(
        folder / CONFIG, {"format": 1, "config": config, "versions": versions, "record": record}
    )


def save_tower(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write a model as transformers does, with these tensors, but without the settings of its
    config.json by which code could come
    in: many repositories of the hub name some beside a model that transformers knows. They are
    never followed, so nothing is lost.
    """
    with _savable(model), without_bars():
        model.save_pretrained(folder, state_dict=dict(tensors))
    _strip(folder / "config.json")


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws no bars meanwhile, a tower is loaded or written in a moment; what the
    user has set holds again afterwards."""
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda bar, given, named: bar(*given, **named | {"disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def check_tower(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Raises the ZipperError in which loading this model from what `save_tower` writes would end;
    writes no weights."""
    from transformers.core_model_loading import revert_weight_conversion

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "towers" / "tower"
        with _savable(model):
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        _strip(folder / "config.json")
        kinds = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
        held = revert_weight_conversion(model, dict(tensors))
        entries = {
            name: Entry(kinds.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes)
            for name, t in held.items()
        }
        try:
            _check_model(folder, entries, None)
        except ZipperError as error:
            said = str(error).replace(f"{folder}{os.sep}", "its ")
            raise ZipperError(
                f"{type(model).__name__} could be trained and saved, but not loaded again: {said}"
            ) from error


@contextmanager
def _savable(model: PreTrainedModel) -> Iterator[None]:
    """A model with settings of generation that transformers saves: it loads some, as of sampling
    without sampling, that it refuses to save. A zip does not follow them."""
    from transformers import GenerationConfig

    own = model.generation_config
    try:
        with tempfile.TemporaryDirectory() as place:
            own.save_pretrained(place)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = own


def _strip(path: Path) -> None:
    """Take the settings out of a config.json by which code could come in."""
    written = read_json(path)
    write_json(path, without_code(written))


def load(folder: Path, root: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(configuration, record) of a saved zip, after `check` and after everything that its files ask
    for was compared with what
    they hold: a tower with the model that its config.json describes, every parameter with a finite
    number.

    What the configuration says of links is left to whoever knows links (`tensors`). A ZipperError
    names the file.
    """
    return _examined(folder, *check(folder, root))


def examine(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`load` of what this process has written: its hashes are not computed again."""
    return _examined(
        folder,
        {name: header(folder / name) for name in _listed(folder) if name.endswith(".safetensors")},
    )


def _examined(
    folder: Path, headers: Headers, infinite: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """infinite: what `check` found; None where nothing was read yet."""
    data = read_json(folder / CONFIG)
    if (
        data.get("format") != 1
        or not isinstance(data.get("config"), dict)
        or not isinstance(data.get("record") or {}, dict)
    ):
        raise ZipperError(
            f"{folder / CONFIG} has format {data.get('format')!a:.80}; this version of zipper "
            "reads format 1."
        )
    towers = _towers(folder / CONFIG, data["config"])
    inside = {
        f"towers/{name}": tower
        for name, tower in towers.items()
        if tower["source"] == f"towers/{name}"
    }
    _check_parts(folder, _listed(folder), towers, inside)
    for place, tower in inside.items():
        shards = {
            Path(name).name: entries
            for name, entries in headers.items()
            if name.startswith(f"{place}/")
        }
        _check_model(folder / place, _held(folder / place, shards), tower)
    double = any(tower.get("dtype") == "float64" for tower in towers.values())
    for name, entries in headers.items():
        for tensor, entry in () if double else entries.items():
            if entry.dtype == "F64":
                raise ZipperError(
                    f"{folder / name}: {tensor} is of type F64, but no tower of {folder / CONFIG} "
                    "is in float64."
                )
        if infinite is None:
            check_finite(folder / name, entries)
        else:
            refuse_infinite(folder / name, infinite[name])
    return data["config"], data.get("record") or {}


def tensors(folder: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new parameters; names, shapes and kinds are compared with `wanted` (on any device, also
    meta) before any memory is taken for them."""
    path = compare(folder, wanted)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise DamagedFile(
            f"{path} is damaged or not a safetensors file: {error}. Copy the folder again."
        ) from error


def compare(folder: Path, wanted: Mapping[str, Tensor]) -> Path:
    """The file of the new parameters, which holds those that are wanted. Raises a ZipperError where
    it does not."""
    path = folder / TENSORS
    _compare(path, header(path), wanted, folder / CONFIG)
    return path


def _listed(folder: Path) -> list[str]:
    return [*read_json(folder / MANIFEST)["files"]]


def _manifest(files: Mapping[str, Any]) -> bytes:
    """The one way to write it: whatever was changed in a manifest, also white space, is found."""
    return (json.dumps({"files": files}, indent=1) + "\n").encode()


def _check_place(path: Path, roots: Iterable[Path]) -> None:
    real = path.resolve()
    if not any(real.is_relative_to(root) for root in roots):
        raise ZipperError(
            f"{path} is a link to {real}, which lies outside its folder. Do not use this folder."
        )


def _readable(folder: Path) -> Iterator[str]:
    """Names of the files that somebody would read, if they were there; folders that are links are
    none of ours."""
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        if here == Path():
            folders[:] = [name for name in folders if name in ("towers", "modalities")]
            names = [name for name in names if name.endswith((".json", ".safetensors"))]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from ((here / name).as_posix() for name in (*names, *links))


def _towers(path: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the configuration says of its towers, as far as files depend on it."""
    towers = config.get("towers")
    if not isinstance(towers, dict) or not towers:
        raise ZipperError(f"{path} is not the configuration of a zip: it names no towers.")
    for name, tower in towers.items():
        sizes = [tower.get(key) for key in SIZES] if isinstance(tower, dict) else []
        source = tower.get("source") if isinstance(tower, dict) else None
        if (
            not re.fullmatch(_NAME, name)
            or not sizes
            or any(type(size) is not int or not 0 < size < 1 << 31 for size in sizes)
        ):
            raise ZipperError(
                f"{path} is not the configuration of a zip: {name!a:.80} is no tower with "
                f"{', '.join(SIZES)}."
            )
        if (
            not isinstance(source, str)
            or not source.isprintable()
            or ".." in re.split(r"[/\\]", source)
        ):
            raise ZipperError(
                f"{path} is not the configuration of a zip: the tower {name!r} comes from "
                f"{source!a:.80}."
            )
        if source.startswith("towers/") and source != f"towers/{name}":
            raise ZipperError(
                f"{path} says that the tower {name!r} lies in {source!a:.80}. Do not use this file."
            )
    return towers


def _check_parts(
    folder: Path,
    files: Iterable[str],
    towers: Mapping[str, Mapping[str, Any]],
    inside: Iterable[str],
) -> None:
    """The folder has every part that its configuration asks for, and in towers/ and modalities/
    nothing else."""
    pinned = (folder / PINS).is_file()
    if pinned:
        pins = read_json(folder / PINS)
        if pins.keys() != towers.keys() or not all(
            isinstance(p, str) and re.fullmatch(r"[0-9a-f]{64}", p) for p in pins.values()
        ):
            raise ZipperError(
                f"{folder / PINS} should hold one hash for each of {sorted(towers)}; it is about "
                f"{[*pins][:5]!a:.200}."
            )
    parts = {f"modalities/{name}": tower for name, tower in towers.items() if pinned}
    there = {*files, *(str(Path(name).parent) for name in files)}
    if missing := sorted({TENSORS, *(f"{place}/config.json" for place in inside), *parts} - there):
        raise ZipperError(
            f"{folder / missing[0]} is missing, {folder / CONFIG} asks for it. Save the model "
            "again."
        )
    for name in files:
        place, _, file = name.rpartition("/")
        ours = place in parts or (place in inside and re.fullmatch(_TOWER_FILE, file))
        if name.startswith(("towers/", "modalities/")) and not ours:
            raise ZipperError(
                f"{folder / name} belongs to no tower of {folder / CONFIG}. Do not use this folder."
            )
        # A tokenizer says some 100 bytes of each token; what says much more is none, and would take
        # memory to find out.
        if (
            place in parts
            and file.endswith(".json")
            and (folder / name).stat().st_size
            > (most := 1_000_000 + 500 * parts[place]["vocabulary"])
        ):
            raise ZipperError(
                f"{folder / name} has more than {most} bytes, for a vocabulary of "
                f"{parts[place]['vocabulary']}."
            )


def _check_settings(path: Path, described: Mapping[str, Any]) -> None:
    """Raises a ZipperError for settings by which code comes in, or that no model has."""
    for key, value in _settings(described):
        if _FOREIGN.match(key):
            raise ZipperError(
                f"{path} sets {key!a:.80}, by which other code or files come in. Do not use this "
                "file."
            )
        if isinstance(value, int | float) and abs(value) > (
            MOST_LAYERS if _DEPTH.search(key) else 1 << 53
        ):
            raise ZipperError(f"{path} sets {key!a:.80} to {value!a:.30}, which no model has.")


def _check_model(folder: Path, held: Mapping[str, Entry], pin: Mapping[str, Any] | None) -> None:
    """The files of a tower hold the tensors of the model that its config.json describes, and that
    is of the pinned size.

    held: all tensors. pin: None = of any size. The model is built without memory, and not before
    what it is built of is known to be no more than the files hold.
    """
    from transformers import AutoConfig, GenerationConfig  # seconds
    from transformers.core_model_loading import revert_weight_conversion

    path, generation = folder / "config.json", folder / "generation_config.json"
    described = read_json(path)
    if generation.is_file():
        read_json(generation)
    _check_settings(path, described)
    if described.get("model_type") not in [*mapping.classes()]:
        raise ZipperError(
            f"{path} describes no causal language model that transformers knows: "
            f"{described.get('model_type')!a:.80}."
        )
    try:
        if generation.is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        sizes = dict(
            zip(SIZES, (text.hidden_size, text.num_hidden_layers, text.vocab_size), strict=True)
        )
        pinned = sizes if pin is None else {size: pin[size] for size in SIZES}
        if sizes == pinned:
            with torch.device("meta"), _Few(1_000 + 50 * len(held)):
                model: Any = mapping.auto().from_config(config, trust_remote_code=False)
            wanted = revert_weight_conversion(model, model.state_dict(keep_vars=True))
    except Exception as error:  # whatever a stranger's settings lead transformers to
        raise ZipperError(
            f"{path} describes no model that can be built: {error!s:.300}. Do not use this file."
        ) from error
    if sizes != pinned:
        raise ZipperError(
            f"{path} describes a tower of {sizes}, {folder.parents[1] / CONFIG} one of {pinned}."
        )
    computed = sum(b.nbytes for name, b in model.named_buffers() if name not in model.state_dict())
    if computed > MOST_COMPUTED_BYTES:
        raise ZipperError(
            f"{path} asks for {computed} bytes of tables that no file holds. Do not use this file."
        )
    stored = {id(wanted[name]) for name in held.keys() & wanted.keys()}
    tied = {
        name for name, tensor in wanted.items() if name not in held and id(tensor) in stored
    }  # saved under another name
    weights = folder / (INDEX if (folder / INDEX).is_file() else "model.safetensors")
    _compare(
        weights, held, {name: tensor for name, tensor in wanted.items() if name not in tied}, path
    )


def _held(folder: Path, shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Entry]:
    """All tensors of a tower, whose files are those that the index names, if there are several."""
    held, where = dict[str, Entry](), dict[str, str]()
    for file, entries in shards.items():
        held.update(entries)
        where.update(dict.fromkeys(entries, file))
    path = folder / INDEX
    if path.is_file():
        if read_json(path).get("weight_map") != where or len(where) < sum(
            map(len, shards.values())
        ):
            raise ZipperError(
                f"{path} does not say which file holds which tensor. Do not use this folder."
            )
    elif [*shards] != ["model.safetensors"]:
        raise ZipperError(
            f"{folder} should hold model.safetensors; it holds {sorted(shards)[:3]} without an "
            "index."
        )
    return held


def _compare(
    path: Path, held: Mapping[str, Entry], wanted: Mapping[str, Tensor], configuration: Path
) -> None:
    """A ZipperError where a file does not hold what its configuration asks for."""
    if held.keys() != wanted.keys():
        odd = sorted(held.keys() ^ wanted.keys())[:3]
        raise ZipperError(
            f"{path}: the tensors are not those that {configuration} asks for (differs in "
            f"{odd!a:.300})."
        )
    for name, entry in held.items():
        shape = tuple(wanted[name].shape)
        if entry.shape != shape:
            raise ZipperError(
                f"{path}: {name} has shape {entry.shape}, {configuration} wants {shape}."
            )
        if entry.real != wanted[name].is_floating_point():
            raise ZipperError(
                f"{path}: {name} is of type {entry.dtype}, {configuration} wants "
                f"{wanted[name].dtype}."
            )


def without_code(data: Any) -> Any:
    """A nested configuration without the settings by which code could come in."""
    if isinstance(data, dict):
        return {key: without_code(item) for key, item in data.items() if not _CODE.match(key)}
    return [without_code(item) for item in data] if isinstance(data, list) else data


def _settings(data: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a nested configuration with its value."""
    if isinstance(data, dict):
        yield from data.items()
        data = [*data.values()]
    for item in data if isinstance(data, list) else ():
        yield from _settings(item)


class _Few(TorchFunctionMode):
    """Stops what is built inside after so many calls of torch, so that no setting makes it go on
    for ever."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Counts."""
        self.left -= 1
        if self.left < 0:
            raise ZipperError("it has more parts than its files hold tensors")
        return function(*args, **(kwargs or {}))


def check_built(
    kind: Any, settings: Mapping[str, Any], held: Mapping[str, Entry], path: Path, weights: Path
) -> Any:
    """The configuration of a model of transformers of the class `kind`, whose weights hold every
    tensor that these settings ask for, and nothing else.

    path, weights: the files that they came from, for errors. The model is built without memory, and
    not before what it is built of is known to be no more than the file holds. Raises ZipperError.
    """
    _check_settings(path, settings)
    try:
        config = kind.config_class.from_dict(dict(settings))
        with torch.device("meta"), _Few(2_000 + 200 * len(held)):
            model = kind(config)
        wanted = model.state_dict(keep_vars=True)
    except Exception as error:  # whatever a stranger's settings lead transformers to
        raise ZipperError(
            f"{path} describes no {kind.__name__} that can be built: {error!s:.300}. Do not use "
            "this file."
        ) from error
    computed = sum(b.nbytes for name, b in model.named_buffers() if name not in wanted)
    if computed > MOST_COMPUTED_BYTES:
        raise ZipperError(
            f"{path} asks for {computed} bytes of tables that no file holds. Do not use this file."
        )
    _compare(weights, held, wanted, path)
    return config
