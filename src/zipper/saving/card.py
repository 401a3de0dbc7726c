"""The model card: what a person wants to know of a zip before loading it, from the zip's own files
and nothing else.

It knows what a saved folder holds, not how a model is built or how well it does its tasks.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zipper.saving import checkpoint, hub
from zipper.saving.files import header
from zipper.tasks import Task, lanes

RECORDED = (
    "tasks",
    "batch",
    "rows",
    "train",
    "lora",
    "lr_new",
    "lr_gate",
    "lr_tower",
    "mixed_precision",
    "calibrate",
    "seed",
)

WHAT = """\
Decoders that were pre-trained alone, {towers}, zipped by gated cross-attention ([Zipper](https://arxiv.org/abs/2405.18669)): each \
reads the hidden states of the others on its way, so that one model reads and writes all of them."""

CHECKED = """\
Loading compares the SHA-256 of every file, base, tokenizer and codebook with those written here, and refuses what differs. \
`zipper verify` tries the rest on this model: input of one tower alone gives the bare tower's logits bit for bit; a frozen tower \
is its base; no token sees what comes after it in another tower; packed documents do not see each other; decoding with caches \
agrees with one full forward pass; every segment ends, by its end token or at its cap. How well it does its tasks is not among \
these."""


class Told(NamedTuple):
    """What a card says of a modality. kind: its name. about: in words. like: a value of it, such as
    the path of a file, for the program on the card."""

    kind: str
    about: str = ""
    like: str = "..."


def card(
    folder: Path, parameters: Mapping[str, int], modalities: Mapping[str, Told] | None = None
) -> str:
    """The README.md of the zip whose other files are in a folder.

    parameters: {tower: how many it has, adapters left out}. modalities: what is said of those that
    are pinned beside it, by tower.

    Raises ZipperError where the folder holds no zip.
    """
    saved = checkpoint.read_json(folder / checkpoint.CONFIG)
    config, record = saved["config"], saved["record"]
    # Not of the training loop: anything may stand in it.
    if not {"recipe", "step", "dev"} <= record.keys():
        record = {}
    pins = (
        checkpoint.read_json(folder / checkpoint.PINS)
        if (folder / checkpoint.PINS).is_file()
        else {}
    )
    towers = config["towers"]
    told = {name: (modalities or {}).get(name, Told("")) for name in pins}
    parts = [
        _front(towers),
        f"# {' + '.join(towers)}",
        WHAT.format(
            towers=_listed(f"`{name}` ({_state(tower)})" for name, tower in towers.items())
        ),
        f"## Use\n\n```python\n{_code(towers, told, record)}\n```",
        f"## Towers\n\n{_towers(towers, parameters)}",
        f"## Links\n\n{_links(folder, config)}",
    ]
    if pins:
        rows = [(n, told[n].kind, told[n].about, f"`{pin[:16]}`") for n, pin in pins.items()]
        head = ("tower", "modality", "what it is", "its SHA-256")
        parts.append(f"## Modalities\n\n{_table(head, rows)}")
    if record:
        parts.append(
            f"## Training\n\nThe whole recipe is in `{checkpoint.CONFIG}`.\n\n{_training(record)}"
        )
    versions = _listed(f"{package} {version}" for package, version in saved["versions"].items())
    parts.append(f"## Files\n\n{_files(folder, towers)}\n\nWritten with {versions}.")
    parts.append(f"## What is checked, and what is not\n\n{CHECKED}")
    return "\n\n".join(parts) + "\n"


def _front(towers: Mapping[str, Any]) -> str:
    """What the hub reads, as YAML; names are quoted, for `on` and `no` are truth values there."""
    bases = [tower["source"] for tower in towers.values() if _place(tower) == "hub"]
    lines = [
        "---",
        "library_name: zipper",
        "tags:",
        *(f"- {json.dumps(name)}" for name in ("zipper", *towers)),
    ]
    return "\n".join(
        [
            *lines,
            *(["base_model:"] if bases else []),
            *(f"- {json.dumps(base)}" for base in bases),
            "---",
        ]
    )


def _code(
    towers: Mapping[str, Any], modalities: Mapping[str, Told], record: Mapping[str, Any]
) -> str:
    """How this zip is loaded, and a line for every task that it was trained on."""
    elsewhere = {
        name: f"where/{name}/lies" for name, tower in towers.items() if _place(tower) == "elsewhere"
    }
    source = f'".", towers={json.dumps(elsewhere)}' if elsewhere else '"."'
    if not modalities:
        return f"from zipper import Zipper\n\nmodel = Zipper.from_pretrained({source})"
    tasks = [Task.parse(task) for task in record.get("recipe", {}).get("tasks", ())]
    lines = [
        f"from zipper import Pipeline{', Segment' if tasks else ''}",
        "",
        f"pipe = Pipeline.from_pretrained({source})",
    ]
    for task in tasks:
        given = ", ".join(
            f'Segment("{n}", "{modalities[n].like}")'
            for n in [lane.tower for lane in lanes(task.given)]
        )
        lines.append(f"segments = pipe.run([{given}], outputs={json.dumps(task.outputs)})")
    return "\n".join(lines)


def _towers(towers: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    head = (
        "tower",
        "from",
        "commit",
        "in alignment",
        "blocks",
        "width",
        "ids",
        "parameters",
        "dtype",
        "SHA-256 of its content",
    )
    rows = []
    for name, tower in towers.items():
        source = {"here": "this zip", "hub": tower["source"], "elsewhere": "a folder elsewhere"}[
            _place(tower)
        ]
        shape = (
            tower["layers"],
            tower["width"],
            tower["vocabulary"],
            f"{parameters[name]:,}",
            tower["dtype"],
        )
        rows.append(
            (
                name,
                source,
                tower.get("revision", ""),
                _state(tower),
                *shape,
                f"`{tower['digest'][:16]}`",
            )
        )
    return _table(head, rows)


def _links(folder: Path, config: Mapping[str, Any]) -> str:
    junctions, dropped, towers = config["junctions"], config.get("dropped", ()), config["towers"]
    shows = config.get("shows") or junctions
    links = -len(dropped)
    for fused, shown in zip(junctions, shows, strict=True):
        links += sum(source != target for source, target in itertools.product(shown, fused))
    new = sum(math.prod(entry.shape) for entry in header(folder / checkpoint.TENSORS).values())
    pruned = f" Pruned: {', '.join(f'`{name}`' for name in dropped)}." if dropped else ""
    head = ["junction", *(f"{name} fused after block" for name in towers)]
    rows = [
        [n, *(junction.get(name, "") for name in towers)] for n, junction in enumerate(junctions)
    ]
    if config.get("shows"):
        head += [f"{name} shown after block" for name in towers]
        for row, shown in zip(rows, shows, strict=True):
            row += [shown.get(name, "") for name in towers]
    table = _table(head, rows)
    return (
        f"{links} links at {len(junctions)} junctions. With input projections and adapters "
        f"{new:,} new parameters.{pruned} "
        f"Settings of a link: `{json.dumps(config['link'])}`.\n\n{table}"
    )


def _training(record: Mapping[str, Any]) -> str:
    """What the training loop recorded of a run."""
    recipe = record["recipe"]
    rows = [("steps", f"{record['step']} of {recipe['steps']}")]
    rows += [
        (name, f"`{json.dumps(recipe[name])}`")
        for name in RECORDED
        if recipe.get(name) not in (None, {}, [])
    ]
    return _table(
        ("", ""),
        rows
        + [
            (f"dev loss, {task}", "not finite" if loss is None else f"{loss:.4f}")
            for task, loss in record["dev"].items()
        ],
    )


def _files(folder: Path, towers: Mapping[str, Any]) -> str:
    """Megabytes of the parts that are in the folder."""
    starts = {"links, input projections, adapters": checkpoint.TENSORS} | {
        f"tower {name}": f"towers/{name}/" for name in towers
    }
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in checkpoint.inside(folder)
        if path.is_file()
    }
    sizes = {
        part: sum(size for name, size in files.items() if name.startswith(start))
        for part, start in (starts | {"modalities": "modalities/"}).items()
    }
    return _table(("", "MB"), [(part, f"{size / 1e6:.2f}") for part, size in sizes.items() if size])


def _place(tower: Mapping[str, Any]) -> str:
    """Where a tower's weights are: here, hub or elsewhere."""
    if tower["source"].startswith("towers/"):
        return "here"
    return "elsewhere" if hub.names_a_path(tower["source"]) else "hub"


def _state(tower: Mapping[str, Any]) -> str:
    return (
        "trained"
        if tower["train"]
        else "frozen, with a trained adapter"
        if tower.get("lora")
        else "frozen"
    )


def _listed(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    cells = [[*head], *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:])
    )
