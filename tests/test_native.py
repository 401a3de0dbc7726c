"""The compiled step: built where it can be, done without where not, and the same numbers whatever
it is built for."""

import _ctypes
import ctypes
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import SEED, VOCABULARY, read_one, wake
from torch import Tensor

from zipper.fast import native
from zipper.fast.reader import Fused
from zipper.fast.weights import Form, Matrix
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.testing import tiny_tower

NAMES = ["text", "speech"]
needs_compiler = pytest.mark.skipif(
    os.environ.get("ZIPPER_NATIVE") == "0" or native.library() is None, reason="no C++ compiler"
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing built and nothing loaded; the folder of what will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ZIPPER_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path / "zipper"
    native.library.cache_clear()


def made(dtype: torch.dtype = torch.float32) -> Zipper:
    """Its heads take five registers (80), or two and a half (40); its matrices have several panels,
    and parts of one."""
    widths = {"text": 320, "speech": 160}
    towers = {
        name: tiny_tower("llama", SEED[name], width, 4, VOCABULARY[name])
        for name, width in widths.items()
    }
    model = Zipper.from_towers(towers, {"text": 2}, link=LinkConfig(head_width=40))
    wake(model, True)
    return model.to(dtype)


def kind_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bfloat16" else torch.float32


@pytest.fixture(scope="module")
def model() -> Zipper:
    return made()


def decode(model: Zipper, company: int, int8: bool = False) -> Tensor:
    """Logits of one sequence, read in pieces beside so many others of other lengths: speech, a text
    too long for a step, and four tokens one by one."""
    fast, dice = Fused(model, int8=int8), random.Random(0)
    sessions = [fast.open(NAMES, NAMES) for _ in range(1 + company)]
    found = []
    for step, (tower, ids) in enumerate(
        [("speech", [3, 4, 5]), ("text", [6, 7] * 7), *[("text", [8 + i]) for i in range(4)]]
    ):
        others = [
            [dice.randrange(20) for _ in range(1 + (n + step) % 3 + 10 * (n % 2))]
            for n in range(company)
        ]
        pieces = list(zip(sessions, [ids, *others], strict=True))
        logits = read_one(fast, tower, pieces[1:] + pieces[:1])[-1]
        assert logits is not None
        found.append(logits)
    return torch.stack(found[1:])


@needs_compiler
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_company_and_threads_change_no_bit(kind: str) -> None:
    """However many tokens share a step: 1, a few, and more than a step takes."""
    model = made(kind_of(kind))
    alone = decode(model, 0, kind == "int8")
    threads = torch.get_num_threads()
    for company in (1, 4, 7, 30):
        assert torch.equal(decode(model, company, kind == "int8"), alone)
    try:
        torch.set_num_threads(3)
        assert torch.equal(decode(model, 2, kind == "int8"), alone)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_pieces_in_which_it_is_read_change_no_bit(kind: str) -> None:
    """A prompt at once, in pieces, or token by token: logits and what links read of it are
    equal."""
    model, dice = made(kind_of(kind)), random.Random(0)
    fast = Fused(model, int8=kind == "int8")
    speech, text = ([dice.randrange(20) for _ in range(n)] for n in (45, 33))

    def read(longest: int) -> Tensor:
        session, logits = fast.open(NAMES, NAMES), list[Tensor | None]()
        for tower, ids in (("speech", speech), ("text", text), ("speech", [3])):
            while ids:
                size = dice.randint(1, longest)
                logits, ids = read_one(fast, tower, [(session, ids[:size])]), ids[size:]
        assert logits[0] is not None
        return logits[0]

    whole = read(10**9)
    for longest in (1, 7, 8, 20, 44):
        assert torch.equal(read(longest), whole)


@needs_compiler
def test_defaults_of_torch_change_no_bit(model: Zipper) -> None:
    """A narrower default type would make room for half of what the step writes; a default device,
    none."""
    fast = Fused(model)

    def read() -> Tensor:
        session = fast.open(NAMES, NAMES)
        read_one(fast, "speech", [(session, [3] * 9)])
        logits = read_one(fast, "text", [(session, [5, 6])])[0]
        assert logits is not None
        return logits

    wanted = read()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        found = read()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


@needs_compiler
def test_a_read_is_one_call_of_compiled_code(
    model: Zipper, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, calls, step = Fused(model), list[int](), native.step

    def counted(stages: Any, tokens: Any, *rest: Any) -> Tensor:
        calls.append(len(tokens))
        return step(stages, tokens, *rest)

    monkeypatch.setattr(native, "step", counted)
    monkeypatch.setattr(fast, "_run", None)
    sessions = [fast.open(NAMES, NAMES) for _ in range(20)]
    read_one(fast, "speech", [(sessions[0], [3] * 70)])
    read_one(fast, "text", [(session, [5] * n) for n, session in enumerate(sessions, 1)])
    assert calls == [70, 210]


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_of_all_shapes(kind: str, bias: bool) -> None:
    """Rows that are no multiple of anything, rows longer than a part, several panels, more tokens
    than a block."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 3e-2}[kind]
    before = Matrix(
        [torch.nn.Linear(2112, 8, dtype=kind_of(kind))], Form(int8=kind == "int8", compiled=True)
    )
    for tokens in (1, 16, 131):
        assert before(torch.full((tokens, 2112), torch.nan)).isnan().all(), (
            "and in the memory that products share"
        )
    for width, out in ((39, 13), (608, 145), (2112, 1000)):
        layer = torch.nn.Linear(width, out, bias, dtype=kind_of(kind))
        matrix = Matrix([layer], Form(int8=kind == "int8", compiled=True))
        for tokens in (1, 7, 8, 15, 17, 24, 70, 131):
            x = torch.randn(tokens, width, dtype=kind_of(kind))
            torch.testing.assert_close(matrix(x), layer(x), atol=tolerance, rtol=tolerance)
            assert torch.equal(matrix(x)[-1:], matrix(x[-1:]))


@needs_compiler
def test_weights_are_laid_out_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CHUNK", 1 << 16)
    monkeypatch.setattr(native, "_PAGES", native.Pages())
    weights = [
        torch.randn(100, 40),
        torch.randn(7, 65, dtype=torch.bfloat16),
        torch.randn(3000, 64),
        torch.randn(9, 32),
    ]
    laid = [native.laid_out(weight) for weight in weights]
    for weight, found in zip(weights, laid, strict=True):
        rows, (out, width) = found.transpose(1, 2).flatten(0, 1).flatten(1), weight.shape
        assert (
            torch.equal(rows[:out, :width], weight)
            and not rows[out:].any()
            and not rows[:, width:].any()
        )
        assert found.shape[2] == native.PANEL and found.data_ptr() % native.LINE == 0
    first, second, large, _ = laid
    assert (
        first.data_ptr() % native.LARGE == 0
        and second.data_ptr() == first.data_ptr() + first.nbytes
    )
    assert large.nbytes > native.CHUNK, "more than is asked for at once"
    if sys.platform == "linux":
        lines = [
            line.split()
            for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        ]
        bounds = [(*(int(end, 16) for end in line[0].split("-")), line[1]) for line in lines]
        (rights,) = {rights for start, stop, rights in bounds if start <= first.data_ptr() < stop}
        assert rights == "rw-p", "private: a process that is forked off lays out its own"


@pytest.mark.slow
@needs_compiler
def test_it_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library() is not None
    (built,) = fresh.iterdir()
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None and built.stat().st_mtime_ns == written
    monkeypatch.setenv("CXXFLAGS", "-O1")
    native.library.cache_clear()
    assert native.library() is not None and len(list(fresh.iterdir())) == 2, (
        "other flags, other code"
    )


@pytest.fixture
def small(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `fresh`, with code that is built at once."""
    source = tmp_path / "small.cpp"
    source.write_text(
        'extern "C" void zipper_step(void*) {}\nextern "C" void zipper_product(void*) {}\n'
        'extern "C" void zipper_read(void*) {}\n'
    )
    monkeypatch.setattr(native, "SOURCE", source)
    return fresh


@needs_compiler
def test_what_is_damaged_or_could_be_somebody_elses_is_built_anew(small: Path) -> None:
    loaded = native.library()
    (built,) = small.iterdir()
    whole = built.read_bytes()
    page, most = 4096, len(whole)
    for content, mode in (
        (b"", 0o700),
        (whole[:100], 0o700),
        (whole[:page], 0o700),  # of these the system would map more than there is
        (whole[: most * 6 // 10], 0o700),
        (whole[:page] + bytes(most - page), 0o700),
        (whole, 0o770),
    ):
        _ctypes.dlclose(loaded._handle)  # else the system has it still
        built.write_bytes(content)
        built.chmod(mode)
        os.utime(built, (1, 1))
        native.library.cache_clear()
        loaded = native.library()
        assert loaded is not None and [*small.iterdir()] == [built]
        assert built.stat().st_mtime > 1 and len(built.read_bytes()) == len(whole)


@needs_compiler
def test_where_programs_may_not_be_run_from_the_cache_it_is_run_from_another_place(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    load = ctypes.CDLL

    def forbidden(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(str(small)):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(ctypes, "CDLL", forbidden)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    assert native.library() is not None and not recwarn.list
    (built,) = other.glob("zipper-*/step-*.so")
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None and built.stat().st_mtime_ns == written
    monkeypatch.setattr(tempfile, "tempdir", str(native.SOURCE))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match=r"it was built, and cannot be loaded: .*\(noexec\)"):
        assert native.library() is None


@needs_compiler
def test_what_was_built_wants_no_compiler_and_another_cpu_has_its_own(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor: 0\nflags : fpu avx2\nprocessor: 1\nflags : fpu avx2\n")
    monkeypatch.setattr(native, "CPU", told)
    assert native.library() is not None
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        native.library.cache_clear()
        assert native.library() is not None and not recwarn.list
    told.write_text("processor: 0\nflags : fpu avx2 avx512f\n")
    native.library.cache_clear()
    assert native.library() is not None and len([*small.iterdir()]) == 2
    monkeypatch.setattr(native, "CPU", tmp_path / "nowhere")  # the compiler knows
    native.library.cache_clear()
    assert native.library() is not None and len([*small.iterdir()]) == 3


@needs_compiler
@pytest.mark.parametrize(
    ("environment", "loads"),
    [
        ({"CXX": ""}, True),
        ({"CXXFLAGS": "-DNAMED='a b'"}, True),
        ({"CXXFLAGS": "-DNAMED='a"}, False),
        ({"CXX": "'c++"}, False),
        ({"CXXFLAGS": "-c"}, False),
    ],
    ids=str,
)
def test_whatever_the_compilers_environment_is_decoding_goes_on(
    small: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], loads: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if loads:
        assert native.library() is not None
        return
    with pytest.warns(UserWarning, match="decoding goes by torch"):
        assert native.library() is None


HIDDEN = """
import os, resource, torch
from zipper.fast import native
from zipper.fast.weights import Form, Matrix
matrix, most = Matrix([torch.nn.Linear(4096, 64)], Form(False, True)), 40_000
x = torch.zeros(most, 4096)
matrix(x[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
for _ in range(2):
    try:
        matrix(x)
    except MemoryError as error:
        print(error)
print(matrix(x[:1]).shape)
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_without_memory_a_step_is_an_error_and_the_process_lives(tmp_path: Path) -> None:
    hidden = {"XDG_CACHE_HOME": str(tmp_path), "CXXFLAGS": "-fvisibility=hidden -O1"}
    asked = [sys.executable, "-W", "error", "-c", HIDDEN]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | hidden)
    assert not done.returncode, done.stderr
    said = "There is no memory left for a step of decoding.\n"
    assert done.stdout == f"{said}{said}torch.Size([1, 64])\n"


@needs_compiler
def test_where_no_cache_can_be_written_it_lies_among_temporary_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(native.SOURCE))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native.library() is not None
    (built,) = tmp_path.glob("zipper-*/step-*.so")
    written = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None and built.stat().st_mtime_ns == written and not recwarn.list
    monkeypatch.setattr(tempfile, "tempdir", str(native.SOURCE))
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        assert native.library() is None


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("-mno-avx512bf16", marks=pytest.mark.slow),
        pytest.param("-mno-avx512f", marks=pytest.mark.slow),
        "-march=x86-64",
    ],
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_lesser_processors_get_the_same_numbers(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, flags: str, kind: str
) -> None:
    model = made(kind_of(kind))
    monkeypatch.setattr(native, "library", lambda: None)
    wanted = decode(model, 2, kind == "int8")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh.parent))
    monkeypatch.setenv("CXXFLAGS", flags)
    assert native.library() is not None
    found = decode(model, 2, kind == "int8")
    assert torch.equal(decode(model, 0, kind == "int8"), found), (
        "company changes no bit there either"
    )
    assert (found - wanted).norm() / wanted.norm() < {
        "float32": 1e-5,
        "bfloat16": 0.03,
        "int8": 0.02,
    }[kind]


@pytest.mark.parametrize(
    "compiler", ["no-such-compiler", f"{shlex.quote(sys.executable)} -c 'raise SystemExit(1)'"]
)
def test_without_a_compiler_decoding_goes_by_torch_and_says_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, model: Zipper, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(
        UserWarning, match=r"goes by torch(?s:.*)Install a C\+\+ compiler with OpenMP"
    ):
        assert native.library() is None
    assert decode(model, 1).isfinite().all() and native.library() is None
    assert not fresh.exists() or not list(fresh.iterdir())


def test_it_can_be_declined(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("ZIPPER_NATIVE", "0")
    assert native.library() is None and not recwarn.list and not fresh.exists()
