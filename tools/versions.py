"""Versions of what zipper stands on: resolve them anew (`make upgrade`), try the oldest and the
newest (`make matrix`).

constraints.txt pins all that `make setup` and the extras install; src/zipper/tried.json names the
versions of python, torch and transformers with which tests were green. Only these two are written,
by this file alone.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from zipper import environment

ROOT = Path(__file__).parents[1]
CONSTRAINTS, ENVIRONMENTS = ROOT / "constraints.txt", ROOT / ".cache" / "matrix"
HEAD = """\
# Every package that `make setup` and the extras install, in the version that the gate was green
# with. `make upgrade` writes it. torch without a local part takes the CPU build where one is at
# hand and the CUDA build on a GPU machine, whose pins say the rest.
"""
#: Comes with torch's CUDA build, or with Python's own tools.
LEFT_OUT = re.compile(r"(nvidia|cuda)-.*|triton|pip|setuptools|wheel")
#: Of a package, as in ray[serve]: pip takes none in a constraint.
EXTRAS = re.compile(r"\[[\w,-]+\](?===)")
#: The tests of what stands closest to other packages; --tests names others, `tests` all.
TESTS = "tests/test_tower.py tests/test_families.py tests/test_lora.py tests/test_audio.py tests/test_speech.py tests/test_text.py"
TESTS += " tests/test_layouts.py tests/lab/test_report.py tests/test_hub.py tests/test_training.py tests/test_cli.py"


def canonical(name: str) -> str:
    """A package's name as indices know it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Package -> version of a constraints file."""
    return dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))


def ranges() -> dict[str, dict[str, str]]:
    """Of pyproject.toml: extra ("" is the core, `all` left out) -> package as it is asked for, with
    its extras -> versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    split = {
        name: [re.fullmatch(r"([\w.-]+(?:\[[\w,]+\])?)(.*)", line) for line in lines]
        for name, lines in lists.items()
    }
    return {
        name: {match[1]: match[2] for match in found if match}
        for name, found in split.items()
        if name != "all"
    }


def lowest() -> list[str]:
    """Every direct dependency in the lowest version that pyproject.toml allows."""
    every = [item for part in ranges().values() for item in part.items()]
    return [
        f"{package}=={bound[1]}"
        for package, versions in every
        if (bound := re.match(r">=([\w.]+)", versions))
    ]


def pip(python: str | Path, *arguments: str, quiet: bool = True) -> str:
    """What pip prints; raises CalledProcessError where it fails, which it has said why."""
    command = [
        str(python),
        "-m",
        "pip",
        "--disable-pip-version-check",
        *(["--quiet"] if quiet else []),
        *arguments,
    ]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def here() -> str:
    """The package with all its extras, as pip is asked for it."""
    return f".[{','.join(name for name in ranges() if name)}]"


def resolved(torch: str) -> dict[str, str]:
    """What pip would install into an empty environment."""
    report = pip(
        sys.executable,
        "install",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
        here(),
        f"torch=={torch}",
    )
    found = {
        canonical(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report)["install"]
    }
    wanted = [
        name
        for name in sorted(found)
        if name != environment.PACKAGE and not LEFT_OUT.fullmatch(name)
    ]
    return {name: found[name].partition("+")[0] for name in wanted}


def moved(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """A line for each package that came, went or changed."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f"{name:28} {old.get(name, '-'):>16} -> {new.get(name, '-')}" for name in names]


def record(versions: dict[str, str]) -> None:
    """Add to tried.json what is not in it yet."""
    found = {
        name: {*environment.tried()[name], versions[name].partition("+")[0]}
        for name in environment.tried()
    }
    lines = {name: sorted(known, key=environment.numbers) for name, known in found.items()}
    environment.TRIED.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    environment.tried.cache_clear()


def upgrade(torch: str | None) -> int:
    """Write constraints.txt anew, run the gate on it, say what moved."""
    old = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    new = resolved(torch or old["torch"])
    CONSTRAINTS.write_text(
        HEAD + "".join(f"{name}=={version}\n" for name, version in new.items()), encoding="utf-8"
    )
    if not (changes := moved(old, new)):
        print("Nothing moved.")
        return 0
    print("\n".join(changes), flush=True)
    record(new | {"python": environment.installed("python")})
    code = subprocess.run(["make", "check"], cwd=ROOT).returncode
    print("\n".join(changes))
    if code:
        print(
            f"The gate is red. Repair it, or go back: git checkout {CONSTRAINTS.name} "
            f"{environment.TRIED.relative_to(ROOT)}"
        )
    return code


def rows(torch: str) -> dict[str, list[str]]:
    """Name -> what is asked for beside the package itself. torch: the pin of the rows that are
    about something else."""
    about = {
        f"transformers-{version}": [f"transformers=={version}", f"torch=={torch}"]
        for version in environment.tried()["transformers"]
    }
    return {"lowest": lowest(), "newest": [], **about}


def settled(python: Path, wanted: Sequence[str]) -> Path:
    """A file beside an environment that pins all that it will hold. By uv, in seconds: pip goes
    through versions one by one, and with the oldest of everything it had not ended after a quarter
    of an hour (docs/log.md)."""
    home = python.parents[1]
    asked, found = home / "wanted.txt", home / "constraints.txt"
    asked.write_text("".join(f"{re.sub(EXTRAS, '', one)}\n" for one in wanted), encoding="utf-8")
    pip(python, "install", "uv")
    extras = chain.from_iterable(("--extra", name) for name in ranges() if name)
    command = [python, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml", *extras]
    command += ["--constraint", asked, "--output-file", found]
    # What pip is told by its own settings holds for uv too, or pip would refuse what uv says.
    told = (line.partition("=") for line in pip(python, "config", "list").splitlines())
    for file in (value.strip("'") for name, _, value in told if name.endswith(".constraint")):
        command += ["--constraint", file]
    subprocess.run(command, check=True, cwd=ROOT)
    kept = re.sub(EXTRAS, "", found.read_text(encoding="utf-8"))
    found.write_text(kept, encoding="utf-8")
    return found


def tried(
    row: str, wanted: Sequence[str], tests: Sequence[str], workers: int
) -> tuple[dict[str, str], str]:
    """Make the environment of a row and run tests in it: the versions that are in it, and what came
    of it ("passed" is good)."""
    home = ENVIRONMENTS / row
    venv.create(home, clear=True, with_pip=True)
    python = home / "bin" / "python"
    try:
        pip(python, "install", "-e", here(), "-c", str(settled(python, wanted)))
    except subprocess.CalledProcessError:
        return {}, "does not install"
    lines = pip(python, "list", "--format", "freeze").splitlines()
    versions = {
        canonical(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    with open(home / "tests.log", "w", encoding="utf-8") as log:
        command = [python, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *tests]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    return versions | {"python": environment.installed("python")}, "failed" if code else "passed"


def matrix(only: Sequence[str], tests: Sequence[str], workers: int) -> int:
    """Try every row, record what passed, print a table. 1 if one failed."""
    table = rows(pins(CONSTRAINTS.read_text(encoding="utf-8"))["torch"])
    if unknown := sorted({*only} - {*table}):
        sys.exit(f"There are no rows {unknown}; there are {[*table]}.")
    said = []
    for row in only or table:
        versions, result = tried(row, table[row], tests, workers)
        if result == "passed":
            record(versions)
        named = ", ".join(
            f"{name} {versions[name]}" for name in environment.tried() if name in versions
        )
        said.append(
            (
                result,
                f"{row:24} {result:16} {named}; "
                f"{(ENVIRONMENTS / row / 'tests.log').relative_to(ROOT)}",
            )
        )
        print(said[-1][1], flush=True)
    return int(any(result != "passed" for result, _ in said))


def main() -> int:
    """The two commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "upgrade", help="write constraints.txt anew, run the gate, say what moved"
    )
    sub.add_argument("--torch", help="another pin of torch (default: it stays)")
    sub = commands.add_parser(
        "matrix",
        help="run tests on the lowest and newest versions and every transformers that was tried",
    )
    sub.add_argument(
        "row",
        nargs="*",
        help="only these rows: lowest, newest, transformers-5.5.0 ... (default all)",
    )
    sub.add_argument(
        "--tests",
        default=TESTS,
        help="what pytest is given; `tests` is the whole suite (default: what is close to others)",
    )
    sub.add_argument("--workers", type=int, default=2, help="test processes (default 2)")
    given = parser.parse_args()
    return (
        upgrade(given.torch)
        if given.command == "upgrade"
        else matrix(given.row, given.tests.split(), given.workers)
    )


if __name__ == "__main__":
    sys.exit(main())
