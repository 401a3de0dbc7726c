"""Names of before: what was moved can still be imported from where it was.

Outsiders' programs say `from zipper.engine import Engine`. A module that is gone is found here, and
looks its names up in the files that took them over. Nothing inside of zipper imports by such a
name.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, final

#: Fields of rows that were made of two, by the field that now stands in front: "voiced:speech" in
#: a task is "voice~speech", unless the row has a field "voiced" (unit files of before).
BEHIND = {"voiced": "voice"}
#: By module of before, the modules that have its names now; the first that has one gives it.
MOVED = {
    "zipper.adaptation": ("zipper_lab.adaptation",),
    "zipper.baseline": ("zipper_lab.baseline", "zipper.config"),
    "zipper.bench": ("zipper_lab.bench", "zipper.statistics"),
    "zipper.bench.decode": ("zipper_lab.bench.decode",),
    "zipper.bench.speech": ("zipper_lab.bench.speech",),
    "zipper.bench.start": ("zipper_lab.bench.start",),
    "zipper.bench.summary": ("zipper_lab.bench.summary",),
    "zipper.bench.train": ("zipper_lab.bench.train",),
    "zipper.card": ("zipper.saving.card",),
    "zipper.checkpoint": ("zipper.saving.checkpoint", "zipper.saving.files"),
    "zipper.containers": ("zipper.audio.containers",),
    "zipper.corpus": ("zipper_lab.corpora.commands",),
    "zipper.demo": ("zipper_lab.demo",),
    "zipper.disturbance": ("zipper.audio.disturbance",),
    "zipper.driver": ("zipper.towers.driver",),
    "zipper.engine": ("zipper.fast", "zipper.generation", "zipper.reading", "zipper.sampling"),
    "zipper.experiments": ("zipper_lab.experiments",),
    "zipper.extraction": ("zipper.data.extraction",),
    "zipper.families": ("zipper.towers.families",),
    "zipper.files": ("zipper.saving.files",),
    "zipper.fused": (
        "zipper.fast.reader",
        "zipper.fast.weights",
        "zipper.fast.session",
        "zipper.fast.blocks",
    ),
    "zipper.graphs": ("zipper.fast.graphs",),
    "zipper.history": ("zipper.training.history",),
    "zipper.hub": ("zipper.saving.hub",),
    "zipper.layouts": ("zipper.data.layouts",),
    "zipper.native": ("zipper.fast.native",),
    "zipper.packing": ("zipper.training.packing",),
    "zipper.plain": ("zipper.fast.plain",),
    "zipper.plan": ("zipper.training.cost",),
    "zipper.proofs": ("zipper.fast.recall",),
    "zipper.prose": ("zipper_lab.corpora.prose",),
    "zipper.report": ("zipper_lab.report", "zipper.pages", "zipper.training.history"),
    "zipper.results": ("zipper_lab.results", "zipper.pages"),
    "zipper.rows": ("zipper.data.rows",),
    "zipper.sequence": ("zipper.strand",),
    "zipper.sharding": ("zipper.training.sharding",),
}
#: By module of before and name, what that name is now, where it is another.
RENAMED = {
    ("zipper.bench.decode", "table"): ("zipper_lab.bench.decode", "markdown"),
    ("zipper.bench.speech", "table"): ("zipper_lab.bench.speech", "markdown"),
    ("zipper.bench.start", "table"): ("zipper_lab.bench.start", "markdown"),
    ("zipper.bench.summary", "table"): ("zipper_lab.bench.summary", "markdown"),
    ("zipper.bench.train", "table"): ("zipper_lab.bench.train", "markdown"),
    ("zipper.doctor", "table"): ("zipper.doctor", "text"),
    ("zipper.engine", "Engine"): ("zipper.fast", "engine"),
    ("zipper.engine", "Life"): ("zipper.generation", "Course"),
    ("zipper.engine", "Wish"): ("zipper.generation", "Wanted"),
    ("zipper.evaluation", "pulses"): ("zipper_lab.judges", "pcm"),
    ("zipper.experiments", "Ears"): ("zipper_lab.experiments", "Judges"),
    ("zipper.experiments", "Ground"): ("zipper_lab.experiments", "Corpus"),
    ("zipper.families", "table"): ("zipper.towers.families", "text"),
    ("zipper.inspection", "table"): ("zipper.inspection", "text"),
    ("zipper.model", "link_name"): ("zipper.config", "LinkKey"),  # a tuple that prints as the name
    ("zipper.plan", "table"): ("zipper.training.cost", "text"),
    ("zipper.surgery", "table"): ("zipper.surgery", "text"),
    ("zipper.training", "Model"): ("zipper.reading", "Model"),
}


def names_of(module: str, homes: Sequence[str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module whose names have moved to others."""

    def lookup(name: str) -> Any:
        folders = vars(sys.modules[module]).get("__path__", ())
        if name.startswith("__"):  # `from module import name` asks whether it is a package
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if any((Path(folder) / f"{name}.py").is_file() for folder in folders):
            # `from zipper.training import history` asks for the name before it imports the file.
            raise AttributeError(f"module {module!r} has not imported {name!r} yet")
        home, now = RENAMED.get((module, name), ("", name))
        for place in (home,) if home else homes:
            found = import_module(place)
            if now in vars(found):
                return vars(found)[now]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return lookup


@final
class Former(MetaPathFinder, Loader):
    """Finds modules of before; asked last, so that what is there comes first."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=f"{fullname}.train" in MOVED)

    def exec_module(self, module: ModuleType) -> None:
        """See `Loader`."""
        module.__doc__ = f"Moved to {', '.join(MOVED[module.__name__])}."
        vars(module)["__getattr__"] = names_of(module.__name__, MOVED[module.__name__])


def install() -> None:
    """Lets names of before be imported."""
    if not any(isinstance(finder, Former) for finder in sys.meta_path):
        sys.meta_path.append(Former())
