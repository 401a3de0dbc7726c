"""When words were said: times from the cross-attention of the shipped model beside those that the
synthesiser knows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from zipper.modality.text import Text
from zipper.pipeline import Pipeline
from zipper.strand import Segment
from zipper_lab.corpora import commands


def test_the_synthesiser_says_when_each_word_begins() -> None:
    (utterance,) = commands.sentences("dev", 1)
    audio, starts = commands.timed(utterance)
    assert np.array_equal(audio.samples, commands.synthesize(utterance).samples)
    assert len(starts) == len(utterance.text.split()) and starts == sorted(starts)
    assert 0 <= starts[0] < 0.1 and starts[-1] < audio.seconds


@pytest.mark.slow
def test_words_of_the_shipped_model_begin_where_they_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On sentences that are heard without an error; docs/serving.md says how far off they are."""
    pytest.importorskip("fastapi")
    from zipper.serving.looking import clock, looks, timed

    pipe = Pipeline.from_pretrained()
    text, units = pipe.modalities["text"], pipe.units
    off, by_letters = list[float](), list[float]()
    heard = 0
    for utterance in commands.sentences("test", 300):
        audio, starts = commands.timed(utterance)
        request = pipe.asked([Segment("speech", audio)], ["text"])
        assert request is not None and isinstance(text, Text)
        (answer,) = pipe.engine(1).run([request])
        (written,) = answer.written
        same = text.decode(written.ids) == utterance.text
        if not same or len(starts) != len(utterance.text.split()):
            continue  # eSpeak says some words as one, "at one"
        heard += 1
        (look,) = looks(pipe.model, request, answer.written)
        clocks = [clock(units, audio, len(request.segments[0].content))]
        blind = replace(look, weights=torch.ones_like(look.weights))
        for found, seen in ((off, look), (by_letters, blind)):
            told = timed(text, written, [seen], 1, clocks)
            found += [abs(word["start"] - start) for word, start in zip(told, starts, strict=True)]
    quantiles = {
        name: np.quantile(some, (0.5, 0.9)).round(3).tolist()
        for name, some in (("looks", off), ("letters", by_letters))
    }
    with capsys.disabled():
        print(f"{heard} sentences, {len(off)} words, starts off by (median, 90 %): {quantiles}")
    assert heard > 250
    assert quantiles["looks"][0] < 0.06 and quantiles["looks"][1] < 0.18
    assert quantiles["looks"][0] < quantiles["letters"][0]
