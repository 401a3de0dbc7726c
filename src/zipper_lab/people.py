"""Few pairs of people: a zip that has heard nobody but a synthesiser meets the words of people.

Both models, the zip and the paper's baseline (one decoder with every id in its vocabulary and as
many parameters), learn eighteen words from synthetic voices, and then from 10, 100, 1,000 or all
pairs of people, mixed with what they had. Tested on people that no part of the training heard,
towers and codebook included. Speech is units of a pre-trained encoder's layer.
"""

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from zipper import modality, statistics
from zipper.audio import disturbance
from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.encoder import EncoderUnits
from zipper.modality.text import Text
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.saving.files import read_json, write_json
from zipper.strand import Segment
from zipper.training import TrainConfig, train
from zipper_lab import real
from zipper_lab.corpora import prose, words
from zipper_lab.demo import SPEECH_TOWER, TEXT_TOWER

LAYER, CODES = 5, 500  # docs/log.md: people who say the same word are nearest there
MARGIN_S = 0.3  # around clips whose ends were trimmed
FITTED = 3000  # sounds that the codebook is made of
TASKS = {"heard:speech -> text": 0.6, "text -> speech": 0.4}
PAIRS = (10, 100, 1000, 0)  # of people; 0 = all
SEEDS = (0, 1, 2)
ARMS = ZIP, LINKS, LORA, EXPANDED = real.ZIP, "links", "lora", real.EXPANDED
BASE_STEPS, STEPS = 1000, 200
LIMIT = 250  # clips of each set that are tested, spread over all of it
SHIFTED = 200  # of them disturbed


@dataclass(frozen=True)
class Ear:
    """Which word units say: logistic regression on how often each unit, and each two behind one
    another, stand in them. It shares nothing with the models but the units."""

    places: Mapping[tuple[int, ...], int]
    model: Any

    @classmethod
    def trained(cls, rows: Sequence[Mapping[str, Any]]) -> "Ear":
        """On true units of people and of the synthesiser."""
        counted = [_counted(row["speech"]) for row in rows]
        known = sorted({*chain.from_iterable(counted)})
        places = {key: place for place, key in enumerate(known)}
        model = extra("sklearn.linear_model").LogisticRegression(max_iter=300, C=10.0)
        made = cls(places, model)
        model.fit(made._traits([row["speech"] for row in rows]), [row["text"] for row in rows])
        return made

    def heard(self, units: Sequence[Sequence[int]]) -> list[str]:
        """The word of each."""
        found: list[str] = self.model.predict(self._traits(units)).tolist()
        return found

    def _traits(self, units: Sequence[Sequence[int]]) -> Any:
        found = extra("scipy.sparse").lil_matrix((len(units), len(self.places)))
        for row, counts in enumerate(map(_counted, units)):
            for key in counts.keys() & self.places.keys():
                found[row, self.places[key]] = np.log1p(counts[key])
        return found.tocsr()


def _counted(ids: Sequence[int]) -> Counter[tuple[int, ...]]:
    return Counter([(one,) for one in ids]) + Counter(pairwise(ids))


def prepare(data: Path, encoder: str, folder: Path, seed: int = 0) -> None:
    """Modalities, and every manifest as units, in `folder`; what is there as a whole stays.

    data: the folder with both originals (`corpora.words`). encoder: hub id or folder.
    """
    if (folder / "speech.jsonl").is_file():  # the last one
        return
    said = words.people(data, seed)
    by = {part: [each for each in said if each.part == part] for part in ("train", "dev", "test")}
    spoken = [*words.synthesized(words.vocabulary(data))]
    if not (folder / "speech" / "modality.json").is_file():
        chance = random.Random(f"codebook {seed}")
        sounds = [each.audio for each in chance.sample(by["train"], FITTED // 2)]
        sounds += [sound for _, _, sound in chance.sample(spoken, FITTED // 2)]
        fitted = EncoderUnits.fitted(
            sounds, encoder, LAYER, CODES, merged=True, seed=seed, margin_s=MARGIN_S
        )
        modality.save(fitted, folder / "speech")
    units = modality.load(folder / "speech")
    made = []
    for name, word, sound in tqdm(spoken, desc="synthetic", unit="word", disable=None):
        heard = disturbance.drawn(key := zlib.crc32(name.encode())).apply(sound, key)
        row = {"id": name, "text": word, "speech": units.encode(sound)}
        made.append(row | {"heard:speech": units.encode(heard)})
    random.Random(seed).shuffle(made)
    manifests.write(folder / "synthetic.jsonl", made)
    texts = [text for _, text in prose.lines("text")]
    single = words.vocabulary(data) * 200
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in [*texts, *single]])
    modality.save(Text.train([*texts[:5000], *single], 500), folder / "text")
    for part in ("train", "dev", "test"):
        rows = []
        for each in tqdm(by[part], desc=part, unit="word", disable=None):
            ids = units.encode(each.audio)
            row = {"id": each.id, "text": each.text, "speech": ids, "heard:speech": ids}
            rows.append(row | {"speaker": each.speaker, "source": each.source})
        random.Random(f"{part} {seed}").shuffle(rows)
        manifests.write(folder / f"{part}.jsonl", rows)
    alone = [row["speech"] for row in made + manifests.manifest(folder / "train.jsonl")]
    manifests.write(folder / "speech.jsonl", [{"speech": ids} for ids in alone])


def recipes(folder: Path, output: Path, share: float = 1.0) -> dict[str, TrainConfig]:
    """The towers, by name, and both models that have heard nobody yet: "zip", "expanded"."""
    common: dict[str, Any] = {"dev": str(folder / "dev.jsonl"), "lr_tower": 2e-3, "trackers": ()}
    towers = {}
    for name, shape, data, steps in (
        ("text", TEXT_TOWER, "texts", 800),
        ("speech", SPEECH_TOWER | {"max_position_embeddings": 512}, "speech", 1200),
    ):
        towers[name] = TrainConfig(
            output=str(output / name),
            towers={name: shape},
            modalities={name: str(folder / name)},
            data=str(folder / f"{data}.jsonl"),
            tasks={f"-> {name}": 1.0},
            steps=max(1, round(steps * share)),
            corrupt={} if name == "text" else {name: 0.05},
            **common,
        )
    zipped = TrainConfig(
        output=str(output / ZIP),
        towers={name: str(output / name / "model" / "towers" / name) for name in towers},
        modalities={name: str(folder / name) for name in towers},
        data=str(folder / "synthetic.jsonl"),
        dev=str(folder / "dev.jsonl"),
        tasks=TASKS,
        train=("speech",),
        links=real.links(["speech"]),
        **real.ALIGNED,
        corrupt={"speech": 0.05},
        steps=max(1, round(BASE_STEPS * share)),
        trackers=(),
    )
    return {**towers, ZIP: zipped, EXPANDED: real.arms(zipped)[EXPANDED]}


def adapted(
    base: TrainConfig, arm: str, folder: Path, output: Path, pairs: int, seed: int, share: float
) -> TrainConfig:
    """The recipe that takes a base to so many pairs of people. arm: ZIP lets links and the speech
    tower learn, LINKS the links alone, LORA links and an adapter of the speech tower."""
    people = folder / "few" / f"{pairs}-{seed}.jsonl"
    if not people.is_file():
        manifests.write(people, few(manifests.manifest(folder / "train.jsonl"), pairs, seed))
    learns: dict[str, dict[str, Any]] = {
        ZIP: {},
        LINKS: {"train": (), "freeze": ("speech",)},
        LORA: {"train": (), "lora": {"speech": {"r": 8}}},
        EXPANDED: {},
    }
    slower: dict[str, Any] = {"lr_new": 1e-3, "lr_tower": base.lr_tower / 2, "calibrate": 0}
    sources = (str(people), str(folder / "synthetic.jsonl"))
    return replace(
        base,
        output=str(output / f"{arm}-{pairs}-{seed}"),
        start=str(Path(base.output) / "model"),
        data=dict.fromkeys(sources, 0.5),
        steps=max(1, round(STEPS * share)),
        eval_every=50,  # the best on dev is what is taken: few pairs are learnt by heart
        seed=seed,
        **(slower | learns[arm]),
    )


def few(rows: Sequence[Mapping[str, Any]], pairs: int, seed: int) -> list[Mapping[str, Any]]:
    """So many rows, 0 for all; of each word as many as can be, whoever said it."""
    drawn = random.Random(f"few {seed}").sample([*rows], len(rows))
    by: dict[str, list[Any]] = defaultdict(list)
    for row in drawn:
        by[row["text"]].append(row)
    order = sorted(drawn, key=lambda row: by[row["text"]].index(row))
    return order[: pairs or None]


def tested(
    pipeline: Pipeline, rows: Sequence[Mapping[str, Any]], ear: Ear, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Shares of words that are right, by direction and set, with 95 % intervals.

    "asr": what is written is the word. "tts": what is said is the word by `ear`, beside its
    "oracle" on the person's own units.
    """
    text = pipeline.modalities["text"]
    heard = [[Segment("speech", row["heard:speech"])] for row in rows]
    asked = [[Segment("text", text.encode(row["text"]))] for row in rows]
    written = pipeline.generate(heard, ["text"], Sampling())
    # Drawn, as people differ: the likeliest would be one and the same for a word.
    spoken = pipeline.generate(asked, ["speech"], Sampling(temperature=0.7, seed=seed))
    right = {
        "asr": [text.decode(made[0].content) == row["text"] for made, row in _both(written, rows)],
        "tts": _same(ear.heard([made[0].content for made in spoken]), rows),
        "oracle": _same(ear.heard([row["speech"] for row in rows]), rows),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, source in product(right, (words.DIGITS, words.WORDS)):
        some = [hit for hit, row in _both(right[name], rows) if row["source"] == source]
        if some:
            found.setdefault(name, {})[source] = rate(np.array(some, float))
    return found


def _both(made: Sequence[Any], rows: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(made, rows, strict=True)


def _same(heard: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [word == row["text"] for word, row in _both(heard, rows)]


def rate(hits: Float[np.ndarray, " rows"]) -> dict[str, float]:
    """A share of rows, with its 95 % interval."""
    low, high = statistics.bootstrap(lambda some: some.mean(axis=-1), hits)
    return {"value": float(hits.mean()), "low": low, "high": high, "rows": len(hits)}


def shifted(
    pipeline: Pipeline, data: Path, rows: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Share of words of the test that are written right, by what their sounds were disturbed with
    (`disturbance.TABLE`)."""
    units, text = pipeline.modalities["speech"], pipeline.modalities["text"]
    sounds = {each.id: each for each in words.people(data, seed)}
    found = {}
    for name, one in tqdm(disturbance.TABLE.items(), desc="disturb", disable=None):
        heard = [
            units.encode(one.apply(sounds[row["id"]].audio, zlib.crc32(row["id"].encode())))
            for row in rows
        ]
        made = pipeline.generate([[Segment("speech", ids)] for ids in heard], ["text"], Sampling())
        said = [text.decode(written.content) for (written,) in made]
        found[name] = rate(np.array(_same(said, rows), float))
    return found


def spread(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """At most so many rows of each set, evenly."""
    found: list[Mapping[str, Any]] = []
    for source in (words.DIGITS, words.WORDS):
        some = [row for row in rows if row["source"] == source]
        found += real.evenly(some, limit)
    return found


def run(data: Path, encoder: str, output: Path, share: float = 1.0) -> dict[str, Any]:
    """All of it: output/data, the towers, both bases, every arm; measured.json as it grows, and
    returned. What is done is not done again.

    share: of all steps, for a short try. Raises ZipperError for a missing original.
    """
    folder = output / "data"
    prepare(data, encoder, folder)
    plans = recipes(folder, output, share)
    for name, config in plans.items():
        real.trained(config, real.maker(name, plans))
    place = output / "measured.json"
    told: dict[str, Any] = read_json(place) if place.is_file() else {}
    every = manifests.manifest(folder / "train.jsonl")
    ear = Ear.trained([*every, *manifests.manifest(folder / "synthetic.jsonl")])
    rows = spread(manifests.manifest(folder / "test.jsonl"), LIMIT)
    for name in (ZIP, EXPANDED):
        if name not in told:
            told[name] = tested(Pipeline.from_pretrained(output / name / "model"), rows, ear)
            write_json(place, told)
    for seed, pairs, arm in product(SEEDS, PAIRS, ARMS):
        base = EXPANDED if arm == EXPANDED else ZIP
        config = adapted(plans[base], arm, folder, output, pairs, seed, share)
        name = Path(config.output).name
        if name in told:
            continue
        made = train(config, resume=True, build=real.maker(base, plans))
        told[name] = tested(made, rows, ear)
        if (arm, pairs, seed) == (ZIP, 0, 0):
            told["shifted"] = shifted(made, data, real.evenly(rows, SHIFTED))
        write_json(place, told)
        print(f"-- {name}: {told[name]['asr']}", flush=True)
    return told


def markdown(told: Mapping[str, Any]) -> str:
    """What `run` measured, as tables: the mean over seeds and the least and most."""
    if ZIP not in told:
        raise ZipperError("Nothing was measured yet: the zip itself is missing.")
    lines = []
    for task, source in product(("asr", "tts"), (words.DIGITS, words.WORDS)):
        bound = f" (oracle of the ear: {_percent(told[ZIP]['oracle'][source])})"
        said = "speech to text**" if task == "asr" else f"text to speech**{bound}"
        lines += [f"**{source}, {said}", ""]
        lines += ["| pairs of people | " + " | ".join(ARMS) + " |", "|---" * 5 + "|"]
        first = [told[EXPANDED if arm == EXPANDED else ZIP][task][source] for arm in ARMS]
        lines.append(f"| none | {' | '.join(map(_percent, first))} |")
        for pairs in PAIRS:
            cells = []
            for arm in ARMS:
                runs = [told.get(f"{arm}-{pairs}-{seed}") for seed in SEEDS]
                cells.append(over([one[task][source] for one in runs if one]))
            lines.append(f"| {pairs or 'all'} | {' | '.join(cells)} |")
        lines.append("")
    if "shifted" in told:
        lines += ["| disturbed by | words right |", "|---|---|"]
        lines += [f"| {name} | {_percent(rate)} |" for name, rate in told["shifted"].items()]
    return "\n".join(lines)


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['value']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def over(rates: Sequence[Mapping[str, float]]) -> str:
    """Of several runs their mean, least and most; of one its interval."""
    if len(rates) < 2:
        return _percent(rates[0]) if rates else "-"
    values = [100 * rate["value"] for rate in rates]
    return f"{float(np.mean(values)):.1f} % ({min(values):.1f} to {max(values):.1f})"
