"""Commands that make: units from sound, towers and zips from recipes, one model from another.

What they do stands in the library; here is what is asked of the user before, and told after.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zipper.cli.options import MAKE, Bases, absent, command, count, named, writable
from zipper.environment import extra
from zipper.errors import ZipperError

app = typer.Typer()

# --- units

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="sound files or folders of them; or one manifest (.jsonl), or KIND:PLACE, the kind "
        "one of librispeech, libritts, librilight, sounds, parquet, arrow, audiofolder, jsonl, "
        "made; behind it, where columns have other names, #text=COLUMN,...",
    ),
]
UnitsOutput = Annotated[
    Path,
    typer.Option("--output", "-o", help="manifest (JSONL) or, of a corpus, folder to write"),
]
Codebook = Annotated[
    Path | None, typer.Option(help="codebook folder", show_default="the shipped one")
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="tokenizer folder, for the texts of a corpus", show_default="the shipped one"
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--modality",
        metavar="NAME=FOLDER",
        help="of a manifest: what a field is read as, instead of speech and text; a folder that "
        "fit or a model's modalities/ has",
    ),
]
Fit = Annotated[
    int | None,
    typer.Option(
        parser=count,
        metavar="CODES",
        help="fit a new codebook of so many codes on this audio, saved at --units",
    ),
]
Split = Annotated[str | None, typer.Option(help="only this part of a corpus, e.g. train-clean-100")]
Limit = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="only its first so many samples")
]
Takes = Annotated[
    int | None,
    typer.Option(
        parser=count, metavar="N", help="N rows a sample, each with a disturbed take of its sound"
    ),
]
Bad = Annotated[Literal["error", "warn", "skip"], typer.Option(help="what becomes of bad samples")]
MostBad = Annotated[float, typer.Option(metavar="SHARE", help="refuse a corpus with more")]
Workers = Annotated[
    int | None,
    typer.Option(parser=count, metavar="N", help="processes", show_default="one a core"),
]
Ray = Annotated[
    bool, typer.Option("--ray", help="work on the Ray cluster at hand instead, or on a local one")
]


@command(
    app, MAKE, "zipper units librispeech:data/LibriSpeech --split train-clean-100 -o units/clean100"
)
def units(
    source: Sources,
    output: UnitsOutput,
    units: Codebook = None,
    text: Tokenizer = None,
    modality: Others = None,
    fit: Fit = None,
    split: Split = None,
    limit: Limit = None,
    takes: Takes = None,
    bad: Bad = "error",
    most_bad: MostBad = 0.01,
    workers: Workers = None,
    ray: Ray = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the counts as JSON")] = False,
) -> None:
    """Turn a corpus into ids, for training, on all cores.

    It goes on where it was stopped. Sound files become a manifest, other sources a folder of unit
    files.
    """
    import shutil

    from zipper.data import extraction, layouts, rows

    corpus = len(source) == 1 and layouts.names(source[0])
    place: layouts.Source = source[0] if corpus else [Path(path) for path in source]
    policy = extraction.Policy(bad, most_bad)
    _check_units(corpus, source, output, units, fit, takes)
    if not corpus and (split or text or modality):
        raise ZipperError(
            "--split, --text and --modality are for a corpus, and sound files were given. Leave "
            "them out."
        )
    if fit and units:
        _fitted(place, fit, policy, limit).save(units)
    beside = output.with_name(f".{output.name}.parts")  # what a killed run goes on from
    folder = output if corpus else beside
    fresh = not folder.exists()
    speed = [0.0]
    try:
        found = extraction.extract(
            place,
            folder,
            _modalities(units, text, corpus, named("--modality", modality)),
            policy,
            split,
            limit,
            spread=extraction.on_ray if ray else extraction.processes(workers),
            report=lambda said: speed.append(said["real_time"]),
            takes=takes or 0,
        )
    except ZipperError:
        made = len(list(folder.glob("units-*")))
        if (fresh and not made) or (not corpus and made < 2):  # nothing worth keeping
            shutil.rmtree(folder, ignore_errors=True)
        raise
    counts = rows.provenance(folder)
    bad_list = output / rows.BAD
    if not corpus:
        bad_list = _manifest(found, folder, output, bool(counts["bad"]))
        shutil.rmtree(beside, ignore_errors=True)
    _tell_units(counts, output, bad_list, speed[-1], "samples" if corpus else "files", as_json)


def _check_units(
    corpus: bool,
    source: Sequence[str],
    output: Path,
    units: Path | None,
    fit: int | None,
    takes: int | None,
) -> None:
    """Raise ZipperError where options do not go together, or a place cannot be written."""
    from zipper.modality.speech import SpeechUnits

    if takes and not corpus:
        raise ZipperError(
            "--takes wants sound with its texts. Give a corpus, or a manifest of both."
        )
    if corpus:
        if output.exists() and not output.is_dir():
            raise ZipperError(f"{output} is a file, a folder of unit files was wanted.")
        writable(output / "units")
    else:
        writable(output, source)
        if output.exists() and output.stat().st_size and not _of_units(output):
            raise ZipperError(
                f"{output} is there, and is no list of units. Choose another file, or move it."
            )
    if not fit:
        return
    if corpus:
        raise ZipperError(
            "--fit wants sound files. Fit a codebook on some of this corpus first, then pass it "
            "as --units."
        )
    if units is None:
        raise ZipperError("--fit makes a new codebook. Pass --units FOLDER to say where it goes.")
    if (units / SpeechUnits.CONFIG).exists():
        raise ZipperError(
            f"{units} holds a codebook already. Leave out --fit to use it, or choose another "
            "folder."
        )
    writable(units / SpeechUnits.CONFIG)


def _of_units(output: Path) -> bool:
    """Whether a manifest is one that this command has written."""
    from zipper.data import manifests
    from zipper.data.layouts import SPEECH

    try:
        return manifests.manifest(output, 1)[0].keys() == {"id", SPEECH, "duration"}
    except ZipperError:
        return False


def _modalities(
    units: Path | None, text: Path | None, corpus: bool, others: Mapping[str, str]
) -> dict[str, Any]:
    """What encodes a corpus; sound files have no texts. Where others are named, those of the
    shipped model are not taken for granted."""
    from zipper.data.layouts import SPEECH, TEXT
    from zipper.modality import load
    from zipper.pipeline import SHIPPED

    found = {name: load(folder) for name, folder in others.items()}
    if units or not others:
        found[SPEECH] = load(units or SHIPPED / "modalities" / SPEECH)
    if corpus and (text or not others):
        found[TEXT] = load(text or SHIPPED / "modalities" / TEXT)
    return found


def _fitted(source: Any, codes: int, policy: Any, limit: int | None) -> Any:
    """A codebook of so many codes for the sound of a source, or of its first `limit` samples; what
    cannot be read is left out where the policy says so."""
    from zipper.data import layouts
    from zipper.modality.speech import SpeechUnits

    found = islice(layouts.samples(source), limit)
    paths = [sample.folder / sample.row[layouts.SPEECH] for sample in found]
    return SpeechUnits.fitted(paths, codes, bad=policy.bad)


def _manifest(found: Any, folder: Path, output: Path, bad: bool) -> Path:
    """Write the units of sound files as a manifest, and which were bad; returns where the latter
    goes."""
    from zipper.data import manifests, rows
    from zipper.data.layouts import SPEECH

    bad_list = output.with_suffix(".bad.jsonl")
    bad_list.unlink(missing_ok=True)  # of the time before
    if bad:
        manifests.write(bad_list, manifests.manifest(folder / rows.BAD))
    each = zip(range(len(found)), found, found.seconds.tolist(), strict=True)
    lines = [
        {"id": found.name(n), SPEECH: row[SPEECH], "duration": round(seconds, 3)}
        for n, row, seconds in each
    ]
    manifests.write(output, lines)
    return bad_list


def _tell_units(
    counts: Mapping[str, Any], output: Path, bad_list: Path, speed: float, what: str, as_json: bool
) -> None:
    """How it went. counts: of the corpus. speed: times real time. what: it was made of."""
    from zipper.data import extraction

    told = {key: counts[key] for key in ("samples", "bad", "passed", "rows", "seconds", "fields")}
    if as_json:
        where = str(bad_list) if told["bad"] else None
        print(json.dumps(told | {"real_time": round(speed, 1), "bad_list": where}))
        return
    ids = ", ".join(f"{field['ids']} of {name}" for name, field in told["fields"].items())
    left = f"{told['bad']} bad ones left out" + f", see {bad_list}" * bool(told["bad"])
    print(
        f"{output}: {told['rows']} {what} ({left}), {told['seconds']:.0f} s, ids: {ids}; "
        f"{speed:.0f} x real time. {extraction.told(told['passed'])}".strip()
    )


# --- modalities


@command(app, MAKE, "zipper fit image pictures/ -o runs/image --set codes=256 --set patch=4")
def fit(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="symbols, signal, image ..., or one that a package brings"
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DATA",
            help="files, folders of them, or a manifest (.jsonl) with such a field; of a codec the "
            "model itself",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="new folder for the modality")
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="the field of a manifest", show_default="the kind's name"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=JSON", help="a setting of the kind, e.g. codes=512"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--vq",
            metavar="ID|FOLDER",
            help="fit nothing: take the codes of this model of transformers (a VQ model, the "
            "colours of an ImageGPT, a codec)",
        ),
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="fit nothing: write a small set of such data there"),
    ] = None,
) -> None:
    """Fit a modality to data: a codebook, an alphabet, a tokenizer."""
    from zipper import modality
    from zipper.data import fitting

    found = modality.of_kind(kind)
    if example:
        absent(example)
        example.mkdir(parents=True)
        try:
            how = found.example(example)
        except ZipperError:
            example.rmdir()
            raise
        suits = f"zipper fit {kind} {example}/manifest.jsonl {how}".rstrip()
        print(f"{example}: an example of {kind}. Go on: {suits} -o {example}-fitted")
        return
    if getattr(found, "modelled", False) and data and not model:
        model, data = str(data[0]), data[1:]
    if bool(data) == bool(model) or not output:
        raise ZipperError(
            "fit wants DATA and -o FOLDER. Give both, or --model ID instead of data, or --example "
            "FOLDER to see what data of this kind look like."
        )
    absent(output)
    given = _settings(settings or [])
    if model:
        made = fitting.of_model(found, model, given)
    else:
        made = fitting.fit(found, data or [], field, given)
    modality.save(made, output)
    said = ", ".join(f"{name} {value}" for name, value in modality.whole(made).about().items())
    print(f"{output}: {kind} of {made.vocabulary} ids" + (f" ({said})" if said else ""))


def _settings(items: list[str]) -> dict[str, Any]:
    """NAME=JSON items; what is no JSON is a word."""
    found: dict[str, Any] = {}
    for name, value in named("--set", items).items():
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


# --- recipes

Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="a Python file with config() -> TrainConfig and, where it needs them, prepare() for "
        "its data and build, which makes its model",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=JSON", help="change a field of the recipe, e.g. steps=100"
    ),
]
Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="train nothing: print what trains, FLOPs, memory and time, once the data are there",
    ),
]
PlanJson = Annotated[bool, typer.Option("--json", help="print the plan as JSON")]


@command(app, MAKE, "zipper pretrain recipes/text_tower.py")
def pretrain(
    recipe: Recipe,
    resume: Resume = False,
    changes: Changes = None,
    plan: Plan = False,
    as_json: PlanJson = False,
) -> None:
    """Train one tower alone by next-token prediction."""
    config, rest = _read(recipe, changes or [])
    if len(config.towers) != 1:
        raise ZipperError(
            f"{recipe} has the towers {sorted(config.towers)}; pretrain wants one. Use "
            "`zipper train` for several."
        )
    _follow(config, rest, resume, plan, as_json)


@command(app, MAKE, "zipper train recipes/spoken_commands.py")
def train(
    recipe: Recipe,
    resume: Resume = False,
    changes: Changes = None,
    plan: Plan = False,
    as_json: PlanJson = False,
) -> None:
    """Align towers on pairs."""
    config, rest = _read(recipe, changes or [])
    _follow(config, rest, resume, plan, as_json)


def _read(path: Path, changes: list[str]) -> tuple[Any, Mapping[str, Any]]:
    """The TrainConfig of a recipe, changed as --set says, and all that the file defines."""
    from zipper.saving.files import place
    from zipper.training.building import Build
    from zipper.training.config import TrainConfig

    if not path.is_file():
        raise ZipperError(
            f"The recipe {path} does not exist. Give a Python file such as "
            "recipes/spoken_commands.py."
        )
    try:
        found = runpy.run_path(str(path))
    except SyntaxError as error:
        raise ZipperError(f"{path}, line {error.lineno} is no Python: {error.msg}.") from error
    if not callable(found.get("config")):
        raise ZipperError(
            f"{path} has no function config(). A recipe is a Python file with config() -> "
            "TrainConfig."
        )
    if "build" in found and not isinstance(found["build"], Build):
        raise ZipperError(
            f"build in {path} is {found['build']!r}. It has to be an object of "
            "zipper.training.building.Build, which is called and has a `course`."
        )
    config = found["config"]()
    if not isinstance(config, TrainConfig):
        raise ZipperError(f"config() of {path} returns {config!r:.200}; a TrainConfig was wanted.")
    for item in changes:
        config = _changed(config, item)
    return dataclasses.replace(config, output=str(place(config.output))), found


def _follow(
    config: Any, recipe: Mapping[str, Any], resume: bool, plan: bool, as_json: bool
) -> None:
    """Do what a recipe says, or say what it would cost."""
    from zipper.training import building, loop

    build = recipe.get("build", building.build)
    if as_json and not plan:
        raise ZipperError("--json is for what --plan finds. Add --plan, or leave it out.")
    if not plan:
        writable(Path(config.output) / "config.json")
    if "prepare" in recipe:
        with extra("accelerate").PartialState().main_process_first():
            recipe["prepare"]()
    if plan:
        _plan(config, build, as_json)
        return
    loop.train(config, resume=resume, build=build)
    model = f"{config.output}/model"
    print(f"{model}: the best by dev loss. See it with: zipper show {model}")


def _plan(config: Any, build: Any, as_json: bool) -> None:
    """What a recipe will cost; builds its model and reads its data as training does."""
    import torch

    from zipper import modality
    from zipper.data import extraction
    from zipper.training import cost

    modalities = {name: modality.load(Path(path)) for name, path in config.modalities.items()}
    most = min(config.rows or cost.SAMPLE, cost.SAMPLE)
    policy = extraction.Policy(config.bad, config.most_bad)
    rows: list[Any] = []
    for source in [config.data] if isinstance(config.data, str) else config.data:
        rows += extraction.load(source, modalities, most, policy)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(config, modalities, rows)
    if config.frozen_dtype:
        for weight in model.towers.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(getattr(torch, config.frozen_dtype))
    how = (config.mixed_precision, config.accumulate, config.recompute, device)
    found = cost.plan(model, rows, config.tasks, config.batch, config.steps, *how)
    print(json.dumps(found, indent=1) if as_json else cost.text(found))


def _changed(config: Any, item: str) -> Any:
    """A TrainConfig with one field changed as --set says."""
    field, _, text = item.partition("=")
    if field not in {each.name for each in dataclasses.fields(config)}:
        raise ZipperError(
            f"--set {item}: TrainConfig has no field {field!r}. Its fields stand in "
            "zipper.training.config.TrainConfig."
        )
    old = getattr(config, field)
    try:
        new = _as_before(json.loads(text), old)
    except json.JSONDecodeError:
        raise ZipperError(
            f"--set {item}: {text!r} is not JSON. Write e.g. steps=100 or output='\"runs/x\"'."
        ) from None
    except TypeError as error:
        raise ZipperError(f"--set {item}: {error}. It is {old!r} in the recipe.") from error
    try:
        return dataclasses.replace(config, **{field: new})
    except ZipperError as error:
        raise ZipperError(f"--set {item}: {error} It is {old!r} in the recipe.") from error


def _as_before(new: Any, old: Any) -> Any:
    """What JSON says, as the field it is for: settings change in part, lists are tuples, whole
    numbers are floats. Raises TypeError."""
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        return dataclasses.replace(old, **new)
    if isinstance(old, tuple):
        return tuple(new)
    if isinstance(old, float) and isinstance(new, int):
        return float(new)
    return new


# --- one model from another


@command(
    app,
    MAKE,
    "zipper swap runs/demo/model text=runs/larger --modality text=runs/larger -o runs/swapped",
)
def swap(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a saved model")],
    tower: Annotated[
        list[str],
        typer.Argument(metavar="NAME=SOURCE", help="the new tower: a folder or hub id"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder for the model")],
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a new tower that learns; else it is frozen"),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="its tokenizer or codebook, where that is another"
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MEAN", help="its mean tokens per segment", show_default="as before"
        ),
    ] = None,
    towers: Bases = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Put another tower in a saved model: what still fits is kept, the rest is born again with
    closed gates."""
    from zipper import modality as modalities
    from zipper import surgery
    from zipper.pipeline import Pipeline
    from zipper.saving import hub

    new_towers = named("swap", tower)
    means = _means(tokens or [])
    absent(output)
    folders = named("--modality", modality)
    new_modalities = {name: modalities.load(folder) for name, folder in folders.items()}
    record = hub.record(model)
    old = Pipeline.from_pretrained(model, named("--tower", towers), dtype=None)
    new, report = surgery.swap_pipeline(old, new_towers, new_modalities, train or [], means)
    told = dataclasses.asdict(report)
    new.save_pretrained(output, surgery.inside(new.zip, model), record | {"swap": told})
    print(json.dumps(told, indent=1) if as_json else f"{report.text()}\n{output}: saved")


@command(
    app,
    MAKE,
    "zipper add runs/demo/model image=runs/image --modality image=runs/image -o runs/three",
)
def add(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a saved model")],
    tower: Annotated[
        str, typer.Argument(metavar="NAME=SOURCE", help="the new tower: a folder or hub id")
    ],
    modality: Annotated[str, typer.Option(metavar="NAME=FOLDER", help="its tokenizer or codebook")],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder for the model")],
    partner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="an old tower that it is linked with", show_default="all"
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="blocks of the new tower between junctions", show_default="1"),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A:N>B:M",
            help="each link by itself, instead of partners: behind its block M, B reads what A "
            "shows behind N, as in text:0>image:1",
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="the new tower learns; else it is frozen")
    ] = False,
    towers: Bases = None,
) -> None:
    """Add a tower to a saved model: what was there stays as it was, new links begin closed."""
    from zipper import growth, surgery
    from zipper import modality as modalities
    from zipper.pipeline import Pipeline
    from zipper.saving import hub

    ((name, source),) = named("add", [tower]).items()
    ((whose, folder),) = named("--modality", [modality]).items()
    if whose != name:
        raise ZipperError(
            f"--modality names {whose!r}; the new tower is {name!r}. "
            f"Write --modality {name}=FOLDER."
        )
    if link and every is not None:
        raise ZipperError(
            "--link says where each link reads and is fused, --every would say it too. Leave one "
            "out."
        )
    absent(output)
    record = hub.record(model)
    old = Pipeline.from_pretrained(model, named("--tower", towers), dtype=None)
    given = modalities.load(folder)
    new = growth.add_pipeline(
        old,
        name,
        source,
        given,
        partners=partner,
        every=1 if every is None else every,
        links=[_directed(one) for one in link] if link else None,
        train=train,
    )
    new.save_pretrained(output, surgery.inside(new.zip, model), record)
    print(f"{output}: saved")


def _directed(said: str) -> tuple[str, int, str, int]:
    """ "text:0>image:1" as a link. Raises a ZipperError for anything else."""
    form = re.fullmatch(r"(\w+):(\d{1,4})>(\w+):(\d{1,4})", said)
    if form is None:
        raise ZipperError(
            f"--link {said!r} is no link. Write SOURCE:DEPTH>TARGET:DEPTH, for example "
            "'text:0>image:1'."
        )
    source, shown, target, fused = form.groups()
    return source, int(shown), target, int(fused)


@command(
    app,
    MAKE,
    "zipper compose runs/demo/model runs/pictures/model -o runs/three",
)
def compose(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="a saved model")],
    second: Annotated[
        Path, typer.Argument(metavar="SECOND", help="another, that has a tower in common with it")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="new folder for the model")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="what a tower of the second is called in the new model"
        ),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="copy all towers into the new folder, not only name those of the parents"
        ),
    ] = False,
    towers: Bases = None,
) -> None:
    """Make one model of two that share a tower: each pair of towers answers as before."""
    from zipper import composition

    absent(output)
    names, bases = named("--name", name), named("--tower", towers)
    new = composition.compose_saved(first, second, names, bases)
    new.save_pretrained(output, [*new.zip.towers] if copy else [])
    print(f"{output}: saved, {', '.join(sorted(new.zip.towers))}")


def _means(tokens: list[str]) -> dict[str, float]:
    """NAME=MEAN items as numbers."""
    try:
        return {name: float(mean) for name, mean in named("--tokens", tokens).items()}
    except ValueError as error:
        raise ZipperError(f"--tokens {tokens}: {error}. Write e.g. --tokens text=15.9.") from None


@command(app, MAKE, "zipper push runs/demo/model me/my-zip --private")
def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a saved model")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="hub repository; made if there is none")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="if the repository is new, only its owner sees it")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="branch to commit to, made from main if there is none", show_default="main"
        ),
    ] = None,
    message: Annotated[str, typer.Option(help="of the commit")] = "Upload a zip",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="a frozen tower to upload too: others lack its folder"),
    ] = None,
    towers: Bases = None,
) -> None:
    """Upload a saved model to the hub, in one commit."""
    import tempfile

    from zipper.model import Zipper
    from zipper.pipeline import Pipeline
    from zipper.saving import checkpoint, hub

    with tempfile.TemporaryDirectory() as place:
        folder = model
        if include or towers:
            kind = Pipeline if (model / checkpoint.PINS).is_file() else Zipper
            record = hub.record(model)
            loaded = kind.from_pretrained(model, named("--tower", towers), dtype=None)
            folder = Path(place) / "zip"
            inside = [*(include or []), *loaded.inside(model)]
            loaded.save_pretrained(folder, inside, record)
        print(hub.push(folder, repo, private=private, revision=revision, message=message))
