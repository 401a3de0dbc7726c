"""Judges of what is made of real data: pictures, motion, digits, actions, molecules, proteins and
words.

Each is trained on real data alone, of the part "train", or is a simulator or a program of
chemistry, and shares nothing with our models. `judge(wanted, made)` gives numbers for each sample,
1 is best: wanted are rows of a manifest of zipper_lab.corpora, made what a model answered. A number
means something beside its bounds (`bounds`): what real held-out data gets, and what the answer to
another sample gets. Knows no model.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Float

from zipper.audio.sound import Audio, Mel, read
from zipper.data import manifests
from zipper.environment import extra
from zipper.measurement import Labelling
from zipper.modality import Scores
from zipper.modality.signal import Series
from zipper_lab.corpora import babyai, digits, molecules, motion

Row = Mapping[str, Any]
Found = dict[str, list[float]]

FRAMES = 20  # of the log-mel of a spoken digit, whatever its length
TREES = 200


@runtime_checkable
class Judge(Protocol):
    """Whatever gives numbers to answers. One that goes by a package of an extra names its modules
    in `needs`."""

    def judge(self, wanted: Sequence[Row], made: Sequence[Any]) -> Found:
        """By name of the metric, a number for each sample; 1 is best."""


@final
@dataclass(frozen=True)
class Scored:
    """A judge as `zipper.measurement.measure` wants one: it sees the rows, and a sample without a
    number counts for nothing."""

    by: Judge

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules of extras without which it cannot judge."""
        return getattr(self.by, "needs", ())

    def __call__(self, wanted: Sequence[Any], made: Sequence[Any], rows: Sequence[Row]) -> Scores:
        """A pair for each sample, by metric."""
        return {
            name: [(0.0, 0.0) if np.isnan(value) else (value, 1.0) for value in values]
            for name, values in self.by.judge(rows, made).items()
        }

    def labels(self, made: Sequence[Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
        """See `zipper.measurement.Labelling`; none where the judge takes nothing for anything."""
        return [*self.by.labels(made, rows)] if isinstance(self.by, Labelling) else []


# --- words


class Words:
    """Text beside text. exact: whether all words are the same, in their order; words: the F1 of the
    bag of words."""

    def __init__(self, field: str = "text") -> None:
        """field: of the rows."""
        self.field = field

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """See the class."""
        pairs = [
            (_words(row[self.field]), _words(said)) for row, said in zip(wanted, made, strict=True)
        ]
        return {
            "exact": [float(one == other) for one, other in pairs],
            "words": [_f1(one, other) for one, other in pairs],
        }


def _words(text: str) -> list[str]:
    kept = "".join(c if c.isalnum() or c in "'-" else " " for c in text.lower())
    return kept.split()


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    shared = (Counter(one) & Counter(other)).total()
    return 2 * shared / (len(one) + len(other)) if one or other else 1.0


# --- pictures


@dataclass(frozen=True)
class Pictures:
    """Whether a picture shows what was asked for.

    category: whether a forest of trees, trained on real pictures, finds the category of the thing;
    most are people, so that a floor is far from 0.
    name: 1 / rank of the thing among all things asked for, by how near their real pictures in the
    other style are (1: nearest). A thing without a picture in the other style has no number.
    """

    forest: Any
    others: Mapping[tuple[str, str], Float[np.ndarray, " pixels"]]

    @classmethod
    def trained(cls, folder: Path, seed: int = 0) -> "Pictures":
        """On train.jsonl of a folder that `corpora.emoji.write` made; the pictures of the other
        parts are only looked up."""
        rows = manifests.manifest(folder / "train.jsonl")
        seen = np.stack(_traits(pictures(folder, rows)))
        forest = extra("sklearn.ensemble").ExtraTreesClassifier(TREES, random_state=seed)
        forest.fit(seen, [row["category"] for row in rows])
        found = dict[tuple[str, str], Float[np.ndarray, " pixels"]]()
        for part in ("train", "dev", "test", "known"):
            some = manifests.manifest(folder / f"{part}.jsonl")
            for row, picture in zip(some, pictures(folder, some), strict=True):
                found[row["name"], row["style"]] = _centred(picture)
        return cls(forest, found)

    def judge(self, wanted: Sequence[Row], made: Sequence[Any]) -> Found:
        """made: arrays (height, width, 3) of bytes."""
        return {
            "category": [float(one == other) for one, other in self.labels(made, wanted)],
            "name": self._ranks(wanted, made),
        }

    def labels(self, made: Sequence[Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Of each picture the category that is right, and that which is seen."""
        seen = self.forest.predict(np.stack(_traits(made))).tolist()
        return [(row["category"], one) for row, one in zip(rows, seen, strict=True)]

    def _ranks(self, wanted: Sequence[Row], made: Sequence[Any]) -> list[float]:
        styles = sorted({style for _, style in self.others})
        names = sorted({row["name"] for row in wanted})
        ranks = []
        for row, picture in zip(wanted, made, strict=True):
            other = next((style for style in styles if style != row["style"]), "")
            known = [name for name in names if (name, other) in self.others]
            if row["name"] not in known:
                ranks.append(float("nan"))
                continue
            bank = np.stack([self.others[name, other] for name in known])
            near = bank @ _centred(picture)
            # Those as near as the wanted one stand before it: twins earn half.
            ranks.append(1 / float((near >= near[known.index(row["name"])]).sum()))
        return ranks


def pictures(folder: Path, rows: Sequence[Row]) -> list[Any]:
    """The real pictures of rows, as arrays (height, width, 3) of bytes."""
    images = extra("PIL.Image")
    return [np.asarray(images.open(folder / row["image"]).convert("RGB")) for row in rows]


def _traits(made: Sequence[Any]) -> list[Any]:
    """What a forest looks at: the pixels, and how often each colour is there, wherever it is."""
    found = []
    for picture in made:
        pixels = np.asarray(picture, np.float32) / 255
        coarse = (np.asarray(picture).reshape(-1, 3) // 64).astype(int) @ (16, 4, 1)
        colours = np.bincount(coarse, minlength=64) / len(coarse)
        found.append(np.concatenate([pixels.reshape(-1), colours]))
    return found


def _centred(picture: Any) -> Any:
    """Pixels of mean 0 and length 1, so that a product is a correlation."""
    pixels = np.asarray(picture, np.float32).reshape(-1) / 255
    pixels = pixels - pixels.mean()
    return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


class Names:
    """A name of a picture beside the true one. exact: whether all of it is the same; words: the F1
    of its words, category: whether the category before the colon is the same."""

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: "flags: andorra flag"."""
        said = [text.partition(":") for text in made]
        names = Words("name").judge(wanted, [name for _, _, name in said])
        same = zip(wanted, said, strict=True)
        hits = [float(bool(colon) and row["category"] == kind) for row, (kind, colon, _) in same]
        return names | {"category": hits}

    def labels(self, made: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Of each name the category that is right, and that which it begins with."""
        known = {row["category"] for row in rows}
        said = [text.partition(":")[0] if ":" in text else "" for text in made]
        pairs = zip(rows, said, strict=True)
        return [(row["category"], one if one in known else "none") for row, one in pairs]


# --- motion


@dataclass(frozen=True)
class Motion:
    """Whether a motion is what was asked for: a forest for each device, trained on real motion,
    says of every second what is done.

    activity: share of seconds in which that is what the real motion has there. order: 1 - the
    least number of activities to put in, leave out or change, by the longer list of them. device:
    whether the motion is that of a phone or a watch, as asked for.
    """

    forests: Mapping[str, Any]
    devices: Any

    @classmethod
    def trained(cls, folder: Path, seed: int = 0) -> "Motion":
        """On train.jsonl of a folder that `corpora.motion.write` made."""
        ensemble = extra("sklearn.ensemble")
        seen = defaultdict[str, list[Any]](list)
        told = defaultdict[str, list[str]](list)
        for row in manifests.manifest(folder / "train.jsonl"):
            seconds = _seconds(row["motion"]["values"])
            seen[row["device"]] += seconds
            told[row["device"]] += _middles(row["activities"], len(seconds))
        forests = {
            device: ensemble.RandomForestClassifier(TREES, random_state=seed, min_samples_leaf=2)
            for device in seen
        }
        for device, forest in forests.items():
            forest.fit(np.stack(seen[device]), told[device])
        whose = np.repeat([*seen], [len(seconds) for seconds in seen.values()])
        devices = ensemble.RandomForestClassifier(TREES // 4, random_state=seed)
        devices.fit(np.concatenate([np.stack(seen[device]) for device in seen]), whose)
        return cls(forests, devices)

    def judge(self, wanted: Sequence[Row], made: Sequence[Any]) -> Found:
        """made: series, or arrays (time, 6), at 50 Hz; what is longer than the row's own is
        cut."""
        found: Found = {"activity": [], "order": [], "device": []}
        for row, values in zip(wanted, made, strict=True):
            seconds, heard, true = self._heard(row, values)
            if not len(seconds):
                for scores in found.values():
                    scores.append(0.0)
                continue
            # What is too short has been nothing from its end on.
            same = sum(one == other for one, other in zip(heard, true, strict=False))
            found["activity"].append(same / len(true))
            found["order"].append(_alike(_runs(heard), _runs(true)))
            devices = Counter(self.devices.predict(seconds).tolist())
            found["device"].append(float(devices.most_common(1)[0][0] == row["device"]))
        return found

    def labels(self, made: Sequence[Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Of each second the activity that is right, and that which is heard; "none" behind the end
        of what is too short."""
        found = []
        for row, values in zip(rows, made, strict=True):
            _, heard, true = self._heard(row, values)
            found += [*zip(true, [*heard, *["none"] * len(true)], strict=False)]
        return found

    def _heard(self, row: Row, values: Any) -> tuple[list[Any], list[str], list[str]]:
        """Traits of every second, the activity heard in each, and the right ones of the row."""
        own = values.values if isinstance(values, Series) else values
        steps = len(row["activities"]) * motion.STEP
        seconds = _seconds(np.asarray(own)[:steps])
        true = _middles(row["activities"], len(_seconds(np.zeros((steps, 6)))))
        heard = self.forests[row["device"]].predict(np.stack(seconds)).tolist() if seconds else []
        return seconds, heard, true


class Told:
    """Whether a description of a motion tells what was done: activities as the description of the
    row tells them.

    exact: all in their order, turns with their side. order: 1 - the least number to put in, leave
    out or change, by the longer list. device: phone or watch.
    """

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: descriptions."""
        pairs = [
            (motion.heard(row["text"]), motion.heard(said))
            for row, said in zip(wanted, made, strict=True)
        ]
        devices = zip(wanted, made, strict=True)
        return {
            "exact": [float(one == other) for one, other in pairs],
            "order": [_alike(one, other) for one, other in pairs],
            "device": [
                float([name for name in ("phone", "watch") if name in said] == [row["device"]])
                for row, said in devices
            ],
        }


def _plain(label: str) -> str:
    """Without the side of a turn: it is hardly to be felt in a pocket."""
    return label.removesuffix(" LEFT").removesuffix(" RIGHT")


def _middles(activities: Sequence[str], seconds: int) -> list[str]:
    """The activity in the middle of every second that `_seconds` looks at."""
    half = motion.RATE_HZ // 2 // motion.STEP
    return [_plain(activities[min(2 * n + half, len(activities) - 1)]) for n in range(seconds)]


def _seconds(values: Any) -> list[Any]:
    """Traits of every second, 0.4 s apart: of each channel and of both lengths mean, spread, least,
    most and mean change."""
    given = np.asarray(values, np.float64)
    lengths = [np.linalg.norm(given[:, some], axis=1) for some in (slice(0, 3), slice(3, 6))]
    whole = np.concatenate([given, np.stack(lengths, axis=1)], axis=1)
    found = []
    for start in range(0, len(whole) - motion.RATE_HZ + 1, 2 * motion.STEP):
        second = whole[start : start + motion.RATE_HZ]
        changes = np.abs(np.diff(second, axis=0)).mean(0)
        sums = [second.mean(0), second.std(0), second.min(0), second.max(0), changes]
        thirds = [part.mean(0) for part in np.array_split(second, 3)]
        found.append(np.concatenate([*sums, *thirds]))
    return found


def _runs(labels: Sequence[str]) -> list[str]:
    """Each label once where it stays; what is heard for one moment alone is passed over."""
    runs = [(label, len([*same])) for label, same in groupby(labels)]
    kept = [label for label, length in runs if length > 1] or [label for label, _ in runs]
    return [label for label, _ in groupby(kept)]


def _alike(one: Sequence[str], other: Sequence[str]) -> float:
    row = [*range(len(other) + 1)]
    for i, label in enumerate(one, start=1):
        row, before = [i], row
        for j, said in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (label != said)))
    return 1 - row[-1] / max(len(one), len(other), 1)


# --- digits


@dataclass(frozen=True)
class Digits:
    """Which digit a picture shows or a sound says, by support vectors trained on real ones."""

    eye: Any
    ear: Any

    @classmethod
    def trained(cls, folder: Path) -> "Digits":
        """On train.jsonl of a folder that `corpora.digits.write` made: other speakers, other
        pictures."""
        vectors = extra("sklearn.svm")
        rows = manifests.manifest(folder / "train.jsonl")
        shown = {row["image"]: row for row in rows}
        said = {row["speech"]: row for row in rows}
        eye, ear = vectors.SVC(gamma="scale", C=10), vectors.SVC(gamma="scale", C=10)
        drawn = pictures(folder, [*shown.values()])
        eye.fit(np.stack([_grey(one) for one in drawn]), [row["digit"] for row in shown.values()])
        spoken = [_spoken(sound) for sound in sounds(folder, [*said.values()])]
        ear.fit(np.stack(spoken), [row["digit"] for row in said.values()])
        return cls(eye, ear)

    def judge(self, wanted: Sequence[Row], made: Sequence[Any]) -> Found:
        """digit: whether it is the one of the row. made: pictures of 8 by 8 pixels (arrays of
        bytes), sounds, or words."""
        return {"digit": [float(one == other) for one, other in self.labels(made, wanted)]}

    def labels(self, made: Sequence[Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
        """Of each answer the digit that is right, and that which is seen, heard or read."""
        found = [self.digit(one) for one in made]
        pairs = zip(rows, found, strict=True)
        return [(str(row["digit"]), str(one) if one >= 0 else "none") for row, one in pairs]

    def digit(self, made: Any) -> int:
        """The digit that is seen, heard or read; -1 for none."""
        if isinstance(made, str):
            said = made.split()
            return digits.WORDS.index(said[0]) if len(said) == 1 and said[0] in digits.WORDS else -1
        if isinstance(made, Audio):
            return int(self.ear.predict([_spoken(made)])[0]) if len(made.samples) else -1
        return int(self.eye.predict([_grey(made)])[0])


def sounds(folder: Path, rows: Sequence[Row]) -> list[Audio]:
    """The real sounds of rows."""
    return [read(folder / row["speech"]) for row in rows]


def _grey(picture: Any) -> Any:
    """Brightness in 0 .. 1, row by row."""
    bright = np.asarray(picture, np.float32) / 255
    return (bright.mean(axis=2) if bright.ndim == 3 else bright).reshape(-1)


def _spoken(sound: Audio) -> Any:
    """The log-mel at FRAMES places from the first thing heard to the last, and how long it is."""
    picture = Mel(high_hz=3_800.0).picture(sound)
    loud = picture.mean(axis=1)
    heard = np.flatnonzero(loud > loud.max() - 6)
    kept = picture[heard[0] : heard[-1] + 1]
    places = np.linspace(0, len(kept) - 1, FRAMES)
    steps = np.arange(len(kept))
    even = np.stack([np.interp(places, steps, band) for band in kept.T], axis=1)
    shape = even - even.mean(axis=0)  # without what room and voice do to all of it
    return np.concatenate([shape.reshape(-1), [len(kept) / 10]])


# --- actions


class Simulator:
    """Whether actions fulfil their mission in the simulator itself, from the start that level and
    seed of the row say.

    success: whether they do, at any step. short: 1 where no more actions were taken than the bot
    took, less where more were, 0 without success.
    """

    needs = ("minigrid.envs.babyai.core.verifier",)

    def __init__(self) -> None:
        self._worlds: dict[str, Any] = {}

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: actions in words with spaces between them; a word that is none ends them."""
        found: Found = {"success": [], "short": []}
        for row, actions in zip(wanted, made, strict=True):
            taken = self._taken(row, actions.split(), None)
            found["success"].append(float(taken > 0))
            best = max(1, len(str(row["actions"]).split()))
            found["short"].append(min(1.0, best / taken) if taken else 0.0)
        return found

    def fulfils(self, row: Row, mission: str) -> bool:
        """Whether the row's own actions fulfil another mission, given in words; False for words
        that are none."""
        told = _instruction(mission)
        return told is not None and self._taken(row, str(row["actions"]).split(), told) > 0

    def _taken(self, row: Row, actions: Sequence[str], told: Any) -> int:
        """After how many actions the mission (or another, told) is fulfilled; 0 if it never is."""
        level = row["env"]
        world = self._worlds.get(level)
        if world is None:
            world = self._worlds[level] = babyai.simulator(level)
        with babyai.quiet():
            world.reset(seed=row["seed"])
            if told is not None:
                world.instrs = told
                told.reset_verifier(world)
            for taken, action in enumerate(actions[: world.max_steps], start=1):
                number = babyai.number(action)
                if number < 0:
                    break
                _, reward, over, late, _ = world.step(number)
                if reward > 0:
                    return taken
                if over or late:
                    break
        return 0


class Missions:
    """Whether words tell a mission that the actions of the row fulfil, in the simulator (true), and
    whether they are the row's own (exact)."""

    needs = Simulator.needs

    def __init__(self) -> None:
        self._simulator = Simulator()

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: missions."""
        pairs = [*zip(wanted, made, strict=True)]
        return {
            "true": [float(self._simulator.fulfils(row, said)) for row, said in pairs],
            "exact": [float(row["text"] == said) for row, said in pairs],
        }


def _instruction(mission: str) -> Any:
    """The instruction of minigrid that a mission of our levels says; None for other words."""
    levels = extra("minigrid.envs.babyai.core.verifier")
    said = mission.split()
    if said[:2] == ["go", "to"]:
        thing = _thing(said[2:])
        return levels.GoToInstr(thing) if thing else None
    if said[:2] == ["pick", "up"]:
        thing = _thing(said[2:])
        return levels.PickupInstr(thing) if thing else None
    if said[:1] == ["put"] and said.count("next") == 1:
        at = said.index("next")
        first, second = _thing(said[1:at]), _thing(said[at + 2 :])
        if said[at : at + 2] == ["next", "to"] and first and second:
            return levels.PutNextInstr(first, second)
    return None


def _thing(said: Sequence[str]) -> Any:
    """ "the red ball on your left" as minigrid describes a thing; None for other words."""
    places = {
        ("in", "front", "of", "you"): "front",
        ("behind", "you"): "behind",
        ("on", "your", "left"): "left",
        ("on", "your", "right"): "right",
    }
    left, where = [*said], None
    for words, name in places.items():
        if tuple(left[-len(words) :]) == words:
            left, where = left[: -len(words)], name
    if left[:1] not in (["a"], ["the"]):
        return None
    colour = left.pop(1) if len(left) == 3 and left[1] in babyai.COLOURS else None
    if len(left) != 2 or left[1] not in ("object", "key", "ball", "box"):
        return None
    kind = None if left[1] == "object" else left[1]
    return extra("minigrid.envs.babyai.core.verifier").ObjDesc(kind, colour, where)


# --- molecules


class Chemistry:
    """Molecules by RDKit. valid: whether the line is one. exact: whether it is the one asked for.
    alike: Tanimoto's similarity of Morgan fingerprints (radius 2, 2,048 bits), 0 for none."""

    needs = ("rdkit.Chem",)

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: SMILES lines."""
        true = [molecules.canonical(row["molecule"]) for row in wanted]
        read = [molecules.canonical(line) for line in made]
        return {
            "valid": [float(bool(line)) for line in read],
            "exact": [
                float(bool(one) and one == other) for one, other in zip(read, true, strict=True)
            ],
            "alike": [_tanimoto(one, other) for one, other in zip(true, read, strict=True)],
        }


def _tanimoto(one: str, other: str) -> float:
    if not one or not other:
        return 0.0
    chemistry = extra("rdkit.Chem")
    maker = extra("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=2048)
    prints = [maker.GetFingerprint(chemistry.MolFromSmiles(line)) for line in (one, other)]
    return float(extra("rdkit.DataStructs").TanimotoSimilarity(*prints))


# --- proteins

#: Ten kinds of residues (Murphy et al. 2000), each told by its first: kin keep these longer than
#: the residues themselves.
COARSE = str.maketrans("VIMTYWDNQR", "LLLSFFEEEK")
#: Words with gaps find more kin than words without (PatternHunter, Ma et al. 2002).
SPACED = ("11111", "110111", "111011", "1101011", "1011011", "11001011", "11010011")
PAIRS = ("11", "101", "1001", "10001")
FRESH = 0.8  # of all words of four, those that differ: 199 of 200 proteins have more


@dataclass(frozen=True)
class Proteins:
    """What a protein looks like beside the real ones that were trained on.

    name: the F1 of the words of the wanted name and of the name of the nearest real protein, by
    words with gaps of ten kinds of residues. Where nothing of that name was trained on, as three of
    four in the test, it cannot be found; what a model makes like something trained on is found
    better than real kin are. new: how far the nearest is, 1 - cosine; a copy has 0. real: whether a
    regression on pairs of residues takes it for a protein and not for one whose residues were
    shuffled, and it does not go in circles; those of other rows are real, too, so that the floor is
    the oracle.
    """

    kin: Any
    bank: Any
    names: Sequence[str]
    order: Any

    @classmethod
    def trained(cls, folder: Path, seed: int = 0) -> "Proteins":
        """On train.jsonl of a folder that `corpora.proteins.write` made."""
        count = partial(extra("sklearn.feature_extraction.text").TfidfVectorizer, sublinear_tf=True)
        rows = manifests.manifest(folder / "train.jsonl")
        real = [str(row["protein"]) for row in rows]
        kin = count(analyzer=lambda one: _spaced(one.translate(COARSE), SPACED), dtype=np.float32)
        order = extra("sklearn.pipeline").make_pipeline(
            count(analyzer=partial(_spaced, masks=PAIRS)),
            extra("sklearn.linear_model").LogisticRegression(C=10, max_iter=500),
        )
        order.fit(real + [shuffled(one, seed) for one in real], [1] * len(real) + [0] * len(real))
        return cls(kin, kin.fit_transform(real), [row["name"] for row in rows], order)

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: residues; nothing at all is 0 in everything."""
        near = (self.kin.transform(made) @ self.bank.T).toarray()
        places, alike = near.argmax(axis=1).tolist(), near.max(axis=1)
        names = [self.names[n] if near > 0 else "" for n, near in zip(places, alike, strict=True)]
        whole = zip(self.order.predict(made), map(_fresh, made), strict=True)
        return {
            "name": Words("name").judge(wanted, names)["words"],
            "new": [float(1 - near) if one else 0.0 for near, one in zip(alike, made, strict=True)],
            "real": [float(seen and fresh) for seen, fresh in whole],
        }


class Called:
    """What a protein is called, beside its name and species. exact: whether all of the name is the
    same; words: the F1 of its words; species: whether that is the same."""

    def judge(self, wanted: Sequence[Row], made: Sequence[str]) -> Found:
        """made: "adenylate kinase of bos taurus"."""
        said = [text.rpartition(" of ") for text in made]
        names = [what or whose for what, _, whose in said]
        whose = zip(wanted, said, strict=True)
        return Words("name").judge(wanted, names) | {
            "species": [float(row["species"] == said) for row, (_, _, said) in whose]
        }


def shuffled(protein: str, seed: int = 0) -> str:
    """The same residues in an order of chance: what `Proteins.real` should refuse."""
    return "".join(random.Random(f"{seed} {protein}").sample(protein, len(protein)))


def _fresh(protein: str) -> bool:
    """Whether it does not go in circles; what is too short to tell does."""
    words = _spaced(protein, ("1111",))
    return len({*words}) > FRESH * len(words)


def _spaced(protein: str, masks: Sequence[str]) -> list[str]:
    """The words of a string of symbols that each mask sees through its ones."""
    found = []
    for mask in masks:
        places = [place for place, seen in enumerate(mask) if seen == "1"]
        words = zip(*(protein[place:] for place in places), strict=False)
        found += [mask + "".join(word) for word in words]
    return found


#: By name, for `zipper evaluate --by` (entry point group `zipper.judges`): those that need no
#: training.
SIMULATOR, MISSIONS = Scored(Simulator()), Scored(Missions())
RDKIT, WORDS = Scored(Chemistry()), Scored(Words())
