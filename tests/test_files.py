"""Files of strangers: what they say is compared with what they are before it is believed."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zipper.errors import ZipperError
from zipper.saving import files
from zipper.saving.files import (
    HELD,
    MOST_INTEGER,
    check_finite,
    flush,
    header,
    held,
    parse,
    read_json,
    read_through,
    saving,
    settle,
    sha256,
    write,
    write_json,
)

#: Of floating-point numbers.
KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Wheel:
    size: int
    kind: Literal["front", "back"] = "front"


@dataclass(frozen=True)
class Cart:
    """One of every type that parse knows."""

    wheels: tuple[Wheel, ...]
    load: float = 0.0
    open: bool = True
    name: str | None = None
    parts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] | None = None


LIMITS = {"size": (1, 100), "parts": (0, 9)}
FULL = {
    "wheels": [{"size": 3}, {"size": 5, "kind": "back"}],
    "load": 2,
    "open": False,
    "name": "blue",
    "parts": {"axle": 2},
    "notes": {"of": ["any", None, 1.5]},
}


def test_a_dataclass_comes_back_from_json_with_its_types() -> None:
    assert parse(Cart, FULL, "x.json", LIMITS) == Cart(
        (Wheel(3), Wheel(5, "back")), 2.0, False, "blue", {"axle": 2}, {"of": ["any", None, 1.5]}
    )
    assert type(parse(Cart, FULL, "x.json", LIMITS).load) is float
    assert parse(Cart, {"wheels": []}, "x.json", {}) == Cart(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wheels": None}, r"x.json, wheels: it is None; it must be of type list"),
        ({"wheels": [3]}, r"x.json, wheels: it is 3; it must be an object"),
        ({"wheels": [{}]}, r"x.json, wheels: it lacks the key 'size'"),
        (
            {"wheels": [{"size": 0}]},
            r"x.json, wheels, size: it is 0; it must lie between 1 and 100",
        ),
        ({"wheels": [{"size": 10**30}]}, r"size: it is 10+; it must lie between 1 and 100"),
        ({"wheels": [{"size": True}]}, r"size: it is True; it must be of type int"),
        ({"wheels": [{"size": 1.0}]}, r"size: it is 1.0; it must be of type int"),
        (
            {"wheels": [{"size": 1, "kind": "side"}]},
            r"kind: it is 'side'; it must be one of front, back",
        ),
        (
            {"wheels": [{"size": 1, "kind": ["front"]}]},
            r"kind: it is \['front'\]; it must be one of",
        ),
        ({"load": math.nan}, r"load: it is nan; it must lie between"),
        ({"load": math.inf}, r"load: it is inf; it must lie between"),
        ({"load": 10**400}, r"load: it is 10+\.\.\.; it must be of type float"),
        ({"load": True}, r"load: it is True; it must be of type float"),
        ({"open": 1}, r"open: it is 1; it must be of type bool"),
        ({"name": 3}, r"name: it is 3; it must be of type str"),
        ({"parts": {"axle": 10}}, r"x.json, parts, 'axle': it is 10; it must lie between 0 and 9"),
        ({"parts": []}, r"parts: it is \[\]; it must be of type object"),
        (
            {"colour\n": "red"},
            r"x.json: it has the key 'colour\\n', which this version of zipper does not know",
        ),
    ],
)
def test_what_has_another_type_or_lies_outside_the_limits_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZipperError, match=message):
        parse(Cart, FULL | change, "x.json", LIMITS)


def test_json_is_readable_and_lists_of_numbers_take_a_line(tmp_path: Path) -> None:
    data = {
        "edits": [1, -2.5, 1e-7],
        "deep": [[1, 2], [3], []],
        "text": ["[\n 1\n]", "[1, 2]"],
        "mixed": [None, 1],
        "none": {},
    }
    write_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == data == read_json(tmp_path / "a.json")
    assert (
        ' "edits": [1, -2.5, 1e-07],\n' in text
        and "  [1, 2],\n  [3],\n" in text
        and "  null,\n  1\n" in text
    )


def test_json_has_no_nan_null_stands_for_it(tmp_path: Path) -> None:
    write_json(
        tmp_path / "x.json",
        {"a": [math.nan, 1.5, (math.inf, None)], "b": tmp_path, "c": torch.float16, "d": {1: True}},
    )
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, None]],
        "b": str(tmp_path),
        "c": "torch.float16",
        "d": {"1": True},
    }
    with pytest.raises(TypeError, match="set does not belong in JSON"):
        write_json(tmp_path / "x.json", {"a": {1}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is not a number that JSON has"),
        (b'{"a": -1e999}', "'-1e999' is not a number that JSON has"),
        (b'{"a": {"b": 1, "b": 1}}', "a key is given twice"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "digits"),
        (b'{"a": "' + b"a" * 1_000 + b'"}', "it has more than 1000 bytes"),
        (b'\xff{"a": 1}', "utf-8"),
    ],
)
def test_json_that_pythons_parser_lets_through_or_chokes_on_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ZipperError, match=rf"x.json is not readable JSON: .*{message}"):
        read_json(tmp_path / "x.json", 1_000 if "more than" in message else 1_000_000)


def test_json_has_as_many_bytes_as_it_may_and_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": 1}')
    assert read_json(tmp_path / "x.json", 8) == {"a": 1}
    with pytest.raises(ZipperError, match="it has more than 7 bytes"):
        read_json(tmp_path / "x.json", 7)
    (tmp_path / "x.json").write_bytes(b"[1]")
    with pytest.raises(ZipperError, match=r"x.json should hold a JSON object; it holds a list"):
        read_json(tmp_path / "x.json")


def test_a_file_whose_disk_fails_while_its_lines_are_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ZipperError, match=r"rows.jsonl cannot be read: Input/output error"):
        next(files.lines(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 299_999, 599_999])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, value: float, place: int
) -> None:
    tensors = {
        "odd": torch.zeros(3, dtype=torch.int8),
        "large": torch.full((600_000,), torch.finfo(dtype).max, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    check_finite(tmp_path / "x.safetensors", header(tmp_path / "x.safetensors"))
    tensors["large"][place] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ZipperError, match=r"x.safetensors: the tensor large holds NaN or infinity"):
        check_finite(tmp_path / "x.safetensors", header(tmp_path / "x.safetensors"))
    # One reading gives both: the hash, and the tensor.
    seen = hashlib.sha256()
    path = tmp_path / "x.safetensors"
    assert read_through(path, header(path), seen.update) == "large"
    assert seen.hexdigest() == sha256(path)


def test_a_header_says_of_every_tensor_where_it_lies(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b": torch.randn(4, 5),
        "c": torch.tensor(2.0, dtype=torch.float16),
        "d": torch.tensor([True, False]),
        "e": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content, found = (tmp_path / "x.safetensors").read_bytes(), header(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = found[name]
        assert (entry.shape, entry.real) == (tuple(tensor.shape), tensor.is_floating_point())
        np.testing.assert_array_equal(
            np.frombuffer(content[entry.start : entry.stop], tensor.numpy().dtype),
            tensor.numpy().ravel(),
        )


def test_a_file_without_tensors_is_read_through_all_the_same(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.safetensors", hashlib.sha256()
    save_file({}, path, metadata={"format": "pt"})
    assert header(path) == {} and read_through(path, {}, seen.update) == ""
    assert seen.hexdigest() == sha256(path)


def described(entries: Any, payload: int = 0, length: int | None = None, blanks: int = 0) -> bytes:
    """A safetensors file of this header."""
    text = json.dumps(entries).encode() + b" " * blanks
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + bytes(payload)


def entry(start: int, stop: int, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """What a header says of a tensor of bytes."""
    return {
        "dtype": "U8",
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(7), "it has 7 bytes, fewer than its header asks for"),
        (described({}, length=3), "it has 10 bytes, fewer than its header asks for"),
        (described({}, blanks=files.MOST_HEADER_BYTES), r"its header has \d+ bytes; at most"),
        (described([]), "its header is no object"),
        (described({"a": entry(0, 2), "b": entry(3, 4)}, 4), "'b' does not begin where"),
        (described({"a": entry(0, 2), "b": entry(1, 3)}, 3), "'b' does not begin where"),
        (described({"a": entry(1, 2)}, 2), "'a' does not begin where"),
        (described({"a": entry(0, 2)}, 3), r"it has \d+ bytes, its header accounts for \d+"),
        (described({"a": entry(0, 2)}, 1), r"it has \d+ bytes, its header accounts for \d+"),
        (described({"a": entry(0, 2, [3])}, 2), r"'a' of shape \[3\] does not fill"),
        (described({"a": entry(0, 1, [1] * 9)}, 1), "'a' has the shape"),
        (described({"a": entry(0, 1, [True])}, 1), "'a' has the shape"),
        (described({"a": entry(0, 0, [0, 1 << 53])}), "'a' has the shape"),
    ],
    ids="short cut long list gap overlap late more less unfilled deep bool huge".split(),
)
def test_a_header_by_which_not_every_byte_has_its_place_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ZipperError, match=rf"x.safetensors is damaged or not .*: {message}"):
        header(path)
    path.write_bytes(described({"b": entry(2, 3), "a": entry(0, 2, [1] * 7 + [2])}, 3))
    assert [*header(path)] == ["a", "b"]  # in the order of their bytes


# --- writing


def test_a_file_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace, seen = tmp_path / "file", os.replace, []

    def look(a: Path, b: Path) -> None:
        seen.append((path.read_bytes() if path.exists() else None, Path(a).read_bytes()))
        replace(a, b)

    monkeypatch.setattr(os, "replace", look)
    for content in (b"old", b"new"):
        write(path, content)
    assert seen == [(None, b"old"), (b"old", b"new")]
    assert path.read_bytes() == b"new"
    (tmp_path / ".file.zipper-new").write_bytes(b"what a killed writer left")
    write(path, b"newer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"newer")]


def test_a_link_stays_one_and_a_name_may_be_as_long_as_can_be(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, there = tmp_path / "link.json", tmp_path / "real" / "file.json"
    link.symlink_to(there)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(there.read_text()) == {"a": 1}
    longest = tmp_path / f"{'a' * 250}.json"
    write(longest, b"long")
    assert longest.read_bytes() == b"long"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link.json", longest.name}


def test_what_goes_wrong_while_a_file_is_written_is_told_as_it_is(tmp_path: Path) -> None:
    for error in (FileNotFoundError, BlockingIOError, KeyboardInterrupt):
        with pytest.raises(error, match="mine"), files.replacing(tmp_path / "file"):
            raise error("mine")
        with pytest.raises(error, match="mine"), held(tmp_path / "folder"):
            raise error("mine")
    assert not [*tmp_path.iterdir()]


WRITER = """
import sys
from pathlib import Path
from zipper.saving.files import write_json
for n in range(300):
    write_json(Path(sys.argv[1]), {"numbers": [int(sys.argv[2])] * 3000})
"""


def test_two_writers_of_one_file_never_show_a_part(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    write_json(path, {"numbers": [0] * 3000})
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(n)]) for n in (1, 2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        numbers = json.loads(path.read_text())["numbers"]
        assert len(numbers) == 3000 and len({*numbers}) == 1
        reads += 1
    assert [writer.wait() for writer in writers] == [0, 0] and reads
    assert [found.name for found in tmp_path.iterdir()] == ["one.json"]


def test_who_waits_for_a_folder_gets_it_though_the_other_leaves_it_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "runs", Path.mkdir

    def taken_away(self: Path, **options: Any) -> None:
        made(self, **options)
        monkeypatch.setattr(Path, "mkdir", made)
        self.rmdir()

    monkeypatch.setattr(Path, "mkdir", taken_away)
    with held(folder):
        assert (folder / HELD).is_file()


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_its_file_system_cannot_flush_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EINVAL))
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "x"),
            "No space left on device. All is well. Make room on the disk and try again.",
        ),
        (
            OSError(errno.EROFS, "x", "/a/b"),
            "Read-only file system (/a/b). All is well. Make the place writable, or choose another",
        ),
        (
            Exception("Quota! (os error 122)"),
            "Disk quota exceeded. All is well. Make room in your quota and try again.",
        ),
        (OSError("something else"), "something else. All is well. Mend that and try again."),
    ],
)
def test_what_the_system_says_becomes_what_happened_what_is_safe_and_what_to_do(
    error: Exception, message: str
) -> None:
    with pytest.raises(ZipperError) as raised, saving(Path("run"), "All is well."):
        raise error
    assert str(raised.value).startswith(f"run could not be saved: {message}")
    with pytest.raises(ZipperError) as raised, saving(Path("run"), "All is well."):
        raise ZipperError("it was read back") from error
    assert str(raised.value).startswith(f"run could not be saved: {message}")


@pytest.mark.parametrize(
    "error", [KeyError("x"), ZipperError("The base is foreign."), Exception("42")]
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, saving(Path("run"), "All is well."):
        raise error
    assert raised.value is error
    missing = ZipperError("x does not exist. Give another.")
    missing.__cause__ = FileNotFoundError(errno.ENOENT, "x")
    with (
        pytest.raises(ZipperError, match=r"does not exist. Give another"),
        saving(Path("run"), "All is well."),
    ):
        raise missing


# --- what a program says is held to the same limits


@dataclass(frozen=True)
class Load:
    """What settles itself, of the types that recipes have."""

    weight: float = 1.0
    places: Sequence[Mapping[str, int]] | None = None
    shares: str | Mapping[str, float] = "all"
    ends: tuple[float, float] = (0.0, 1.0)
    modules: str | list[str] = "all"
    path: str = ""
    cart: Cart = field(default_factory=lambda: Cart(()))

    def __post_init__(self) -> None:
        settle(self, {"weight": (0.5, 9.0), "places": (1, MOST_INTEGER)})


def test_what_a_program_gives_becomes_plain_and_the_configurations_own() -> None:
    places, shares = [{"axle": np.int64(2)}], {"a": 1, "b": np.float32(0.5)}
    load = Load(np.float64(3), places, shares, [1, 2], {"wheel", "axle"}, Path("x") / "y")
    assert load == Load(
        3.0, [{"axle": 2}], {"a": 1.0, "b": 0.5}, (1.0, 2.0), ["axle", "wheel"], "x/y"
    )
    assert {type(n) for n in (load.weight, *load.shares.values(), *load.ends)} == {float}  # type: ignore[union-attr]
    places[0]["axle"], shares["a"] = 7, 7
    assert load.places == [{"axle": 2}] and load.shares == {"a": 1.0, "b": 0.5}


def test_a_truth_of_numpy_becomes_a_plain_one_and_is_no_number() -> None:
    assert parse(Cart, FULL | {"open": np.bool_(False)}, "x.json", LIMITS).open is False
    with pytest.raises(ZipperError, match=r"load: it is .*; it must be of type float"):
        parse(Cart, FULL | {"load": np.bool_(True)}, "x.json", LIMITS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": math.nan}, "weight is nan; it must lie between 0.5 and 9"),
        ({"weight": 10**400}, "weight is 10+.*of type float"),
        ({"weight": "1"}, "weight is '1'; it must be of type float"),
        ({"weight": True}, "weight is True; it must be of type float"),
        ({"places": [{"axle": 0}]}, "places, 'axle' is 0; it must be at least 1"),
        ({"places": {"axle": 1}}, "places is .* of type list"),
        ({"shares": {"a": math.inf}}, "shares, 'a' is inf; it must lie between"),
        ({"shares": {1: 1.0}}, "a key of shares is 1; it must be of type str"),
        ({"shares": 3}, "shares is 3; it must be of type str"),
        ({"ends": (1.0,)}, "ends is .1.0,.; it must have 2 items"),
        ({"cart": {"wheels": [{}]}}, "cart, wheels: it lacks the key 'size'"),
    ],
)
def test_what_a_program_gives_and_no_file_may_ask_for_is_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZipperError, match=message):
        Load(**given)


# --- a folder that is written is held


HOLDER = """
import sys, time
from pathlib import Path
from zipper.saving.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    other = holder(folder)
    try:
        with (
            pytest.raises(
                ZipperError,
                match=rf"{folder} is in use: process {other.pid} on .* writes it. Wait for it, "
                r"end it",
            ),
            held(folder),
        ):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with held(folder):
        assert [path.name for path in folder.iterdir()] == [HELD]
        with (
            pytest.raises(ZipperError, match=rf"in use: process {os.getpid()} on"),
            held(folder),
        ):  # another thread of this one
            pass
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]
    (folder / "kept").unlink()
    with held(folder):
        pass
    assert not folder.exists() and folder.parent.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_who_holds_a_folder_is_told_whatever_stood_there_before(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "kept").touch()
    (tmp_path / HELD).write_text(f"process 123456789 on {'x' * 150}")  # who was killed
    with (
        held(tmp_path),
        pytest.raises(ZipperError, match=rf"in use: process {os.getpid()} on \S+ writes it"),
        held(tmp_path),
    ):
        pass
    with (tmp_path / HELD).open("x") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # who has not said yet who it is
        with pytest.raises(ZipperError, match="in use: another process writes it"), held(tmp_path):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_where_there_are_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path), held(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_lock_on_a_file_that_was_taken_away_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before lets go between our opening of the file and our locking it."""
    import fcntl

    flock, seen = fcntl.flock, []

    def slow(descriptor: int, how: int) -> None:
        if not seen:
            (tmp_path / HELD).unlink()
        seen.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with held(tmp_path):
        assert len(seen) == 2
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(ZipperError, match="in use"), held(tmp_path):
            pass


# --- the user's cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the user's cache will be; temporary files would lie beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "home" / "zipper"


def test_the_cache_is_the_users_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.cached("a") is None and not home.exists(), "looking makes nothing"
    assert files.cache_folder() == home and home.stat().st_mode & 0o777 == 0o700
    (home / "a").write_text("")
    assert files.cached("a") == home / "a"
    (home / "a").chmod(0o664)
    assert files.cached("a") is None
    (home / "a").chmod(0o600)
    home.chmod(0o775)
    assert files.cached("a") is None
    assert files.cache_folder() == home and files.cached("a") == home / "a", "closed again"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: home.parents[1])
    assert files.cache_folder() == home.parents[1] / ".cache" / "zipper"


def test_where_the_cache_cannot_be_written_temporary_files_will_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.write_text("no folder")
    other = files.cache_folder()
    assert other.parent == home.parents[1] / "temporary" and str(os.geteuid()) in other.name
    (other / "a").write_text("")
    (other / "a").chmod(0o600)
    assert files.cached("a") == other / "a"
    other.rename(home.parents[1] / "theirs")
    # Where anybody may put things, a link may be anybody's.
    other.symlink_to(home.parents[1] / "theirs")
    assert files.cached("a") is None
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        files.cache_folder()

    def homeless() -> Path:
        raise RuntimeError("no home")

    other.unlink()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert files.cache_folder() == other
