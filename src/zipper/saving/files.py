"""Files of strangers: what JSON and safetensors files say of themselves is checked before it is
believed.

A size is compared with a limit before memory is taken for it, a value with the type that its field
names, a tensor's place with the file it lies in. What a program says of itself in a configuration
is held to the same limits (`settle`), so that nothing is saved that would not be read. What is
written here is on the disk before it takes its place. This file knows neither zips nor models, and
does not need torch.
"""

import codecs
import errno
import hashlib
import json
import math
import os
import re
import socket
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from zipper.errors import DamagedFile, ZipperError

#: A parsed file takes up to 25 times its size; the largest one we write, of all experiments, has
#: 1 MB.
MOST_JSON_BYTES = 4 << 20
MOST_HEADER_BYTES = 4 << 20  # some 40,000 tensors; the largest models have a few thousand a file
MOST_INTEGER = 1 << 53  # beyond lie no counts
#: Blocks, and depths of any other kind, beyond which no model goes.
MOST_LAYERS = 10_000

#: Bytes of a number, by the types that we and the towers write.
WIDTH = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# The bits that are all ones in NaN and infinity, and in no other number.
_EXPONENT: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
# No string holds a line break of its own.
_NUMBERS = re.compile(r"\[\n\s+((?:[-+.eE\d]+,\n\s+)*[-+.eE\d]+)\n\s*\]")
HELD = ".held"  # in a folder that a process writes; who
_NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOSYS,
}  # of a file system that has none
_HALF = re.compile("[\ud800-\udfff]")
_UNIX = os.name == "posix"
_CHUNK = 1 << 18  # numbers looked at together: stays in the cache

_WHAT_TO_DO = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room in your quota",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EIO: "Look after the disk (dmesg names the fault)",
} | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "Make the place writable, or choose another"
)

T = TypeVar("T")
Limits = Mapping[str, tuple[int | float, int | float]]
_types: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def place(path: str | Path) -> Path:
    """A path as people write it: `~` in front is their home, whoever gave it and wherever it
    stood."""
    return Path(os.path.expanduser(path))


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file and their numbers from 1, without those that are blank and without a
    byte order mark.

    A line ends in \\n, \\r\\n or \\r and in nothing else: U+2028 and others may stand in one. They
    are bytes, because what is no UTF-8 is the fault of its line alone. Raises a ZipperError that
    names what is no file or cannot be read.
    """
    if not os.path.isfile(path):
        raise ZipperError(
            f"{path} is a folder or no plain file."
            if os.path.exists(path)
            else f"{path} does not exist."
        )
    number = 0
    try:
        with path.open("rb") as file:
            for part in file:  # up to a line feed
                for line in part.splitlines():
                    number += 1
                    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if line.strip():
                        yield number, line
    except OSError as error:
        raise ZipperError(f"{path} cannot be read: {error.strerror}.") from error


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """A JSON object in UTF-8, without NaN, infinity and repeated keys; a ZipperError names the file
    if it is none or too large."""
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"it has more than {most_bytes} bytes")
        data = _decode(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ZipperError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ZipperError(f"{path} should hold a JSON object; it holds a {type(data).__name__}.")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write JSON, one readable way for the whole project, lists of numbers on one line. JSON has no
    NaN and no infinity: null stands for them."""
    text = as_json(_plain(data), indent=1)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write(path, f"{text}\n".encode())


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON that people can read; with escapes where half a character, as in a file's name that is
    no UTF-8, has no other way to be written."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(data, indent=indent)


def write(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part, whenever
    the writer or the power goes."""
    if path.exists() and not path.is_file():  # a pipe or a terminal, which nothing may replace
        path.write_bytes(content)
        return
    with replacing(path) as beside:
        beside.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`write` for who writes a file by other means: a place beside it, which takes its place at the
    end, and is not there any more after an error."""
    path = Path(os.path.realpath(path))  # a link stays one
    # One that a killed writer left is written over; one that lives is waited for.
    beside = path.with_name(f".{_fitting_name(path.name)}.zipper-new")
    with _locked(beside, wait=True):
        try:
            yield beside
            flush(beside)
            os.replace(beside, path)
        except BaseException:  # not behind the end: the next one may have made its own there
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Hold a file that this process goes on writing, by one beside it. Raises ZipperError where
    another process that lives does, or where nothing can be written there."""
    beside = path.with_name(f".{_fitting_name(path.name)}.held")
    with ExitStack() as stack:
        with saving(path, "Nothing was written.", "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_locked(beside, wait=False))
            except BlockingIOError:
                raise ZipperError(
                    f"{path} is in use: another process writes it. Wait for it, end it or choose "
                    "another file."
                ) from None
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)  # while it is held: whoever waits sees that it is gone


def _fitting_name(name: str) -> str:
    """A name that bears an ending more; of one that is as long as can be, its hash."""
    content = os.fsencode(name)
    return name if len(content) <= 240 else hashlib.sha256(content).hexdigest()


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[int]:
    """Hold a file, made if it is not there, as no other process does: its descriptor. Raises
    BlockingIOError where another holds it, unless it is waited for. Where the system has no locks
    nobody is kept out."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, wait)
            mine, there = os.fstat(descriptor), None
            with suppress(FileNotFoundError):
                there = os.stat(path)
            if there is not None and os.path.samestat(mine, there):
                yield descriptor
                return
            # The one before took it away: the next one.
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def flush(path: Path) -> None:
    """Wait until a file, or which files a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # There are network file systems that cannot flush a folder.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder that this process writes, made if it is not there. If another process that
    lives holds it, a ZipperError says who; with `wait` a warning does, and this one waits for it.
    The system lets go when a process ends, however it ends; of an empty folder nothing stays.

    On a network file system it holds as far as that has locks (NFS from version 4 on, Lustre with
    -o flock); where there are none, and on Windows, nobody is kept out.
    """
    with ExitStack() as stack:
        with saving(folder, "Nothing was written."):
            _hold(stack, folder, wait)
        try:
            yield
        finally:
            with suppress(OSError):
                # While it is held: whoever opened it before will see that it is not there any more.
                os.unlink(folder / HELD)
                os.rmdir(folder)


def _hold(stack: ExitStack, folder: Path, wait: bool) -> None:
    """Lock the file in a folder that says who holds it (see `held`)."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who held the folder took it away, empty: once more
            try:
                descriptor = stack.enter_context(_locked(folder / HELD, wait=False))
            except BlockingIOError:
                who = (folder / HELD).read_text(errors="replace").strip() or "another process"
                said = f"{folder} is in use: {who} writes it."
                if not wait:
                    raise ZipperError(
                        f"{said} Wait for it, end it or choose another folder."
                    ) from None
                warnings.warn(f"{said} This process waits for it.", stacklevel=5)
                descriptor = stack.enter_context(_locked(folder / HELD, wait=True))
            me = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.pwrite(descriptor, me.encode().ljust(200), 0)
            return


@contextmanager
def saving(path: Path, safe: str, done: str = "saved") -> Iterator[None]:
    """Makes a ZipperError of what the system says when it cannot write: what happened, what is
    safe, what to do.

    safe: a sentence. Libraries written in Rust give the system's error in words; other errors pass
    unchanged.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ZipperError) else error
        if isinstance(cause, OSError):
            number, place = cause.errno or 0, f" ({cause.filename})" * bool(cause.filename)
        elif said := re.search(r"\(os error (\d+)\)", str(cause)):
            number, place = int(said[1]), ""
        else:
            raise
        # It says better what is missing.
        if isinstance(error, ZipperError) and number == errno.ENOENT:
            raise
        reason = os.strerror(number) if number else str(cause)
        do = _WHAT_TO_DO.get(number, "Mend that")
        raise ZipperError(
            f"{path} could not be {done}: {reason}{place}. {safe} {do} and try again."
        ) from error


def sha256(path: Path) -> str:
    """Content hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(name: str) -> Path | None:
    """A file of the user's cache, if it is there; see `every_cached`."""
    return next(every_cached(name), None)


def every_cached(name: str) -> Iterator[Path]:
    """The files of a name in the user's caches that nobody but the user and root could have
    written: code is among what lies there, and what is said to be proved."""
    there = (place / name for place in _places() if _own(place))
    return (path for path in there if path.is_file() and _own(path))


def cache_folder() -> Path:
    """The user's folder for what can be made again, in which nobody else may write.

    It is zipper in XDG_CACHE_HOME or ~/.cache; where that cannot be written, one among the system's
    temporary files. Raises OSError where there is neither.
    """
    for place in cache_folders():
        return place
    raise OSError(errno.EACCES, "no folder for a cache can be written (XDG_CACHE_HOME names one)")


def cache_folders() -> Iterator[Path]:
    """All that `cache_folder` may be, the first it is."""
    for place in _places():
        with suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _UNIX and not _own(place):
                made = place.lstat()
                if made.st_uid == os.geteuid() and stat.S_ISDIR(made.st_mode):
                    place.chmod(0o700)  # made under a umask that lets a group write
            if _own(place) and os.access(place, os.W_OK | os.X_OK):
                yield place


def _places() -> Iterator[Path]:
    with suppress(RuntimeError):  # there are users without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zipper"
    with suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"zipper-{os.geteuid() if _UNIX else 'cache'}"


def _own(path: Path) -> bool:
    """Whether nobody but this user and root can have written it; on Windows the place says so."""
    try:
        found = path.lstat() if path.parent == Path(tempfile.gettempdir()) else path.stat()
    except OSError:
        return False
    return not _UNIX or (found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022)


def parse(kind: type[T], data: Any, where: str, limits: Limits | None = None) -> T:
    """A dataclass from what JSON gave: every value has the type that its field names, numbers are
    finite and inside the limits.

    limits: (least, most) by the name of the field, in nested dataclasses too; a class that settles
    itself (`settle`) has its own. Fields that have a default may be absent. Raises a ZipperError
    that begins with `where` for unknown and missing keys and for values that do not fit.
    """
    assert isinstance(kind, type) and is_dataclass(kind)
    if not isinstance(data, dict):
        raise ZipperError(f"{where}: it is {_short(data)}; it must be an object.")
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(data.keys() - known.keys()):
        raise ZipperError(
            f"{where}: it has the key {_short(unknown[0])}, which this version of zipper does not "
            "know."
        )
    needed = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    if missing := sorted(needed - data.keys()):
        raise ZipperError(f"{where}: it lacks the key {missing[0]!r}.")
    values = {
        name: _parse(_types(kind)[name], value, f"{where}, {name}", name, limits or {})
        for name, value in data.items()
    }
    try:
        return kind(**values)
    except ZipperError as error:
        raise ZipperError(f"{where}: {error}") from error


def settle(config: Any, limits: Limits) -> None:
    """For the `__post_init__` of a frozen dataclass: what `parse` asks of a file is asked of a
    program too, numbers of numpy and paths become plain ones, and lists and dicts become the
    configuration's own, whatever becomes of the caller's.
    """
    for field in fields(config):
        try:
            value = _parse(
                _types(type(config))[field.name],
                getattr(config, field.name),
                field.name,
                field.name,
                limits,
            )
        except ZipperError as error:
            raise ZipperError(str(error).replace(": it is", " is", 1)) from None
        object.__setattr__(config, field.name, value)


class Entry(NamedTuple):
    """One tensor of a safetensors file. start, stop: its bytes, counted from the beginning of the
    file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def real(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in _EXPONENT


def header(path: Path) -> dict[str, Entry]:
    """What a safetensors file says that it holds, in the order of its bytes; nothing of the tensors
    is read.

    Every byte of the file belongs to one tensor, whose shape and type account for it. Raises a
    ZipperError that names the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it has {size} bytes, fewer than its header asks for")
            if length > MOST_HEADER_BYTES:
                raise ValueError(
                    f"its header has {length} bytes; at most {MOST_HEADER_BYTES} are read"
                )
            described = _decode(file.read(length))
        if not isinstance(described, dict):
            raise ValueError("its header is no object")
        described.pop("__metadata__", None)
        entries = {name: _entry(name, entry, 8 + length) for name, entry in described.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = 8 + length
        for name, entry in entries.items():
            if entry.start != end:
                raise ValueError(f"{_short(name)} does not begin where the tensor before it ends")
            end = entry.stop
        if end != size:
            raise ValueError(f"it has {size} bytes, its header accounts for {end}")
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{path} is damaged or not a safetensors file: {error}. Copy the folder again."
        ) from error
    return entries


def check_finite(path: Path, entries: Mapping[str, Entry]) -> None:
    """A ZipperError names the first tensor of a safetensors file that holds NaN or infinity. Takes
    no memory of its own."""
    refuse_infinite(path, read_through(path, entries, lambda part: None))


def refuse_infinite(path: Path, name: str) -> None:
    """The ZipperError for the tensor that `read_through` found; "" is none."""
    if name:
        raise ZipperError(
            f"{path}: the tensor {name} holds NaN or infinity. Use an earlier checkpoint."
        )


def read_through(path: Path, entries: Mapping[str, Entry], see: Callable[[Any], object]) -> str:
    """Read a safetensors file once, from its first byte to its last: `see` is shown every part of
    it, in order. entries: of `header`. Returns the first tensor that holds NaN or infinity, "" for
    none. Takes no memory of its own."""
    content, found = np.memmap(path, np.uint8, "r"), ""
    see(content[: min((entry.start for entry in entries.values()), default=len(content))])
    for name, entry in entries.items():
        kind, ones = _EXPONENT.get(entry.dtype, (np.uint8, 0))
        step = _CHUNK * np.dtype(kind).itemsize
        for start in range(entry.start, entry.stop, step):
            part = content[start : min(start + step, entry.stop)]
            see(part)
            if entry.real and not found and (part.view(kind) & ones == ones).any():
                found = name
    return found


def _decode(content: bytes) -> Any:
    """JSON, without what Python's parser lets through."""
    return json.loads(
        content.decode(), object_pairs_hook=unique, parse_constant=_no_number, parse_float=_finite
    )


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json`: an object whose keys are all different; a ValueError for any other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a number that JSON has")


def _finite(word: str) -> float:
    return number if math.isfinite(number := float(word)) else _no_number(_short(word))


def _plain(value: Any) -> Any:
    """What JSON can say."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
    if type(value).__module__ == "torch":  # a dtype
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in JSON")


def _parse(kind: Any, value: Any, where: str, name: str, limits: Limits) -> Any:
    """A value as a type annotation wants it, and as a new object."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return deepcopy(value) if isinstance(value, dict | list) else value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        choices = [choice for choice in inner if choice is not NoneType]
        fits = (choice for choice in choices if _holds(get_origin(choice), value))
        return _parse(next(fits, choices[0]), value, where, name, limits)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
        raise ZipperError(f"{where}: it is {_short(value)}; it must be one of {', '.join(inner)}.")
    if _holds(origin, value):
        if origin in (dict, Mapping):
            keys = [_parse(inner[0], key, f"a key of {where}", name, {}) for key in value]
            items = [
                _parse(inner[1], item, f"{where}, {_short(key)}", name, limits)
                for key, item in value.items()
            ]
            return dict(zip(keys, items, strict=True))
        items = sorted(value, key=str) if isinstance(value, Set) else [*value]
        many = inner if origin is tuple and inner[-1] is not Ellipsis else (inner[0],) * len(items)
        if len(many) != len(items):
            raise ZipperError(f"{where}: it is {_short(value)}; it must have {len(many)} items.")
        found = [
            _parse(one, item, where, name, limits) for one, item in zip(many, items, strict=True)
        ]
        return tuple(found) if origin is tuple else found
    if origin is Callable and callable(value):
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        return value if isinstance(value, kind) else parse(kind, value, where, limits)
    value = _plainly(kind, value)
    if type(value) is not kind:
        wanted = {
            tuple: "list",
            Sequence: "list",
            dict: "object",
            Mapping: "object",
            Callable: "function",
        }.get(origin or kind)
        raise ZipperError(
            f"{where}: it is {_short(value)}; it must be of type {wanted or kind.__name__}."
        )
    if kind in (int, float):
        low, high = limits.get(name, (-MOST_INTEGER, MOST_INTEGER))
        if not low <= value <= high:  # NaN is not
            bounds = (
                f"be at least {low:g}"
                if high == MOST_INTEGER and name in limits
                else f"lie between {low:g} and {high:g}"
            )
            raise ZipperError(f"{where}: it is {_short(value)}; it must {bounds}.")
    return value


def _holds(origin: Any, value: Any) -> bool:
    """Whether a value is a container as an annotation names it."""
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return origin in (list, tuple, Sequence) and isinstance(value, list | tuple | Set)


def _plainly(kind: Any, value: Any) -> Any:
    """Numbers of any library, and paths, as the plain type that is wanted; anything else as it
    is."""
    if kind is bool and isinstance(value, np.bool_):
        return bool(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if (
        isinstance(value, bool | np.bool_)
        or kind not in (int, float)
        or not isinstance(value, Integral if kind is int else Real)
    ):
        return value
    try:
        return kind(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return value


def _entry(name: str, data: Any, base: int) -> Entry:
    if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTH:
        raise ValueError(f"{_short(name)} is of type {_short(dtype)}; known are {', '.join(WIDTH)}")
    if not _counts(shape) or not _counts(offsets) or len(shape) > 8 or len(offsets) != 2:
        raise ValueError(
            f"{_short(name)} has the shape {_short(shape)} and the offsets {_short(offsets)}"
        )
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTH[dtype]:
        raise ValueError(
            f"{_short(name)} of shape {_short(shape)} does not fill its bytes {_short(offsets)}"
        )
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < MOST_INTEGER for item in value
    )


def _short(value: Any) -> str:
    """A value of a stranger's file for a message."""
    text = (
        ascii(value) if not isinstance(value, Sequence) or len(value) < 100 else ascii(value[:100])
    )
    return text if len(text) <= 100 else f"{text[:100]}..."
