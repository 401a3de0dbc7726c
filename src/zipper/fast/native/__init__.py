"""The compiled step: step.cpp, built for this CPU by its own compiler at first use.

Where there is no compiler (a C++ one named c++, or what CXX names, with OpenMP) decoding goes by
torch's kernels, slower but right.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from zipper.saving import files

#: Kinds of weights that it knows.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
#: Rows of weights that lie together, column by column; of bfloat16 two columns at a time. As in
#: step.cpp.
PANEL = 32
#: Bytes of memory that weights are laid out in at once, of a large page, of a line of the cache.
CHUNK, LARGE, LINE = 64 << 20, 2 << 20, 64
CPU = Path("/proc/cpuinfo")
SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = (
    "-std=gnu++17 -O3 -march=native -fopenmp -fno-math-errno -ffp-contract=off -shared -fPIC -w"
).split()


class Matrix(Structure):
    """A matrix of weights in panels."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
        *((name, c_int32) for name in ("kind", "out", "in")),
    )


class Norm(Structure):
    """A layer norm, or where there is no bias one by the root mean square."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class Block(Structure):
    """A block like Llama's."""

    _fields_ = (
        *((name, Norm) for name in ("norm", "second", "query", "key")),
        *((name, Matrix) for name in ("qkv", "out", "gate", "up", "down")),
        *((name, c_int32) for name in ("heads", "key_heads", "head_width")),
        ("scale", c_float),
    )


class Link(Structure):
    """What a tower does to read another. reads: what makes keys and values of the other's states,
    ReLU between them."""

    _fields_ = (
        *((name, Norm) for name in ("norm", "second", "source")),
        *((name, Matrix) for name in ("query", "out", "up", "down")),
        ("reads", POINTER(Matrix)),
        *((name, c_int32) for name in ("depth", "heads", "head_width", "half")),
    )


class Input(Structure):
    """What stands between embeddings and the first block."""

    _fields_ = (("layers", POINTER(Matrix)), ("depth", c_int32), ("residual", c_int32))


class Token(Structure):
    """A token: its sequence's buffer of keys and values, the room in it, how many tokens came
    before, which token it is, and the number of its sequence."""

    _fields_ = (
        ("cache", c_void_p),
        *((name, c_int64) for name in ("room", "past", "id", "place")),
    )


class Memory(Structure):
    """What a sequence sees through a link: keys and values, the room there, and how many it is."""

    _fields_ = (("held", c_void_p), ("room", c_int64), ("slots", c_int64))


class Unread(Structure):
    """States that a link has not read yet, and where their keys and values go: behind `past`."""

    _fields_ = (
        ("link", POINTER(Link)),
        *((name, c_void_p) for name in ("states", "held", "cos", "sin")),
        *((name, c_int64) for name in ("tokens", "room", "past")),
    )


class Stage(Structure):
    """One of the first four, in the order of the tower: an input projection, a block, a link, or a
    place where states are kept."""

    _fields_ = (
        ("input", POINTER(Input)),
        ("block", POINTER(Block)),
        ("link", POINTER(Link)),
        *((name, c_void_p) for name in ("keep", "cos", "sin")),
        *((name, c_int32) for name in ("layer", "seen", "last")),
    )


class Call(Structure):
    """A step."""

    _fields_ = (
        ("stages", POINTER(Stage)),
        ("tokens", POINTER(Token)),
        ("memory", POINTER(Memory)),
        ("spoken", POINTER(c_int32)),
        *((name, c_void_p) for name in ("cos", "sin", "table", "logits")),
        ("norm", Norm),
        ("head", Matrix),
        *(
            (name, c_int32)
            for name in (
                *("n_stages", "n_tokens", "n_places", "n_spoken", "width", "threads", "half"),
            )
        ),
    )


def matrix(
    panels: Tensor, scale: Tensor | None, bias: Tensor | None, out: int, width: int
) -> Matrix:
    """Of a weight that was `laid_out`, out x width. The tensors must live as long as it."""
    return Matrix(panels.data_ptr(), pointer(scale), pointer(bias), KINDS[panels.dtype], out, width)


def laid_out(weight: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "panels columns row together"]:
    """A copy in panels, filled up by zeros; together: 2 columns of bfloat16, else 1. It lies behind
    the weights that were laid out
    before it and in large pages: a step walks through gigabytes in that order, and where pages are
    small it waits for addresses (a fifth of the bandwidth, docs/log.md).
    """
    out, width = weight.shape
    together = 2 if weight.dtype == torch.bfloat16 else 1
    panels = F.pad(weight, (0, -width % together, 0, -out % PANEL)).reshape(
        -(-out // PANEL), PANEL, -(-width // together), together
    )
    place = _PAGES.take(panels.nbytes)
    panels = panels.transpose(1, 2)
    return place.view(weight.dtype).view(panels.shape).copy_(panels)


@final
class Pages:
    """Memory that is given away piece by piece, each behind the one before and at a line of the
    cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of the memory that was asked for last; it lives as long as a matrix in it.
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """So many bytes that nobody else has."""
        with self._lock:
            if len(self._free) < size:
                self._free = _large_pages(max(size, CHUNK))
            place, self._free = self._free[:size], self._free[-(-size // LINE) * LINE :]
        return place


_PAGES = Pages()


def _large_pages(size: int) -> Tensor:
    """So many bytes of zeros. Where the system has no large pages, they are small."""
    # Not shared with a process that is forked off.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    memory = mmap.mmap(-1, size + LARGE, **private)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    return found[-found.data_ptr() % LARGE :]


def pointer(tensor: Tensor | None) -> int | None:
    """Where its numbers stand; none is null."""
    return None if tensor is None else tensor.data_ptr()


def array(kind: Any, items: Sequence[Any]) -> Any:
    """An array of structures, or of tuples of their fields."""
    return (kind * len(items))(*items)


def step(
    stages: Any,
    tokens: Sequence[tuple[int, int, int, int, int]],
    memory: Sequence[Sequence[tuple[int, int, int]]],
    spoken: Any,
    angles: tuple[Tensor, Tensor],
    table: Float[Tensor, "vocabulary width"],
    norm: Norm,
    head: Matrix,
) -> Float[Tensor, "spoken vocabulary"]:
    """Embeddings of tokens through the stages, those of the `spoken` ones to logits in float32.
    stages, spoken: arrays of `Stage` and of c_int32. tokens: fields of `Token`. memory: fields of
    `Memory`, by link as the stages count them and by sequence. angles: cosine and signed sine of
    every position, for blocks. table: embeddings, in the dtype of the keys and values of blocks.
    """
    # Whatever the defaults are.
    logits = torch.empty((len(spoken), head.out), dtype=torch.float32, device="cpu")
    tensors = (part.data_ptr() for part in (*angles, table, logits))
    shape = (
        len(stages),
        len(tokens),
        tokens[-1][-1] + 1,
        len(spoken),
        table.shape[1],
        torch.get_num_threads(),
        table.dtype == torch.bfloat16,
    )
    given = array(Token, tokens), array(Memory, [*chain.from_iterable(memory)])
    library().zipper_step(Call(stages, *given, spoken, *tensors, norm, head, *shape))
    return logits


def read(unread: Sequence[Unread]) -> None:
    """Links read states: keys and values go where they are kept."""
    library().zipper_read(array(Unread, unread), len(unread), torch.get_num_threads())


def product(matrix: Matrix, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
    """A product alone, its bias included, in float32. What a token gets does not depend on the
    others, to the bit."""
    x = x.float().contiguous()
    y = x.new_empty((len(x), matrix.out))
    library().zipper_product(matrix, x.data_ptr(), len(x), torch.get_num_threads(), y.data_ptr())
    return y


def compiler() -> list[str]:
    """The command of the C++ compiler. Raises ValueError for an open quote in CXX."""
    return shlex.split(os.environ.get("CXX") or "c++")


@cache
def library() -> Any:
    """The compiled code, or None and a warning where it cannot be had; None without one if
    ZIPPER_NATIVE=0."""
    if os.environ.get("ZIPPER_NATIVE") == "0":
        return None
    try:
        return _load([*compiler(), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))])
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "The compiled step could not be had, decoding goes by torch and takes about twice as "
            f"long: {said.strip()[-500:]} Install a C++ compiler with OpenMP (CXX names another "
            "than c++), or set ZIPPER_NATIVE=0 to do without.",
            stacklevel=2,
        )
        return None


def _load(compiler: Sequence[str]) -> Any:
    """From the cache, under a name made of all that decides what is compiled: source, compiler,
    flags and what this CPU can do. What lies there wants no compiler."""
    decides = [*compiler, _machine(compiler), SOURCE.read_text(encoding="utf-8")]
    name = hashlib.sha256("\0".join(decides).encode()).hexdigest()[:16]
    for built in files.every_cached(f"step-{name}.so"):
        with contextlib.suppress(OSError):
            if _whole(built):
                return _declared(ctypes.CDLL(str(built)))
    refused = list[str]()
    for home in files.cache_folders():
        built = _build(compiler, home / f"step-{name}.so")
        try:
            return _declared(ctypes.CDLL(str(built)))
        except OSError as error:
            refused.append(str(error))
    if not refused:
        files.cache_folder()  # raises: there is none
    raise OSError(
        f"it was built, and cannot be loaded: {'; '.join(refused)}. Where programs may not be run "
        "from the cache (noexec), XDG_CACHE_HOME names another place."
    )


def _machine(compiler: Sequence[str]) -> str:
    """What this CPU can do: as Linux tells it, elsewhere as the compiler does."""
    with contextlib.suppress(OSError):
        told = re.findall(r"(?m)^(?:flags|Features|CPU part)\s*:.*$", CPU.read_text())
        if told:
            return "\n".join(sorted({*told}))
    asked = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def _build(compiler: Sequence[str], place: Path) -> Path:
    """Compiles the step to a file that ends in its own hash."""
    # Others may build it at the same time.
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        part = Path(folder) / place.name
        subprocess.run(
            [*compiler, str(SOURCE), "-o", str(part)], capture_output=True, text=True, check=True
        )
        with part.open("rb+") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)
        part.chmod(0o700)
        files.flush(part)
        return part.replace(place)


def _whole(built: Path) -> bool:
    """Whether a file is what was built: of a damaged one the system loads a part and dies."""
    content = built.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _declared(loaded: Any) -> Any:
    """With what its functions take and give."""
    loaded.zipper_step.argtypes = [POINTER(Call)]
    loaded.zipper_read.argtypes = [POINTER(Unread), c_int32, c_int32]
    loaded.zipper_product.argtypes = [POINTER(Matrix), c_void_p, c_int32, c_int32, c_void_p]
    for function in (loaded.zipper_step, loaded.zipper_read, loaded.zipper_product):
        function.restype, function.errcheck = c_int32, _check_memory
    return loaded


def _check_memory(lacking: int, *_: Any) -> None:
    if lacking:
        raise MemoryError("There is no memory left for a step of decoding.")
