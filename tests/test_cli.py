"""The command line: it says what to type, does what it says, and answers bad input with one
sentence and exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import tiny
import torch
from tiny import World

from zipper import cli
from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.data import manifests as data
from zipper.modality.speech import SpeechUnits
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.strand import Segment
from zipper.verify import Check
from zipper_lab.commands import _page

#: How each command that loads a saved model is told where a frozen tower lies; the others load
#: none.
LOADS = {
    "transcribe": ["a.wav"],
    "speak": ["call anna", "-o", "out.wav"],
    "run": ["--given", "text=call anna", "--outputs", "text"],
    "evaluate": [],
    "show": [],
    "verify": [],
    "swap": ["text=x", "-o", "out"],
    "add": ["image=x", "--modality", "image=y", "-o", "out"],
    "compose": ["other", "-o", "out"],
    "serve": ["--check"],
    "run-batch": ["rows.jsonl", "--task", "speech -> text", "-o", "out.jsonl"],
    "prune": ["--below", "0.1", "-o", "out"],
    "push": ["me/zip"],
}
COMMANDS = sorted(context.command_path.removeprefix("zipper ") for context in cli.commands())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


def run_python(*words: str, **environment: str) -> Answer:
    """A process of its own."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | environment
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def read(*words: str) -> dict[str, Any]:
    """What a command would be given for these words; nothing is done."""
    program, given = cli.program(), dict[str, Any]()
    for context in cli.commands(program):
        context.command.callback = lambda **found: given.update(found)
    program.main(list(words), standalone_mode=False)
    return given


Zipper = Callable[..., Answer]


@pytest.fixture
def zipper(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Zipper:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZIPPER_DEBUG", raising=False)

    def run(*arguments: Any) -> Answer:
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # wrong usage, and --help
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


def refused(answer: Answer) -> str:
    """The one sentence (or two) of a refusal."""
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.count("\n") == 1, answer.err
    return answer.err


# --- help


@pytest.mark.slow  # the pages themselves are tried in tests/lab/test_results.py
def test_a_recorded_run_is_told_again(zipper: Zipper, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    (recorded,) = (root / "benchmarks" / "results").glob("reproduce_cpu_*.json")
    assert zipper("reproduce", "--report", recorded, "--output", tmp_path / "told").code == 0
    assert (tmp_path / "told" / "results.md").read_text() == (
        root / "docs" / "results.md"
    ).read_text()
    assert (tmp_path / "told" / "results.html").is_file()
    (tmp_path / "other.json").write_text('{"preset": "cpu"}')
    for wrong, message in (
        ("none.json", "none.json"),
        ("other.json", "Give the results.json that"),
    ):
        assert message in refused(
            zipper("reproduce", "--report", tmp_path / wrong, "--output", tmp_path / "untold")
        )
        assert not (tmp_path / "untold").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(zipper: Zipper, command: str) -> None:
    for option in ("--help", "-h"):
        answer = zipper(*command.split(), option)
        assert answer.code == 0
        assert answer.out.startswith(f"Usage: zipper {command} ")
        assert f"example: zipper {command}" in answer.out


@pytest.mark.parametrize("columns", [80, 100])
def test_every_help_fits_the_window_and_cuts_nothing_off(
    zipper: Zipper, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("", *COMMANDS):
        lines = zipper(*command.split(), "--help").out.splitlines()
        wide = [line for line in lines if len(line) > columns and "example:" not in line]
        assert not wide and not any(line.endswith("...") for line in lines[2:])


HELP = """
import sys
from zipper.cli import main
try: main(["--help"])
except SystemExit as stop: assert not stop.code
print(sorted({"torch", "transformers", "numpy", "tqdm", "huggingface_hub", "rich", "pydantic"}
             & set(sys.modules)))
"""


def test_help_lists_every_command_and_loads_no_heavy_library() -> None:
    said = run_python("-c", HELP).out
    listed = {line.split()[0] for line in said.splitlines() if re.match("  [a-z]", line)}
    assert {command.split()[0] for command in COMMANDS} <= listed
    headings = [line for line in said.splitlines() if re.fullmatch("[A-Z][a-z]+:", line)]
    assert headings[:5] == ["Options:", "Use:", "Make:", "Look:", "Laboratory:"]
    assert said.endswith("[]\n")


def test_the_page_of_all_commands_has_them_all() -> None:
    titles = [line for line in cli.markdown().splitlines() if line.startswith("## zipper ")]
    assert sorted(title.removeprefix("## zipper ") for title in titles) == COMMANDS


@pytest.mark.slow
def test_a_shell_is_told_how_words_go_on() -> None:
    def completed(*words: str) -> list[str]:
        asked = {"COMP_WORDS": " ".join(["zipper", *words]), "COMP_CWORD": str(len(words))}
        return run_python("-m", "zipper", _ZIPPER_COMPLETE="complete_bash", **asked).out.split()

    assert completed("tr") == ["transcribe", "train"]
    assert completed("units", "--mos") == ["--most-bad"]
    assert completed("units", "--bad", "") == ["error", "warn", "skip"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("sing",),
        ("transcribe",),
        ("speak", "call"),
        ("units", "x.wav", "-o", "u", "--fit", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(zipper: Zipper, arguments: tuple[str, ...]) -> None:
    answer = zipper(*arguments)
    assert answer.code == 2
    usage, *said = answer.err.splitlines()
    assert usage.startswith("Usage: zipper") and said[-1].startswith("zipper")
    assert answer.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("units", "a.wav", "-o", "a.wav"), "would lose it"),
        (("units", "b.wav", "a.wav", "-o", "./a.wav"), "would lose it"),
        (("units", "rows.jsonl", "-o", "rows.jsonl"), "is a file, a folder"),
        (("units", "a.wav", "-o", "u.jsonl", "--text", "."), "are for a corpus"),
        (
            ("units", "a.wav", "-o", "u.jsonl", "--split", "train"),
            "--split, --text and --modality are for a corpus",
        ),
        (("evaluate", "MODEL", "rows.jsonl", "-o", "rows.jsonl"), "would lose it"),
        (("evaluate", "MODEL", "rows.jsonl", "-o", "rows.html"), "end in .json"),
        (("evaluate", "MODEL", "rows.jsonl", "--robust"), "are for the built-in corpus"),
        (("evaluate", "MODEL", "rows.jsonl", "--test", "5"), "are for the built-in corpus"),
        (("evaluate", "MODEL", "rows.jsonl", "--task", "asr"), "are for the built-in corpus"),
        (("evaluate", "MODEL", "--seed", "3"), "are for rows of DATA"),
        (("demo", "--modality", "digits", "--json"), "are for spoken commands"),
        (("demo", "--modality", "digits", "--steps", "3"), "are for spoken commands"),
        (("demo", "--data", "FOLDER"), "--data is for --modality"),
        (("evaluate", "MODEL", "--limit", "3"), "are for rows of DATA"),
        (("run-batch", "rows.jsonl", "--task", "asr", "-o", "rows.jsonl"), "would lose it"),
        (("speak", "...", "-o", "o.wav"), "nothing to say in '...'"),
        (("fit", "text", "latin.txt", "-o", "f"), "latin.txt, line 2 is no text in UTF-8"),
        (("fit", "text", "plain.txt", "-o", "f", "--set", "merges=-1"), "merges is -1"),
        (("train", "broken.py"), "broken.py, line 1 is no Python"),
        (("train", "number.py"), "has no function config()"),
        (("train", "nothing.py"), "returns 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_wanted_is_one_sentence_and_loses_nothing(
    zipper: Zipper, world: World, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    for name in ("a.wav", "b.wav"):
        tiny.sound(tmp_path / name, seconds=0.2)
    (tmp_path / "rows.jsonl").write_text('{"text": "call", "speech": "a.wav"}\n')
    (tmp_path / "latin.txt").write_bytes("plain\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "plain.txt").write_text("plain\n")
    (tmp_path / "broken.py").write_text("def config(:\n")
    (tmp_path / "number.py").write_text("config = 3\n")
    (tmp_path / "nothing.py").write_text("def config():\n    return 7\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    answer = zipper(*(str(world.zip) if word == "MODEL" else word for word in arguments))
    assert answer.code == 2 and said in answer.err, answer
    assert len(answer.err.splitlines()) == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_an_option_with_dots_takes_all_words_up_to_the_next() -> None:
    for words in ("--links a b -o x m", "m -o x --links a b", "m --links a --links b -o x"):
        found = read("prune", *words.split())
        assert (found["links"], found["output"], found["model"]) == (
            ["a", "b"],
            Path("x"),
            Path("m"),
        )


def test_options_of_all_benchmarks_are_not_lost_before_one(zipper: Zipper) -> None:
    answer = zipper("bench", "--json", "decode")
    assert answer.code == 2 and "options of decode stand behind it" in answer.err


# --- commands of other packages

ROOT = Path(__file__).parents[1]


def package(place: Path, name: str, commands: dict[str, str], **modules: str) -> None:
    """An installed package of no more than entry points and modules."""
    metadata = place / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {value}" for entry, value in commands.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[zipper.commands]", *lines]))
    for module, content in modules.items():
        (place / f"{module}.py").write_text(content)


def bare(place: Path, *words: str) -> Answer:
    """`python -m zipper` that sees, of packages with commands, only those in a folder.

    It is told so by a module that Python imports when it starts, before all others.
    """
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        f"all_, place = m.entry_points, {str(place)!r}\n"
        "m.entry_points = lambda **given: m.EntryPoints(\n"
        "    e for e in all_(**given) if str(e.dist.locate_file('')) == place)\n"
    )
    return run_python(*words, PYTHONPATH=os.pathsep.join([str(place), str(ROOT / "src")]))


OTHER = """
import typer
app = typer.Typer()
@app.command()
def sing(song: str) -> int:
    "Sing a song."
    from zipper.errors import ZipperError
    if song == "none":
        raise ZipperError("there is no song")
    print(song)
    return 1
"""


def test_the_library_knows_no_laboratory() -> None:
    for path in (ROOT / "src" / "zipper").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) zipper_lab", path.read_text(), re.MULTILINE), path


def test_the_laboratory_is_attached_by_its_entry_point(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["zipper.commands"]
    without = bare(tmp_path / "without", "-m", "zipper", "--help")
    package(tmp_path / "with", "zipper_lm", named)
    attached = bare(tmp_path / "with", "-m", "zipper", "--help")
    assert (without.code, without.err, attached.code, attached.err) == (0, "", 0, "")
    assert "Laboratory:" not in without.out and "  demo " not in without.out
    assert "Laboratory:" in attached.out and "  demo " in attached.out
    assert "  prune " in attached.out.partition("Make:")[2].partition("Look:")[0]


@pytest.mark.slow
def test_the_laboratory_runs_from_a_checkout(tmp_path: Path) -> None:
    answer = bare(tmp_path, "-m", "zipper_lab", "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "  demo " in answer.out and "  transcribe " in answer.out
    assert bare(tmp_path, "-m", "zipper_lab", "demo", "--pairs", "0").code == 2
    assert "No such command 'demo'" in bare(tmp_path, "-m", "zipper", "demo").err


@pytest.mark.slow
def test_another_package_brings_a_command_that_answers_as_ours_do(tmp_path: Path) -> None:
    package(tmp_path, "choir", {"choir": "choir:app"}, choir=OTHER)
    assert re.search("More:\n  sing +Sing a song", bare(tmp_path, "-m", "zipper", "-h").out)
    assert bare(tmp_path, "-m", "zipper", "sing", "la") == Answer(1, "la\n", "")
    refusal = Answer(2, "", "zipper sing: there is no song\n")
    assert bare(tmp_path, "-m", "zipper", "sing", "none") == refusal


@pytest.mark.parametrize(
    ("value", "module", "why"),
    [
        ("gone:app", "", "ModuleNotFoundError: No module named 'gone'"),
        ("choir:app", "1 / 0", "ZeroDivisionError: division by zero"),
        ("choir:app", "app = 'la\\nla'", "TypeError: it is a str, a typer.Typer was wanted"),
        ("choir:app", OTHER.replace("sing(", "train("), "ValueError: there is another train"),
        ("choir:app", OTHER.replace("str", "int | str"), "support Union types"),
    ],
)
def test_a_broken_package_costs_one_line_and_only_where_it_is_asked(
    tmp_path: Path, value: str, module: str, why: str
) -> None:
    package(tmp_path, "choir", {"choir": value}, choir=module)
    answer = bare(tmp_path, "-m", "zipper", "--help")
    assert answer.code == 0 and "  transcribe " in answer.out
    assert answer.err.startswith(f"zipper: the commands of choir ({value}) are left out: ")
    assert why in answer.err and answer.err.count("\n") == 1
    assert bare(tmp_path, "-m", "zipper", "train", "--help").err == ""


# --- raw in, raw out


def test_transcribe_prints_the_words_of_each_file(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    clips = [tiny.sound(tmp_path / f"{n}.wav", seconds=0.4, seed=n) for n in range(2)]
    pipe = Pipeline.from_pretrained(world.zip)
    words = [pipe.transcribe(clip) for clip in clips]
    answer = zipper("transcribe", *clips, "--model", world.zip)
    assert (answer.code, answer.out) == (0, "".join(f"{text}\n" for text in words))
    answer = zipper("transcribe", *clips, "--model", world.zip, "--json")
    found = [json.loads(line) for line in answer.out.splitlines()]
    sure = [found_one.pop("confidence") for found_one in found]
    assert found == [
        {"file": str(clip), "text": text} for clip, text in zip(clips, words, strict=True)
    ]
    assert sure == pytest.approx([pipe.hear(clip).confidence for clip in clips], abs=1e-4)


def test_where_nothing_is_said_nothing_is_written(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    silence, noise = (
        np.zeros(16_000, np.float32),
        np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32),
    )
    soundfile.write(tmp_path / "silence.wav", silence, 16_000)
    soundfile.write(tmp_path / "noise.wav", noise, 16_000)
    said = tiny.sound(tmp_path / "said.wav")
    answer = zipper("transcribe", "silence.wav", "noise.wav", said, "--model", world.zip, "--json")
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert [(one["text"], one["confidence"]) for one in found[:2]] == [("", 1.0)] * 2
    assert found[2]["text"]
    assert 0 < found[2]["confidence"] < 0.5  # an untrained model is sure of nothing
    answer = zipper("transcribe", said, "--model", world.zip, "--json", "--least", "0.9")
    assert json.loads(answer.out) == found[2] | {"text": ""}
    for least in ("nan", "1.5", "-0.1"):
        answer = zipper("transcribe", said, "--model", world.zip, "--least", least)
        assert (answer.code, answer.out) == (2, "")
        assert "confidence goes from 0 to 1" in answer.err
    answer = zipper(
        "run", "--given", "speech=silence.wav", "--outputs", "text", "--model", world.zip, "--json"
    )
    assert json.loads(answer.out) == {"text": "", "ended": True}


def test_speak_writes_the_sound(zipper: Zipper, world: World, tmp_path: Path) -> None:
    answer = zipper(
        "speak", "call anna", "--voice", "high", "-o", "out.wav", "--model", world.zip, "--json"
    )
    assert answer.code == 0
    found = json.loads(answer.out)
    written, rate_hz = soundfile.read(tmp_path / "out.wav", dtype="float32")
    said = Pipeline.from_pretrained(world.zip).speak("call anna", "high")
    assert (found["file"], rate_hz, found["seconds"]) == (
        "out.wav",
        said.rate_hz,
        round(said.seconds, 2),
    )
    np.testing.assert_allclose(written, said.samples, atol=1e-4)
    answer = zipper(
        "speak",
        "call anna",
        "-o",
        "out.flac",
        "--model",
        world.zip,
        "--temperature",
        "1",
        "--top-k",
        "3",
        "--seed",
        "4",
    )
    assert answer.code == 0
    assert answer.out.startswith("out.flac: ")
    drawn = "--takes 3 --temperature 2 --seed 8".split()
    assert zipper("speak", "call", "-o", "best.wav", "--model", world.zip, *drawn).code == 0
    how = Sampling(temperature=2.0, seed=8)
    pipe = Pipeline.from_pretrained(world.zip)
    first, best = (pipe.speak("call", sampling=how, takes=takes) for takes in (1, 3))
    assert first.seconds != best.seconds
    kept = audio.read(tmp_path / "best.wav")
    np.testing.assert_allclose(kept.samples, best.samples, atol=1e-4)


def test_run_takes_and_makes_any_order(zipper: Zipper, world: World, tmp_path: Path) -> None:
    clip = tiny.sound(tmp_path / "clip.wav", seconds=0.4)
    plan = (
        "--given",
        "text=call anna",
        "--given",
        f"speech={clip}",
        "--outputs",
        "text, speech",
        "--model",
        world.zip,
    )
    answer = zipper("run", *plan, "-o", "made/here", "--json")
    assert answer.code == 0
    first, second = (json.loads(line) for line in answer.out.splitlines())
    assert first.keys() == {"text", "ended"}
    assert second["speech"] == str(Path("made/here/1-speech.wav"))
    assert audio.read(tmp_path / "made" / "here" / "1-speech.wav").seconds > 0
    answer = zipper("run", "--given", f"speech={clip}", "--outputs", "text", "--model", world.zip)
    assert answer.out.startswith("text: ")


def test_run_goes_on_where_the_model_says_nothing(
    zipper: Zipper, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produced = [Segment("speech", Audio([], 16_000)), Segment("text", "call anna")]
    monkeypatch.setattr("zipper.pipeline.Pipeline.run", lambda *_, **__: produced)
    plan = ("--given", "text=call", "--outputs", "speech, text", "--model", world.zip, "-o", "made")
    assert zipper("run", *plan) == Answer(0, "speech: \ntext: call anna\n", "")
    assert not list((tmp_path / "made").iterdir())
    answer = zipper("speak", "call", "-o", "a.wav", "--model", world.zip)
    assert (answer.code, answer.out) == (
        2,
        "",
    ) and "There is no sound to write to a.wav" in answer.err


def test_show_prints_a_table_or_json(zipper: Zipper, world: World) -> None:
    assert json.loads(zipper("show", world.zip, "--json").out)["junctions"] == [
        {"text": 1, "speech": 1}
    ]
    assert "voices low, high" in zipper("show", world.zip).out


def test_verify_is_exit_code_1_where_a_promise_is_broken(
    zipper: Zipper, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = zipper("verify", world.zip)
    assert answer.code == 0
    assert all(line.startswith("ok ") for line in answer.out.splitlines())
    assert all(check["held"] for check in json.loads(zipper("verify", world.zip, "--json").out))
    some = zipper("verify", world.zip, "--only", "no leak").out.splitlines()
    assert some == [line for line in answer.out.splitlines() if line[8:].startswith("no leak")]
    monkeypatch.setattr("zipper.verify.verify", lambda *_, **__: [Check("no leak", False, "0.3")])
    assert zipper("verify", world.zip) == Answer(1, "BROKEN  no leak: 0.3\n", "")


def test_units_writes_a_manifest_that_training_reads(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    (clips / "more").mkdir(parents=True)
    (clips / "notes.txt").write_text("no sound")
    paths = [tiny.sound(clips / "a.wav"), tiny.sound(clips / "more" / "b.flac", seconds=0.5)]
    answer = zipper("units", clips, "-o", "new/units.jsonl", "--units", world.folder / "speech")
    assert answer.code == 0
    assert "2 files" in answer.out
    rows = data.manifest(tmp_path / "new" / "units.jsonl")
    assert [row["id"] for row in rows] == ["a", "more/b"]
    assert [row["duration"] for row in rows] == [1.0, 0.5]
    assert data.read(tmp_path / "new" / "units.jsonl", {"speech": tiny.units()})[0][
        "speech"
    ] == tiny.units().encode(paths[0])


def test_units_fits_a_codebook_of_its_own(zipper: Zipper, tmp_path: Path) -> None:
    for n in range(3):
        tiny.sound(tmp_path / f"{n}.wav", seconds=2, seed=n)
    arguments = (
        "units",
        "0.wav",
        "1.wav",
        "2.wav",
        "-o",
        "units.jsonl",
        "--fit",
        8,
        "--units",
        "codes",
    )
    assert zipper(*arguments).code == 0
    units = SpeechUnits.load(tmp_path / "codes")
    assert (units.codes, units.config.fitted_on) == (8, "3 sounds")
    assert data.read(tmp_path / "units.jsonl", {"speech": units})[2]["speech"] == units.encode(
        tmp_path / "2.wav"
    )
    before = (tmp_path / "codes" / "codebook.safetensors").read_bytes()
    assert "codes holds a codebook already" in refused(zipper(*arguments))
    assert (tmp_path / "codes" / "codebook.safetensors").read_bytes() == before


# --- training

RECIPE = """
import tiny
from pathlib import Path
def prepare():
    Path("prepared").touch()
def config():
    return tiny.World(Path({world!r})).config(Path("run"), steps=2, eval_every=2)
"""


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(world=str(world.folder)))
    return path


def test_train_runs_a_recipe_with_fields_changed_and_resumes(
    zipper: Zipper, recipe: Path, tmp_path: Path
) -> None:
    changed = (
        "--set",
        "steps=3",
        "--set",
        'link={"dropout": 0.5}',
        "--set",
        "lr_new=1",
        "--set",
        'train=["text"]',
    )
    answer = zipper("train", recipe, *changed)
    assert answer.code == 0
    assert answer.out == "run/model: the best by dev loss. See it with: zipper show run/model\n"
    assert (tmp_path / "prepared").exists()
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["steps"], written["link"]["dropout"], written["link"]["gate_init"]) == (
        3,
        0.5,
        0.6,
    )
    assert (written["lr_new"], written["train"]) == (1, ["text"])
    assert "run holds a run already. Pass --resume" in refused(zipper("train", recipe, *changed))
    assert "another recipe: other steps (steps was 3, is 4)" in refused(
        zipper("train", recipe, *changed, "--set", "steps=4", "--resume")
    )
    assert zipper("train", recipe, *changed, "--resume").code == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [2, 3]


BUILD = """
class Told:
    course = {"of": "mine"}
    def __call__(self, config, modalities, rows):
        from zipper.training.building import build
        Path("built").write_text(", ".join(sorted(modalities)))
        return build(config, modalities, rows)
build = Told()
"""


def test_a_recipe_may_build_its_own_model(zipper: Zipper, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + BUILD)
    assert zipper("train", recipe, "--plan", "--json").code == 0
    assert (tmp_path / "built").read_text() == "speech, text"
    (tmp_path / "built").unlink()
    assert zipper("train", recipe).code == 0
    assert (tmp_path / "built").exists()
    recipe.write_text(recipe.read_text() + "build = None\n")
    assert "has to be an object of zipper.training.building.Build" in refused(
        zipper("train", recipe)
    )


def test_results_whose_names_differ_have_pages_of_their_own() -> None:
    pages = [_page(Path("there") / name).name for name in ("v1.1", "v1.2", "found.json", "a.JSON")]
    assert pages == ["v1.1.html", "v1.2.html", "found.html", "a.html"]


def test_json_is_of_a_plan(zipper: Zipper, recipe: Path, tmp_path: Path) -> None:
    assert "--json is for what --plan finds" in refused(zipper("train", recipe, "--json"))
    assert not (tmp_path / "run").exists()


def test_pretrain_wants_one_tower(zipper: Zipper, recipe: Path, tmp_path: Path) -> None:
    assert "pretrain wants one. Use `zipper train`" in refused(zipper("pretrain", recipe))
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz=3", "TrainConfig has no field 'stepz'"),
        ("steps", "'' is not JSON. Write e.g. steps=100"),
        ("steps=ten", "'ten' is not JSON"),
        ('steps="ten"', "steps is 'ten'; it must be of type int. It is 2 in the recipe"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("lr_new=null", "lr_new is None; it must be of type float"),
        ('link={"colour": 1}', "unexpected keyword argument 'colour'"),
        ("train=3", "'int' object is not iterable"),
        ('output="recipe.py/run"', "recipe.py is no folder that you may write in"),
        ('data="gone.jsonl"', "The manifest gone.jsonl does not exist"),
        ('data="bad.jsonl"', "bad.jsonl, line 1 is not JSON"),
        (
            'data="ids.jsonl"',
            "ids.jsonl, line 1: 'speech' holds 28; ids of 'speech' go from 0 to 27",
        ),
        ('towers={"text": "gone", "speech": "gone"}', "gone"),
        ('modalities={"text": "gone", "speech": "gone"}', "gone holds no modality"),
    ],
)
def test_a_bad_recipe_is_refused_and_leaves_nothing(
    zipper: Zipper, recipe: Path, tmp_path: Path, change: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    data.write(tmp_path / "ids.jsonl", [{"text": "call", "speech": [28]}])
    assert message in refused(zipper("train", recipe, "--set", change))
    assert not (tmp_path / "run").exists()


def test_what_is_no_recipe_is_refused(zipper: Zipper, tmp_path: Path) -> None:
    assert "The recipe gone.py does not exist" in refused(zipper("train", "gone.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "empty.py has no function config()" in refused(zipper("train", "empty.py"))


# --- bad input


def not_audio(folder: Path) -> Path:
    (folder / "words.wav").write_text("these are words")
    return folder / "words.wav"


def empty_file(folder: Path) -> Path:
    (folder / "empty.wav").touch()
    return folder / "empty.wav"


def no_samples(folder: Path) -> Path:
    soundfile.write(folder / "silent.wav", np.zeros(0, np.float32), 16_000)
    return folder / "silent.wav"


def slow_rate(folder: Path) -> Path:
    return tiny.sound(folder / "slow.wav", seconds=100, rate_hz=100)


def absurd_rate(folder: Path) -> Path:
    path = tiny.sound(folder / "fast.wav", seconds=0.1)
    content = bytearray(path.read_bytes())
    content[24:28] = (2_000_000_000).to_bytes(4, "little")  # the rate in the header
    path.write_bytes(content)
    return path


def too_long(folder: Path) -> Path:
    return tiny.sound(folder / "long.wav", seconds=30)


BAD_SOUND = [
    (lambda folder: folder / "gone.wav", "gone.wav does not exist"),
    (lambda folder: folder, "is a folder, a sound file was wanted"),
    (not_audio, "words.wav is not readable sound"),
    (empty_file, "empty.wav is not readable sound"),
    (no_samples, "silent.wav holds no sound (0 samples)"),
    (slow_rate, "slow.wav is 100 Hz, wanted are 8000 to 192000 Hz"),
    (absurd_rate, "fast.wav is 2000000000 Hz"),
    (too_long, "'speech' would read 75"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SOUND)
def test_bad_sound_is_refused(
    zipper: Zipper, world: World, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(zipper("transcribe", path, "--model", world.zip))
    given = ("--given", f"speech={path}", "--outputs", "speech", "-o", "made", "--model", world.zip)
    assert message in refused(zipper("run", *given))
    if path.is_file() and make is not too_long:
        fine = tiny.sound(tmp_path / "fine.wav")
        units = ("units", fine, path, "-o", "units.jsonl")
        assert message in refused(zipper(*units, "--units", world.folder / "speech"))
        assert message in refused(zipper(*units, "--units", "codes", "--fit", 4))
        fine.unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("speak", "call", "-o", "out.wav", "--voice", "alto"),
            "these units have no voice 'alto'. Take one of low, high",
        ),
        (("speak", "call", "-o", "out.wav", "--takes", "2"), "2 takes were asked for. Give 1 or"),
        (("run", "--given", "text=call", "--outputs", "text", "--takes", "2"), "2 takes were"),
        (("speak", "call 42", "-o", "out.wav"), "this tokenizer cannot write 2 4 in 'call 42'"),
        (("speak", "call " * 99, "-o", "out.wav"), "'text' would read"),
        (("speak", "call", "-o", "out.xyz"), "End its name in one of .wav"),
        (("speak", "call", "-o", "gone/out.wav"), "the folder gone does not exist"),
        (("speak", "call", "-o", "file/out.wav"), "the folder file does not exist"),
        (("speak", "call", "-o", "."), "does not say which kind of sound"),
        (("speak", "call", "-o", "out.wav", "--temperature", "-1"), "temperature >= 0"),
        (("run", "--outputs", ""), "needs at least one"),
        (("run", "--given", "call", "--outputs", "text"), "--given 'call' is not NAME=CONTENT"),
        (
            ("run", "--given", "video=x", "--outputs", "text"),
            "no modality 'video'; it has ['speech', 'text']",
        ),
        (
            ("run", "--given", "text=call", "--outputs", "video"),
            "no tower 'video'; it has ['speech', 'text']",
        ),
        (("run", "--given", "text=call", "--outputs", "speech"), "Pass -o FOLDER"),
        (
            ("run", "--given", "text=call", "--outputs", "speech", "-o", "file"),
            "file is no folder that you may write in",
        ),
        (
            ("run", "--given", "text=call 42", "--outputs", "speech", "-o", "new"),
            "cannot write 2 4",
        ),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    zipper: Zipper, world: World, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file").write_text("a file")
    assert message in refused(zipper(*arguments, "--model", world.zip))
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_folder_one_may_not_write_in_is_refused(
    zipper: Zipper, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.sound(tmp_path / "a.wav")
    (tmp_path / "locked").mkdir()
    # Root may do everything.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "locked")
    for arguments in (
        ("speak", "call", "-o", "locked/out.wav", "--model", world.zip),
        (
            "run",
            "--given",
            "text=call",
            "--outputs",
            "speech",
            "-o",
            "locked/new",
            "--model",
            world.zip,
        ),
        ("units", "a.wav", "-o", "locked/units.jsonl", "--units", world.folder / "speech"),
        ("units", "a.wav", "-o", "units.jsonl", "--units", "locked/codes", "--fit", "4"),
    ):
        assert "locked" in refused(zipper(*arguments))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.wav", "locked"]


def test_a_manifest_never_lands_on_a_folder(zipper: Zipper, world: World, tmp_path: Path) -> None:
    tiny.sound(tmp_path / "a.wav")
    (tmp_path / "units").mkdir()
    assert "units is a folder" in refused(
        zipper("units", "a.wav", "-o", "units", "--units", world.folder / "speech")
    )
    assert "There is no sample in units" in refused(
        zipper("units", "units", "-o", "u.jsonl", "--units", world.folder / "speech")
    )
    assert "Pass --units FOLDER" in refused(zipper("units", "a.wav", "-o", "u.jsonl", "--fit", "4"))
    assert "too few" in refused(
        zipper("units", "a.wav", "-o", "u.jsonl", "--fit", "4000", "--units", "codes")
    )
    codes = ("--units", world.folder / "speech")
    assert "does not exist" in refused(zipper("units", "jsonl:gone.jsonl", "-o", "new", *codes))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.wav", "units"]


def test_units_of_folders_are_a_manifest_that_says_what_it_holds(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    for name in ("f/one/a.wav", "f/two/a.wav", "f/b.aiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.sound(tmp_path / name, seconds=0.2)
    for name in ("c.m4a", "d.webm", "._e.wav", "notes.txt"):
        (tmp_path / "f" / name).write_bytes(b"no sound")
    (tmp_path / "f" / "ring").symlink_to(tmp_path / "f")
    asked = ("units", "f", "-o", "u.jsonl", "--units", world.folder / "speech", "--workers", "1")
    assert "c.m4a" in refused(zipper(*asked))
    answer = zipper(*asked, "--bad", "skip", "--most-bad", "0.5", "--json")
    told = json.loads(answer.out)
    assert answer.code == 0 and (told["samples"], told["rows"], told["bad"]) == (5, 3, 2)
    assert told["passed"] == {
        "files .txt": 1,
        "folders that were met before": 1,
        "hidden files and folders": 1,
    }
    assert told["bad_list"] == "u.bad.jsonl"
    assert [line["id"] for line in data.manifest(tmp_path / "u.bad.jsonl")] == ["c", "d"]
    assert [row["id"] for row in data.manifest(tmp_path / "u.jsonl")] == ["b", "one/a", "two/a"]
    answer = zipper(*asked, "--bad", "skip", "--most-bad", "0.5")
    assert "u.jsonl: 3 files (2 bad ones left out, see u.bad.jsonl)" in answer.out
    assert (
        "Passed over: files .txt (1), folders that were met before (1), hidden files and folders "
        "(1)." in answer.out
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "u.bad.jsonl", "u.jsonl"]
    again = zipper(
        "units",
        "u.jsonl",
        "-o",
        "again",
        "--units",
        world.folder / "speech",
        "--text",
        world.folder / "text",
        "--json",
    )
    assert json.loads(again.out) | {"real_time": 0} == {
        "samples": 3,
        "bad": 0,
        "passed": {},
        "rows": 3,
        "seconds": pytest.approx(0.6),
        "fields": json.loads(again.out)["fields"],
        "real_time": 0,
        "bad_list": None,
    }


def test_a_codebook_is_fitted_on_what_can_be_read_where_bad_sound_may_be_skipped(
    zipper: Zipper, tmp_path: Path
) -> None:
    for n in range(3):
        tiny.sound(tmp_path / f"{n}.wav", seconds=0.5, seed=n)
    (tmp_path / "3.wav").write_bytes(b"no sound")
    asked = (
        "units",
        *(f"{n}.wav" for n in range(4)),
        "-o",
        "u.jsonl",
        "--fit",
        "4",
        "--units",
        "codes",
        "--workers",
        "1",
    )
    assert "3.wav is not" in refused(zipper(*asked))
    assert zipper(*asked, "--bad", "skip", "--most-bad", "0.5").code == 0
    assert len(data.manifest(tmp_path / "u.jsonl")) == 3


def test_realistic_texts_fit_the_shipped_tokenizer(zipper: Zipper, tmp_path: Path) -> None:
    chapter = tmp_path / "LibriTTS" / "dev-clean" / "84" / "1"
    chapter.mkdir(parents=True)
    said = [
        "\u201cWell,\u201d he said\u2014rather quietly\u2014\u201cI don\u2019t know; do you?\u201d",
        "Mr. Bennet's carriage (the old one) came at half-past nine: it was late!",
        "'Tis true, 'tis pity; and pity 'tis 'tis true.",
    ]
    for n, text in enumerate(said):
        tiny.sound(chapter / f"84_1_{n}.wav", seconds=0.2)
        (chapter / f"84_1_{n}.normalized.txt").write_text(text, encoding="utf-8")
    answer = zipper("units", "libritts:LibriTTS", "-o", "made", "--json", "--workers", "1")
    told = json.loads(answer.out)
    assert (answer.code, told["rows"], told["bad"]) == (0, 3, 0)
    assert told["passed"] == {"field voice": 3, "punctuation of text": 3}
    text = Pipeline.from_pretrained().modalities["text"]
    assert (
        text.decode(data.read(tmp_path / "made", {})[0]["text"])
        == "well he said rather quietly i don't know do you"
    )


def test_home_is_understood_in_every_path(
    zipper: Zipper, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c").mkdir()
    tiny.sound(tmp_path / "c" / "a.wav", seconds=0.2)
    shutil.copytree(world.folder, tmp_path / "world")
    (tmp_path / "m.jsonl").write_text('{"text": "call", "speech": "~/c/a.wav"}\n')
    codes = ("--units", "~/world/speech", "--workers", "1")
    modalities = (*codes, "--text", "~/world/text")
    for arguments in (
        ("units", "sounds:~/c", "-o", "~/u1", *modalities),
        ("units", "~/c", "~/c/a.wav", "-o", "~/u2.jsonl", *codes),
        ("units", "~/m.jsonl", "-o", "~/u3", *modalities),
        (
            "swap",
            "~/world/zip",
            "text=~/world/text/tower",
            "--modality",
            "text=~/world/text",
            "-o",
            "~/swapped",
        ),
        ("show", "~/world/zip"),
    ):
        answer = zipper(*arguments)
        assert answer.code == 0, answer.err
    assert {"u1", "u2.jsonl", "u3", "swapped"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


def test_links_are_taken_out_with_data_in_which_somebody_is_silent(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    for name, texts in {"some": ["call anna", ""], "all": ["", "  "]}.items():
        data.write(
            tmp_path / f"{name}.jsonl", [{"text": text, "speech": [1, 2, 3]} for text in texts]
        )
        answer = zipper(
            "prune",
            world.zip,
            "-o",
            name,
            "--links",
            "0:text>speech",
            "--data",
            f"{name}.jsonl",
            "--json",
        )
        assert answer.code == 0, answer.err
        assert ("asr" in json.loads(answer.out)["wer"]) == (name == "some")


def foreign_codebook(folder: Path) -> str:
    tiny.units(seed=1).save(folder / "modalities" / "speech")
    return "is damaged: its content hash is not the one in manifest.json"


def cut_weights(folder: Path) -> str:
    path = folder / "towers" / "speech" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    return "model/towers/speech/model.safetensors is damaged"


def bad_json(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "manifest.json is not readable JSON"


def nothing(folder: Path) -> str:
    shutil.rmtree(folder)
    return "model is no folder and not wholly in the hub's cache"


@pytest.mark.parametrize("harm", [foreign_codebook, cut_weights, bad_json, nothing])
def test_a_damaged_or_foreign_model_is_refused(
    zipper: Zipper, world: World, tmp_path: Path, harm: Callable[[Path], str]
) -> None:
    message = harm(Path(shutil.copytree(world.zip, tmp_path / "model")))
    clip = tiny.sound(tmp_path / "clip.wav")
    for arguments in (
        ("show", "model"),
        ("verify", "model"),
        ("transcribe", clip, "--model", "model"),
        ("speak", "call", "-o", "out.wav", "--model", "model"),
        ("run", "--given", "text=call", "--outputs", "speech", "-o", "made", "--model", "model"),
    ):
        assert message in refused(zipper(*arguments))
    assert not (tmp_path / "out.wav").exists()
    assert not (tmp_path / "made").exists()


def test_a_foreign_codebook_for_units_is_refused(zipper: Zipper, tmp_path: Path) -> None:
    tiny.units().save(tmp_path / "codes")
    other = tmp_path / "other"
    tiny.units(seed=1).save(other)
    shutil.copy(other / "codebook.safetensors", tmp_path / "codes")
    tiny.sound(tmp_path / "a.wav")
    assert "codes holds a foreign codebook" in refused(
        zipper("units", "a.wav", "-o", "u.jsonl", "--units", "codes")
    )
    assert not (tmp_path / "u.jsonl").exists()


# --- what nobody foresaw


def test_an_unexpected_failure_is_exit_code_1_in_one_line(
    zipper: Zipper, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(Pipeline, "from_pretrained", fail)
    answer = zipper("show", world.zip)
    assert (answer.code, answer.out) == (1, "")
    assert (
        answer.err
        == "zipper show: failed by RuntimeError: out of luck (ZIPPER_DEBUG=1 shows where)\n"
    )
    monkeypatch.setenv("ZIPPER_DEBUG", "1")
    with pytest.raises(RuntimeError):
        zipper("show", world.zip)


def test_an_interrupt_is_exit_code_1(
    zipper: Zipper, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "from_pretrained", interrupt)
    assert zipper("show", world.zip) == Answer(1, "", "zipper show: interrupted\n")


# --- what other libraries say

VOICES = """
import logging, sys, warnings
from zipper import cli, inspection

def describe(*_):
    warnings.warn("advice of a library", UserWarning)
    warnings.warn_explicit("of ours,\\nin two lines", UserWarning, "model.py", 1, "zipper.model")
    warnings.warn_explicit("of the driver", UserWarning, "cuda.py", 1, "torch.cuda")
    logging.getLogger("accelerate").warning("advice by a logger")
    logging.getLogger("accelerate").error("what went wrong")
    return {}

inspection.describe = describe
inspection.text = lambda found: "told"
sys.exit(cli.main(["show"]))
"""


@pytest.mark.slow
def test_of_others_only_what_matters_is_heard_and_what_is_ours_in_one_line() -> None:
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    said = run([sys.executable, "-c", VOICES])
    assert said.stdout == "told\n"
    assert said.stderr.splitlines() == [
        "zipper: of ours, in two lines",
        "zipper: of the driver",
        "what went wrong",
    ]
    assert "advice of a library" in run([sys.executable, "-W", "default", "-c", VOICES]).stderr


@pytest.mark.slow
def test_the_shipped_model_is_used_without_a_word_from_others(tmp_path: Path) -> None:
    """In a process of its own, with the settings of a user: nobody's bars, nobody's advice."""
    settings = ("HF_", "TRANSFORMERS_", "TOKENIZERS_")
    user = {name: value for name, value in os.environ.items() if not name.startswith(settings)} | {
        "HF_HUB_OFFLINE": "1"
    }
    clip = tiny.sound(tmp_path / "clip.wav", 0.4)
    for arguments in (
        ["show"],
        ["transcribe", clip],
        ["speak", "call anna", "-o", tmp_path / "out.wav"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "zipper", *arguments], capture_output=True, text=True, env=user
        )
        assert (done.returncode, done.stderr) == (0, "") and done.stdout


# --- where a base lies now


@pytest.fixture(scope="module")
def lost(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A zip whose frozen tower is not where it was, and where that lies."""
    place = tmp_path_factory.mktemp("lost")
    shutil.copytree(world.folder / "text" / "tower", place / "towers" / "text")
    pipeline = Pipeline.from_pretrained(world.zip, towers={"text": place / "towers" / "text"})
    pipeline.save_pretrained(place / "runs" / "zip")
    (place / "towers").rename(place / "elsewhere")
    return place / "runs" / "zip", place / "elsewhere" / "text"


def given(command: str, model: Path) -> list[str]:
    """The command's words for this model."""
    words = LOADS[command]
    return (
        [command, *words, "--model", str(model)]
        if command in ("transcribe", "speak", "run", "run-batch", "evaluate")
        else [command, str(model), *words]
    )


@pytest.mark.parametrize("command", ["transcribe", "speak", "run", "show", "verify", "prune"])
def test_a_lost_base_is_named_with_the_option_that_finds_it(
    world: World, lost: tuple[Path, Path], zipper: Zipper, tmp_path: Path, command: str
) -> None:
    tiny.sound(tmp_path / "a.wav")
    words = [
        *given(command, lost[0]),
        *(
            ["--data", str(world.folder / "dev.jsonl"), "--below", "9"]
            if command == "prune"
            else []
        ),
    ]
    said = zipper(*words)
    assert said.code == 2
    assert (
        f"The frozen tower 'text' of {lost[0]} was not found" in said.err
        and "--tower text=PATH" in said.err
    )
    assert said.err.count("\n") == 1
    found = zipper(*words, "--tower", f"text={lost[1]}")
    assert found.code == 0, found.err


def test_every_command_that_loads_a_model_takes_the_option(
    world: World, lost: tuple[Path, Path]
) -> None:
    for command in LOADS:
        words = [*given(command, lost[0]), "--tower", "a=b", "--tower", "c=d"]
        assert read(*words)["towers"] == ["a=b", "c=d"]
    takes = {
        context.command_path.removeprefix("zipper ")
        for context in cli.commands()
        if "a saved model" in context.get_help()
    }
    assert takes <= LOADS.keys()


def test_what_is_said_of_a_base_is_checked(
    world: World, lost: tuple[Path, Path], zipper: Zipper
) -> None:
    for words, message in (
        (["--tower", "text"], "--tower 'text' is not NAME=VALUE"),
        (
            ["--tower", "video=x"],
            "towers names the tower 'video'; this model has ['speech', 'text']",
        ),
        (
            ["--tower", f"text={lost[1]}", "--tower", "text=x"],
            "--tower says of one name two things",
        ),
        (
            ["--tower", f"text={world.folder / 'speech' / 'tower'}"],
            "is not the one this zip was trained on",
        ),
        (["--tower", "text=./nowhere"], "The tower 'text' of"),
    ):
        said = zipper("show", lost[0], *words)
        assert said.code == 2 and message in said.err, said.err


def test_a_swap_finds_the_base_that_stays(
    world: World, lost: tuple[Path, Path], zipper: Zipper, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    tiny.tower(tiny.units()).model.save_pretrained(tmp_path / "new")
    said = zipper(
        "swap", lost[0], f"speech={tmp_path / 'new'}", "-o", "out", "--tower", f"text={lost[1]}"
    )
    assert said.code == 0, said.err
    assert (
        Path(Pipeline.from_pretrained(tmp_path / "out").zip.config.towers["text"].source) == lost[1]
    )


# --- numbers, and settings that say nothing


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--temperature", "1e-45"],
        ["--temperature", "1e300"],
        ["--temperature", "1", "--seed", str(2**64)],
        ["--temperature", "1", "--seed", str(-(2**70))],
        ["--temperature", "1", "--top-k", "-1"],
        ["--temperature", "1", "--top-p", "nan"],
        ["--temperature", "1", "--top-p", "0"],
        ["--guidance", "nan"],
        ["--guidance", "1e300"],
        ["--top-k", "3"],
        ["--top-p", "0.5"],
        ["--seed", "3"],
    ],
    ids=" ".join,
)
def test_a_number_that_cannot_be_worked_with_is_wrong_usage(
    world: World, zipper: Zipper, tmp_path: Path, words: list[str]
) -> None:
    said = zipper("speak", "call anna", "-o", "out.wav", "--model", world.zip, *words)
    assert (
        said.code == 2
        and said.err.startswith("zipper speak: ")
        and not (tmp_path / "out.wav").exists()
    )


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "m", "--below", "nan", "-o", "x"],
        ["prune", "m", "--below", "inf", "-o", "x"],
        ["prune", "m", "--below", "1", "-o", "x", "--rows", "9" * 20],
        ["bench", "decode", "--threads", "-1"],
        ["bench", "train", "--rounds", "0"],
        ["evaluate", "--test", "1e3"],
        ["show", "-o", "page.html"],
        ["run", "--given", "text=a", "--outputs", "text", "--guidance", "2"],
    ],
    ids=" ".join,
)
def test_options_are_refused_where_they_mean_nothing(zipper: Zipper, words: list[str]) -> None:
    assert zipper(*words).code == 2


def test_run_knows_what_a_plan_makes_before_it_is_made(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    asked = ("run", "--given", "text=call anna", "--model", world.zip, "--outputs")
    for plan in ("text + speech", "speech@2", "*", "text|speech"):
        answer = zipper(*asked, plan)
        assert answer.code == 2 and "This plan produces speech. Pass -o FOLDER" in answer.err
    answer = zipper(*asked, "text + speech", "--guidance", "2", "-o", "made")
    assert answer.code == 0
    answer = zipper(*asked, "text@2", "--guidance", "2")
    assert answer.code == 2 and "this plan names no other" in answer.err


def test_what_a_plan_makes_does_not_lie_where_it_reads(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    tiny.sound(tmp_path / "out" / "1-speech.wav", seconds=0.5)
    before = (tmp_path / "out" / "1-speech.wav").read_bytes()
    asked = ("run", "--given", "speech=out/1-speech.wav", "--outputs", "text,speech", "-o", "out")
    assert "would lose it" in refused(zipper(*asked, "--model", world.zip))
    assert (tmp_path / "out" / "1-speech.wav").read_bytes() == before
    (tmp_path / "out" / "1-speech.wav").rename(tmp_path / "out" / "0-speech.wav")
    asked = ("run", "--given", "speech=out/0-speech.wav", "--outputs", "text,speech", "-o", "out")
    assert zipper(*asked, "--model", world.zip).code == 0
    assert (tmp_path / "out" / "0-speech.wav").read_bytes() == before


def test_units_write_over_their_own_list_and_no_other(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    tiny.sound(tmp_path / "a.wav", seconds=0.2)
    asked = ("units", "a.wav", "-o", "rows.jsonl", "--units", world.folder / "speech")
    mine = '{"id": "a", "text": "call anna", "speech": "a.wav"}\n'
    (tmp_path / "rows.jsonl").write_text(mine)
    assert "rows.jsonl is there, and is no list of units" in refused(zipper(*asked))
    assert (tmp_path / "rows.jsonl").read_text() == mine
    (tmp_path / "rows.jsonl").unlink()
    for _ in range(2):
        assert zipper(*asked).code == 0
    (tmp_path / "b.wav").write_bytes(b"no sound")
    assert zipper("units", "b.wav", *asked[1:], "--bad", "skip", "--most-bad", "1").code == 0
    assert (tmp_path / "rows.bad.jsonl").is_file()
    assert zipper(*asked).code == 0 and not (tmp_path / "rows.bad.jsonl").exists()


def test_a_tower_that_was_allowed_is_not_the_one_that_was_pinned(
    zipper: Zipper, world: World, tmp_path: Path
) -> None:
    other = tiny.tower(tiny.text())
    with torch.no_grad():
        next(other.parameters()).add_(0.5)
    other.save(tmp_path / "other")
    asked = ("verify", world.zip, "--only", "frozen text", "--tower", "text=other")
    answer = zipper(*asked, "--allow-mismatch")
    assert answer.code == 1 and answer.out.startswith("BROKEN  frozen text is its base")
    assert zipper(*asked[:4]).code == 0


def test_a_kind_without_an_example_leaves_no_folder(zipper: Zipper, tmp_path: Path) -> None:
    for _ in range(2):
        assert "has no example" in refused(zipper("fit", "text", "--example", "shown"))
        assert not (tmp_path / "shown").exists()


def test_a_run_has_no_towers_of_elsewhere(zipper: Zipper, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    answer = zipper("show", tmp_path, "--tower", "text=nowhere")
    assert "are for a model" in refused(answer)


def test_a_model_is_served_by_the_name_of_its_folder(
    zipper: Zipper, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.chdir(world.zip)
    answer = zipper("serve", ".", "--check")
    assert answer.code == 0 and answer.out.startswith(f"{world.zip.name} on http://")


def test_few_sounds_fit_a_codebook_where_few_are_asked_for(
    zipper: Zipper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[int] = []

    def counted(paths: Any, *given: Any, **more: Any) -> Any:
        fitted.append(len([*paths]))
        return tiny.units()

    monkeypatch.setattr(SpeechUnits, "fitted", counted)
    sounds = [tiny.sound(tmp_path / f"{n}.wav", seconds=0.2).name for n in range(3)]
    asked = ("units", *sounds, "-o", "u.jsonl", "--units", "codes", "--fit", "8", "--limit", "1")
    assert zipper(*asked).code == 0 and fitted == [1]
