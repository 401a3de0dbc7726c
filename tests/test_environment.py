"""What zipper stands on: extras are asked for by one mechanism, versions are pinned and tried, and
each is said in a sentence."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.utils import logging

from zipper import environment
from zipper.environment import BrokenExtra, MissingExtra
from zipper.saving.checkpoint import save_tower
from zipper.testing import tiny_tower
from zipper.tower import Tower, UnsupportedTower
from zipper.towers import families

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
    if name != "all"
}
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)
#: Not pinned: what torch's CUDA build brings and pins itself, and Python's own tools.
FREE = re.compile(r"(nvidia|cuda)-.*|triton|pip|setuptools|wheel|zipper-lm")


# --- extras


def test_the_extras_are_those_of_the_project() -> None:
    assert {name: {*packages} for name, packages in environment.extras().items()} == {
        name: {wanted.name for wanted in packages} for name, packages in EXTRAS.items()
    }


@pytest.mark.parametrize(
    ("name", "package"),
    [(name, wanted.name) for name, packages in EXTRAS.items() for wanted in packages],
)
def test_a_missing_package_is_said_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    module = environment.importable(package)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    sentence = f"This needs {module}, which is not installed. Do: pip install 'zipper-lm[{name}]'"
    for wanted in (module, f"{module}.part"):
        with pytest.raises(MissingExtra) as refused:
            environment.extra(wanted)
        assert str(refused.value) == sentence
    with pytest.raises(MissingExtra):
        environment.need(name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import a_part_that_is_not_there", "No module named 'a_part_that_is_not_there'"),
        ("raise OSError('sndfile library not found')", "sndfile library not found"),
    ],
)
def test_what_is_installed_and_does_not_load_is_another_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    (tmp_path / "soundfile.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soundfile", raising=False)
    with pytest.raises(
        BrokenExtra,
        match=rf"soundfile, which is installed and does not load \({said}\).*zipper-lm\[speech\]",
    ):
        environment.extra("soundfile")


def test_extras_are_imported_by_nothing_but_the_one_mechanism() -> None:
    modules = {
        environment.importable(wanted.name)
        for name, packages in EXTRAS.items()
        if name != "dev"
        for wanted in packages
    }
    found = []
    front = ROOT / "src" / "zipper" / "serving" / "__init__.py"
    assert 'need("serve")' in front.read_text("utf-8"), "before any of its files is imported"
    for path in sorted((ROOT / "src" / "zipper").rglob("*.py")):
        if path.parent == front.parent:  # it says what is missing, for all of them
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typed = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        for node in typed:
            node.body = []
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            )
            found += [
                f"{path.name}, line {node.lineno}: {name}"
                for name in names
                if name.partition(".")[0] in modules
            ]
    assert not found, f"{found}. Write extra('MODULE'), which says what is missing."


# --- versions


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    wanted = [Requirement(line) for line in PROJECT["dependencies"]] + [
        r for packages in EXTRAS.values() for r in packages
    ]
    for requirement in wanted:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), str(
            requirement
        )


def test_what_comes_along_is_pinned_too() -> None:
    """Everything installed that is reached from zipper, by the metadata of each."""
    there = {name for name in PINS if _installed(name)}
    if any(Version(distribution(name).version).public != PINS[name] for name in there):
        pytest.skip("this environment was not made by constraints.txt")
    reached, left = set[str](), [(environment.PACKAGE, name) for name in ("", *EXTRAS)]
    while left:
        package, extra = left.pop()
        try:
            lines = distribution(package).requires or []
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            meant = requirement.marker is None or requirement.marker.evaluate(
                {**default_environment(), "extra": extra}
            )
            if meant and name not in reached and not FREE.fullmatch(name):
                reached.add(name)
                left += [(name, part) for part in ("", *requirement.extras)]
    there = {name for name in reached if _installed(name)}
    assert len(there) > 50 and sorted(there - PINS.keys()) == []


def _installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def test_pins_name_no_build_no_place_and_nothing_of_cuda() -> None:
    assert all(
        re.fullmatch(r"[\w.]+", version) and not FREE.fullmatch(name)
        for name, version in PINS.items()
    )
    assert [*PINS] == sorted(PINS)


def test_the_pinned_versions_are_tried_ones_and_those_that_were_tried_are_allowed() -> None:
    for name in environment.MOVING:
        assert PINS[name] in environment.tried()[name]
        (allowed,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name]
        assert all(allowed.specifier.contains(version) for version in environment.tried()[name])
        assert [*environment.tried()[name]] == sorted(environment.tried()[name], key=Version)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "5.24", "6.0.0rc1", "5.24.0.dev0", "10.2"])
def test_versions_are_read_as_packaging_reads_them(version: str) -> None:
    assert environment.numbers(version) == Version(version).release


def test_a_version_is_new_if_it_is_newer_than_all_that_were_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        environment, "tried", lambda: {"torch": ("2.11.0", "2.13.0"), "python": ("3.11",)}
    )
    new = {
        version: environment.newer("torch", version)
        for version in ("2.9.1", "2.12.0", "2.13.0+cu130", "2.13.1", "2.100.0")
    }
    assert [*new.values()] == [False, False, False, True, True]
    assert not environment.newer("python", "3.11.7") and environment.newer("python", "3.12.0")


def refusal_of(name: str) -> str:
    with pytest.raises(UnsupportedTower) as refused:
        Tower(families.tiny(name))
    return str(refused.value)


def test_a_refusal_names_the_ground_where_that_is_newer_than_any_that_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = {name: (environment.installed(name),) for name in environment.tried()}
    monkeypatch.setattr(environment, "tried", lambda: here)  # nothing here is newer than that
    assert refusal_of("mamba").endswith("Use another model.")
    # It puts itself there anew now and then.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.0")
    newest = {name: environment.tried()[name][-1] for name in environment.MOVING}
    said = refusal_of("mamba")
    assert said.startswith("MambaForCausalLM") and "another model" not in said
    assert (
        f"Here is transformers 5.99.0, the newest that was tried is {newest['transformers']}"
        in said
    )
    assert said.endswith(
        f"Do: pip install 'torch=={newest['torch']}' 'transformers=={newest['transformers']}'"
    )


# --- what others say


def test_a_tower_comes_and_goes_without_bars_and_the_settings_of_the_user_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def hook(bar: Any, given: Any, named: dict[str, Any]) -> Any:
        asked.append(named)
        return bar(*given, **named)

    tiny_tower("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    before = logging.set_tqdm_hook(hook)
    try:
        capsys.readouterr()
        tower = Tower.load(tmp_path)
        assert capsys.readouterr().err == "" and asked == []
        (tmp_path / "again").mkdir()
        save_tower(tmp_path / "again", tower.model, tower.model.state_dict())
        assert capsys.readouterr().err == "" and asked == []
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "Loading weights" in capsys.readouterr().err and asked
    finally:
        logging.set_tqdm_hook(before)


PLAIN = """
import json, logging, os, sys, warnings
before = dict(os.environ), list(warnings.filters), warnings.formatwarning, logging.lastResort.level
import zipper
heavy = sorted({"torch", "transformers", "numpy", "tqdm", "huggingface_hub"} & sys.modules.keys())
from zipper import *
from zipper import __all__
missing = [name for name in __all__ if name not in globals()]
same = before[:1] == (dict(os.environ),) and before[2:] == (warnings.formatwarning, logging.lastResort.level)
import transformers, huggingface_hub
shown = transformers.utils.logging.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
print(json.dumps([heavy, missing, same, shown, transformers.logging.get_verbosity()]))
"""


def test_importing_zipper_loads_nothing_heavy_and_changes_no_settings() -> None:
    said = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, check=True, env=_plain()
    )
    heavy, missing, same, shown, verbosity = json.loads(said.stdout)
    assert (heavy, missing, same, shown) == (
        [],
        [],
        True,
        [True, False],
    ) and verbosity == transformers.logging.WARNING


def _plain() -> dict[str, str]:
    """The environment without what this project sets in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_"))
    }
