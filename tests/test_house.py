"""The house rules: who may import whom, what must be documented, which documentation must run, what
git may hold.

Nothing here knows what zipper computes. The first half reads the source and never imports it.
"""

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PACKAGES = ("zipper", "zipper_lab")

# A file imports only files above it (docs/architecture.md says why). The front page of a package
# stands behind its files where it names them, before them where they go by it. The front page of
# zipper names what lies below, so nothing may import from it.
ORDER = """
    zipper.errors zipper.former zipper.environment zipper.workers zipper.normaliser
    zipper.statistics zipper.evaluation
    zipper.saving.files zipper.pages zipper.strand zipper.tasks
    zipper.towers.mapping zipper.saving.checkpoint zipper.saving.hub
    zipper.towers.driver zipper.towers.proof zipper.tower zipper.towers.families zipper.towers
    zipper.link zipper.loss zipper.junctions zipper.config zipper.lockstep
    zipper.sampling zipper.reading zipper.writing zipper.generation
    zipper.saving.card zipper.saving.zips zipper.saving zipper.model
    zipper.fast.native zipper.fast.graphs zipper.fast.plain zipper.fast.session
    zipper.fast.weights zipper.fast.blocks zipper.fast.reader zipper.fast zipper.fast.recall
    zipper.audio.containers zipper.audio.sound zipper.audio zipper.audio.disturbance
    zipper.modality.kind zipper.modality.codebook zipper.modality.sound zipper.modality.text
    zipper.modality.speech zipper.modality.symbols zipper.modality.series zipper.modality.signal
    zipper.modality.pinned zipper.modality.image zipper.modality.codec
    zipper.modality.renderer zipper.modality.encoder
    zipper.modality zipper.pipeline
    zipper.inspection zipper.words zipper.verify
    zipper.data.rows zipper.data.manifests zipper.data.layouts zipper.data.extraction
    zipper.data.fitting zipper.data
    zipper.growth zipper.composition zipper.surgery zipper.measurement zipper.batch
    zipper.training.config zipper.training.building zipper.training.packing
    zipper.training.batches zipper.training.sharding zipper.training.resume zipper.training.cost
    zipper.training.loop zipper.training zipper.training.history
    zipper.doctor zipper.testing
    zipper.serving zipper.serving.refusals zipper.serving.worker zipper.serving.bodies
    zipper.serving.sounds zipper.serving.looking zipper.serving.service zipper.serving.answers
    zipper.serving.transcription zipper.serving.saying zipper.serving.chat zipper.serving.anything
    zipper.serving.realtime zipper.serving.page zipper.serving.gauges zipper.serving.app zipper.serving.process
    zipper.serving.deployment
    zipper.cli.answers zipper.cli.entries zipper.cli.options zipper.cli.use zipper.cli.make
    zipper.cli.look zipper.cli zipper.__main__
    zipper_lab zipper_lab.judges zipper_lab.recognisers zipper_lab.adaptation
    zipper_lab.baseline
    zipper_lab.corpora.commands zipper_lab.corpora.prose zipper_lab.corpora.english
    zipper_lab.corpora.originals
    zipper_lab.corpora.emoji zipper_lab.corpora.motion zipper_lab.corpora.babyai
    zipper_lab.corpora.molecules zipper_lab.corpora.proteins zipper_lab.corpora.digits
    zipper_lab.corpora.words zipper_lab.corpora.asked
    zipper_lab.corpora
    zipper_lab.real_judges
    zipper_lab.report zipper_lab.results zipper_lab.demo zipper_lab.experiments zipper_lab.real
    zipper_lab.people zipper_lab.pairwise zipper_lab.reuse zipper_lab.choices
    zipper_lab.bench zipper_lab.bench.decode zipper_lab.bench.train zipper_lab.bench.speech
    zipper_lab.bench.start zipper_lab.bench.serving zipper_lab.bench.summary zipper_lab.commands zipper_lab.__main__
""".split()
FILES = sorted(path for package in PACKAGES for path in (SOURCE / package).rglob("*.py"))
FENCES = {
    "python",
    "bash",
    "console",
    "text",
}  # python runs, bash and console are parsed, text is only shown
LARGEST_FILE_BYTES = 13_000_000


def module_of(path: Path) -> str:
    """`zipper.modality.text` for src/zipper/modality/text.py, `zipper` for the front page."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
INSIDE = pytest.mark.parametrize("module", [module for module in MODULES if module != "zipper"])


def rank(module: str) -> int:
    """Place in ORDER."""
    assert module in ORDER, f"{module} has no place in ORDER (tests/test_house.py). Give it one."
    return ORDER.index(module)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, also inside functions and under
    TYPE_CHECKING."""
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def definitions(
    body: list[ast.stmt], owner: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """The public classes, functions and methods defined in a module or class body."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield owner + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{owner}{node.name}.")


def blocks(text: str) -> list[tuple[int, str, str]]:
    """Line number, language and content of every fenced block; a fence in no known language is an
    error."""
    found: list[tuple[int, str, str]] = []
    language, start, content = None, 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.fullmatch(r"\s*```(.*)", line)
        if language is None and fence:
            language, start, content = fence[1].strip(), number, []
            assert language in FENCES, (
                f"line {number}: a block is marked one of {sorted(FENCES)}, not '{language}'"
            )
        elif fence:
            found.append((start, str(language), "\n".join(content)))
            language = None
        elif language is not None:
            content.append(line)
    assert language is None, f"line {start}: this block never ends"
    return found


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, without comments, prompts, variables, pipes and the path of
    the program."""
    for line in block.replace("\\\n", " ").splitlines():
        shell = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
        shell.whitespace_split = True
        words: list[str] = []
        for word in [*shell, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if words:
                    yield [words[0].rpartition("/")[2], *words[1:]]
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def repository_files() -> list[Path]:
    """What git holds, or would after `git add .`."""
    # safe.directory: a checkout owned by another user (containers, CI) is still ours to read.
    listing = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert ROOT / "pyproject.toml" in paths, (
        "git does not know pyproject.toml: this is not a checkout of zipper"
    )
    return [path for path in paths if path.is_file()]


def ours(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every file of ours that a file imports; of a package of which it takes a
    file, its front page is not meant."""
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] in PACKAGES:
            while parts and ".".join(parts) not in MODULES:  # the tail is a name inside a file
                parts.pop()
            yield line, ".".join(parts)


@INSIDE
def test_a_file_imports_only_files_above_it(module: str) -> None:
    below = []
    for line, target in ours(MODULES[module]):
        if target == "zipper" or (target != module and rank(target) > rank(module)):
            below.append(f"line {line} imports {target}")
    assert not below, f"{module}: {below}. Import from the file that defines it, from above."


def test_the_library_does_not_know_the_laboratory() -> None:
    """Not by an import; a name of before is looked up only when somebody asks for it."""
    known = [
        f"{module}, line {line}"
        for module, path in MODULES.items()
        if module.partition(".")[0] == "zipper"
        for line, target in ours(path)
        if target.startswith("zipper_lab")
    ]
    assert not known


def test_every_name_of_before_can_be_imported() -> None:
    """Public names of the modules of zipper 0.1, whatever file has them now; but for commands as
    functions, and what only tests called."""
    before = json.loads((ROOT / "tests" / "names_of_before.json").read_text("utf-8"))
    gone = []
    for module, names in before.items():
        found = importlib.import_module(module)
        gone += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    assert not gone


def test_every_file_has_a_place_in_the_order() -> None:
    assert len(MODULES) > 1, f"no modules in {SOURCE}"
    for module in MODULES:
        assert module == "zipper" or rank(module) >= 0


@pytest.mark.parametrize("module", list(MODULES))
def test_every_file_and_every_public_definition_has_a_docstring(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    bare = [
        f"{name} (line {node.lineno})"
        for name, node in definitions(tree.body)
        if not ast.get_docstring(node)
    ]
    assert ast.get_docstring(tree), (
        f"zipper.{module}: say in a docstring what the file is for and what it does not know"
    )
    assert not bare, f"zipper.{module} says nothing about {bare}"


def test_functions_are_paragraphs_and_a_comprehension_is_one_loop() -> None:
    """But for the training loop, which is the story."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > 80 and (module, node.name) != ("zipper.training.loop", "_train"):
                    found.append(f"{module}.{node.name} has {lines} lines")
            if len(getattr(node, "generators", ())) > 1:
                found.append(f"{module}, line {node.lineno}: two loops in a comprehension")
    assert not found


def test_every_name_on_the_front_page_exists_and_is_documented() -> None:
    zipper = importlib.import_module("zipper")
    assert zipper.__all__, "zipper.__all__ is empty"
    for name in zipper.__all__:
        thing = getattr(zipper, name)
        if inspect.isclass(thing) or callable(thing):
            assert inspect.getdoc(thing), f"zipper.{name} has no docstring"
            assert thing.__module__.startswith("zipper."), (
                f"zipper.{name} comes from {thing.__module__}"
            )


def test_the_python_blocks_of_the_readme_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = ROOT / "README.md"
    programs = [
        (line, code)
        for line, kind, code in blocks(readme.read_text(encoding="utf-8"))
        if kind == "python"
    ]
    assert programs, "README.md shows no Python"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, code in programs:
        # The newlines give tracebacks the README's lines.
        exec(compile("\n" * line + code, readme, "exec"), namespace)


def wrong_usage(arguments: list[str]) -> str:
    """What the command line has against these words; "" where it would do what they say. Nothing is
    done."""
    from typer import TyperException

    from zipper import cli

    program = cli.program()
    for context in cli.commands(program):
        context.command.callback = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # --help
            program.main(arguments, prog_name="zipper", standalone_mode=False)
    except TyperException as error:
        return error.format_message()
    return ""


#: May say of text and speech by name: the kinds themselves, the pipeline's two conveniences, the
#: server, whose clients do, and the table of names of before, whose functions were called so.
MAY_NAME = ("zipper.modality", "zipper.pipeline", "zipper.serving", "zipper.former", "zipper_lab")


def test_no_modality_is_known_by_name_outside_of_its_place() -> None:
    found = [
        f"{module}, line {node.lineno}"
        for module, path in MODULES.items()
        if not module.startswith(MAY_NAME)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("text", "speech")
    ]
    assert not found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/growing.md"])
def test_the_commands_in_the_documentation_exist(page: str) -> None:
    targets = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    seen = 0
    for line, kind, block in blocks((ROOT / page).read_text(encoding="utf-8")):
        if kind not in ("bash", "console"):
            continue
        for program, *arguments in commands(block):
            if program == "zipper":
                seen += 1
                wrong = wrong_usage(arguments)
                assert not wrong, f"{page}, line {line}: zipper {shlex.join(arguments)}: {wrong}"
            elif program == "make":
                seen += 1
                unknown = [word for word in arguments if "=" not in word and word not in targets]
                assert not unknown, f"{page}, line {line}: the Makefile has no target {unknown}"
    assert seen, f"{page} shows no command"


@pytest.mark.parametrize(
    "words",
    ["sing", "train", "train a.py --sing", "evaluate --task sing", "bench decode --rounds 0"],
)
def test_a_command_that_does_not_exist_would_be_found(words: str) -> None:
    assert wrong_usage(words.split())


def test_the_page_about_the_command_line_is_up_to_date() -> None:
    from zipper.cli import markdown

    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == markdown(), "docs/cli.md is out of date. Run `make docs`."


def test_no_file_in_git_is_too_large() -> None:
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in repository_files()}
    large = {name: size for name, size in large.items() if size > LARGEST_FILE_BYTES}
    assert not large, f"larger than {LARGEST_FILE_BYTES} bytes: {large}"


def test_no_file_in_git_names_a_path_of_somebodys_machine() -> None:
    private = re.compile(rb"(?<![\w.~-])/(work|root|home|Users)/")
    found = {}
    for path in repository_files():
        lines = [
            number
            for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
            if private.search(line)
        ]
        if lines and path != Path(__file__):
            found[str(path.relative_to(ROOT))] = lines
    assert not found, f"absolute paths, by file and line: {found}"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(build, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = tmp_path.glob("zipper_lm-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in repository_files()
        if any(SOURCE / package in path.parents for package in PACKAGES)
    }
    assert "zipper/py.typed" in wanted
    assert wanted <= packed, f"not in the wheel: {sorted(wanted - packed)}"
