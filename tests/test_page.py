"""The page in a real browser: every control, a microphone that hears a sentence, a phone's width,
dark and light, the keyboard; and nothing leaves the machine. Skipped where there is no Chromium."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import many
import soundfile
from PIL import Image
from test_serving import SENTENCE, Served, serving

from zipper.audio import sound
from zipper.pipeline import Pipeline
from zipper.strand import Segment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-ui-for-media-stream "
    "--use-fake-device-for-media-stream"
).split()


@pytest.fixture(scope="module")
def shipped() -> Iterator[Served]:
    with serving(Pipeline.from_pretrained(), name="spoken-commands") as found:
        yield found


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence as the microphone hears it."""
    path = tmp_path_factory.mktemp("spoken") / "said.wav"
    sound.write(path, Pipeline.from_pretrained().speak(SENTENCE).resample(48_000))
    return path


@pytest.fixture(scope="module")
def chromium(spoken: Path) -> Iterator[Any]:
    heard = f"--use-file-for-fake-audio-capture={spoken}%noloop"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, heard])
        yield browser
        browser.close()


class Page:
    """The page of a server, and what it asked for and complained of."""

    def __init__(self, chromium: Any, served: Served, tab: str, **options: Any) -> None:
        self.context = chromium.new_context(permissions=["microphone"], **options)
        self.page, self.served = self.context.new_page(), served
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.wrong.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(f"{served.url}/#{tab}")
        self.page.wait_for_selector("body[data-ready]")

    def close(self) -> None:
        """Nothing went wrong, and nobody else was asked."""
        self.context.close()
        assert self.wrong == []
        here = urlsplit(self.served.url).netloc
        assert {urlsplit(url).netloc for url in self.asked if not url.startswith(("blob:", "data:"))} == {here}  # fmt: skip

    def inked(self, selector: str) -> float:
        """The share of a canvas that is not of one colour."""
        return float(
            self.page.eval_on_selector(
                selector,
                """canvas => {
                  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                  const seen = new Map(), all = new Uint32Array(data.buffer);
                  all.forEach(one => seen.set(one, (seen.get(one) ?? 0) + 1));
                  return 1 - Math.max(...seen.values()) / all.length;
                }""",
            )
        )


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_recording_becomes_words_that_light_up_where_they_are_heard(
    chromium: Any, shipped: Served, width: int, scheme: str
) -> None:
    opened = Page(
        chromium,
        shipped,
        "listen",
        viewport={"width": width, "height": 850},
        color_scheme=scheme,
    )
    page = opened.page
    page.click("#record")
    page.wait_for_timeout(2600)
    assert page.get_attribute("#record", "aria-pressed") == "true" and opened.inked("#wave") > 0.01
    page.click("#record")
    page.wait_for_selector("#heard-look:not([hidden])")
    words = page.inner_text("#words").split()
    wanted = SENTENCE.split()
    # the microphone's clock is the machine's: under load it may lose a part of a word
    assert len(set(words) & set(wanted)) >= len(wanted) - 2, words
    assert "sure" in page.inner_text("#heard-facts")
    assert opened.inked("#heard-look canvas") > 0.2
    lit = page.evaluate(
        """async () => {
          const lit = new Set(), player = document.getElementById("heard");
          await player.play();
          while (!player.ended) {
            document.querySelectorAll("#words .lit").forEach(one => lit.add(one.textContent));
            await new Promise(requestAnimationFrame);
          }
          return [...lit];
        }"""
    )
    assert lit == words, "each word once, in order"
    page.click("#words button:nth-child(3)")
    assert page.evaluate("document.getElementById('heard').currentTime") > 0.3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()


def test_a_file_is_heard_and_one_that_is_no_sound_is_told(
    chromium: Any, shipped: Served, spoken: Path, tmp_path: Path
) -> None:
    opened = Page(chromium, shipped, "listen")
    page = opened.page
    page.set_input_files("#file", spoken)
    page.wait_for_selector("#heard-look:not([hidden])")
    assert page.inner_text("#words").strip() == SENTENCE
    (tmp_path / "no.wav").write_bytes(b"<html>")
    page.set_input_files("#file", tmp_path / "no.wav")
    page.wait_for_selector("#told:not([hidden])")
    assert "sound" in page.inner_text("#told")
    samples = (0.0001 * many.np.random.default_rng(0).normal(size=16_000)).astype("float32")
    soundfile.write(tmp_path / "quiet.wav", samples, 16_000)
    page.set_input_files("#file", tmp_path / "quiet.wav")
    page.wait_for_selector("#words .none")
    assert page.is_hidden("#told") and "Nothing was said" in page.inner_text("#words")
    assert all("422" in error for error in opened.wrong) and opened.wrong
    opened.wrong.clear()
    opened.close()


def test_a_text_is_said_in_a_chosen_voice(chromium: Any, shipped: Served) -> None:
    opened = Page(chromium, shipped, "speak")
    page = opened.page
    page.fill("#say", "call anna")
    page.click("text=high")
    page.focus("#say")
    page.keyboard.press("Enter")
    page.wait_for_selector("#said-look:not([hidden])")
    assert "first sound after" in page.inner_text("#said-facts")
    assert opened.inked("#spectrogram") > 0.3 and opened.inked("#said-look canvas") > 0.3
    page.wait_for_function("document.getElementById('said').duration > 0")
    seconds = page.evaluate("document.getElementById('said').duration")
    offline = shipped.guard.service.pipeline.speak("call anna", "high")
    assert seconds == pytest.approx(offline.seconds, abs=0.01)
    page.fill("#say", "日本")
    page.click("#speak-go")
    page.wait_for_selector("#told:not([hidden])")
    assert "cannot write" in page.inner_text("#told")
    opened.wrong.clear()
    opened.close()


def test_any_order_of_modalities_is_given_and_produced(chromium: Any, tmp_path: Path) -> None:
    Image.fromarray(many.pictures()[0]).save(tmp_path / "square.png")
    with (tmp_path / "swing.csv").open("w", newline="") as file:
        rows: Any = many.waves()[0]["values"]
        table = csv.writer(file)
        table.writerow(["time [s]", "ax", "ay"])
        table.writerows([n / 50, *row] for n, row in enumerate(rows))
    with serving(many.pipe(), name="many") as served:
        opened = Page(chromium, served, "compose", viewport={"width": 390, "height": 800})
        page = opened.page
        page.fill("#given textarea", "call anna")
        for name in ("picture", "motion", "protein", "text"):
            page.click(f"#add button:has-text('{name}')")
        page.set_input_files(
            "#given article:nth-child(2) input[type=file]", tmp_path / "square.png"
        )
        page.set_input_files("#given article:nth-child(3) input[type=file]", tmp_path / "swing.csv")
        page.fill("#given article:nth-child(4) textarea", "MKTAY")
        page.click("#given article:nth-child(5) [aria-label='Remove this text']")
        assert page.locator("#given article").count() == 4
        page.click("text=clear")
        for chip in ("picture", "motion", "text", "+"):
            page.click(f"#chips button:text-is('{chip}')")
        page.click("#chips button:text-is('speech')")
        assert page.input_value("#plan") == "picture, motion, text + speech"
        page.click("summary")
        page.fill("#limit", "12")
        page.fill("#temperature", "0.7")
        page.fill("#seed", "5")
        page.click("#run")
        page.wait_for_selector("#produced article:nth-child(4) details")
        made = page.eval_on_selector_all(
            "#produced article", "all => all.map(one => one.querySelector('header b').textContent)"
        )
        assert made == ["picture", "motion", "text", "speech"]
        assert page.locator("#produced img").count() == 1
        assert page.locator("#produced audio").count() == 1
        assert opened.inked("#produced article:nth-child(2) canvas") > 0.01
        page.click("#produced article:nth-child(3) summary")
        page.select_option("#produced article:nth-child(3) select", index=2)
        assert opened.inked("#produced article:nth-child(3) details canvas") > 0.1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.fill("#plan", "smell")
        page.click("#run")
        page.wait_for_selector("#told:not([hidden])")
        assert "smell" in page.inner_text("#told")
        opened.wrong.clear()
        opened.close()


def test_what_the_model_chose_is_told_as_if_it_had_been_asked_for(
    chromium: Any, tmp_path: Path
) -> None:
    chooses = Pipeline.from_pretrained()
    chooses.zip.choose(["speech", "text"])
    alone = chooses.run([Segment("text", "call anna")], ["*"], limits={"speech": 12, "text": 12})
    with serving(chooses, name="chooses") as served:
        opened = Page(chromium, served, "compose", viewport={"width": 900, "height": 1000})
        page = opened.page
        page.fill("#given textarea", "call anna")
        page.click("text=clear")
        page.click("#chips button:text-is('*')")
        assert page.input_value("#plan") == "*"
        page.click("summary")
        page.fill("#limit", "12")
        page.click("#run")
        page.wait_for_selector("#run:not([disabled])")
        made = page.eval_on_selector_all(
            "#produced article", "all => all.map(one => one.querySelector('header b').textContent)"
        )
        assert made == [one.tower for one in alone] and made
        page.screenshot(path=tmp_path / "chosen.png", full_page=True)
        opened.close()


def test_what_the_model_is_and_the_keyboard(chromium: Any, shipped: Served) -> None:
    opened = Page(chromium, shipped, "listen")
    page = opened.page
    page.focus("#tab-listen")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.is_visible("#model") and page.evaluate("document.activeElement.id") == "tab-model"
    assert "✓" in page.inner_text("#towers") and page.locator("#links tbody tr").count() == 6
    pinned = shipped.guard.service.pipeline.model.config.towers["text"].digest
    assert pinned[:24] in page.inner_text("#towers")
    assert page.locator("#model-picture path[marker-end]").count() == 6
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "record"
    opened.close()


def test_with_a_key_the_browser_asks_for_it(chromium: Any) -> None:
    with serving(Pipeline.from_pretrained(), key="secret") as closed:
        credentials = {"username": "anybody", "password": "secret"}
        opened = Page(chromium, closed, "speak", http_credentials=credentials)
        opened.page.click("#speak-go")
        opened.page.wait_for_selector("#said-look:not([hidden])")
        opened.wrong = [error for error in opened.wrong if "401" not in error]
        opened.close()
