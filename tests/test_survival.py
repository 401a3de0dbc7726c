"""Saves that are cut off: after every file operation, by every error of the disk, by a loss of
power, by a disk that is full.

Whatever happens, a reader finds the old state or the new one, the message says what is safe, and
the next save leaves no trace. The operations are caught on their way to the system, in this
process; nothing in zipper knows of it.
"""

import builtins
import ctypes
import errno
import io
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import torch
from safetensors import SafetensorError
from tiny import World

from zipper.cli import main
from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.saving import checkpoint
from zipper.training import loop, train

OLD, NEW = "What was saved before is as it was.", "It is whole and in its place"
CHANGES = (
    "write",
    "close",
    "mkdir",
    "rmdir",
    "unlink",
    "rename",
    "replace",
    "chmod",
    "fsync",
    "exchange",
    "serialize",
)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- a disk that fails when it is told to


class Gone(BaseException):
    """The process is no more: nothing that it does reaches the disk."""


class Disk:
    """Counts the file operations under a folder. The one numbered `at` is not done, or only half;
    and what follows depends on how:

    "stop": an exception, once. "dead": no operation works any more, as if the process were no more.
    "exit": it is no more. An errno: that error, once; EROFS: for every change from then on. None:
    nothing fails.
    """

    def __init__(
        self, root: Path, how: str | int | None = None, at: int = -1, exchange: bool = True
    ) -> None:
        self.root, self.how, self.at, self.exchanges = str(root), how, at, exchange
        self.done: list[str] = []
        # Inodes of files and folders that changed and were not flushed since.
        self.unsure: set[int] = set()
        # Undoes each rename of which the folder was not flushed since.
        self.moved: list[Callable[[], Any]] = []
        self.descriptors: dict[int, str] = {}

    def step(self, kind: str, half: Callable[[], Any] | None = None) -> None:
        """One operation; raises if it is its turn to fail."""
        self.done.append(kind)
        turn = len(self.done) - 1
        if (
            self.how is None
            or turn < self.at
            or (turn > self.at and self.how not in ("dead", errno.EROFS))
        ):
            return
        if self.how == errno.EROFS and not kind.startswith((*CHANGES, "open w")):
            return
        if half and turn == self.at:
            half()
        if self.how == "exit":
            os._exit(0)
        if isinstance(self.how, str):
            raise Gone
        if kind == "serialize":  # a library of Rust
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(self.how)} (os error {self.how})"
            )
        raise OSError(self.how, os.strerror(self.how))

    def cut(self, undo: bool) -> None:
        """Power is lost: what was not flushed is not there; undo: neither is a rename of which the
        folder was not flushed."""
        for move in reversed(self.moved) if undo else ():
            move()
        for place, _, names in os.walk(self.root, topdown=False):
            for name in names:
                path = Path(place, name)
                if os.stat(place).st_ino in self.unsure and place != self.root:
                    path.unlink()
                elif path.stat().st_ino in self.unsure:
                    path.write_bytes(b"")

    @contextmanager
    def watching(self) -> Iterator["Disk"]:
        """Every operation inside goes through this disk."""
        with pytest.MonkeyPatch.context() as patch:
            for name in (
                "mkdir",
                "rmdir",
                "unlink",
                "remove",
                "chmod",
                "scandir",
                "listdir",
                "open",
                "fsync",
            ):
                patch.setattr(os, name, self._plain(name, getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._rename(name, getattr(os, name)))
            opened = self._open(builtins.open)
            for module in (builtins, io):
                patch.setattr(module, "open", opened)
            for library in (safetensors.torch, safetensors.numpy):
                patch.setattr(library, "serialize_file", self._serialize(library.serialize_file))
            patch.setattr(checkpoint, "_exchange", self._exchange(checkpoint._exchange))
            yield self

    def _here(self, path: Any, dir_fd: Any = None) -> bool:
        return (
            isinstance(path, int)
            or dir_fd is not None
            or os.path.abspath(path).startswith(self.root)
        )

    def _changed(self, *paths: Any) -> None:
        self.unsure |= {os.stat(path).st_ino for path in paths}

    def _plain(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
            if self._here(path, more.get("dir_fd")):
                self.step(name)
                if name == "fsync":  # there is no other disk below to wait for
                    inode = os.fstat(path).st_ino
                    self.unsure.discard(inode)
                    if self.descriptors.get(path) == self.root:
                        self.moved.clear()
                    return None
            found = real(path, *rest, **more)
            if name == "mkdir" and self._here(path):
                self._changed(path, Path(path).parent)
            if name == "open":
                self.descriptors[found] = str(path)
            return found

        return call

    def _rename(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(a: Any, b: Any) -> None:
            if self._here(b):
                self.step(name)
                if Path(a).is_dir():
                    self.moved.append(
                        lambda: Path(b).exists() and not Path(a).exists() and real(b, a)
                    )
            real(a, b)
            if self._here(b):
                self._changed(Path(a).parent, Path(b).parent)

        return call

    def _exchange(self, real: Callable[[Path, Path], bool]) -> Callable[[Path, Path], bool]:
        def call(a: Path, b: Path) -> bool:
            if not self.exchanges:
                return False
            self.step("exchange")
            self.moved.append(lambda: a.exists() and real(a, b))
            return real(a, b)

        return call

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not self._here(path) or isinstance(path, int):
                return real(path, mode, *rest, **more)
            self.step(f"open {mode}")
            file = real(path, mode, *rest, **more)
            if mode[0] != "r":
                write, close = file.write, file.close
                self._changed(path, Path(path).parent)

                def some(content: Any) -> Any:
                    self.step("write", lambda: write(content[: len(content) // 2]))
                    return write(content)

                def last() -> None:
                    try:
                        if not file.closed:
                            self.step("close")
                    finally:
                        close()

                file.write, file.close = some, last
                file = Closing(file)
            return file

        return call

    def _serialize(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, path: Any, **more: Any) -> None:
            def half() -> None:
                real(tensors, path, **more)
                os.truncate(path, os.stat(path).st_size // 2)
                self._changed(path, Path(path).parent)

            self.step("serialize", half)
            real(tensors, path, **more)
            self._changed(path, Path(path).parent)

        return call


class Closing:
    """A file whose `with` calls its own close, as it was replaced."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


# --- a model that is saved over an older one


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def changed(world: World) -> Pipeline:
    """The model of the world with other weights: what is saved in the place of the old one."""
    pipeline = Pipeline.from_pretrained(world.zip)
    with torch.no_grad():
        for p in pipeline.model.parameters():
            p += 1
    return pipeline


@pytest.fixture(scope="module")
def new(changed: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the new state."""
    place = tmp_path_factory.mktemp("new") / "model"
    changed.save_pretrained(place)
    return files(place)


class Save:
    """A save that is tried again and again from the same old state."""

    def __init__(
        self, place: Path, old: Path, new: dict[str, bytes], save: Callable[[], None]
    ) -> None:
        self.place, self.source, self.old, self.new, self.save = place, old, files(old), new, save
        self.folder = place / "model"
        self.reset()
        with Disk(place).watching() as disk:
            save()
        self.operations = disk.done

    def reset(self) -> None:
        """The old state, and nothing beside it."""
        if os.listdir(self.place) != ["model"] or files(self.folder) != self.old:
            for path in self.place.iterdir():
                shutil.rmtree(path)
            shutil.copytree(self.source, self.folder)

    def tried(self, disk: Disk) -> BaseException | None:
        """Try it on a disk; the error, if there was one."""
        self.reset()
        with disk.watching():
            try:
                self.save()
            except (Exception, Gone) as error:
                return error
        return None

    def state(self) -> str:
        """Which state a reader finds; an AssertionError for any other."""
        checkpoint.check(self.folder)
        found = files(self.folder)
        assert found in (self.old, self.new)
        return "old" if found == self.old else "new"


@pytest.fixture(scope="module")
def model(
    world: World, changed: Pipeline, new: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Save:
    place = tmp_path_factory.mktemp("place")
    assert files(world.zip).keys() == new.keys()
    return Save(place, world.zip, new, lambda: changed.save_pretrained(place / "model"))


HOW = ["stop", "dead", errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]
EVERY = {
    "stop": 6,
    "dead": 1,
    errno.ENOSPC: 3,
    errno.EIO: 4,
    errno.EROFS: 5,
    errno.EACCES: 4,
}  # tried: each so many-th operation; make slow: all


def named(how: str | int) -> str:
    return how if isinstance(how, str) else errno.errorcode[how]


def cut_off_anywhere(model: Save, how: str | int, every: int) -> None:
    """Whatever operation fails, a reader finds the old model or the new one, and the message says
    which."""
    switch, states, told = model.operations.index("exchange"), [], set()
    for at in range(0, len(model.operations), every):
        error, operation = model.tried(Disk(model.place, how, at)), model.operations[at]
        states.append(model.state())
        assert states[-1] == ("old" if error and at <= switch else "new"), f"{operation}: {error!r}"
        if isinstance(how, str):
            assert isinstance(error, Gone), operation
        elif error is not None:
            # A folder that could not be made because it was there already is no error.
            assert isinstance(error, ZipperError), f"{operation}: {error!r}"
            assert str(error).startswith(f"{model.folder} could not be saved: {os.strerror(how)}")
            assert (OLD if states[-1] == "old" else NEW) in str(error)
            assert str(error).endswith("and try again.")
            told.add(states[-1])
    assert {*states} == {"old", "new"}
    assert isinstance(how, str) or "old" in told


@pytest.mark.parametrize("how", HOW, ids=named)
def test_a_save_cut_off_at_any_operation_leaves_the_old_model_or_the_new_one(
    model: Save, how: str | int
) -> None:
    cut_off_anywhere(model, how, EVERY[how])


@pytest.mark.slow
@pytest.mark.parametrize("how", [*HOW, errno.EDQUOT], ids=named)
def test_a_save_cut_off_at_every_operation_leaves_the_old_model_or_the_new_one(
    model: Save, how: str | int
) -> None:
    cut_off_anywhere(model, how, 1)


def test_the_old_model_is_not_given_up_before_the_new_one_is_sure_to_stay(model: Save) -> None:
    switch = model.operations.index("exchange")
    assert model.operations[switch : switch + 3] == ["exchange", "open", "fsync"]
    error = model.tried(Disk(model.place, errno.EIO, switch + 2))
    assert NEW in str(error)
    assert model.state() == "new"
    (left,) = (path for path in model.place.iterdir() if path != model.folder)
    assert files(left) == model.old


def test_a_process_that_ends_leaves_what_one_leaves_that_can_do_no_more(model: Save) -> None:
    def left() -> list[bytes]:
        return sorted(content for path in model.place.iterdir() for content in files(path).values())

    # What Python holds back of a write is lost with the process, and not with the disk, where the
    # file is closed.
    places = [
        at
        for at, operation in enumerate(model.operations)
        if operation not in ("write", "close", "fsync")
    ]
    for at in random.Random(0).sample(places, 6):
        model.tried(Disk(model.place, "dead", at))
        wanted = left()
        model.reset()
        if not (process := os.fork()):
            try:
                model.tried(Disk(model.place, "exit", at))
            finally:
                os._exit(1)
        assert os.waitpid(process, 0)[1] == 0
        assert left() == wanted
        model.state()


@pytest.mark.parametrize("undo", [False, True], ids=["as it was renamed", "renames undone"])
def test_after_a_loss_of_power_a_reader_finds_the_old_model_or_the_new_one(
    model: Save, undo: bool
) -> None:
    states = set()
    for at in range(int(undo), len(model.operations), 5):
        disk = Disk(model.place, "dead", at)
        model.tried(disk)
        disk.cut(undo)
        states.add(model.state())
    assert states == {"old", "new"}


def test_a_file_that_was_not_flushed_is_lost_with_the_power(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.watching():
        for name in ("a", "b"):
            os.mkdir(tmp_path / name)
            (tmp_path / name / "file").write_text("content")
            descriptor = os.open(tmp_path / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        descriptor = os.open(tmp_path / "a" / "file", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        (tmp_path / "a" / "later").write_text("content")
    disk.unsure.discard((tmp_path / "a").stat().st_ino)
    disk.cut(undo=False)
    assert files(tmp_path) == {"a/file": b"content", "a/later": b"", "b/file": b""}


def test_where_folders_cannot_change_places_the_next_save_puts_the_old_model_back(
    model: Save,
) -> None:
    between = 0
    model.reset()
    with Disk(model.place, exchange=False).watching() as disk:
        model.save()
    switch = disk.done.index("rename")
    for at in range(switch - 1, len(disk.done)):
        model.tried(Disk(model.place, "dead", at, exchange=False))
        between += not model.folder.exists()
        checkpoint.clean(model.place)
        assert model.state() == ("old" if at <= switch + 1 else "new")
        assert os.listdir(model.place) == ["model"]
    assert between
    error = model.tried(Disk(model.place, errno.EROFS, switch + 1, exchange=False))
    (left,) = model.place.rglob("model")
    assert f"What was saved before lies in {left}; the next save puts it back" in str(error)
    assert files(left) == model.old
    model.save()
    assert model.state() == "new"


def test_the_next_save_takes_away_what_dead_ones_left_but_nothing_else(model: Save) -> None:
    for at in range(3, model.operations.index("exchange"), 40):
        with Disk(model.place, "dead", at).watching(), pytest.raises(Gone):
            model.save()
    mine = [
        model.place / f".model.{name}"
        for name in ("old", "zipper-old", "old.20261121", "zipper-new.2026-11-21")
    ]
    for path in mine:
        path.mkdir()
    assert len(os.listdir(model.place)) == len(mine) + 2
    # A save that goes on while this one comes and goes.
    with checkpoint.whole(model.place / "other") as alive:
        (alive / "file").write_text("content")
        model.save()
        assert sorted(model.place.iterdir()) == sorted([model.folder, alive, *mine])
    checkpoint.check(model.folder)
    assert (model.place / "other" / "file").read_text() == "content"
    for path in (*mine, model.place / "other"):
        shutil.rmtree(path)


def test_a_link_to_a_model_stays_one(
    world: World, changed: Pipeline, new: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(world.zip, tmp_path / "large" / "disk")
    (tmp_path / "model").symlink_to(tmp_path / "large" / "disk")
    changed.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    placed = {"zipper.json", "manifest.json"}  # they say where towers lie, as seen from here
    found = files(tmp_path / "large" / "disk")
    assert {name: found[name] for name in found.keys() - placed} == {
        name: new[name] for name in new.keys() - placed
    }
    checkpoint.check(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["large", "model"]


def test_what_is_no_fault_of_the_disk_passes_unchanged(tmp_path: Path) -> None:
    for error in (
        KeyError("x"),
        RuntimeError("a mistake"),
        ZipperError("The tower is foreign. Give another."),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as raised, checkpoint.whole(tmp_path / "model"):
            raise error
        assert raised.value is error
    assert not os.listdir(tmp_path)


# --- a disk that is full, a disk that may only be read


@contextmanager
def largest(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes; a write beyond it fails, also in libraries that are not
    Python's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1000, 10_000])
def test_files_that_may_not_grow_leave_the_old_model(model: Save, size: int) -> None:
    model.reset()
    with largest(size), pytest.raises(ZipperError) as error:
        model.save()
    assert str(error.value).startswith(f"{model.folder} could not be saved: File too large")
    assert str(error.value).endswith(
        f"{OLD} Raise the limit on the size of files (ulimit -f) and try again."
    )
    assert model.state() == "old"
    assert os.listdir(model.place) == ["model"]


def on_a_small_disk(
    place: Path, kilobytes: int, work: Callable[[Callable[[str], None]], None]
) -> None:
    """Do the work while a disk of that size lies at a place, seen by this work alone; it may mount
    it again with other options.

    Skips where the system does not let its users have one. AssertionErrors inside are failures.
    """
    if sys.platform != "linux":
        pytest.skip("a disk of its own for one process: Linux only")
    libc, new_user, new_mounts, again = ctypes.CDLL(None, use_errno=True), 0x10000000, 0x20000, 32
    reads, writes = os.pipe()
    user, group = os.getuid(), os.getgid()
    if not (process := os.fork()):
        said = "it ended"
        try:
            said = "not allowed"
            if libc.unshare(new_user | new_mounts) == 0:
                for name, line in (
                    ("setgroups", "deny"),
                    ("uid_map", f"0 {user} 1"),
                    ("gid_map", f"0 {group} 1"),
                ):
                    Path("/proc/self", name).write_text(line)

                def mount(options: str = "", flags: int = again) -> None:
                    read_only, options = int(options == "ro"), f"size={kilobytes}k"
                    if libc.mount(
                        b"tmpfs", os.fsencode(place), b"tmpfs", flags | read_only, options.encode()
                    ):
                        raise PermissionError(os.strerror(ctypes.get_errno()))

                mount(flags=0)
                said = "failed"
                work(mount)
                said = "well"
        except PermissionError as error:
            said = said if said == "not allowed" else f"failed: {error!r}"
        except BaseException as error:
            said = f"failed: {error!r}"
        finally:
            os.write(writes, said.encode()[:60_000])
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(process, 0)
    if said == "not allowed":
        pytest.skip("users may not mount a disk of their own here")
    assert said == "well"


def test_a_full_disk_leaves_the_old_model_and_says_so(
    world: World, changed: Pipeline, tmp_path: Path
) -> None:
    wanted, seen = files(world.zip), set()
    folder = tmp_path / "model"

    def work(_: Callable[[str], None]) -> None:
        shutil.copytree(world.zip, folder)
        ballast = tmp_path / "ballast"
        ballast.write_bytes(b"")
        while True:  # fill it, then give back 8 kB at a time
            with suppress(OSError), ballast.open("ab") as file:
                file.write(bytes(4096))
                continue
            break
        for _ in range(60):
            try:
                changed.save_pretrained(folder)
            except ZipperError as error:
                assert "could not be saved: No space left on device" in str(error)
                assert f"{OLD} Make room on the disk and try again." in str(error)
                assert sorted(os.listdir(tmp_path)) == ["ballast", "model"]
                assert files(folder) == wanted
                seen.add(os.stat(ballast).st_size)
            else:
                break
            os.truncate(ballast, os.stat(ballast).st_size - 8192)
        checkpoint.check(folder)
        assert files(folder) != wanted
        assert len(seen) > 10

    on_a_small_disk(tmp_path, 2000, work)


# --- a run of training

RUN = {"steps": 12, "save_every": 4, "keep": 2, "eval_every": 12}


@dataclass
class Run:
    """A run that came to its end, and its last save, to be done again."""

    world: World
    output: Path
    before: Path  # its checkpoints before the last save
    save: Callable[[], None]

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def reset(self) -> None:
        """As it was before the last save."""
        shutil.rmtree(self.checkpoints)
        shutil.copytree(self.before, self.checkpoints)


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place, saves, real = tmp_path_factory.mktemp("run"), [], loop.save

    def save(*arguments: Any, **named: Any) -> None:
        saves.append(lambda: real(*arguments, **named))
        if len(saves) == 3:
            shutil.copytree(place / "output" / "checkpoints", place / "before")
        saves[-1]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save)
        train(world.config(place / "output", **RUN))
    assert len(saves) == 3
    return Run(world, place / "output", place / "before", saves[-1])


def steps(checkpoints: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(checkpoints.glob("step-*"))]


def cut_off_anywhere_in_a_run(run: Run, how: str | int, every: int) -> None:
    run.reset()
    old = files(run.checkpoints)
    with Disk(run.checkpoints).watching() as disk:
        run.save()
    known = old | files(run.checkpoints)
    seen: dict[tuple[int, ...], int] = {}
    for at in range(0, len(disk.done), every):
        run.reset()
        error = None
        with Disk(run.checkpoints, how, at).watching():
            try:
                run.save()
            except (ZipperError, OSError, Gone) as raised:
                error = raised
        found = steps(run.checkpoints)
        for step in found:
            checkpoint.check(run.checkpoints / f"step-{step:07d}")
        visible = {
            name: content
            for name, content in files(run.checkpoints).items()
            if not name.startswith(".")
        }
        assert visible.items() <= known.items()
        assert 8 in found, disk.done[at]
        assert error or found[-1] == 12
        if isinstance(error, ZipperError):
            assert os.strerror(int(how)) in str(error)
            assert (OLD in str(error)) == (found == [4, 8])
        elif isinstance(how, int) and error:  # the list of checkpoints could not be read
            assert isinstance(error, OSError)
            assert (disk.done[at], found) == ("scandir", [4, 8, 12])
        seen[tuple(found)] = at
        checkpoint.clean(run.checkpoints)
        assert not [*run.checkpoints.glob(".*")]
    assert sorted(seen, key=lambda found: seen[found]) == [(4, 8), (4, 8, 12), (8, 12)]


@pytest.mark.parametrize("how", HOW, ids=named)
def test_a_checkpoint_cut_off_at_any_operation_leaves_the_ones_before(
    run: Run, how: str | int
) -> None:
    cut_off_anywhere_in_a_run(run, how, 1 if how in ("dead", errno.ENOSPC) else 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW, ids=named)
def test_a_checkpoint_cut_off_at_every_operation_leaves_the_ones_before(
    run: Run, how: str | int
) -> None:
    cut_off_anywhere_in_a_run(run, how, 1)


def recipe(run: Run, output: Path, folder: Path) -> str:
    """A file with the recipe of the run, for another output."""
    path = folder / "recipe.py"
    path.write_text(
        f"import tiny\nfrom pathlib import Path\n\n"
        "def config():\n    return "
        f"tiny.World(Path({str(run.world.folder)!r})).config(Path({str(output)!r}), **{RUN!r})\n"
    )
    return str(path)


def test_zipper_train_says_that_the_disk_is_full_and_goes_on_once_it_is_not(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "output", safetensors.torch.serialize_file

    def full(tensors: Any, path: Any, **more: Any) -> None:
        if "step-0000008" in str(path):
            Path(path).write_bytes(b"half")
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        real(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "serialize_file", full)
        assert main(["train", recipe(run, output, tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    what = f"{output}/checkpoints/step-0000008 could not be saved: No space left on device."
    assert said == f"zipper train: {what} {OLD} Make room on the disk and try again."
    assert os.listdir(output / "checkpoints") == ["step-0000004"]
    checkpoint.check(output / "checkpoints" / "step-0000004")
    assert main(["train", recipe(run, output, tmp_path), "--resume"]) == 0
    run.reset()
    run.save()
    assert files(output / "checkpoints") == files(run.checkpoints)


def test_zipper_train_says_that_a_folder_is_read_only_and_harms_nothing_in_it(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = ["train", recipe(run, disk / "output", tmp_path), "--resume"]
    run.reset()

    def work(mount: Callable[[str], None]) -> None:
        shutil.copytree(run.output, disk / "output")
        before = files(disk)
        mount("ro")
        assert main(arguments) == 2
        assert files(disk) == before

    on_a_small_disk(disk, 20_000, work)
    assert "config.json cannot be written" in capfd.readouterr().err


# --- a run that is killed


@pytest.mark.slow
def test_training_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, which forks those that are killed: it must have computed nothing."""
    tool = Path(__file__).parent.parent / "tools" / "kill_test.py"
    wanted = ["--kills", "2", "--output", str(tmp_path / "found.json")]
    ended = subprocess.run([sys.executable, tool, *wanted], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = checkpoint.read_json(tmp_path / "found.json")
    assert found["kills"] >= 2
    assert found["inside"] >= 1
    assert found["same"] == found["runs"] >= 1
    assert found["failures"] == []
    assert f"{found['kills']} kills (seed 0, 1 rank)" in ended.stdout
