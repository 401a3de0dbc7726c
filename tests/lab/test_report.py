"""A report says every number it was given, believes no text it was given, and asks the network for
nothing."""

import base64
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from zipper import pages
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.evaluation import ErrorRate
from zipper_lab import report
from zipper_lab.report import AttentionMap, Report, Sample, Score, Sound

EVIL = """</p></title><script>alert("1")</script><img src='https://evil.example/x' onerror=alert(2)>&amp; $x^{ $page"""
RATE_HZ = 16_000


class Page(HTMLParser):
    """What a browser would see: every opened tag with its attributes, every text with the tag it
    stands in."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")

    def data(self, kind: str) -> list[bytes]:
        """The embedded files of one kind, in order."""
        head = f"data:{kind};base64,"
        found = [attributes.get("src", "") for _, attributes in self.tags]
        return [
            base64.b64decode(value.removeprefix(head)) for value in found if value.startswith(head)
        ]


def noise(seconds: float, seed: int = 0) -> Audio:
    samples = (
        np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE_HZ)).astype(np.float32)
    )
    return Audio(samples, RATE_HZ)


def rate(k: int) -> ErrorRate:
    """A rate all of whose numbers differ from those of every other k."""
    return ErrorRate(
        wer=0.1003 + k / 100, low=0.0509 + k / 100, high=0.1507 + k / 100, cer=0.4011 + k / 100, exact=0.6013 + k / 100,
        words=1_234 + k, utterances=2_000 + k,
    )  # fmt: skip


def sample(text: str = "send forty oranges", spoken: Audio | None = None) -> Sample:
    return Sample(
        id="test-7",
        text=text,
        voice="en-us",
        transcript="send fourteen oranges please",
        recorded=Sound(noise(0.3, 1), {"first judge": text}),
        rebuilt=Sound(noise(0.3, 2), {"first judge": "send oranges"}),
        spoken=Sound(
            noise(0.2, 3) if spoken is None else spoken, {"first judge": "lend forty oranges"}
        ),
    )


METRICS = [
    {
        "step": 20 * n,
        "loss/text": 2.0 / n,
        "loss/speech": 3.0 / n,
        "gate/0:speech>text": 0.5,
        "gate/1:text>speech": 0.6,
        "lr": 1e-3,
    }
    | ({"dev/speech -> text": 1.5 / n} if n % 2 == 0 else {})
    for n in range(1, 7)
]
TOKENS, UNITS = ["<s>", "send", "四十"], [f"{0.04 * n:.2f} s" for n in range(7)]
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(7), 3).astype(np.float32)


def whole() -> Report:
    return Report(
        asr=[
            Score("model", "by eye", rate(0), unended=0.0317),
            Score("floor", "by eye", rate(1)),
            Score("model", "by eye", rate(7), disturbed="noise at 20 dB"),
        ],
        tts=[
            Score("model", "first judge", rate(2), unended=0.0719),
            Score("model", "second judge", rate(3)),
            Score("model", "first judge", rate(4), voice="en-us+f3"),
            Score("oracle", "first judge", rate(5)),
            Score("floor", "first judge", rate(6)),
        ],
        seconds=512.3,
        phases={"corpus": 83.2, "align": 330.1},
        corpus={"pairs": 11_000, "test": 200},
        recipe={"steps": 800, "link": {"gate_init": 0.625, "dropout": 0.0}, "train": ["speech"]},
        environment=report.environment(),
        command="zipper demo --steps 800",
        metrics=METRICS,
        attention=[
            AttentionMap("text", "speech", WEIGHTS, TOKENS, UNITS),
            AttentionMap("speech", "text", WEIGHTS.T, UNITS, TOKENS),
        ],
        samples=[sample()],
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report.write(path, whole())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def asks(page: Page) -> list[str]:
    """All that a browser would fetch for this page."""
    loading = {"script", "link", "iframe", "object", "embed", "base", "form"}
    found = [tag for tag, _ in page.tags if tag in loading]
    fetched = ("src", "href", "xlink:href", "srcset", "action", "poster", "data", "background")
    for tag, attributes in page.tags:
        values = [attributes[name] for name in fetched if name in attributes]
        found += [f"{tag} {value[:60]}" for value in values if not value.startswith(("data:", "#"))]
        found += [f"{tag} {name}" for name in attributes if name.startswith("on")]
        found += [
            f"{tag} {value}"
            for value in re.findall(r"url\((?!#)[^)]*", attributes.get("style", ""))
        ]
    styles = "".join(data for tag, data in page.texts if tag == "style")
    return found + re.findall(r"@import|url\((?!#)[^)]*", styles)


def test_every_number_given_stands_on_the_page(page: Page) -> None:
    numbers = [
        "3.2\u00a0%",
        "7.2\u00a0%",
        "512.3",
        "83.2",
        "330.1",
        "11,000",
        "200",
        "800",
        "0.625",
    ]
    for k in range(7):
        given = rate(k)
        numbers += [
            f"{100 * share:.1f}\u00a0%" for share in (given.wer, given.high, given.cer, given.exact)
        ]
        numbers += [f"{100 * given.low:.1f} to", f"{given.utterances:,}"]
    # Words and utterances are those of a row's first judge.
    numbers += [f"{rate(k).words:,}" for k in range(7) if k != 3]
    numbers.remove(f"{rate(3).utterances:,}")
    assert not [number for number in numbers if number not in page.text]


def test_names_of_judges_voices_towers_tokens_and_versions_stand_on_the_page(page: Page) -> None:
    names = [
        "by eye",
        "first judge",
        "second judge",
        "en-us+f3",
        "text reads speech",
        "speech reads text",
        "junction 1",
    ]
    names += [
        "speech -> text",
        "link.gate_init",
        "zipper demo --steps 800",
        "test-7",
        *TOKENS,
        UNITS[-1],
        *report.environment().values(),
    ]
    assert not [name for name in names if name not in page.text]


def test_the_page_asks_the_network_for_nothing(page: Page) -> None:
    assert not asks(page)


def test_ids_on_the_page_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_report_gives_the_same_bytes(source: str, tmp_path: Path) -> None:
    report.write(tmp_path / "again.html", whole())
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == source


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    score = Score(EVIL, EVIL, rate(0))
    seen = AttentionMap(EVIL, EVIL, WEIGHTS, [EVIL] * 3, [EVIL] * 7)
    metrics = [{"step": 1, f"loss/{EVIL}": 1.0, f"dev/{EVIL}": 1.0, f"gate/0:{EVIL}": 1.0}]
    said = replace(
        sample(EVIL), id=EVIL, voice=EVIL, transcript=EVIL, spoken=Sound(noise(0.1), {EVIL: EVIL})
    )
    evil = Report(
        [score],
        [replace(score, voice=EVIL)],
        1.0,
        {EVIL: 1.0},
        {EVIL: 1},
        {EVIL: {EVIL: EVIL}},
        {EVIL: EVIL},
        EVIL,
    )
    evil = replace(evil, metrics=metrics, attention=[seen], samples=[said], title=EVIL, about=EVIL)
    report.write(tmp_path / "evil.html", evil)
    source = (tmp_path / "evil.html").read_text(encoding="utf-8")
    assert not asks(Page(source))
    assert "<script" not in source.lower()
    assert unescape(source).count(EVIL) > 20, "the text should be there, to be read"


def test_sound_comes_back_from_the_page_sample_by_sample(page: Page) -> None:
    sounds = [
        soundfile.read(io.BytesIO(content), dtype="float32") for content in page.data("audio/flac")
    ]
    wanted = [sound.audio for sound in (sample().recorded, sample().rebuilt, sample().spoken)]
    assert [rate_hz for _, rate_hz in sounds] == [RATE_HZ] * 3
    for (samples, _), audio in zip(sounds, wanted, strict=True):
        np.testing.assert_allclose(samples, audio.samples, atol=1 / 32_768)


def test_every_sound_has_a_spectrogram_of_one_pixel_per_10_ms(page: Page) -> None:
    # A PNG's header: width at byte 16.
    widths = [int.from_bytes(content[16:20], "big") for content in page.data("image/png")]
    assert widths == [30, 30, 20]


def test_a_model_that_said_nothing_gets_no_player(tmp_path: Path) -> None:
    silent = sample(spoken=Audio(np.zeros(0, np.float32), RATE_HZ))
    report.write(
        tmp_path / "silent.html", replace(whole(), samples=[silent], metrics=[], attention=[])
    )
    page = Page((tmp_path / "silent.html").read_text(encoding="utf-8"))
    assert "No sound came out" in page.text
    assert len(page.data("audio/flac")) == 2


WORDS = st.lists(st.sampled_from("send forty fourteen oranges to vienna".split()), max_size=8).map(
    " ".join
)


@given(reference=WORDS, hypothesis=WORDS)
def test_struck_out_words_complete_the_reference_and_marked_words_the_hypothesis(
    reference: str, hypothesis: str
) -> None:
    marked = report.marked(reference, hypothesis)
    without = {
        tag: " ".join(words for kind, words in marked if kind != tag) for tag in ("del", "ins")
    }
    assert without == {"del": hypothesis, "ins": reference}


def test_words_are_marked_as_the_word_error_rate_counts_them(tmp_path: Path) -> None:
    said = replace(
        sample("send forty oranges to vienna"), transcript="send fourteen oranges vienna"
    )
    report.write(tmp_path / "one.html", replace(whole(), samples=[said], metrics=[], attention=[]))
    marked = "send <del>forty</del> <ins>fourteen</ins> oranges <del>to</del> vienna"
    assert f"</span> {marked}</p>" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_report_json_quotes_the_first_judge_over_all_voices_in_fractions() -> None:
    found = json.loads(json.dumps(whole().to_json()))
    assert found["seconds"] == 512.3
    assert {key: found["asr"][key] for key in ("wer", "floor", "judge", "unended")} == {
        "wer": rate(0).wer,
        "floor": rate(1).wer,
        "judge": "by eye",
        "unended": 0.0317,
    }
    assert [found["tts"][key] for key in ("wer", "oracle", "floor")] == [
        rate(2).wer,
        rate(5).wer,
        rate(6).wer,
    ]
    assert [score["rate"]["wer"] for score in found["tts"]["scores"]] == [
        rate(k).wer for k in range(2, 7)
    ]
    assert found["samples"][0]["spoken_heard"] == {"first judge": "lend forty oranges"}


def test_disturbed_speech_stands_beside_and_is_not_quoted(page: Page) -> None:
    found = whole().to_json()["asr"]
    assert found["wer"] == rate(0).wer
    assert found["robust"] == {"noise at 20 dB": rate(7).wer}
    assert "robust" not in whole().to_json()["tts"]
    assert "noise at 20 dB" in page.text
    table = report.text_table(whole().asr).splitlines()
    assert (
        len(
            {
                line.index(end) + len(end)
                for line, end in zip(table, ("WER", "10.0%", "11.0%", "17.0%"), strict=True)
            }
        )
        == 1
    )
    assert "noise at 20 dB" in table[3]


def test_a_report_of_one_task_and_no_pictures_is_a_page_too(tmp_path: Path) -> None:
    report.write(
        tmp_path / "small.html", replace(whole(), tts=[], metrics=[], attention=[], samples=[])
    )
    text = Page((tmp_path / "small.html").read_text(encoding="utf-8")).text
    assert "Speech to text" in text
    assert not [
        title
        for title in ("Text to speech", "Training", "Listen", "Who looked where")
        if title in text
    ]


def test_curves_are_one_drawing_in_the_colour_of_the_text_around() -> None:
    drawing = report.curves(METRICS)
    names = {
        "".join(text.itertext())
        for text in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"text", "speech", "speech -> text", "junction 0", "junction 1", "step"} <= names
    assert "currentColor" in drawing
    assert pages.INK not in drawing


def test_curves_of_a_tower_that_trained_alone_have_no_gates() -> None:
    assert "gate" not in report.curves(
        [{"step": 1, "loss/text": 2.0}, {"step": 2, "loss/text": 1.0, "dev/text": 1.2}]
    )


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "lr": 1e-3}]])
def test_curves_of_nothing_are_an_error(metrics: list[dict[str, float]]) -> None:
    with pytest.raises(ZipperError, match="nothing to draw"):
        report.curves(metrics)


def test_an_attention_map_needs_a_label_for_every_row_and_column() -> None:
    with pytest.raises(ZipperError, match="one label per row"):
        AttentionMap("text", "speech", WEIGHTS, TOKENS, UNITS[:-1])


def test_without_matplotlib_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ZipperError, match=r"zipper-lm\[train\]"):
        report.write(tmp_path / "report.html", whole())
    assert not list(tmp_path.iterdir())


def test_six_long_samples_of_noise_stay_under_5_mb(tmp_path: Path) -> None:
    loud = Sound(noise(2.5), {})
    samples = [replace(sample(), recorded=loud, rebuilt=loud, spoken=loud)] * 6
    report.write(
        tmp_path / "large.html", replace(whole(), samples=samples, metrics=[], attention=[])
    )
    assert (tmp_path / "large.html").stat().st_size < 5_000_000
