"""Pipelines: raw in, raw out, in any order, alone or in a batch; what is foreign or does not fit is
refused."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import World
from torch import Tensor

from zipper import pipeline as pipelines
from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.fast.reader import Fused
from zipper.link import LinkConfig
from zipper.loss import scores
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.pipeline import Pipeline, Transcript
from zipper.reading import Stepwise
from zipper.sampling import Sampling
from zipper.saving import checkpoint
from zipper.strand import Segment, Target, collate
from zipper.testing import tiny_tower
from zipper.tower import Tower


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return tiny.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pipe(world: World) -> Pipeline:
    return Pipeline.from_pretrained(world.zip)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sound(tmp_path_factory.mktemp("sound") / "clip.wav", seconds=0.5)


def ids(
    pipe: Pipeline, segments: list[Segment], outputs: list[Any], **options: Any
) -> list[list[int]]:
    """What the model alone makes of ids."""
    return [segment.content for segment in pipe.model.generate(segments, outputs, **options)]


# --- raw in, raw out


def test_it_transcribes_a_file_or_a_sound(pipe: Pipeline, clip: Path) -> None:
    codes = tiny.units().encode(clip)
    (wanted,) = ids(pipe, [Segment("speech", codes)], ["text"])
    assert (
        pipe.transcribe(clip)
        == pipe.transcribe(str(clip))
        == pipe.transcribe(audio.read(clip))
        == tiny.text().decode(wanted)
    )
    sound = audio.read(clip)
    pulses = Audio((sound.samples * 32_768).astype(np.int16), sound.rate_hz)  # as the file has them
    assert (
        pipe.transcribe(clip.read_bytes()) == pipe.transcribe(pulses) == tiny.text().decode(wanted)
    )


def test_it_says_how_sure_it_is(pipe: Pipeline, clip: Path) -> None:
    found = pipe.hear(clip)
    given = Segment("speech", tiny.units().encode(clip))
    written = pipe.model.generate([given], ["text"])[0]
    ends = pipe.model.ends()
    logits = pipe.model(collate([[given, written]], ends).strands)["text"][0].detach()
    logits[:, ends["text"].begin] = -torch.inf  # no token of a text
    logits = logits.log_softmax(-1)
    said = [*written.content, *[ends["text"].end] * written.ended]
    nats = [float(logits[place, token]) for place, token in enumerate(said)]
    assert found.text == tiny.text().decode(written.content) == pipe.transcribe(clip)
    assert found.confidence == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)


def test_where_nothing_is_said_nothing_comes_out(pipe: Pipeline, clip: Path) -> None:
    silence = Audio(np.zeros(16_000, np.float32), 16_000)
    noise = Audio(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    for nothing in (silence, noise):
        assert pipe.hear(nothing) == Transcript("", 1.0)
        text, sound = pipe.run([Segment("speech", nothing)], ["text", "speech"])
        assert (text.content, text.ended, len(sound.content.samples)) == ("", True, 0)
    heard = [[Segment("speech", one)] for one in (silence, clip, noise)]
    assert [row[0].content for row in pipe.run_batch(heard, ["text"])] == [
        "",
        pipe.transcribe(clip),
        "",
    ]
    # Something was given.
    with_words = pipe.run([Segment("text", "call anna"), Segment("speech", silence)], ["text"])
    assert (
        with_words[0].content
        == pipe.run(
            [Segment("text", "call anna"), Segment("speech", pipe.units.encode(silence))], ["text"]
        )[0].content
    )


def test_it_speaks_text_as_sound(pipe: Pipeline) -> None:
    (wanted,) = ids(pipe, [Segment("text", tiny.text().encode("call anna"))], ["speech"])
    said = pipe.speak("call anna")
    assert isinstance(said, Audio)
    assert np.array_equal(said.samples, tiny.units().decode(wanted).samples)


def test_it_runs_with_the_weights_as_they_are_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, given = Pipeline.from_pretrained(world.zip), [Segment("speech", [5, 6, 7])]
    assert isinstance(pipe.model, Zipper)

    def answers() -> list[Segment]:
        (made,) = pipe.generate([given], ["text"], Sampling(8.0, seed=1))
        return made

    before = answers()
    assert isinstance(pipe._reader, Fused)
    with torch.no_grad():
        for parameter in pipe.model.towers["text"].parameters():
            parameter.add_(torch.randn_like(parameter))
    after = answers()
    assert [s.content for s in after] != [s.content for s in before]
    assert [s.content for s in after] == ids(pipe, given, ["text"], sampling=Sampling(8.0, seed=1))
    reader = pipe._reader
    assert answers() == after and pipe._reader is reader, "unchanged weights are laid out once"
    assert copy.deepcopy(pipe).generate([given], ["text"], Sampling(8.0, seed=1)) == [after]
    monkeypatch.setattr(pipelines, "FAST_BYTES", 1)
    assert [s.content for s in answers()] == [s.content for s in after]
    assert isinstance(pipe._current_reader(), Stepwise)


def test_engines_and_runs_share_one_set_of_laid_out_weights(world: World) -> None:
    pipe = Pipeline.from_pretrained(world.zip)
    assert isinstance(pipe.model, Zipper)
    first = pipe.engine().reader
    pipe.generate([[Segment("speech", [5])]], ["text"], Sampling(), {"text": 2})
    assert pipe.engine(3).reader is first is pipe._reader
    with torch.no_grad():
        pipe.model.towers["text"].get_parameter("model.lm_head.weight").data[0, 0] += 1
    assert pipe.engine().reader is not first, "a change that torch's own counter does not see"


@pytest.mark.parametrize("voice", ["low", "high"])
def test_a_voice_is_forced_as_the_first_token(pipe: Pipeline, voice: str) -> None:
    token = tiny.units().voice_id(voice)
    assert pipe.voice(voice) == Segment("speech", [token])
    said, written = pipe.model.generate(
        [Segment("text", [5, 6])], [pipe.voice(voice), "text"], limits={"speech": 5, "text": 5}
    )
    assert said.content[0] == token
    # The same as if the model had begun with it by itself: what follows is what it says after that
    # token.
    strands = collate(
        [[Segment("text", [5, 6]), Segment("speech", [token])]], pipe.model.ends()
    ).strands
    logits = pipe.model(strands)["speech"][0, -2]  # the last token is its end
    logits[tiny.units().begin] = -torch.inf
    assert said.content[1] == int(logits.argmax())
    assert written.tower == "text"
    assert np.array_equal(
        pipe.speak("call anna", voice).samples,
        pipe.run([Segment("text", "call anna")], [Segment("speech", [token])])[0].content.samples,
    )


def test_any_order_of_modalities_in_and_out(pipe: Pipeline, clip: Path) -> None:
    given = [Segment("text", "call anna"), Segment("speech", clip), Segment("text", [4, 5])]
    heard, said, written = pipe.run(
        given, outputs=["text", "speech", "text"], limits={"text": 6, "speech": 9}
    )
    assert [s.tower for s in (heard, said, written)] == ["text", "speech", "text"]
    assert isinstance(heard.content, str)
    assert isinstance(written.content, str)
    assert isinstance(said.content, Audio)
    assert [isinstance(s.ended, bool) for s in (heard, said, written)] == [True] * 3
    (alone,) = pipe.run([], outputs=["text"], limits={"text": 4})
    assert isinstance(alone.content, str)


def test_a_segment_that_hits_its_cap_says_so(pipe: Pipeline) -> None:
    segment = pipe.run([Segment("text", "call")], outputs=["speech"], limits={"speech": 2})[0]
    (wanted,) = ids(
        pipe, [Segment("text", tiny.text().encode("call"))], ["speech"], limits={"speech": 2}
    )
    assert len(wanted) == 2
    assert not segment.ended
    assert segment.content.seconds == pytest.approx(2 / 25)


def test_a_batch_is_its_rows_alone(pipe: Pipeline) -> None:
    texts = ["call", "send anna five red lamp", "turn two"]
    together = pipe.run_batch(
        [[Segment("text", text)] for text in texts],
        [pipe.voice("low"), "text"],
        limits={"speech": 8, "text": 6},
    )
    for text, row in zip(texts, together, strict=True):
        alone = pipe.run(
            [Segment("text", text)], [pipe.voice("low"), "text"], limits={"speech": 8, "text": 6}
        )
        assert np.array_equal(row[0].content.samples, alone[0].content.samples)
        assert row[1].content == alone[1].content
        assert [s.ended for s in row] == [s.ended for s in alone]


def test_what_is_drawn_depends_on_the_seed(pipe: Pipeline) -> None:
    def draw(seed: int) -> str:
        return str(
            pipe.run(
                [Segment("text", "call")], ["text"], Sampling(1.0, seed=seed), limits={"text": 12}
            )[0].content
        )

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


# --- saving


@pytest.mark.parametrize(
    "outputs",
    [["text"], ["speech", "text"], ["text@2 + speech"]],
    ids=" ".join,
)
def test_the_score_of_what_was_produced_is_its_own(
    pipe: Pipeline, outputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, begun = Zipper.unembed, {name: ends.begin for name, ends in pipe.model.ends().items()}

    def trained(model: Zipper, tower: str, hidden: Tensor) -> Tensor:
        """As one that has learnt that no segment begins within one."""
        return heads(model, tower, hidden).index_fill(2, torch.tensor(begun[tower]), -99.0)

    monkeypatch.setattr(Zipper, "unembed", trained)
    given, limits = [Segment("speech", [3, 4, 5])], dict.fromkeys(begun, 24)
    made = [
        pipe.model.generate(given, outputs, Sampling(temperature=2.0, seed=n), limits)
        for n in range(12)
    ]
    ended = [each for each in made if all(segment.ended for segment in each)]
    assert len({len(each[0].content) for each in ended}) > 1
    wanted = [sum(segment.score for segment in each) for each in ended]
    assert pipe.score(given, ended) == pytest.approx(wanted, abs=1e-3)


def test_answers_are_scored_alike_in_any_company_and_while_a_model_learns(
    pipe: Pipeline, clip: Path
) -> None:
    words = ["call", "call anna", "send forty two oranges", ""]
    answers = [Segment("text", word) for word in words]
    found = pipe.score([Segment("speech", clip)], answers)
    alone = [pipe.score([Segment("speech", clip)], [answer])[0] for answer in answers]
    assert found == pytest.approx(alone, abs=1e-4)
    assert found[2] < found[0] < 0
    pipe.model.train()
    assert pipe.score([Segment("speech", clip)], answers) == pytest.approx(found, abs=1e-4)
    assert pipe.model.training
    pipe.model.eval()
    assert pipe.score([Segment("speech", clip)], []) == []
    with pytest.raises(ZipperError, match="holds the id 9999"):
        pipe.score([Segment("text", "call")], [Segment("speech", [9999])])


def test_nothing_is_dropped_in_a_score_while_a_model_learns() -> None:
    towers = {name: tiny_tower("llama") for name in ("text", "speech")}
    link = LinkConfig(head_width=8, dropout=0.9, gate_init=1.0)
    model = Zipper.from_towers(towers, link=link, ends=dict.fromkeys(towers, (1, 2))).train()
    sample = [Segment("speech", [3, 4]), Target("text", [5, 6])]
    learning = [one for (one,) in scores(model, [sample] * 20)]
    ((alone,),) = scores(model.eval(), [sample])
    assert learning == pytest.approx([alone] * 20)


def test_what_is_given_has_no_score(pipe: Pipeline) -> None:
    given = [Segment("speech", [3, 4]), Target("text", [5, 6], 0.0)]
    (whole,) = scores(pipe.model, [[*given, Target("text", [7])]])
    (alone,) = scores(pipe.model, [[*given[:1], Segment("text", [5, 6]), Target("text", [7])]])
    assert len(whole) == 1 and whole == pytest.approx(alone)


def test_of_several_takes_the_one_is_kept_that_tells_best_what_was_given(pipe: Pipeline) -> None:
    given, how = [Segment("text", "call anna")], Sampling(temperature=2.0, seed=3)
    prompt = pipe._prompt(given)
    assert prompt is not None
    made = pipe.generate([prompt] * 5, ["speech"], how)
    told = [pipe.score(one, prompt)[0] for one in made]
    best = told.index(max(told))
    assert len({tuple(one[0].content) for one in made}) == 5
    kept = pipe.run(given, ["speech"], how, takes=5)[0]
    assert kept.score == made[best][0].score
    said = pipe.speak("call anna", sampling=how, takes=5)
    assert np.array_equal(said.samples, tiny.units().decode(made[best][0].content).samples)
    silence = Segment("speech", Audio(np.zeros(8_000, np.float32), 16_000))
    assert pipe.run([silence], ["text"], how, takes=5)[0].content == ""
    for takes, sampling in ((0, how), (2, None), (2, Sampling())):
        with pytest.raises(ZipperError, match=rf"{takes} takes were asked for. Give 1 or more"):
            pipe.run(given, ["speech"], sampling, takes=takes)


def test_saved_and_loaded_it_does_the_same(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again", include=["text"], record={"steps": 3})
    again = Pipeline.from_pretrained(tmp_path / "again")
    assert again.transcribe(clip) == pipe.transcribe(clip)
    assert {name: m.fingerprint for name, m in again.modalities.items()} == {
        name: m.fingerprint for name, m in pipe.modalities.items()
    }
    assert checkpoint.load(tmp_path / "again")[1] == {"steps": 3}
    half: Any
    for half in (torch.bfloat16, "bfloat16"):
        loaded = Pipeline.from_pretrained(tmp_path / "again", dtype=half).model
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for odd in ("bfloat17", "Tensor", torch.int8):
        for kind in (Pipeline, Zipper):
            with pytest.raises(ZipperError, match=r"dtype is .*; torch\.float32, torch"):
                kind.from_pretrained(tmp_path / "again", dtype=odd)
        with pytest.raises(ZipperError, match=r"dtype is .*; torch\.float32, torch"):
            Tower.load(pipe.zip.tower("text"), odd)
    assert Tower.load(pipe.zip.tower("text"), "float32").dtype == "float32"


@pytest.mark.parametrize("name", ["text", "speech"])
def test_a_foreign_tokenizer_or_codebook_is_refused(
    world: World, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(world.zip, tmp_path / "copy"))
    shutil.rmtree(folder / "modalities" / name)
    {"text": tiny.text(merges=11), "speech": tiny.units(seed=1)}[name].save(
        folder / "modalities" / name
    )
    with pytest.raises(ZipperError, match=rf"modalities/{name}/\S+ is damaged"):
        Pipeline.from_pretrained(folder)
    checkpoint.seal(folder)  # put in on purpose, with the right hashes
    with pytest.raises(
        ZipperError,
        match=rf"modalities/{name} is not what this model was trained with: its hash is \w+, the "
        r"model wants",
    ):
        Pipeline.from_pretrained(folder)
    with pytest.warns(UserWarning, match=rf"modalities/{name} is not what .* It was allowed"):
        Pipeline.from_pretrained(folder, allow_mismatch=True)


def test_a_foreign_base_may_be_allowed_and_is_pinned_from_then_on(
    world: World, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    tiny.tower(tiny.text()).model.save_pretrained(tmp_path / "foreign")
    with pytest.warns(UserWarning, match=r"'text' from .*foreign is not the one .* It was allowed"):
        pipe = Pipeline.from_pretrained(
            world.zip, towers={"text": tmp_path / "foreign"}, allow_mismatch=True
        )
    pin = pipe.model.config.towers["text"]
    assert pin.digest == Tower.load(tmp_path / "foreign").pin() and pin.source == str(
        tmp_path / "foreign"
    )
    pipe.save_pretrained(tmp_path / "zip")
    Pipeline.from_pretrained(tmp_path / "zip")


def test_a_model_saved_without_modalities_is_no_pipeline(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        ZipperError,
        match=r"bare holds a model without modalities. Load it with Zipper.from_pretrained",
    ):
        Pipeline.from_pretrained(tmp_path / "bare")


def test_modalities_must_be_those_of_the_towers(pipe: Pipeline) -> None:
    both = pipe.modalities
    for modalities, message in [
        (
            {"text": both["text"]},
            r"The model has the towers \['speech', 'text'\], the modalities given are \['text'\]",
        ),
        (
            {**both, "image": both["text"]},
            r"the modalities given are \['image', 'speech', 'text'\]",
        ),
        (
            {**both, "text": tiny.text(merges=30)},
            r"The modality 'text' makes \d+ ids, its tower knows 42",
        ),
        (
            {"text": both["text"], "speech": both["text"]},
            r"'speech' makes 42 ids, its tower knows 28",
        ),
    ]:
        with pytest.raises(ZipperError, match=message):
            Pipeline(pipe.model, modalities)
    # Fits in, but its ids mean other things.
    smaller = type(tiny.units())(tiny.units().codebook[:20], tiny.units().config)
    with pytest.raises(
        ZipperError,
        match=r"'speech' begins and ends with 20 and 21, one of its tower with 24 and 25",
    ):
        Pipeline(pipe.model, {**both, "speech": smaller})


# --- what it refuses


def test_bad_input_is_refused_in_a_sentence(pipe: Pipeline, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "words.wav").write_text("these are words")
    for call, message in [
        (
            lambda: pipe.run([Segment("video", "x")], ["text"]),
            r"no modality 'video'; it has \['speech', 'text'\]",
        ),
        (
            lambda: pipe.run([Segment("text", "call")], ["video"]),
            r"no tower 'video'; it has \['speech', 'text'\]",
        ),
        (
            lambda: pipe.run([Segment("text", "call")], [Segment("video", [1])]),
            r"no modality 'video'",
        ),
        (lambda: pipe.run([Segment("text", "call")], []), r"it needs at least one of each"),
        (
            lambda: pipe.run([Segment("text", [1, 99])], ["speech"]),
            r"'text' holds the id 99; its ids go from 0 to 41",
        ),
        (
            lambda: pipe.run([Segment("text", "call " * 100)], ["speech"]),
            r"'text' would read \d+ tokens.*at most 128",
        ),
        (lambda: pipe.transcribe(tmp_path / "gone.wav"), r"gone.wav does not exist"),
        (lambda: pipe.transcribe(tmp_path / "words.wav"), r"words.wav is not readable sound"),
        (
            lambda: pipe.transcribe(tiny.sound(tmp_path / "long.wav", seconds=20)),
            r"'speech' would read 503 tokens.*at most 128",
        ),
        (
            lambda: pipe.transcribe(b"these are words"),
            r"\(sound given as bytes\) is not readable sound",
        ),
        (lambda: pipe.transcribe(Audio([], 16_000)), r"The sound given has no samples"),
        (lambda: pipe.speak("call anna", voice="alto"), r"no voice 'alto'. Take one of low, high"),
        (lambda: pipe.speak("call 42"), r"cannot write 2 4"),
    ]:
        with pytest.raises(ZipperError, match=message):
            call()


def test_a_tower_named_otherwise_has_no_voices(world: World) -> None:
    towers = {name: world.folder / name / "tower" for name in ("text", "speech")}
    model = Zipper.from_towers({"letters": towers["text"], "speech": towers["text"]})
    pipe = Pipeline(model, {"letters": tiny.text(), "speech": tiny.text()})
    with pytest.raises(ZipperError, match=r"'speech' of this model is not made of units"):
        pipe.speak("call", voice="low")
    with pytest.raises(ZipperError, match=r"no tower 'text'"):
        pipe.run([Segment("letters", "call")], ["text"])


@torch.no_grad()
def test_weights_that_change_places_are_laid_out_anew(pipe: Pipeline) -> None:
    own = copy.deepcopy(pipe.zip)
    mine = Pipeline(own, pipe.modalities)
    first = mine.engine().reader
    weight = max(own.towers["speech"].parameters(), key=lambda p: p.numel())
    weight.copy_(weight.flip(0).clone())
    assert mine.engine().reader is not first is not mine.engine().reader


@pytest.mark.parametrize("what", ["pipeline", "zip", "text", "speech"])
def test_home_is_home_where_a_model_is_saved_too(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"pipeline": pipe, "zip": pipe.zip, **pipe.modalities}
    save = given[what].save_pretrained if what in ("pipeline", "zip") else given[what].save
    save("~/mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_name_too_long_for_any_file_is_an_error_like_another() -> None:
    for load in (Pipeline.from_pretrained, Text.from_pretrained, audio.read):
        with pytest.raises(ZipperError):
            load(f"./{'x' * 300}.wav")


def test_what_a_row_draws_does_not_hang_on_silence_before_it(pipe: Pipeline) -> None:
    speech, silence = [Segment("text", "call anna")], [Segment("text", " ")]
    how = Sampling(2.0, seed=5)
    behind = pipe.run_batch([speech, speech], ["text"], how, {"text": 12})[1]
    assert pipe.run_batch([silence, speech], ["text"], how, {"text": 12})[1] == behind
