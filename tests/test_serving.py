"""The server against the offline pipeline: what a client gets, among others and in whatever shape,
is what `Pipeline` answers; what a stranger sends costs nothing and opens nothing."""

import asyncio
import base64
import io
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx2", reason="the tests ask over httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("websockets", reason="the extra `serve` is not installed")

import many
import tiny
from PIL import Image
from tiny import sound

from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.generation import Engine, Request, Token
from zipper.inspection import attention
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.serving import app, looking, page, process, sounds, transcription
from zipper.serving import worker as worker_module
from zipper.serving.bodies import Caps
from zipper.serving.gauges import Gauges
from zipper.serving.looking import looks
from zipper.serving.refusals import Busy, Refused, Stopping
from zipper.serving.service import Service
from zipper.serving.worker import Ticket, Worker
from zipper.strand import Segment, collate

SENTENCE = "send forty two oranges to vienna"
JSON = {"content-type": "application/json"}


class Served:
    """A server that runs, and how to ask it."""

    def __init__(self, guard: app.Guard, port: int) -> None:
        self.guard, self.worker, self.port = guard, guard.service.worker, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **sent: Any) -> Any:
        return self.client.post(path, **sent)

    def transcribe(self, content: bytes, **fields: str) -> Any:
        return self.post("/v1/audio/transcriptions", files={"file": ("a", content)}, data=fields)

    def said(self, text: str, form: str, **more: Any) -> Any:
        wanted = {"model": "m", "input": text, "voice": "default", "response_format": form}
        return self.post("/v1/audio/speech", json=wanted | more)

    def idle(self) -> None:
        """Waits until nothing runs."""
        until = time.monotonic() + 20
        while self.worker.load != (0, 0):
            assert time.monotonic() < until, self.worker.load
            time.sleep(0.005)


@contextmanager
def serving(pipe: Pipeline, **options: Any) -> Iterator[Served]:
    """A server on a free port."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    guard = app.serve(pipe, **options)
    server = process.server(guard, port=port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    served = Served(guard, port)
    try:
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(20.0)
        guard.service.worker.stop()
        assert guard.service.worker.join(20.0), "a request never ended"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def spoken(pipe: Pipeline) -> bytes:
    """A sentence as a wav file."""
    return sounds.content(pipe.speak(SENTENCE), "wav")


@pytest.fixture(scope="module")
def served(pipe: Pipeline) -> Iterator[Served]:
    with serving(pipe, name="mine") as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_runs_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, no row stays taken."""
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").idle()


def is_refused(answer: Any, status: int, code: str = "") -> None:
    """An error in the clients' shape."""
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "code", "param"} and error["message"]
    assert not code or error["code"] == code
    assert "Traceback" not in answer.text


def events(answer: Any) -> list[Any]:
    """What server-sent events hold, but for the end."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- answers


def test_a_transcription_is_what_the_pipeline_hears(
    served: Served, pipe: Pipeline, spoken: bytes
) -> None:
    heard = pipe.hear(spoken)
    assert served.transcribe(spoken).json() == {"text": heard.text}
    assert served.transcribe(spoken, response_format="text").text == f"{heard.text}\n"
    told = served.transcribe(spoken, response_format="verbose_json").json()
    assert (told["text"], told["duration"]) == (heard.text, pytest.approx(1.88, abs=0.1))
    assert told["confidence"] == pytest.approx(heard.confidence, rel=1e-5)
    assert [word["word"] for word in told["words"]] == heard.text.split()
    assert all(0 < word["confidence"] <= 1 for word in told["words"])
    times = [word["start"] for word in told["words"]]
    assert times == sorted(times) and 0.0 <= times[0] < 0.2 and told["words"][-1]["end"] < 2.0
    assert (told["segments"][0]["start"], told["segments"][0]["text"]) == (times[0], heard.text)
    srt = served.transcribe(spoken, response_format="srt").text
    assert srt.startswith("1\n00:00:00,") and " --> 00:00:01," in srt and heard.text in srt
    vtt = served.transcribe(spoken, response_format="vtt").text
    assert vtt.startswith("WEBVTT\n\n00:00:00.") and heard.text in vtt


def test_a_streamed_transcription_is_the_same_in_parts(served: Served, spoken: bytes) -> None:
    *parts, done = events(served.transcribe(spoken, stream="true"))
    assert len(parts) > 3 and {part["type"] for part in parts} == {"transcript.text.delta"}
    assert "".join(part["delta"] for part in parts) == done["text"] == SENTENCE
    assert done["type"] == "transcript.text.done"


def test_words_behind_a_pause_are_told_when_they_are_heard(served: Served, spoken: bytes) -> None:
    heard = audio.read(spoken)
    late = Audio(np.pad(heard.samples, (heard.rate_hz, 0)), heard.rate_hz)
    plain, later = (
        served.transcribe(content, response_format="verbose_json").json()["words"]
        for content in (spoken, sounds.content(late, "wav"))
    )
    assert [word["word"] for word in later] == [word["word"] for word in plain]
    moved = [after["start"] - before["start"] for after, before in zip(later, plain, strict=True)]
    assert moved == pytest.approx([1.0] * len(plain), abs=0.1)


def test_where_nothing_is_said_the_text_is_empty(served: Served) -> None:
    silence = sounds.content(Audio(np.zeros(16_000, np.float32), 16_000), "wav")
    assert served.transcribe(silence).json() == {"text": ""}
    assert served.transcribe(silence, response_format="verbose_json").json()["words"] == []
    assert events(served.transcribe(silence, stream="true"))[-1]["text"] == ""


def test_speech_is_what_the_pipeline_says(served: Served, pipe: Pipeline) -> None:
    there = sounds.formats()
    assert {"wav", "flac", "pcm"} <= set(there)
    for voice in ("default", pipe.units.voices[1]):
        offline = pipe.speak(SENTENCE, None if voice == "default" else voice)
        for form in set(there) - {"wav", "pcm"}:
            answer = served.said(SENTENCE, form, voice=voice)
            assert answer.content == sounds.content(offline, form) or form == "opus"  # a serial
            assert answer.headers["content-type"] == sounds.media(form, offline.rate_hz)
        output = pipe.voice(None if voice == "default" else voice)
        asked = pipe.asked([Segment("text", SENTENCE)], [output])
        assert asked is not None
        ((ids, *_),) = [pipe.generate([asked.segments], asked.outputs, Sampling())[0]]
        streamed = b"".join(map(sounds.pcm, pipe.units.stream(ids.content)))
        assert served.said(SENTENCE, "pcm", voice=voice).content == streamed
        wav = served.said(SENTENCE, "wav", voice=voice).content
        assert wav == sounds.header(offline.rate_hz) + streamed
        assert pipe.transcribe(wav) == SENTENCE, "zipper reads a wav whose length is unknown"


def test_speech_is_drawn_by_its_seed(served: Served) -> None:
    one, again, other = (
        served.said("call anna", "pcm", temperature=1.0, seed=seed).content for seed in (1, 1, 2)
    )
    assert one == again != other


def test_speech_is_mp3_unless_another_format_is_asked_for(served: Served) -> None:
    answer = served.post("/v1/audio/speech", json={"input": "call anna"})
    assert answer.headers["content-type"] == "audio/mpeg"
    raw = served.said("call anna", "pcm")
    assert raw.headers["content-type"] == "audio/pcm;rate=16000;channels=1"


def test_the_head_of_a_streamed_wav_is_that_of_a_whole_one_but_for_lengths() -> None:
    whole = sounds.content(Audio(np.full(8, 0.5, np.float32), 22_050), "wav")
    head = sounds.header(22_050)
    assert (head[:4], head[8:40]) == (whole[:4], whole[8:40])
    assert head[4:8] == head[40:] == b"\xff" * 4


def test_samples_beyond_one_are_cut_in_a_stream_and_scaled_in_a_file() -> None:
    sound = Audio(np.array([1, -1, 4, -4, 0.5] * 100, np.float32), 16_000)
    raw = np.frombuffer(sounds.pcm(sound), "<i2")[:5].tolist()
    assert raw == [32_767, -32_767, 32_767, -32_767, 16_384]
    scaled = audio.read(sounds.content(sound, "flac")).samples[:5]
    assert scaled == pytest.approx([0.25, -0.25, 1, -1, 0.125], abs=1e-4)


def test_sound_comes_while_it_is_made(served: Served) -> None:
    wanted = {"input": SENTENCE, "voice": "default", "response_format": "pcm"}
    with served.client.stream("POST", "/v1/audio/speech", json=wanted) as answer:
        parts = [len(part) for part in answer.iter_raw()]
    assert len(parts) > 2


def test_run_is_what_the_pipeline_runs(served: Served, pipe: Pipeline, spoken: bytes) -> None:
    content = base64.b64encode(spoken).decode()
    given = [{"tower": "speech", "content": content}]
    answer = served.post("/v1/run", json={"given": given, "outputs": ["text"]}).json()
    ((offline,),) = [pipe.run([Segment("speech", spoken)], ["text"])]
    (made,) = answer["produced"]
    assert (made["content"], made["ended"]) == (offline.content, offline.ended)
    assert made["score"] == pytest.approx(offline.score, rel=1e-5) and answer["model"] == "mine"
    how = {"temperature": 0.8, "top_k": 20}
    wanted = {
        "given": [{"tower": "text", "content": SENTENCE}],
        "outputs": ["speech", {"tower": "text", "content": []}],
        "sampling": how,
        "limits": {"speech": 30, "text": 5},
        "seed": 3,
    }
    said, text = served.post("/v1/run", json=wanted).json()["produced"]
    sampling, limits = Sampling(0.8, 20, seed=3), {"speech": 30, "text": 5}
    first, second = pipe.run([Segment("text", SENTENCE)], ["speech", "text"], sampling, limits)
    assert (text["content"], text["ended"]) == (second.content, second.ended)
    assert said["media_type"] == "audio/wav" and len(said["ids"]) <= 30
    with wave.open(io.BytesIO(base64.b64decode(said["content"]))) as file:
        assert file.getnframes() == len(first.content.samples)
    ids = [{"tower": "text", "content": pipe.modalities["text"].encode("call anna")}]
    assert served.post("/v1/run", json={"given": ids, "outputs": ["speech"]}).status_code == 200


def test_ids_are_given_and_begun_with_as_they_are(served: Served, pipe: Pipeline) -> None:
    ids = pipe.modalities["text"].encode("call anna")
    text = {"tower": "text", "content": ids}
    wanted = {"given": [text], "outputs": [text], "limits": {"text": 20}, "explain": True}
    told = served.post("/v1/run", json=wanted).json()
    assert told["produced"][0]["ids"][: len(ids)] == ids
    assert told["produced"][0]["content"].startswith("call anna") and told["clocks"] == [None]


def test_json_is_known_by_its_type_whatever_stands_behind_it(served: Served) -> None:
    content = json.dumps({"outputs": ["text"], "limits": {"text": 1}}).encode()
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        answer = served.post("/v1/run", content=content, headers={"content-type": kind})
        assert answer.status_code == 200


def test_a_choice_is_the_model_s_and_one_that_has_learnt_none_says_so(served: Served) -> None:
    given = [{"tower": "text", "content": "call anna"}]
    wanted = {"given": given, "limits": {"speech": 20, "text": 5}}
    for plan in "*", "text|speech":
        is_refused(served.post("/v1/run", json=wanted | {"outputs": [plan]}), 422)
    chooses = Pipeline.from_pretrained()
    chooses.zip.choose(["speech", "text"])
    for chooser in chooses.zip.choosers.values():  # never over before there are as many as may be
        chooser.out.bias.data[-1] = -100  # type: ignore[union-attr, index]
    alone = chooses.run([Segment("text", "call anna")], ["*"], limits=wanted["limits"])
    assert len(alone) == 8
    with serving(chooses) as other:
        for plan in "*", "text|speech":
            asked = wanted | {"outputs": [plan]}
            produced = other.post("/v1/run", json=asked).json()["produced"]
            assert [one["tower"] for one in produced] == [one.tower for one in alone]
            asked |= {"stream": True, "explain": True}
            *parts, done = events(other.post("/v1/run", json=asked))
            assert {one["segment"] for one in parts} <= {*range(8)} and len(done["labels"]) == 9
            assert {look["target"] for look in done["looks"]} >= {8}  # of the last one, too


def test_a_streamed_run_is_the_same_in_parts_and_says_what_it_looked_at(
    served: Served, pipe: Pipeline
) -> None:
    wanted = {
        "given": [{"tower": "text", "content": SENTENCE}],
        "outputs": ["text@2 + speech", "text"],
        "limits": {"text": 6, "speech": 30},
        # No pair taught the model text behind text: drawn, for the likeliest is to say nothing.
        "sampling": {"temperature": 6.0},
        "seed": 4,
        "explain": True,
    }
    whole = served.post("/v1/run", json=wanted).json()
    *parts, done = events(served.post("/v1/run", json=wanted | {"stream": True}))
    assert done == {"type": "done", **whole}
    told = [part["segment"] for part in parts]
    assert set(told) == {0, 1, 2} and told.count(1) > 1, "each as it is ready"
    for number, made in enumerate(whole["produced"]):
        pieces = [part["content"] for part in parts if part["segment"] == number]
        if made["tower"] == "text":
            assert "".join(pieces) == made["content"]
        else:
            samples = b"".join(map(base64.b64decode, pieces))
            assert len(samples) == 2 * round(made["seconds"] * pipe.units.config.mel.rate_hz)
    assert whole["labels"][0] is not None and "".join(whole["labels"][0]).split()[0] == "send"
    pairs = {(look["source"], look["target"]) for look in whole["looks"]}
    assert pairs == {(0, 2), (1, 2), (2, 1), (2, 3)}, "lanes saw each other"
    for look in whole["looks"]:
        weights = np.frombuffer(base64.b64decode(look["weights"]), "<u2").reshape(look["shape"])
        assert look["shape"][0] == len(whole["produced"][look["target"] - 1]["ids"])
        assert 0 < weights.sum(1).max() <= 65_535 * 1.01
    assert whole["clocks"] == [None]


def test_a_look_is_what_the_model_looked_at(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against attention over the two segments alone, as `words.spans` has it."""
    given = [Segment("text", pipe.modalities["text"].encode("call anna"))]
    (answer,) = pipe.engine().run([Request(given, ["speech", "text"])])
    found = looks(pipe.model, answer.request, answer.written)
    assert [(look.source, look.target) for look in found] == [(0, 1), (1, 2)]
    strands = collate([[given[0], answer.segments()[0]]], pipe.model.ends()).strands
    alone = attention(pipe.model, strands, "text", "speech")[: len(answer.written[0].ids), 1:-1]
    assert torch.allclose(found[0].weights, alone, atol=1e-6)
    assert looks(object(), answer.request, answer.written) == []
    monkeypatch.setattr(looking, "MOST_CELLS", 100)
    assert looks(pipe.model, answer.request, answer.written) == []


def test_the_page_names_no_other_place_and_tells_what_is_frozen(
    served: Served, pipe: Pipeline
) -> None:
    for route, name in page.FILES.items():
        answer = served.client.get(route)
        assert answer.status_code == 200 and answer.content == (page.HERE / name).read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(rb"(https?:)?//[a-z]+\.", answer.content), "a place elsewhere"
    told = served.client.get("/v1/models/mine").json()
    frozen = told["towers"]["text"]
    assert not frozen["trained"] and frozen["digest_now"] == frozen["digest"]
    assert frozen["digest"] == pipe.model.config.towers["text"].digest
    assert told["towers"]["speech"]["digest_now"] is None and len(told["links"]) == 6
    assert not re.search(r'"[^"]*/(site|src|tmp|home)/', json.dumps(told)), (
        "a place on this machine"
    )
    is_refused(served.client.get("/v1/models/other"), 404, "no_such_model")
    headers = served.client.get("/").headers
    told = (headers["x-content-type-options"], headers["referrer-policy"])
    assert told == ("nosniff", "no-referrer")


def test_chat_takes_sound_and_text_and_gives_both(served: Served, spoken: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(spoken).decode()}}
    heard = {"messages": [{"role": "user", "content": [part]}]}
    answer = served.post("/v1/chat/completions", json=heard).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SENTENCE, "stop")
    assert answer["usage"]["completion_tokens"] > 5 and answer["object"] == "chat.completion"
    plain = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    plain |= {"presence_penalty": 0, "repetition_penalty": 1.0, "user": "me"}
    again = served.post("/v1/chat/completions", json=heard | plain).json()
    assert again["choices"] == answer["choices"]
    few = served.post("/v1/chat/completions", json=heard | {"max_tokens": 2}).json()
    assert few["choices"][0]["finish_reason"] == "length"
    chunks = events(served.post("/v1/chat/completions", json=heard | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == SENTENCE and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    said = {
        "messages": [{"role": "user", "content": SENTENCE}],
        "modalities": ["audio"],
        "audio": {"voice": "default", "format": "wav"},
    }
    message = served.post("/v1/chat/completions", json=said).json()["choices"][0]["message"]
    assert message["content"] is None
    assert served.transcribe(base64.b64decode(message["audio"]["data"])).json()["text"] == SENTENCE


def test_a_chat_tells_its_text_beside_its_sound_whatever_comes_first(
    served: Served, spoken: bytes
) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(spoken).decode()}}
    wanted = {"messages": [{"role": "user", "content": [part]}], "audio": {"format": "pcm16"}}
    wanted |= {"modalities": ["audio", "text"]}
    whole = served.post("/v1/chat/completions", json=wanted).json()
    (choice,), usage = whole["choices"], whole["usage"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "stop"
    assert choice["message"]["audio"]["transcript"] == SENTENCE
    assert usage["prompt_tokens"] > 10 and usage["completion_tokens"] > 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    chunks = events(served.post("/v1/chat/completions", json=wanted | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    said = [delta["audio"].get("transcript", "") for delta in deltas if "audio" in delta]
    assert "".join(said) == SENTENCE
    few = served.post("/v1/chat/completions", json=wanted | {"max_completion_tokens": 2}).json()
    assert few["choices"][0]["finish_reason"] == "length", "only the sound is whole"
    assert 0 < len(few["choices"][0]["message"]["audio"]["transcript"]) < len(SENTENCE)


def test_a_chat_is_drawn_from_no_more_than_top_p(served: Served, spoken: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(spoken).decode()}}
    wanted = {"messages": [{"role": "user", "content": [part]}], "temperature": 9.0, "seed": 1}
    told = [
        served.post("/v1/chat/completions", json=wanted | {"top_p": top_p}).json()["choices"][0]
        for top_p in (1e-6, 1.0)
    ]
    assert told[0]["message"]["content"] == SENTENCE != told[1]["message"]["content"]


def test_what_no_chat_can_do_is_refused_by_its_name(served: Served) -> None:
    sent = {"messages": [{"role": "user", "content": "call anna"}]}
    names = (
        "tools functions logit_bias presence_penalty frequency_penalty min_p limits prediction "
        "tool_choice function_call response_format repetition_penalty guidance best_of top_k"
    )
    for name in names.split():
        answer = served.post("/v1/chat/completions", json=sent | {name: [3]})
        is_refused(answer, 400, "unsupported")
        assert name in answer.json()["error"]["message"]
    for wrong in ({}, {"logprobs": True, "temperature": 1.0}):
        asked = sent | {"top_logprobs": 1} | wrong
        is_refused(served.post("/v1/chat/completions", json=asked), 400, "unsupported")


def test_what_goes_wrong_in_a_stream_is_told_in_it(
    pipe: Pipeline, spoken: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, count()
    monkeypatch.setattr(Engine, "step", lambda self: step(self) if next(steps) % 6 < 5 else 1 / 0)
    coded = base64.b64encode(spoken).decode()
    part = {"type": "input_audio", "input_audio": {"data": coded}}
    chat = {"messages": [{"role": "user", "content": [part]}], "stream": True}
    run = {"given": [{"tower": "speech", "content": coded}], "outputs": ["text"], "stream": True}
    with serving(pipe) as broken:
        for answer in (
            broken.transcribe(spoken, stream="true"),
            broken.post("/v1/chat/completions", json=chat),
            broken.post("/v1/run", json=run),
        ):
            *parts, last = events(answer)
            assert answer.status_code == 200 and parts
            assert last["error"]["code"] == "internal"


def test_a_chat_ends_before_a_stop_and_none_of_it_is_sent(served: Served, spoken: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(spoken).decode()}}
    heard = {"messages": [{"role": "user", "content": [part]}], "logprobs": True}
    whole = served.post("/v1/chat/completions", json=heard).json()
    assert whole["choices"][0]["message"]["content"] == SENTENCE
    pieces = [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]
    assert len(pieces) == whole["usage"]["completion_tokens"] > 5
    assert any(stop not in pieces for stop in ("two", "nges", "o v"))  # it spans tokens
    for stop in ("two", ["nges", "never"], "o v", ["send", "two"], "zebra", "vienna"):
        stops = [stop] if isinstance(stop, str) else stop
        ends = [SENTENCE.find(one) for one in stops if one in SENTENCE]
        wanted = SENTENCE[: min(ends, default=len(SENTENCE))]
        (choice,) = served.post("/v1/chat/completions", json=heard | {"stop": stop}).json()[
            "choices"
        ]
        assert (choice["message"]["content"], choice["finish_reason"]) == (wanted, "stop")
        told = choice["logprobs"]["content"]
        assert told == whole["choices"][0]["logprobs"]["content"][: len(told)]
        chunks = events(
            served.post("/v1/chat/completions", json=heard | {"stop": stop, "stream": True})
        )
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(deltas) == wanted
        last = chunks[-1]["choices"][0]
        assert (last["finish_reason"], last["logprobs"]["content"]) == ("stop", told)
    best = served.post("/v1/chat/completions", json=heard | {"top_logprobs": 1}).json()
    for entry in best["choices"][0]["logprobs"]["content"]:
        (top,) = entry.pop("top_logprobs")
        assert top == entry and entry["logprob"] <= 0
    for wrong in (
        {"top_logprobs": 2},
        {"stop": ["a"] * 5},
        {"stop": ""},
        {"stop": "a", "modalities": ["audio"]},
    ):
        is_refused(served.post("/v1/chat/completions", json=heard | wrong), 400, "unsupported")


def test_the_offline_log_probabilities_are_those_of_a_chat(
    served: Served, pipe: Pipeline, spoken: bytes
) -> None:
    part = {
        "type": "segment",
        "segment": {"tower": "speech", "content": base64.b64encode(spoken).decode()},
    }
    heard = {"messages": [{"role": "user", "content": [part]}], "logprobs": True}
    told = served.post("/v1/chat/completions", json=heard).json()["choices"][0]["logprobs"][
        "content"
    ]
    (answer,) = pipe.engine(1).run([pipe.asked([Segment("speech", spoken)], ["text"])])
    offline = answer.written[0].logprobs[: len(told)]
    assert [entry["logprob"] for entry in told] == pytest.approx(offline, abs=1e-4)


def test_a_chat_gives_what_has_no_place_in_a_message_as_segments(
    served: Served, pipe: Pipeline
) -> None:
    sent = {"messages": [{"role": "user", "content": "call anna"}], "max_tokens": 5}
    wanted = sent | {"modalities": ["text@2 + speech"]}
    message = served.post("/v1/chat/completions", json=wanted).json()["choices"][0]["message"]
    run = {"given": [{"tower": "text", "content": "call anna"}], "outputs": ["text@2 + speech"]}
    produced = served.post("/v1/run", json=run | {"limits": {"text": 5}}).json()["produced"]
    assert message["segments"] == produced and message["content"] is None
    chunks = events(served.post("/v1/chat/completions", json=wanted | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"].get("segments", []) for chunk in chunks]
    text = [one["content"] for (one,) in filter(None, deltas) if one["tower"] == "text"]
    assert "".join(text) == produced[0]["content"]
    twice = served.post("/v1/chat/completions", json=sent | {"modalities": ["text", "text"]}).json()
    assert len(twice["choices"][0]["message"]["segments"]) == 2
    is_refused(served.post("/v1/chat/completions", json=sent | {"modalities": ["smell"]}), 422)
    for url in ("https://example.org/a.png", "file:///etc/passwd", "data:text/html;base64,AAAA"):
        part = {"type": "image_url", "image_url": {"url": url}}
        picture = {"messages": [{"role": "user", "content": [part]}]}
        is_refused(served.post("/v1/chat/completions", json=picture), 422, "bad_request")


@pytest.mark.slow
def test_a_chat_takes_and_gives_pictures_signals_and_symbols() -> None:
    several = many.pipe()
    file = io.BytesIO()
    Image.fromarray(many.pictures()[0]).save(file, "png")
    coded = base64.b64encode(file.getvalue()).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "segment", "segment": {"tower": "motion", "content": many.waves()[0]}},
        {"type": "segment", "segment": {"tower": "protein", "content": "MKTAY"}},
    ]
    given = [Segment("picture", file.getvalue()), Segment("motion", many.waves()[0])]
    given = [*given, Segment("protein", "MKTAY")]
    outputs = ["picture", "protein", "text + motion"]
    offline = several.run(given, outputs, limits={"text": 5})
    with serving(several) as served:
        message = {"messages": [{"role": "user", "content": parts}], "max_tokens": 5}
        wanted = message | {"modalities": outputs}
        answer = served.post("/v1/chat/completions", json=wanted).json()
        told = answer["choices"][0]["message"]["segments"]
        assert [one["tower"] for one in told] == [one.tower for one in offline]
        picture, protein, text, _ = (one["content"] for one in told)
        with Image.open(io.BytesIO(base64.b64decode(picture))) as made:
            np.testing.assert_array_equal(np.asarray(made), offline[0].content)
        assert (protein, text) == (offline[1].content, offline[2].content)


def test_a_chat_streams_sound(served: Served) -> None:
    sent = {"messages": [{"role": "user", "content": SENTENCE}], "modalities": ["audio"]}
    wanted = sent | {"audio": {"voice": "default", "format": "pcm16"}}
    chunks = events(served.post("/v1/chat/completions", json=wanted | {"stream": True}))
    data = [chunk["choices"][0]["delta"].get("audio", {}).get("data", "") for chunk in chunks]
    streamed = b"".join(map(base64.b64decode, data))
    assert streamed == served.said(SENTENCE, "pcm").content
    message = served.post("/v1/chat/completions", json=wanted).json()["choices"][0]["message"]
    assert len(base64.b64decode(message["audio"]["data"])) == len(streamed)


def test_a_form_of_a_run_is_the_run_with_its_files_beside_it(served: Served, spoken: bytes) -> None:
    coded = base64.b64encode(spoken).decode()
    plain = {"given": [{"tower": "speech", "content": coded}], "outputs": ["text"]}
    wanted = {"given": [{"tower": "speech", "file": "clip"}], "outputs": ["text"]}
    alone = served.post("/v1/run", json=plain).json()

    def form(asked: Any, **files: Any) -> Any:
        return served.post("/v1/run", data={"request": json.dumps(asked)}, files=files)

    assert form(wanted, clip=("/etc/passwd", spoken)).json() == alone
    streamed = events(form(wanted | {"stream": True}, clip=("a", spoken)))
    assert streamed[-1]["produced"] == alone["produced"]
    is_refused(form(wanted, other=("a", spoken)), 422, "no_file")
    is_refused(form(wanted, clip=("a", spoken), more=("b", spoken)), 422, "bad_form")
    is_refused(form(wanted | {"given": wanted["given"] * 2}, clip=("a", spoken)), 422, "no_file")
    both = {"given": [{"tower": "speech", "file": "clip", "content": coded}], "outputs": ["text"]}
    is_refused(form(both, clip=("a", spoken)), 422, "bad_request")
    is_refused(form(wanted, clip=("a", b"no sound")), 422, "unprocessable")
    text = {"given": [{"tower": "text", "file": "clip"}], "outputs": ["speech"]}
    is_refused(form(text, clip=("a", b"call anna")), 422, "bad_request")
    is_refused(served.post("/v1/run", files={"clip": ("a", spoken)}), 400, "bad_form")
    is_refused(served.post("/v1/run", json=wanted), 422, "no_file")
    many = {f"f{number}": ("a", b"x") for number in range(17)}
    is_refused(form(wanted, **many), 400, "bad_form")
    twice = [("clip", ("a", spoken)), ("clip", ("b", spoken))]
    sent = {"request": json.dumps(wanted)}
    is_refused(served.post("/v1/run", data=sent, files=twice), 400, "bad_form")


def test_what_is_told_of_the_server(served: Served) -> None:
    get = served.client.get
    assert get("/health").json() == {"status": "alive"}
    assert get("/ready").json()["status"] == "ready"
    (model,) = get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("mine", "model") and model["voices"]
    served.said(SENTENCE, "pcm")
    told = get("/metrics").text
    for line in ("zipper_rows 0.0", "zipper_queue 0.0", 'zipper_tokens_total{tower="speech"}'):
        assert line in told
    count = dict(re.findall(r"^(zipper_first_\S+_count\S*) (\S+)$", told, re.M))
    assert float(count['zipper_first_token_seconds_count{tower="speech"}']) >= 1
    assert float(count["zipper_first_sound_seconds_count"]) >= 1
    described = get("/openapi.json").json()
    assert set(described["paths"]) >= {"/v1/run", "/v1/audio/speech", "/health"}
    for path in ("/docs", "/redoc"):
        is_refused(get(path), 404, "no_such_route")


def test_what_is_counted_is_what_was_made_and_refused(served: Served) -> None:
    def counted() -> list[float]:
        told = dict(re.findall(r"^(zipper_\S+) (\S+)$", served.client.get("/metrics").text, re.M))
        names = ('zipper_tokens_total{tower="speech"}',)
        names += ('zipper_first_token_seconds_count{tower="speech"}',)
        names += ('zipper_refusals_total{code="no_such_route",status="404"}',)
        return [float(told.get(name, 0)) for name in names]

    before = counted()
    given = [{"tower": "text", "content": SENTENCE}]
    wanted = {"given": given, "outputs": ["speech"], "limits": {"speech": 20}}
    (made,) = served.post("/v1/run", json=wanted).json()["produced"]
    assert len(made["ids"]) == 20
    is_refused(served.client.get("/nowhere"), 404, "no_such_route")
    after = counted()
    assert [now - then for now, then in zip(after, before, strict=True)] == [20, 1, 1]


def test_tokens_are_counted_by_their_tower() -> None:
    gauges = Gauges()
    for tower, tokens in (("speech", 3), ("text", 2), ("speech", 1)):
        gauges.made(tower, tokens)
    told = gauges.text().decode()
    assert 'zipper_tokens_total{tower="speech"} 4.0' in told
    assert 'zipper_tokens_total{tower="text"} 2.0' in told


def test_the_official_client_unchanged(served: Served, spoken: bytes) -> None:
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    speech = client.audio.speech.create(
        model="mine", input=SENTENCE, voice="default", response_format="flac"
    )
    for file in (("a.wav", spoken), ("b.flac", speech.content)):
        heard = client.audio.transcriptions.create(model="mine", file=file)
        assert heard.text == SENTENCE
    stream = client.audio.transcriptions.create(model="mine", file=("a", spoken), stream=True)
    assert [*stream][-1].text == SENTENCE
    with client.audio.speech.with_streaming_response.create(
        model="mine", input=SENTENCE, voice="default", response_format="pcm"
    ) as streamed:
        assert sum(map(len, streamed.iter_bytes())) > 40_000
    audio = {"data": base64.b64encode(spoken).decode(), "format": "wav"}
    messages = [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]
    answer = client.chat.completions.create(model="mine", messages=messages)
    assert answer.choices[0].message.content == SENTENCE
    chunks = client.chat.completions.create(model="mine", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SENTENCE
    assert [model.id for model in client.models.list()] == ["mine"]
    with pytest.raises(openai.BadRequestError, match="no voice 'alloy'"):
        client.audio.speech.create(model="mine", input="hi", voice="alloy")


@pytest.mark.slow
def test_clients_side_by_side_share_steps_and_get_the_offline_answers(
    served: Served, pipe: Pipeline
) -> None:
    texts = ["call anna", "call peter", "turn on the lamp"] * 2
    offline = {text: sounds.content(pipe.speak(text), "flac") for text in {*texts}}
    alone = served.worker.steps
    for text in texts:
        served.said(text, "flac")
    alone = served.worker.steps - alone
    found: dict[int, bytes] = {}
    together = served.worker.steps

    def ask(number: int) -> None:
        found[number] = httpx.post(
            f"{served.url}/v1/audio/speech",
            json={"input": texts[number], "response_format": "flac"},
            timeout=60,
        ).content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = served.worker.steps - together
    assert found == {number: offline[text] for number, text in enumerate(texts)}
    assert together < alone / 2


# --- refusals


@pytest.mark.parametrize(
    ("path", "sent", "status", "code"),
    [
        ("/v1/run", {"content": b"{", "headers": JSON}, 400, "bad_json"),
        ("/v1/run", {"content": b"[" * 100_000, "headers": JSON}, 400, "bad_json"),
        ("/v1/run", {"content": b"\xff\xfe", "headers": JSON}, 400, "bad_json"),
        (
            "/v1/run",
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
            415,
            "media_type",
        ),
        ("/v1/run", {"json": {}}, 422, "bad_request"),
        ("/v1/run", {"json": {"outputs": ["smell"]}}, 422, "no_such_modality"),
        ("/v1/run", {"json": {"outputs": ["text"] * 17}}, 422, "too_many_segments"),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "given": [{"tower": "text", "content": "a"}] * 17}},
            422,
            "too_many_segments",
        ),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "limits": {"text": 10**9}}},
            422,
            "too_many_tokens",
        ),
        ("/v1/run", {"json": {"outputs": ["text"], "limits": {"text": 0}}}, 422, "unprocessable"),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "sampling": {"temperature": -1}}},
            422,
            "unprocessable",
        ),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "given": [{"tower": "text", "content": [10**9]}]}},
            422,
            "unprocessable",
        ),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "given": [{"tower": "text", "content": "a" * 20_001}]}},
            413,
            "too_long",
        ),
        (
            "/v1/run",
            {"json": {"outputs": ["text"], "given": [{"tower": "text", "content": [3] * 5000}]}},
            422,
            "",
        ),
        (
            "/v1/audio/speech",
            {"json": {"input": "hi", "voice": "alloy", "response_format": "wav"}},
            400,
            "no_such_voice",
        ),
        (
            "/v1/audio/speech",
            {"json": {"input": "hi", "response_format": "aac"}},
            400,
            "unsupported_format",
        ),
        ("/v1/audio/speech", {"json": {"input": "hi", "speed": 2.0}}, 400, "unsupported"),
        ("/v1/audio/speech", {"json": {"input": " ", "response_format": "wav"}}, 422, "empty"),
        ("/v1/audio/speech", {"json": {"input": "..."}}, 422, "empty"),
        ("/v1/audio/speech", {"json": {"input": "日本"}}, 422, "unprocessable"),
        ("/v1/run", {"json": {"outputs": ["text"], "temperature": 1}}, 422, "bad_request"),
        ("/v1/run", {"json": {"outputs": ["text"], "sampling": {"temp": 1}}}, 422, "bad_request"),
        (
            "/v1/chat/completions",
            {"json": {"messages": [{"role": "user", "content": "hi"}], "presence_penalty": 1}},
            400,
            "unsupported",
        ),
        (
            "/v1/chat/completions",
            {"json": {"messages": [{"role": "user", "content": "hi"}], "tools": [{}]}},
            400,
            "unsupported",
        ),
        (
            "/v1/chat/completions",
            {"json": {"messages": [{"role": "user", "content": "hi"}], "n": 2}},
            422,
            "bad_request",
        ),
        (
            "/v1/chat/completions",
            {"json": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}},
            422,
            "bad_request",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"chunking_strategy": "auto"}},
            400,
            "unsupported",
        ),
        ("/v1/audio/transcriptions", {"json": {}}, 415, "media_type"),
        (
            "/v1/audio/transcriptions",
            {"data": {"model": "m"}, "files": {"other": b""}},
            400,
            "no_file",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"response_format": "pdf"}},
            400,
            "unsupported_format",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"response_format": "srt", "stream": "true"}},
            400,
            "unsupported_format",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"temperature": "0.5"}},
            400,
            "unsupported",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"stream": "maybe"}},
            422,
            "bad_request",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {"stream": "true"}},
            422,
            "unprocessable",
        ),
        (
            "/v1/audio/transcriptions",
            {"files": {"file": b"x"}, "data": {str(n): "" for n in range(99)}},
            400,
            "bad_form",
        ),
        (
            "/v1/audio/transcriptions",
            {"content": b"--", "headers": {"content-type": "multipart/form-data"}},
            400,
            "bad_form",
        ),
        (
            "/v1/audio/transcriptions",
            {
                "content": b"nonsense",
                "headers": {"content-type": "multipart/form-data; boundary=a"},
            },
            400,
            "",
        ),
        ("/v1/chat/completions", {"json": {"messages": []}}, 422, "bad_request"),
        ("/v1/chat/completions", {"json": {"messages": [{"role": "user"}]}}, 422, "empty"),
        (
            "/v1/chat/completions",
            {
                "json": {
                    "messages": [{"role": "user", "content": "a"}],
                    "modalities": ["audio"],
                    "stream": True,
                }
            },
            400,
            "unsupported_format",
        ),
        ("/health", {}, 405, "method"),
        ("/nowhere", {}, 404, "no_such_route"),
    ],
)
def test_errors_have_the_clients_shape(
    served: Served, path: str, sent: dict[str, Any], status: int, code: str
) -> None:
    is_refused(served.post(path, **sent), status, code)


def test_with_a_key_every_route_but_health_is_closed(pipe: Pipeline) -> None:
    with serving(pipe, key="secret") as closed:
        routes: list[Any] = [
            (method, route.path)
            for route in closed.guard.app.routes
            for method in sorted(getattr(route, "methods", ["GET"]))  # a websocket begins so
        ]
        assert len(routes) >= 9 and ("POST", "/v1/run") in routes
        for method, path in [
            *routes,
            ("GET", "/nowhere"),
            ("GET", "/health/"),
            ("GET", "//health"),
        ]:
            for header in (
                {},
                {"authorization": "Bearer secre"},
                {"authorization": "secret"},
                {"authorization": "Basic c2VjcmV0"},
            ):
                answer = closed.client.request(method, path, headers=header)
                if path == app.OPEN:
                    assert answer.status_code == 200
                elif method == "HEAD":
                    assert answer.status_code == 401
                else:
                    is_refused(answer, 401, "no_key")
            for way in (b"Bearer secret", b"Basic " + base64.b64encode(b"anybody:secret")):
                known = closed.client.request(method, path, headers={"authorization": way})
                assert known.status_code != 401


def test_words_become_lines_that_can_be_read() -> None:
    def said(*times: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"word": f"w{n}", "start": a, "end": b} for n, (a, b) in enumerate(times)]

    assert transcription.cues(said((0.0, 0.5), (0.6, 1.0), (2.0, 2.4)), 3.0) == [
        (0.0, 1.0, "w0 w1"),
        (2.0, 2.4, "w2"),
    ]
    long = said(*((n / 2, n / 2 + 0.4) for n in range(40)))
    lines = transcription.cues(long, 20.0)
    assert len(lines) > 2 and all(line.end - line.start <= 6 for line in lines)
    assert " ".join(line.text for line in lines) == " ".join(word["word"] for word in long)
    assert transcription.cues([{"word": "a"}, {"word": "b"}], 2.0) == [(0.0, 2.0, "a b")]
    assert transcription.cues([], 2.0) == []
    assert transcription.cues(said((0.0, 0.4), (0.5, 2.3)), 2.0) == [(0.0, 2.0, "w0 w1")]
    words = [{"word": "w" * 20, "start": n / 10, "end": n / 10 + 0.1} for n in range(9)]
    assert [len(line.text) for line in transcription.cues(words, 1.0)] == [83, 83, 20]
    assert transcription._clock(3723.4567, ",") == "01:02:03,457"


def test_a_refusal_says_its_kind_how_to_be_let_in_and_when_to_come_again() -> None:
    told = {401: "authentication_error", 403: "invalid_request_error", 429: "rate_limit_error"}
    told |= {422: "invalid_request_error", 500: "server_error", 503: "server_error"}
    for status, kind in told.items():
        refused = Refused(status, "code", "message")
        assert refused.shape["error"]["type"] == kind
        again = [("Retry-After", "1")] if status in (429, 503) else []
        basic = ("WWW-Authenticate", 'Basic realm="zipper"')
        assert refused.headers == (
            [("WWW-Authenticate", "Bearer"), basic] if status == 401 else again
        )


def test_a_key_may_hold_any_sign() -> None:
    for key in (b"se:cret", b"a=b", b"with space"):
        assert app._given(b"Basic " + base64.b64encode(b"anybody:" + key)) == key
        assert app._given(b"bearer  " + key) == key
    for nothing in (b"", b"Basic", b"Basic ?", b"Digest a", b"Bearer"):
        assert app._given(nothing) == b""


def test_a_model_whose_name_has_a_stroke_is_told_of(pipe: Pipeline) -> None:
    with serving(pipe, name="ours/small") as served:
        for name in ("ours/small", "ours%2Fsmall"):
            assert served.client.get(f"/v1/models/{name}").json()["id"] == "ours/small"
        is_refused(served.client.get("/v1/models/ours/large"), 404, "no_such_model")


def test_nobody_elses_page_is_let_in(served: Served) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1.evil:{served.port}"):
        is_refused(served.client.get("/v1/models", headers={"origin": origin}), 403, "foreign_page")
    assert served.client.get("/v1/models", headers={"origin": served.url}).status_code == 200
    answer = served.client.options(
        "/v1/run", headers={"origin": "http://a", "access-control-request-method": "POST"}
    )
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_bodies_that_are_too_large_are_refused_before_they_are_here(pipe: Pipeline) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        yield b'--a\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(200):
            sent += 1
            yield bytes(100_000)

    with serving(pipe, caps=Caps(body_bytes=1_000_000)) as small:
        for path, kind in (
            ("/v1/run", "application/json"),
            ("/v1/audio/transcriptions", "multipart/form-data; boundary=a"),
        ):
            is_refused(small.post(path, content=parts(), headers={"content-type": kind}), 413)
        is_refused(small.post("/v1/run", content=bytes(1_000_001), headers=JSON), 413, "too_large")
        head = f"POST /v1/run HTTP/1.1\r\nhost: a\r\ncontent-length: {10**12}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", small.port)) as line:
            line.sendall(head.encode())
            assert line.recv(64).startswith(b"HTTP/1.1 413"), "before one byte of the body"
        assert small.guard.held.bytes == 0
    with serving(pipe, caps=Caps(held_bytes=1000)) as full:
        is_refused(full.post("/v1/run", content=bytes(2000), headers=JSON), 429, "busy")


def test_sound_that_lasts_too_long_is_refused(pipe: Pipeline, spoken: bytes) -> None:
    with serving(pipe, caps=Caps(seconds=1.0)) as short:
        is_refused(short.transcribe(spoken), 413, "too_long")
    given = [{"tower": "speech", "content": base64.b64encode(spoken).decode()}] * 2
    with serving(pipe, caps=Caps(seconds=3.0)) as longer:
        wanted = {"given": given, "outputs": ["text"]}
        is_refused(longer.post("/v1/run", json=wanted), 413, "too_long")
        assert longer.transcribe(spoken).status_code == 200


def test_a_slow_upload_is_cut(pipe: Pipeline) -> None:
    with serving(pipe, caps=Caps(upload_s=0.5)) as hasty:
        head = "POST /v1/run HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        since = time.monotonic()
        with socket.create_connection(("127.0.0.1", hasty.port)) as line:
            line.sendall(head.encode())
            line.settimeout(0.2)
            said = b""
            while not said and time.monotonic() < since + 10:
                try:
                    line.sendall(b"{")
                    said = line.recv(65536)
                except TimeoutError:
                    pass
        assert said.startswith(b"HTTP/1.1 408") and time.monotonic() < since + 5


def test_a_full_queue_is_told_at_once(pipe: Pipeline) -> None:
    with serving(pipe, rows=1, queue=0) as narrow:
        narrow.worker.enter()  # somebody holds the only row
        since = time.monotonic()
        answer = narrow.said("call anna", "wav")
        took = time.monotonic() - since
        is_refused(answer, 429, "busy")
        assert took < 0.05 and answer.headers["retry-after"]
        assert narrow.client.get("/health").status_code == 200
        assert (
            'zipper_refusals_total{code="busy",status="429"} 1.0'
            in narrow.client.get("/metrics").text
        )
        narrow.worker.leave()
        assert narrow.said("call anna", "wav").status_code == 200


def test_a_server_that_stops_ends_what_runs_and_takes_no_more(pipe: Pipeline) -> None:
    with serving(pipe) as ending:
        found: list[Any] = []
        running = threading.Thread(target=lambda: found.append(ending.said(SENTENCE, "flac")))
        running.start()
        while ending.worker.load == (0, 0):
            time.sleep(0.001)
        ending.worker.stop()
        with httpx.Client(base_url=ending.url) as other:
            is_refused(other.post("/v1/run", json={"outputs": ["text"]}), 503, "stopping")
            is_refused(other.get("/ready"), 503, "stopping")
            assert other.get("/health").status_code == 200
        running.join()
        assert found[0].status_code == 200 and ending.worker.join(10.0)


@pytest.mark.parametrize("streams", [False, True])
def test_who_leaves_frees_the_row_within_a_step(
    pipe: Pipeline, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def slow(self: Engine) -> bool:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    with serving(pipe, rows=1) as narrow:
        wanted = {"input": SENTENCE, "response_format": "wav" if streams else "flac"}
        content = json.dumps(wanted).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", narrow.port)) as line:
            line.sendall(head.encode() + content)
            while narrow.worker.steps < 4:
                time.sleep(0.005)
        before = narrow.worker.steps
        narrow.idle()
        assert narrow.worker.steps <= before + 3, "the step that runs, and the one that sees it"


# --- strangers


def strange_places(folder: Path) -> list[str]:
    """Two hundred names of places, in every spelling that has ever opened one."""
    (folder / "there.wav").write_bytes(b"secret")
    files = ["etc/passwd", "etc/shadow", "proc/self/environ", "there.wav", "C:\\windows\\win.ini"]
    files += ["root/.ssh/id_rsa", "proc/self/fd/0", "dev/zero"]
    ways = "/{} ../../../../{} file:///{} ~/{} ..%2f..%2f{} \\\\host\\{} {}\0.wav ./{} //{} ....//....//{}"
    ways += (
        " ..\\..\\{} %2e%2e/%2e%2e/{} ..%252f..%252f{} ..%c0%af{} /{}/. {}%00.wav ${{HOME}}/{} |{}"
    )
    ways += " /proc/self/root/{} \uff0e\uff0e/{}"
    found = [way.format(file) for file in files for way in ways.split(" ")]
    schemes = ("http://127.0.0.1:9/", "https://example.org/", "s3://bucket/", "ftp://a/", "hf://a/")
    schemes += ("gopher://a/", "smb://a/", "data:audio/wav;base64,", "jar:file:///", "zip://")
    found += [scheme + file for scheme in schemes for file in files[:4]]
    return [str(folder / "there.wav"), *found]


def asks(served: Served, place: str) -> Iterator[Any]:
    """Answers to a place in every field that takes a name, each of them an error."""
    for content in (place, {"path": place}, {"bytes": place}, [place]):
        given = [{"tower": "speech", "content": content}]
        yield served.post("/v1/run", json={"given": given, "outputs": ["text"]})
    named = {"given": [{"tower": "speech", "file": place}], "outputs": ["text"]}
    yield served.post("/v1/run", json=named)
    boundary = 'content-disposition: form-data; name="%s"; filename="%s"'
    plain = place.replace("\0", "%00").replace('"', "%22")
    asked = 'content-disposition: form-data; name="request"\r\n\r\n' + json.dumps(named)
    file = boundary % (plain, plain) + "\r\n\r\nx"
    sound = boundary % ("file", plain) + "\r\n\r\nx"
    kind = {"content-type": "multipart/form-data; boundary=a"}
    for path, parts in (("/v1/run", [asked, file]), ("/v1/audio/transcriptions", [sound])):
        form = "".join(f"--a\r\n{part}\r\n" for part in parts) + "--a--\r\n"
        yield served.post(path, content=form.encode(), headers=kind)
    yield served.post("/v1/audio/transcriptions", files={"file": (None, place)})
    for name in ("response_format", "prompt", "temperature", "stream"):
        yield served.transcribe(b"x", model=place, language=place, **{name: place})
    yield served.post("/v1/run", json={"outputs": [place]})
    yield served.post("/v1/run", json={"outputs": [{"tower": place}]})
    said = {"input": "a", "model": place, "voice": "alloy", "response_format": "wav"}
    for wrong in ({}, {"voice": place}, {"voice": {"id": place}}, {"response_format": place}):
        yield served.post("/v1/audio/speech", json=said | wrong)
    for name in ("instructions", "stream_format"):
        yield served.post("/v1/audio/speech", json=said | {"voice": "default", name: place})
    for part in (
        {"type": "input_audio", "input_audio": {"data": place, "format": place}},
        {"type": "image_url", "image_url": {"url": place}},
        {"type": "segment", "segment": {"tower": place, "content": place}},
        {"type": "segment", "segment": {"tower": "speech", "content": {"path": place}}},
    ):
        chat = {"messages": [{"role": "user", "content": [part]}], "model": place}
        yield served.post("/v1/chat/completions", json=chat)
    chat = {"messages": [{"role": place, "content": "a"}], "model": place, "modalities": ["audio"]}
    for spoken in ({"voice": place}, {"format": place}):
        yield served.post("/v1/chat/completions", json=chat | {"audio": spoken})
    yield served.post("/v1/chat/completions", json=chat | {"modalities": [place]})
    quoted = "".join(f"%{byte:02x}" for byte in place.encode())
    for path in ("/v1/models/", "/web/", "/"):
        yield served.client.get(path + quoted)


@pytest.fixture(scope="module")
def looked() -> list[tuple[str, Any]]:
    """Everything that this process opens or asks from now on, by whichever way."""
    seen: list[tuple[str, Any]] = []

    def hook(event: str, args: Any) -> None:
        if event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
            seen.append((event, args))

    sys.addaudithook(hook)  # stays: there is no way to take one off
    return seen


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_no_place_that_a_client_names_is_opened(
    served: Served, tmp_path: Path, looked: list[tuple[str, Any]], every: int
) -> None:
    places = strange_places(tmp_path)
    assert len(set(places)) == 201
    assert all(answer.status_code in range(400, 500) for answer in asks(served, "nowhere"))
    looked.clear()  # what is imported with the first of its kind was
    for place in places[::every]:
        for number, answer in enumerate(asks(served, place)):
            assert answer.status_code in (400, 404, 413, 422), (number, place, answer.text)
    assert looked == []
    (tmp_path / "there.wav").read_bytes()
    assert looked  # it sees what is opened


def hostile(spoken: bytes) -> Iterator[bytes]:
    """Files that are no sound, or not what they say; each must be refused."""
    yield from (
        b"",
        b"\0",
        b"x" * 1000,
        b"<html>",
        b"#!AMR\n" + bytes(99),
        b"OggS",
        b"ID3",
        b"fLaC",
    )
    yield from (spoken[:12], spoken[:44], spoken[:-2000], b"RIFF" * 5000, b"\xff\xfb" * 3000)
    pcm = spoken[44:]
    for channels, rate, bits in (
        (1, 0, 16), (0, 16_000, 16), (9, 16_000, 16), (65_535, 16_000, 16), (1, 7_999, 16),
        (1, 192_001, 16), (1, 2**31 - 1, 16), (1, 16_000, 0), (1, 16_000, 33), (1, 16_000, 65_535),
    ):  # fmt: skip
        align = max(1, channels * bits // 8) % 65_536
        fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * align % 2**32, align, bits)
        head = b"RIFF" + struct.pack("<I", 36 + len(pcm)) + b"WAVEfmt " + struct.pack("<I", 16)
        yield head + fmt + b"data" + struct.pack("<I", len(pcm)) + pcm
    floats = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    for value in (float("nan"), float("inf")):
        data = struct.pack("<f", value) * 16_000
        head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16)
        yield head + floats + b"data" + struct.pack("<I", len(data)) + data
    long = io.BytesIO()
    with wave.open(long, "wb") as file:
        file.setnchannels(1), file.setsampwidth(1), file.setframerate(8000)
        file.writeframes(bytes(8000 * 601))
    yield long.getvalue()
    for told in (2**31 - 2**13, 10**9, 123_456):  # says it holds more than there is
        yield spoken[:40] + struct.pack("<I", told - told % 2) + pcm
    dice = random.Random(0)
    for _ in range(12):
        yield dice.randbytes(dice.randrange(1, 5000))


def test_hostile_sounds_are_refused_by_type(served: Served, spoken: bytes) -> None:
    found = [*hostile(spoken)]
    assert len(found) >= 40
    for number, content in enumerate(found):
        answer = served.transcribe(content)
        assert 400 <= answer.status_code < 500, (number, content[:60], answer.text)
        is_refused(answer, answer.status_code)
    assert served.transcribe(spoken).json() == {"text": SENTENCE}


def test_no_body_whatever_breaks_the_server(served: Served) -> None:
    dice = random.Random(1)
    paths = ["/v1/run", "/v1/audio/speech", "/v1/chat/completions", "/v1/audio/transcriptions"]
    kinds = ["application/json", "multipart/form-data; boundary=a"]
    values: list[Any] = [
        None,
        1,
        -1.5,
        "",
        "text",
        [],
        {},
        ["text"],
        {"tower": "text"},
        1e308,
        True,
    ]
    names = (
        "given outputs sampling limits seed input voice messages modalities stream audio n".split()
    )
    for number in range(150):
        body = {dice.choice(names): dice.choice(values) for _ in range(4)}
        content = json.dumps(body).encode() if number % 3 else dice.randbytes(200)
        headers = {"content-type": kinds[number % 5 == 0]}
        answer = served.post(dice.choice(paths), content=content, headers=headers)
        assert answer.status_code < 500, (body, answer.text)


def test_logs_carry_no_content(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("the secret of anna")

    with serving(pipe) as broken:
        monkeypatch.setattr(broken.guard.service.pipeline, "asked", fails, raising=False)
        answer = broken.said("call anna", "wav")
        is_refused(answer, 500, "internal")
        assert "anna" not in answer.text
        broken.idle()
    assert "KeyError" in caplog.text and "anna" not in caplog.text


# --- the worker alone


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_engine_comes_behind_what_answers(pipe: Pipeline) -> None:
    found: list[int] = []

    def engine() -> Engine:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return pipe.engine(1)

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    worker = Worker(engine, rows=1)
    worker.start()
    worker.stop()
    assert worker.join(30)
    assert found == [min(19, own + 5)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_a_step_that_fails_ends_what_runs_and_the_next_request_is_answered(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pipe.asked([Segment("text", "call anna")], ["speech"])
    assert asked is not None
    worker = Worker(lambda: pipe.engine(2), rows=2, queue=1)
    worker.start()
    step = Engine.step

    async def run(request: Request) -> Any:
        worker.enter()
        return await worker.submit(request).done

    async def both() -> list[Any]:
        monkeypatch.setattr(Engine, "step", lambda self: 1 / 0)
        lost = await asyncio.gather(run(asked), run(asked), return_exceptions=True)
        monkeypatch.setattr(Engine, "step", step)
        return [*lost, await run(asked)]

    first, second, (written,) = asyncio.run(both())
    assert isinstance(first, ZeroDivisionError) and isinstance(second, ZeroDivisionError)
    assert written.stop == "end" and worker.load == (0, 0)
    for _ in range(3):
        worker.enter()
    assert worker.load == (2, 1)
    with pytest.raises(Busy):
        worker.enter()
    for _ in range(3):
        worker.leave()
    worker.stop()
    assert worker.join(5.0)
    with pytest.raises(Stopping):
        worker.enter()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_no_engine_can_be_made_nobody_waits(pipe: Pipeline) -> None:
    asked = pipe.asked([Segment("text", "call anna")], ["speech"])
    assert asked is not None
    fails = threading.Event()

    def engine() -> Engine:
        if fails.wait(20):
            raise MemoryError
        raise AssertionError

    worker = Worker(engine, rows=1, queue=2)
    worker.start()

    async def run() -> list[Any]:
        for _ in range(2):
            worker.enter()
        early = worker.submit(asked)
        fails.set()
        while worker.running:
            await asyncio.sleep(0.01)
        late = worker.submit(asked)
        return await asyncio.wait_for(
            asyncio.gather(early.done, late.done, return_exceptions=True), 20
        )

    assert [type(lost) for lost in asyncio.run(run())] == [MemoryError, MemoryError]
    assert worker.load == (0, 0)
    with pytest.raises(Stopping):
        worker.enter()


def test_no_segment_is_longer_than_the_cap_whatever_is_asked(pipe: Pipeline) -> None:
    with serving(pipe, caps=Caps(tokens=5)) as small:
        asked = {"given": [{"tower": "text", "content": "call anna"}], "outputs": ["speech"]}
        (made,) = small.client.post("/v1/run", json=asked).json()["produced"]
        assert len(made["ids"]) == 5 and not made["ended"]


def test_tokens_of_a_stream_go_out_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [100.0], Request([], ["text"])
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tokens = [Token(0, "text", id, -0.5) for id in range(5)]

    async def run() -> list[Any]:
        ticket = Ticket(asked, streams=True)
        ticket.hand_out(tokens[:1])
        seen = [ticket.tokens.get_nowait()]  # nobody waits for the first
        for token in tokens[1:4]:
            now[0] += worker_module.EVERY_S / 4
            ticket.hand_out([token])
        assert ticket.tokens.empty()
        now[0] += worker_module.EVERY_S / 2
        ticket.hand_out([])  # a step in which it got nothing, and it is time
        seen.append(ticket.tokens.get_nowait())
        ticket.hand_out(tokens[4:])
        assert ticket.tokens.empty()
        ticket.settle([])
        return [*seen, ticket.tokens.get_nowait(), ticket.tokens.get_nowait()]

    assert asyncio.run(run()) == [tokens[:1], tokens[1:4], tokens[4:], None]


def test_threads_that_make_sound_take_one_processor_each(pipe: Pipeline) -> None:
    before, seen = torch.get_num_threads(), list[int]()

    def engine() -> Engine:
        seen.append(torch.get_num_threads())
        return pipe.engine(1)

    torch.set_num_threads(2)
    try:
        worker = Worker(engine, 1)
        service = Service(pipe, worker, Caps(), "mine")
        assert asyncio.run(service.apart(torch.get_num_threads)) == 1
        worker.start()  # after a thread of one: it takes what its maker had
        worker.stop()
        assert worker.join(20.0) and seen == [2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_settings_that_cannot_work_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(ZipperError, match="at least 1 row"):
        Worker(lambda: pipe.engine(1), rows=0)
    with pytest.raises(ZipperError, match="body_bytes is 0"):
        Caps(body_bytes=0)
    with pytest.raises(Refused, match="cannot be written here"):
        sounds.check_format("aac")


def test_a_modality_of_sound_takes_no_path(pipe: Pipeline, tmp_path: Path) -> None:
    path = str(sound(tmp_path / "there.wav"))
    guard = app.serve(pipe)
    for content in (path, Path(path)):
        with pytest.raises(Refused, match="nothing is opened"):
            asyncio.run(guard.service.begin([Segment("speech", content)], ["text"]))
    guard.service.worker.stop()
    assert guard.service.worker.join(5.0)


def test_a_model_without_a_tower_called_text_says_so(tmp_path: Path) -> None:
    modalities = {"words": tiny.text(), "speech": tiny.units()}
    towers = {name: tiny.tower(modality) for name, modality in modalities.items()}
    model = Zipper.from_towers(towers, link=LinkConfig(head_width=16))
    with serving(Pipeline(model, modalities)) as found:
        told = found.said("call", "wav")
        assert told.status_code == 422
        assert told.json()["error"]["code"] == "no_such_modality"


def test_a_replica_with_a_gpu_has_its_model_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it shows without either: by names of Ray that stand in, and a device by a note."""
    made: list[Any] = []
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    for module in (ray, serve):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    chain = SimpleNamespace(bind=lambda: "bound")
    monkeypatch.setattr(serve, "ingress", lambda build: lambda: made.append(build()), raising=False)
    monkeypatch.setattr(
        serve, "deployment", lambda *_, **how: made.append(how) or chain, raising=False
    )
    deployment = pytest.importorskip("zipper.serving.deployment")
    devices: list[str] = []
    monkeypatch.setattr(Zipper, "to", lambda self, device: devices.append(device))
    given: list[Any] = []
    monkeypatch.setattr(
        deployment.app, "serve", lambda pipe, *how: given.append(how) or type(pipe).__name__
    )
    assert deployment.deployment(gpus=1.0) == "bound" and devices == ["cuda"]
    assert made[0] == "Pipeline" and made[1]["ray_actor_options"]["num_gpus"] == 1.0
    caps = Caps(tokens=5)
    deployment.deployment("", (2, 3), 4, 5, "secret", caps, "mine")
    assert devices == ["cuda"] and given[-1] == (4, 5, "secret", caps, "mine")
    assert made[-1]["max_ongoing_requests"] == 9
    scaled = made[-1]["autoscaling_config"]
    told = [scaled[name] for name in ("min_replicas", "max_replicas", "target_ongoing_requests")]
    assert told == [2, 3, 4]
