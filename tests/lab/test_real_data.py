"""Real data: readers on small archives in the form of the originals, splits that keep a test a test,
judges beside their floors, and recipes that fit together.

Nothing here is anybody's data: what stands in the archives is made up below."""

import gzip
import importlib.util
import io
import json
import math
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from zipper import measurement
from zipper.audio import sound
from zipper.data.manifests import manifest
from zipper.environment import MissingExtra
from zipper.errors import ZipperError
from zipper.modality import whole
from zipper.modality.signal import Signal
from zipper.modality.symbols import Symbols
from zipper.training import TrainConfig, train
from zipper.training.resume import finished
from zipper_lab import real, real_judges
from zipper_lab.corpora import babyai, digits, emoji, molecules, motion, proteins
from zipper_lab.corpora.originals import contents, original, part, writable


def needs(*modules: str) -> Any:
    """A test of what a package brings that is no part of the gate."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made up here is easy to tell apart."""
    monkeypatch.setattr(real_judges, "TREES", 16)


def zipped(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def bounds(
    judge: real_judges.Judge, rows: Sequence[Mapping[str, Any]], real: Sequence[Any], seed: int = 0
) -> dict[str, dict[str, float]]:
    """What a judge gives on average to the real answers ("oracle") and to the real answer of
    another row, drawn by `seed` ("floor")."""
    places = [*range(len(rows))]
    random.Random(seed).shuffle(places)
    other: list[Any] = [None] * len(rows)
    for place, following in zip(places, places[1:] + places[:1], strict=True):
        other[place] = real[following]
    return {
        name: means(judge.judge(rows, some)) for name, some in (("oracle", real), ("floor", other))
    }


def means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric over the samples that have a number; NaN where none has."""
    means = dict[str, float]()
    for name, values in found.items():
        told = [value for value in values if not np.isnan(value)]
        means[name] = float(np.mean(told)) if told else float("nan")
    return means


def chance(row: Mapping[str, Any], seed: int = 0) -> str:
    """As many random actions as the bot took: the floor of a simulator."""
    drawn = random.Random(f"{seed} {row['id']}")
    return " ".join(drawn.choices(babyai.ACTIONS[:5], k=len(str(row["actions"]).split())))


# --- originals


def test_an_archive_reads_like_the_folder_it_was_made_of(tmp_path: Path) -> None:
    files = {"a/one.csv": b"1", "a/two.csv": b"2", "a/read.me": b"3"}
    folder = tmp_path / "set"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    zipped(tmp_path / "set.zip", files)
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(folder / "a", "a")
    wanted = [("a/one.csv", b"1"), ("a/two.csv", b"2")]
    for place in (folder, tmp_path / "set.zip", tmp_path / "set.tar.xz"):
        assert [*contents(place, ".csv")] == wanted


def test_a_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"nothing of that kind")
    with pytest.raises(ZipperError, match="neither a folder nor a ZIP"):
        [*contents(tmp_path / "set.zip")]


def test_the_first_pattern_wins_and_a_missing_original_is_named_with_its_home(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    assert original(tmp_path, ("b*", "a*"), "somewhere") == tmp_path / "b"
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ZipperError, match=r"x\*.*The public original: https://there"):
            original(place, ("x*",), "https://there")


@pytest.mark.parametrize(
    ("write", "home"),
    [
        (emoji.write, "emoji-datasource"),
        (motion.write, "sp-sw-har"),
        (babyai.write, "minigrid"),
        (digits.write, "free-spoken-digit"),
        (proteins.write, "mmseqs2-examples"),
    ],
)
def test_every_reader_says_what_is_missing(
    tmp_path: Path, write: Callable[[Path, Path], None], home: str
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ZipperError, match=home):
        write(tmp_path / "data", tmp_path / "out")


def test_parts_have_their_shares_and_a_key_has_one_part() -> None:
    owners = [part(f"key {n}", {"test": 0.1, "dev": 0.05}) for n in range(4000)]
    assert owners == [part(f"key {n}", {"test": 0.1, "dev": 0.05}) for n in range(4000)]
    assert abs(owners.count("test") / 4000 - 0.1) < 0.02
    assert abs(owners.count("dev") / 4000 - 0.05) < 0.02


# --- emoji


def picture(kind: int, style: int, number: int) -> bytes:
    """A square of the colour of its kind, at a place of its own; the style is how bright."""
    from PIL import Image

    pixels = np.zeros((64, 64, 4), np.uint8)
    place = 4 * (number % 10)
    pixels[place : place + 24, 10:40] = (
        [200 - 60 * style, 30, 30, 255] if kind else [30, 30, 220 - 60 * style, 255]
    )
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def test_a_row_with_a_sign_that_no_trained_tokenizer_knows_is_left_out() -> None:
    rows = [{"text": "bad"}, {"text": "a*b"}, {"text": ""}]
    assert writable(rows, ["ab", "cd"]) == [rows[0], rows[2]]


def emoji_originals(data: Path, things: int = 120) -> None:
    data.mkdir()
    listed, drawn = [], list[tuple[str, int, int]]()
    for number in range(things):
        kind, file = number % 2, f"{number:04x}.png"
        tones = {"1F3FB": {"image": f"{number:04x}-1f3fb.png"}} if number % 3 == 0 else {}
        category = ("Food & Drink", "Animals & Nature")[kind]
        listed.append(
            {"name": f"THING-{number}", "image": file, "category": category}
            | {"subcategory": "any", "skin_variations": tones}
        )
        drawn += [(name, kind, number) for name in (file, *(t["image"] for t in tones.values()))]
    for style, name in enumerate(emoji.STYLES):
        files = {f"{name}/img/{file}": picture(kind, style, n) for file, kind, n in drawn}
        if style:
            files[f"{name}/emoji.json"] = json.dumps(listed).encode()
        zipped(data / f"emoji_{name}_64.zip", files)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    place = tmp_path_factory.mktemp("emoji")
    emoji_originals(place / "data")
    emoji.write(place / "data", place / "out")
    return place / "out"


def test_a_thing_is_in_one_part_in_both_styles_and_all_tones(pictures: Path) -> None:
    parts = {name: manifest(pictures / f"{name}.jsonl") for name in ("train", "dev", "test")}
    names = {part: {row["name"].partition(",")[0] for row in rows} for part, rows in parts.items()}
    assert all(names.values())
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 120
    for row in parts["test"]:
        assert {one["style"] for one in parts["test"] if one["name"] == row["name"]} == {
            *emoji.STYLES
        }


def test_known_things_are_trained_on_in_the_other_style_alone(pictures: Path) -> None:
    known = {row["name"] for row in manifest(pictures / "known.jsonl")}
    trained = {(row["name"], row["style"]) for row in manifest(pictures / "train.jsonl")}
    assert known
    assert all((name, emoji.STYLES[0]) in trained for name in known)
    assert not any((name, emoji.STYLES[1]) in trained for name in known)


def test_rows_name_pictures_on_white_and_words_in_plain_letters(pictures: Path) -> None:
    rows = manifest(pictures / "train.jsonl")
    (first,) = real_judges.pictures(pictures, rows[:1])
    assert first.shape == (emoji.SIDE, emoji.SIDE, 3)
    assert (first[-1, -1] == 255).all()
    assert rows[0]["text"] == f"{rows[0]['category']}: {rows[0]['name']}"
    assert rows[0]["category"] in ("food and drink", "animals and nature")
    alone = manifest(pictures / "unpaired.jsonl")
    assert len(alone) == 2 * len(rows)
    assert all("text" not in row and (pictures / row["image"]).is_file() for row in alone)


def test_the_judge_of_pictures_beats_its_floor(pictures: Path) -> None:
    pytest.importorskip("sklearn")
    judge = real_judges.Pictures.trained(pictures)
    rows = manifest(pictures / "test.jsonl")
    found = bounds(judge, rows, real_judges.pictures(pictures, rows))
    assert found["oracle"]["category"] > 0.95 > found["floor"]["category"] + 0.2
    assert found["oracle"]["name"] > found["floor"]["name"] + 0.1
    texts = bounds(real_judges.Names(), rows, [row["text"] for row in rows])
    assert texts["oracle"] == {"exact": 1.0, "words": 1.0, "category": 1.0}
    assert texts["floor"]["exact"] < 0.5


# --- motion


def execution(chance: random.Random, watch: bool) -> str:
    """A file of the original: each activity shakes at its own speed."""
    plan = [
        ("SEATED", 1.6),
        ("STANDING_UP", 1.2),
        ("WALKING", 2.0),
        ("TURNING", 1.2),
        ("WALKING", 2.0),
        ("TURNING", 1.2),
        ("SITTING_DOWN", 1.2),
    ]
    lines, clock = ["x_acc,y_acc,z_acc,x_gyro,y_gyro,z_gyro,timestamp,label"], 0
    for label, seconds in plan:
        place = motion.ACTIVITIES.index(label)
        for n in range(round(100 * seconds)):
            wave = place * math.sin(2 * math.pi * (0.5 + place) * n / 100)
            values = [wave, place, -9.8 if watch else 9.8, wave, 0.1 * place, 0]
            told = ",".join(f"{value + chance.gauss(0, 0.05):.4f}" for value in values)
            lines.append(f"{told},{1_650_000_000_000 + clock},{label}")
            clock += 10
    return "\n".join(lines)


def motion_original(data: Path, people: int = 9) -> None:
    data.mkdir()
    chance = random.Random(0)
    info = ["execution_id,orientation,first_turn,second_turn"]
    files = {}
    for person in range(1, people + 1):
        name = f"s{person:02d}_01"
        info.append(f"{name},back_inv,l,r")
        for kind in motion.DEVICES:
            files[f"DATA/s{person:02d}/{name}_{kind}.csv"] = execution(chance, kind == "sw")
    files["DATA/executions_info.csv"] = "\n".join(info)
    with tarfile.open(data / "sp-sw-har.tar.xz", "w:xz", preset=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))


@pytest.fixture(scope="module")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("motion")
    motion_original(place / "data")
    motion.write(place / "data", place / "out")
    return place / "out"


def test_a_person_is_in_one_part(motions: Path) -> None:
    people = {
        name: {row["person"] for row in manifest(motions / f"{name}.jsonl")}
        for name in ("train", "dev", "test")
    }
    assert {name: len(some) for name, some in people.items()} == {"train": 3, "dev": 2, "test": 4}
    assert len(set.union(*people.values())) == 9
    alone = {row["id"].partition("_")[0] for row in manifest(motions / "unpaired.jsonl")}
    assert alone == people["train"]


def test_windows_are_of_one_length_and_told_as_they_are(motions: Path) -> None:
    sides = set[str]()
    for row in manifest(motions / "test.jsonl"):
        assert np.shape(row["motion"]["values"]) == (motion.LENGTH, 6)
        assert len(row["activities"]) == motion.LENGTH // motion.STEP
        assert row["device"] in row["text"]
        heard = motion.heard(row["text"])
        assert {*heard} <= {*row["activities"]}
        sides |= {label for label in heard if label.startswith("TURNING")}
    assert sides == {"TURNING LEFT", "TURNING RIGHT"}


def test_a_name_without_a_colon_has_no_category() -> None:
    row = {"name": "andorra flag", "category": "flags"}
    judged = real_judges.Names().judge([row, row], ["flags: andorra flag", "flags"])
    assert judged["category"] == [1.0, 0.0]
    labels = real_judges.Names().labels(["flags: andorra flag", "flags"], [row, row])
    assert labels == [("flags", "flags"), ("flags", "none")]


def test_what_was_told_is_heard_again() -> None:
    lying = motion.Execution("s01_01_sp", "s01", "phone", "front_inv", np.zeros((1, 6)), [])
    chance, labels = random.Random(0), [label for label in motion.DONE if label != "TURNING"]
    for _ in range(50):
        done = [label for label in chance.sample(labels, chance.randrange(1, 5))]
        for template in motion.TEMPLATES["phone"]:
            told = motion.describe(lying, [label for label in done for _ in range(3)], template)
            assert motion.heard(told) == done


def test_a_window_is_read_by_the_kind_of_signals(motions: Path) -> None:
    values = [row["motion"] for row in manifest(motions / "train.jsonl")[:20]]
    signal = whole(Signal.fitted(values, codes=16, patch=8))
    ids = signal.encode(signal.read(values[0]))
    assert len(ids) == motion.LENGTH // 8
    assert signal.decode(ids).values.shape == (motion.LENGTH, 6)


def test_the_judge_of_motion_beats_its_floor_on_people_it_never_felt(motions: Path) -> None:
    pytest.importorskip("sklearn")
    judge = real_judges.Motion.trained(motions)
    rows = manifest(motions / "test.jsonl")
    found = bounds(judge, rows, [row["motion"]["values"] for row in rows])
    for metric, oracle in found["oracle"].items():
        assert oracle > 0.8 > found["floor"][metric]
    nothing = judge.judge(rows[:2], [np.zeros((0, 6)), np.zeros((10, 6))])
    assert set(map(tuple, nothing.values())) == {(0.0, 0.0)}


# --- actions


def cells(things: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """A room of 8 by 8: walls around, things inside by (column, row)."""
    found = list[int]()
    for row in range(8):
        for column in range(8):
            wall = 0 in (row, column) or 7 in (row, column)
            found += [2, 5] if wall else things.get((column, row), (1, 0))
    return found


def test_the_room_is_told_as_the_agent_sees_it() -> None:
    grid = cells({(3, 1): (6, 0), (5, 4): (5, 2), (1, 6): (7, 5)})
    right = babyai.seen(grid, [3, 4, 0], 8)
    assert right == "wall a3 l3 blue-key a2r0 red-ball a0l3 grey-box b2r2"
    up = babyai.seen(grid, [3, 4, 3], 8)
    assert up == "wall a3 l2 blue-key a0r2 red-ball a3r0 grey-box b2l2"
    assert {*right.split(), *up.split()} <= {*babyai.vocabulary()}


def episodes(n: int = 600) -> list[dict[str, Any]]:
    chance, found = random.Random(0), []
    for seed in range(n):
        x, y = chance.randrange(1, 7), chance.randrange(1, 7)
        thing = (chance.choice([5, 6, 7]), chance.randrange(6))
        found.append(
            {
                "env": "BabyAI-GoToLocal-v0",
                "seed": seed,
                "mission": f"go to the {babyai.COLOURS[thing[1]]} {babyai.THINGS[thing[0]]}",
                "actions": [2, 0, 2],
                "grid0": cells({(x, y): thing}),
                "pose0": [1 + (x + 2) % 6, 1 + (y + 3) % 6, seed % 4],
                "size": [8, 8],
            }
        )
    # Starts with a second mission, which may belong to another part.
    return found + [e | {"seed": n + e["seed"], "mission": f"find {e['seed']}"} for e in found[::3]]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("minigrid")
    place = tmp_path_factory.mktemp("babyai")
    told = "\n".join(map(json.dumps, episodes()))
    (place / babyai.FILE).write_bytes(gzip.compress(told.encode()))
    babyai.write(place, place / "out")
    return place / "out"


def test_no_start_and_no_unseen_mission_of_the_test_is_trained_on(rooms: Path) -> None:
    parts = {name: manifest(rooms / f"{name}.jsonl") for name in ("train", "dev", "test")}
    starts = {name: {row["seen:actions"] for row in rows} for name, rows in parts.items()}
    assert all(starts.values())
    assert sum(map(len, starts.values())) == len(set.union(*starts.values()))
    missions = {row["text"] for row in parts["train"]}
    for row in parts["test"] + parts["dev"]:
        assert row["unseen"] == (row["text"] not in missions)
    assert missions == {row["text"] for row in manifest(rooms / "texts.jsonl")}
    assert all("text" not in row for row in manifest(rooms / "unpaired.jsonl"))


def test_all_that_is_seen_and_done_has_ids(rooms: Path) -> None:
    symbols = Symbols(babyai.vocabulary(), "words")
    for row in manifest(rooms / "test.jsonl"):
        for key in ("seen:actions", "actions"):
            assert symbols.decode(symbols.encode(row[key])) == row[key]


def test_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / babyai.FILE).write_bytes(b"no gzip")
    with pytest.raises(ZipperError, match="is damaged"):
        babyai.write(tmp_path, tmp_path / "out")


@needs("minigrid")
def test_the_bot_fulfils_its_missions_and_chance_does_not() -> None:
    rows = [
        babyai._row(episode) for level in babyai.LEVELS for episode in babyai.solve(level, range(6))
    ]
    assert len(rows) == 18
    judge = real_judges.Simulator()
    found = bounds(judge, rows, [row["actions"] for row in rows])
    assert found["oracle"] == {"success": 1.0, "short": 1.0}
    assert found["floor"]["success"] < 0.5
    drawn = judge.judge(rows, [chance(row) for row in rows])
    assert means(drawn)["success"] < 0.5
    assert judge.judge(rows[:1], ["sing"]) == {"success": [0.0], "short": [0.0]}
    told = bounds(real_judges.Missions(), rows, [row["text"] for row in rows])
    assert told["oracle"] == {"true": 1.0, "exact": 1.0}
    assert told["floor"]["true"] < 0.5
    assert real_judges.Missions().judge(rows[:1], ["sing a song"])["true"] == [0.0]


@needs("minigrid")
def test_a_record_of_our_own_reads_like_the_original(tmp_path: Path) -> None:
    babyai.record(tmp_path / babyai.FILE, 10)
    babyai.write(tmp_path, tmp_path / "out", more=10)
    rows = [row for name in ("train", "dev", "test") for row in _there(tmp_path / "out", name)]
    assert len(rows) == 10
    assert len(manifest(tmp_path / "out" / "unpaired.jsonl")) > len(
        _there(tmp_path / "out", "train")
    )


def _there(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return manifest(path) if path.stat().st_size else []


# --- molecules


RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNCC1", "C1CCOC1", "C1CC1")
TAILS = ("O", "N", "C", "CC", "C(=O)O", "Cl", "C#N", "OC", "CCN", "C=O")


@needs("rdkit")
def test_molecules_of_one_scaffold_are_in_one_part(tmp_path: Path) -> None:
    rows = ["CID\tSMILES\tdescription"]
    for number, (ring, tail) in enumerate((ring, tail) for ring in RINGS for tail in TAILS):
        said = f"The molecule is number {number}. It has a tail. {'It is long. ' * 40}"
        rows.append(f"{number}\t{ring}{tail}\t{said}")
    rows += ["900\tCC/C=C\\\\C\tThe molecule is bent.", "901\tnone\tThe molecule is none."]
    (tmp_path / "chebi20").mkdir()
    (tmp_path / "chebi20" / "test.txt").write_text("\n".join(rows))
    molecules.write(tmp_path, tmp_path / "out", seed=3)
    parts = {name: _there(tmp_path / "out", name) for name in ("train", "dev", "test")}
    assert sum(map(len, parts.values())) == len(RINGS) * len(TAILS) + 1
    scaffolds = {
        name: {molecules._scaffold(row["molecule"]) for row in some} for name, some in parts.items()
    }
    assert sum(map(len, scaffolds.values())) == len(set.union(*scaffolds.values()))
    told = [row for some in parts.values() for row in some]
    assert all(len(row["text"]) <= molecules.MOST_LETTERS for row in told)
    assert any(row["molecule"] == "C/C=C\\CC" for row in told)
    alone = {molecules.canonical(r["molecule"]) for r in manifest(tmp_path / "out/unpaired.jsonl")}
    assert alone == {row["molecule"] for row in parts["train"]}
    found = bounds(real_judges.Chemistry(), told, [row["molecule"] for row in told])
    assert found["oracle"] == {"valid": 1.0, "exact": 1.0, "alike": 1.0}
    assert found["floor"]["valid"] == 1.0 > found["floor"]["alike"] + 0.3
    made = real_judges.Chemistry().judge(told[:2], ["C1CC", ""])
    assert {tuple(values) for values in made.values()} == {(0.0, 0.0)}


@needs("rdkit")
def test_a_table_in_another_form_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("name\tvalue\n")
    with pytest.raises(ZipperError, match="its columns must be CID, SMILES, description"):
        molecules.write(tmp_path, tmp_path / "out")
    (tmp_path / "test.txt").unlink()
    with pytest.raises(ZipperError, match="MolT5"):
        molecules.write(tmp_path, tmp_path / "out")


# --- proteins


def protein(chance: random.Random, kin: str = "", length: int = 120) -> str:
    """Residues that love water and others in turn, which shuffling undoes; of kin, each residue
    with 1 chance in 8 another one."""
    made = [chance.choice(("AVILMFWC", "DEKRNQSTGH")[n % 2]) for n in range(length)]
    return "".join(
        own if chance.random() < 0.125 else old for old, own in zip(kin or made, made, strict=True)
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 families of three, the last of each nameless; one of twelve; twins, a long and a short one."""
    for module in ("scipy", "sklearn"):
        pytest.importorskip(module)
    chance, place = random.Random(0), tmp_path_factory.mktemp("proteins")
    lines = list[str]()
    for family in range(71):
        first = protein(chance)
        for n in range(12 if family == 70 else 3):
            what = f"Kind{family} kinase (Fragment)" if n != 2 else "Uncharacterized protein"
            lines += [
                f">tr|F{family}N{n}|F{family}_BOVIN {what} OS=Bos taurus (strain {n}) PE=4 SV=1"
            ]
            cut = protein(chance, first)
            lines += [cut[:60], cut[60:], ""]
    for head, residues in (
        ("F90N0|X Uncharacterized protein OS=Ovis aries", "M" + "WC" * 15),
        ("F90N1|X Double OS=Ovis aries GN=a", "M" + "WC" * 15),
        ("F91N0|X Long one OS=Ovis aries", protein(chance, length=257)),
        ("F92N0|X Short one OS=Ovis aries", "MKVL"),
        ("F93N0|X Doubtful OS=Ovis aries", "MXBZ" * 8),
    ):
        lines += [f">sp|{head}", residues]
    (place / "DB.fasta.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    proteins.write(place, place / "out")
    (place / "plain").mkdir()
    (place / "plain" / "uniprot_some.fasta").write_text("\r\n".join(lines))
    proteins.write(place / "plain", place / "plain" / "out")
    return place / "out"


def test_kin_are_in_one_part_and_those_of_a_test_in_nothing_that_is_read(families: Path) -> None:
    names = ("train", "dev", "test", "known", "unpaired")
    parts = {name: manifest(families / f"{name}.jsonl") for name in names}
    ids = {name: {row["id"] for row in rows} for name, rows in parts.items()}
    kin = {name: {one.partition("N")[0] for one in some} for name, some in ids.items()}
    assert not kin["dev"] & kin["test"]
    assert not (kin["dev"] | kin["test"]) & (kin["train"] | kin["unpaired"])
    assert kin["known"] <= kin["unpaired"] and not ids["known"] & ids["unpaired"]
    assert ids["train"] < ids["unpaired"]
    assert all("text" not in row for row in parts["unpaired"])
    assert "F70" in kin["train"]  # too common to be held out
    every = set.union(*ids.values())
    assert not every & {"F90N0", "F91N0", "F92N0"} and {"F90N1", "F93N0"} <= every
    texts = {row["text"] for row in manifest(families / "texts.jsonl")}
    assert "long one of ovis aries" in texts
    held = {row["text"] for name in ("dev", "test", "known") for row in parts[name]}
    assert not held & texts and "kind70 kinase of bos taurus" in texts | held
    for name in names:
        same = families.parent / "plain" / "out" / f"{name}.jsonl"
        assert (families / f"{name}.jsonl").read_bytes() == same.read_bytes()


def test_residues_that_nobody_knows_have_an_id(families: Path) -> None:
    niche = real.named("proteins").niches["protein"]
    rows = [row["protein"] for row in manifest(families / "unpaired.jsonl")]
    symbols = Symbols.fitted(rows, **niche.settings)
    assert symbols.decode(symbols.encode("MKVXU")) == "MKVXX"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("50S ribosomal protein L21e", "50s ribosomal protein l21e"),
        ("Genome polyprotein (Fragment)", "genome polyprotein"),
        ("Probable GTP-binding protein EngB (EC 3.1) (Fragments)", "gtp-binding protein engb"),
        ("UPF0147 protein Metli_1740", "upf0147 protein"),
        ("rRNA (Adenine(1518)-N(6))-methylase", "rrna (adenine(1518)-n(6))-methylase"),
        ("BnaC04g09240D protein", ""),
        ("Putative uncharacterized protein", ""),
        ("Predicted protein", ""),
    ],
)
def test_a_protein_has_the_name_that_says_what_it_is(said: str, name: str) -> None:
    assert proteins.name(said) == name


@pytest.mark.parametrize(
    ("said", "species"),
    [
        (
            "Methanothermococcus okinawensis (strain DSM 14208 / IH1)",
            "methanothermococcus okinawensis",
        ),
        ("Bacillus subtilis XF-1", "bacillus subtilis"),
        ("Listeria monocytogenes serotype 4b str. 81", "listeria monocytogenes"),
        ("African swine fever virus E75", "african swine fever virus"),
        ("Marinobacter sp. ES-1", "marinobacter sp."),
    ],
)
def test_a_species_is_told_without_its_strain(said: str, species: str) -> None:
    assert proteins.species(said) == species


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "holds no protein of 20 to 256"),
        (b">sp|A|A One OS=Bos taurus\nMKV\n", "holds no protein of 20 to 256"),
        (b">one\nMKV\n", "'>one', no record of UniProtKB"),
        (b"MKV\n", "'MKV', no record of UniProtKB"),
        (b">sp|A|A One OS=Bos taurus\nMKV4\n", "'MKV4', no record of UniProtKB"),
        (b">sp|A|A One OS=Bos taurus\n", "'', no record of UniProtKB"),
        (b"\xff\xfe\n", "is damaged"),
    ],
)
def test_a_fasta_of_another_form_is_one_sentence(
    tmp_path: Path, content: bytes, wanted: str
) -> None:
    for name, some in (("uniprot.fasta", content), ("uniprot.fasta.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(some)
        with pytest.raises(ZipperError, match=wanted):
            proteins.write(tmp_path, tmp_path / "out")
        (tmp_path / name).unlink()
    for some in (b"no gzip", gzip.compress(b">sp|A|A One OS=Bos taurus\nMKV\n")[:-12]):
        (tmp_path / "uniprot.fasta.gz").write_bytes(some)
        with pytest.raises(ZipperError, match="is damaged"):
            proteins.write(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_judge_of_proteins_finds_kin_and_knows_a_copy(families: Path) -> None:
    judge = real_judges.Proteins.trained(families)
    known, test = manifest(families / "known.jsonl"), manifest(families / "test.jsonl")
    found = bounds(judge, known, [row["protein"] for row in known])
    assert found["oracle"]["name"] > 0.9 > found["floor"]["name"] + 0.3
    assert 0.2 < found["oracle"]["new"] < 0.8
    true = [row["protein"] for row in test]
    held = means(judge.judge(test, true))
    assert held["new"] > 0.8 and held["name"] < 0.6  # one of its two words: no kin were seen
    assert held["real"] > 0.9
    made = judge.judge(test, [real_judges.shuffled(one) for one in true])
    assert means(made)["real"] < 0.2
    assert judge.judge(test[:1], [true[0][:9] * 12])["real"] == [0.0]  # in circles
    trained = manifest(families / "train.jsonl")[:2]
    copied = judge.judge(trained, [row["protein"] for row in trained])
    assert copied["name"] == [1.0, 1.0] and max(copied["new"]) < 1e-6
    assert {tuple(some) for some in judge.judge(trained, ["", ""]).values()} == {(0.0, 0.0)}


def test_what_a_protein_is_called_is_judged_by_name_and_species() -> None:
    row = {"name": "modulator of chaos", "species": "bos taurus"}
    said = ["modulator of chaos of bos taurus", "modulator of bos taurus", "chaos"]
    found = real_judges.Called().judge([row] * 3, said)
    assert found == {"exact": [1.0, 0, 0], "words": [1.0, 0.5, 0.5], "species": [1.0, 1.0, 0.0]}


# --- digits


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each digit is a tone of its own, each speaker says it a little higher."""
    for module in ("sklearn", "PIL", "soundfile"):
        pytest.importorskip(module)
    place = tmp_path_factory.mktemp("digits")
    (place / "recordings").mkdir()
    times = np.arange(3200) / 8000
    for number, speaker in enumerate(("ann", "ben", "cid", "dot")):
        for digit in range(10):
            for take in range(4, 7):
                wave = np.sin(2 * np.pi * (300 + 250 * digit + 5 * number + take) * times)
                name = place / "recordings" / f"{digit}_{speaker}_{take}.wav"
                sound.write(name, sound.Audio(np.float32(0.3) * wave.astype(np.float32), 8000))
    digits.write(place, place / "out")
    return place / "out"


def test_speakers_and_pictures_of_the_test_are_not_trained_on(spoken: Path) -> None:
    parts = {name: manifest(spoken / f"{name}.jsonl") for name in ("train", "dev", "test", "known")}
    speakers = {name: {row["speaker"] for row in rows} for name, rows in parts.items()}
    assert speakers["known"] == speakers["train"] and len(speakers["train"]) == 2
    assert len(speakers["train"] | speakers["dev"] | speakers["test"]) == 4
    drawn = {name: {row["image"] for row in rows} for name, rows in parts.items()}
    assert not drawn["train"] & (drawn["dev"] | drawn["test"] | drawn["known"])
    assert not drawn["dev"] & drawn["test"]
    said = {name: {row["speech"] for row in rows} for name, rows in parts.items()}
    assert not said["train"] & said["known"]
    for row in parts["test"]:
        assert row["text"] == digits.WORDS[row["digit"]]
        assert row["image"].startswith(f"pictures/{row['digit']}-")
    alone = {row["image"] for row in manifest(spoken / "unpaired_image.jsonl")}
    assert not alone & (drawn["dev"] | drawn["test"])


def test_the_judges_of_digits_beat_their_floors(spoken: Path) -> None:
    judge = real_judges.Digits.trained(spoken)
    rows = manifest(spoken / "test.jsonl")
    for made in (
        real_judges.pictures(spoken, rows),
        real_judges.sounds(spoken, rows),
        [row["text"] for row in rows],
    ):
        found = bounds(judge, rows, made)
        assert found["oracle"]["digit"] > 0.9 > found["floor"]["digit"] + 0.5
    assert judge.digit("two three") == judge.digit("") == -1


# --- judges and recipes


def test_a_number_that_is_none_counts_for_nothing() -> None:
    class Half:
        """Knows only the first sample."""

        def judge(self, wanted: Any, made: Any) -> dict[str, list[float]]:
            return {"known": [1.0, *[float("nan")] * (len(made) - 1)]}

    assert real_judges.Scored(Half())([], ["a", "b"], []) == {"known": [(1.0, 1.0), (0.0, 0.0)]}


@pytest.mark.parametrize("name", real.SETS)
def test_the_recipes_of_a_set_fit_together(tmp_path: Path, name: str) -> None:
    found = real.runs(name, tmp_path / "data", tmp_path / "runs")
    chosen = real.named(name)
    assert [*found] == ["text", *chosen.niches, "zip"]
    assert all(isinstance(config, TrainConfig) for config in found.values())
    for tower in (real.TEXT, *chosen.niches):
        assert found["zip"].towers[tower].startswith(found[tower].output)
        assert found["zip"].modalities[tower] == found[tower].modalities[tower]
    assert set(found["zip"].train) == {*chosen.niches}
    joined = {frozenset((source, target)) for source, _, target, _ in found["zip"].links or ()}
    assert joined == {frozenset((real.TEXT, niche)) for niche in chosen.niches}
    assert all(depth == 0 for source, depth, *_ in found["zip"].links or () if source == real.TEXT)
    assert not [*tmp_path.iterdir()]
    short = real.runs(name, tmp_path / "data", tmp_path / "runs", share=0.01)
    assert all(short[part].steps < config.steps for part, config in found.items())


def test_a_part_that_was_killed_is_trained_to_its_end_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.world(tmp_path / "world").config(tmp_path / "part")

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=kill)
    assert (tmp_path / "part" / "model").exists() and not finished(config)
    assert real.trained(config) == tmp_path / "part" / "model" and finished(config)
    monkeypatch.setattr(real, "train", lambda *_, **__: pytest.fail("it was trained again"))
    real.trained(config)
    for other in (replace(config, steps=3), replace(config, seed=7), replace(config, batch=3)):
        with pytest.raises(ZipperError, match="was made by another recipe: other"):
            real.trained(other)
    moved = {name: tmp_path / name for name in config.towers}
    assert finished(replace(config, log_every=1, modalities=moved))  # files go by what they hold


@pytest.mark.parametrize(
    ("rows", "limit"), [(500, 300), (460, 300), (764, 300), (150, 300), (7, 3)]
)
def test_a_limit_takes_rows_from_all_over_a_test(rows: int, limit: int) -> None:
    some = real.evenly(range(rows), limit)
    assert len(some) == len({*some}) == min(rows, limit) and some == sorted(some)
    gaps = [behind - before for before, behind in pairwise([*some, rows])]
    assert some[0] == 0 and max(gaps) - min(gaps) <= 1
    assert real.evenly(range(rows), None) == [*range(rows)]


def test_what_was_written_in_part_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of manifests the last is the one that says so."""
    for name, value in {"TAKES": 6, "ROUNDS": 1}.items():
        monkeypatch.setattr(digits, name, value)
    digits.say(tmp_path / "said")
    written = digits.manifests.write

    def kill(path: Path, rows: Any) -> None:
        if path.name == "unpaired_image.jsonl":
            raise KeyboardInterrupt
        written(path, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(digits.manifests, "write", kill)
        digits.write(tmp_path / "said", tmp_path / "out")
    assert (tmp_path / "out" / "test.jsonl").is_file()
    monkeypatch.setattr(real, "_fitted", lambda *_: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception, match="enough"):
        real.prepare("digits", tmp_path / "said", tmp_path / "out")
    assert (tmp_path / "out" / real.LAST).is_file()


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ZipperError, match="Take one of images, motion"):
        real.runs("smells", Path("data"), Path("runs"))


def test_a_judge_that_lacks_its_package_says_so_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "prepare", lambda *_: None)
    monkeypatch.setattr(real, "train", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(real_judges.Chemistry, "needs", ("no_such_chemistry",))
    with pytest.raises(MissingExtra, match="no_such_chemistry"):
        real.run("molecules", tmp_path, tmp_path / "out")
    with pytest.raises(MissingExtra, match="no_such_chemistry"):
        measurement.judge("rdkit")


@pytest.mark.slow
def test_motion_runs_from_the_original_to_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = real.SETS["motion"]
    niche = replace(small.niches["motion"], settings={"codes": 16}, shape=real.SMALL)
    monkeypatch.setitem(real.SETS, "motion", replace(small, niches={"motion": niche}, merges=10))
    motion_original(tmp_path / "data", 8)
    place = tmp_path / "out"
    found = real.run("motion", tmp_path / "data", place, 0.002, limit=4, which=real.ARMS)
    for arm in real.ARMS:
        assert [one["task"] for one in found[arm]["test"]] == [*real.named("motion").tasks]
    assert (place / "test.html").is_file() and (place / "expanded_test.html").is_file()
    told = json.loads((place / "measured.json").read_text())
    assert "| ear: activity |" in real.markdown({"sets": {"motion": told}, "about": {}})
    metrics = told["zip"]["test"][1]["metrics"]
    assert metrics["ear: activity"]["oracle"]["value"] > 0.5


def test_the_page_about_modalities_is_made_from_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    newest = sorted((root / "benchmarks" / "results").glob("real_2cpu_*.json"))[-1]
    told = json.loads(newest.read_text(encoding="utf-8"))
    page = (root / "docs" / "modalities.md").read_text(encoding="utf-8")
    assert page == real.markdown(told), "docs/modalities.md: tools/modalities.py --page"
