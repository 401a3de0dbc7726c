"""A conversation over a WebSocket: what is said and heard in it is what the pipeline says and
hears, and whoever misuses the line is told, or left."""

import asyncio
import base64
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx2", reason="the tests ask over httpx")
websockets = pytest.importorskip("websockets.sync.client")

import numpy as np
from test_serving import SENTENCE, Served, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus

from zipper.audio.sound import Audio
from zipper.pipeline import Pipeline
from zipper.serving import process, sounds
from zipper.serving.bodies import Caps
from zipper.serving.realtime import AT_ONCE, RATE_HZ

PART = 4800  # bytes: a tenth of a second


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def spoken(pipe: Pipeline) -> bytes:
    """A sentence as samples."""
    return sounds.pcm(pipe.speak(SENTENCE).resample(RATE_HZ))


@pytest.fixture(scope="module")
def served(pipe: Pipeline) -> Iterator[Served]:
    with serving(pipe, name="mine") as found:
        yield found
        found.idle()


class Line:
    """A client."""

    def __init__(self, served: Served, **options: Any) -> None:
        url = f"ws://127.0.0.1:{served.port}/v1/realtime?model=mine"
        self.opened = websockets.connect(url, open_timeout=20, **options)

    def __enter__(self) -> "Line":
        self.socket = self.opened.__enter__()
        assert self.read()["type"] == "session.created"
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, kind: str, **more: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **more}))

    def read(self) -> Any:
        return json.loads(self.socket.recv(timeout=30))

    def until(self, *kinds: str) -> list[Any]:
        """Events up to these, of each kind one."""
        left, found = set(kinds), []
        while left:
            found.append(self.read())
            assert found[-1]["type"] in kinds or found[-1]["type"] != "error", found[-1]
            left.discard(found[-1]["type"])
        return found

    def speak(self, samples: bytes) -> None:
        for at in range(0, len(samples), PART):
            part = base64.b64encode(samples[at : at + PART]).decode()
            self.say("input_audio_buffer.append", audio=part)
        self.say("input_audio_buffer.commit")


def of(kind: str, events: list[Any]) -> list[Any]:
    return [event for event in events if event["type"] == kind]


WRITTEN = "conversation.item.input_audio_transcription"


def test_what_is_heard_in_parts_is_what_the_pipeline_hears(
    served: Served, pipe: Pipeline, spoken: bytes
) -> None:
    heard = Audio(np.frombuffer(spoken, "<i2").astype(np.float32) / 32768, RATE_HZ)
    offline = pipe.transcribe(heard)
    with Line(served) as line:
        transcribe = {"audio": {"input": {"transcription": {"model": "any"}}}}
        line.say("session.update", session={"output_modalities": ["text"], **transcribe})
        updated = line.until("session.updated")[-1]["session"]
        assert updated["output_modalities"] == ["text"] and updated["model"] == "mine"
        line.speak(spoken)
        line.say("response.create")
        events = line.until("response.done", f"{WRITTEN}.completed")
        deltas = [event["delta"] for event in of("response.output_text.delta", events)]
        assert len(deltas) > 3 and "".join(deltas) == offline
        (written,) = of(f"{WRITTEN}.completed", events)
        assert written["transcript"] == offline
        assert "".join(event["delta"] for event in of(f"{WRITTEN}.delta", events)) == offline
        (done,) = of("response.done", events)
        (item,) = done["response"]["output"]
        assert item["content"] == [{"type": "output_text", "text": offline}]
        assert done["response"]["status"] == "completed"


def test_what_is_said_is_what_the_pipeline_says(served: Served, pipe: Pipeline) -> None:
    with Line(served) as line:
        voice = pipe.units.voices[1]
        line.say("session.update", session={"audio": {"output": {"voice": voice}}})
        said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
        line.say("conversation.item.create", item={"role": "user", **said})
        line.say("response.create")
        events = line.until("response.done")
        parts = [
            base64.b64decode(event["delta"]) for event in of("response.output_audio.delta", events)
        ]
        assert len(parts) > 2, "sound comes while it is made"
        samples = np.frombuffer(b"".join(parts), "<i2").astype(np.float32) / 32768
        offline = pipe.speak(SENTENCE, voice)
        assert len(samples) / RATE_HZ == pytest.approx(offline.seconds, abs=0.01)
        assert pipe.transcribe(Audio(samples, RATE_HZ)) == pipe.transcribe(offline)


def test_the_official_client_unchanged_talks(served: Served, spoken: bytes) -> None:
    openai = pytest.importorskip("openai")

    async def talk() -> str:
        client = openai.AsyncOpenAI(
            base_url=f"{served.url}/v1",
            websocket_base_url=f"ws://127.0.0.1:{served.port}/v1",
            api_key="any",
        )
        async with client.realtime.connect(model="mine") as line:
            wanted = {"type": "realtime", "output_modalities": ["text"]}
            await line.session.update(session=wanted)
            await line.input_audio_buffer.append(audio=base64.b64encode(spoken).decode())
            await line.input_audio_buffer.commit()
            await line.response.create()
            text = ""
            async for event in line:
                if event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type == "response.done":
                    assert event.response.status == "completed"
                    return text
        raise AssertionError("the line ended")

    assert asyncio.run(talk()) == SENTENCE


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("no json", "bad_json"),
        ("[" * 10_000, "bad_json"),
        ("[]", "bad_request"),
        ({"type": "smell"}, "unknown_event"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
        ({"type": "input_audio_buffer.append", "audio": "/etc/passwd"}, "bad_base64"),
        ({"type": "input_audio_buffer.append", "audio": {"path": "/etc/passwd"}}, "bad_request"),
        ({"type": "response.create"}, "empty"),
        ({"type": "response.cancel"}, "response_cancel_not_active"),
        ({"type": "session.update", "session": {"output_modalities": ["smell"]}}, "bad_request"),
        ({"type": "session.update", "session": {"audio": {"output": {"voice": "x"}}}}, "no_such_voice"),
        ({"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}}, "bad_request"),
        ({"type": "session.update", "session": []}, "bad_request"),
        ({"type": "conversation.item.create", "item": {"content": []}}, "bad_request"),
        ({"type": "conversation.item.create"}, "bad_request"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_and_the_line_stays(served: Served, said: Any, code: str) -> None:
    with Line(served) as line:
        line.socket.send(said if isinstance(said, str) else json.dumps(said | {"event_id": "e1"}))
        told = line.read()
        assert told["type"] == "error" and told["error"]["code"] == code
        assert isinstance(said, str) or told["error"]["event_id"] == "e1"
        line.say("input_audio_buffer.clear")
        assert line.read()["type"] == "input_audio_buffer.cleared"


def test_a_response_can_be_cancelled_and_there_is_one_at_a_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with Line(served) as line:
        line.say("conversation.item.create", item=said)
        line.say("response.create")
        line.until("response.created")
        line.say("conversation.item.create", item=said)
        line.say("response.create")
        while (told := line.read())["type"] != "error":
            pass
        assert told["error"]["code"] == "conversation_already_has_active_response"
        line.say("response.cancel")
        done = line.until("response.done")[-1]["response"]
        assert done["status"] == "cancelled"
        served.idle()


def test_a_response_that_is_cancelled_at_once_is_told_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with Line(served) as line:
        line.say("conversation.item.create", item=said)
        line.say("response.create")
        line.say("response.cancel")
        done = line.until("response.created", "response.done")[-1]["response"]
        assert done["status"] == "cancelled"
        line.say("response.cancel")
        assert line.read()["error"]["code"] == "response_cancel_not_active"
    served.idle()


def test_what_is_refused_leaves_nothing_behind_and_what_waits_is_counted(pipe: Pipeline) -> None:
    text = {"type": "input_text", "text": "call anna"}
    part = base64.b64encode(bytes(RATE_HZ)).decode()  # half a second

    def commit(line: Line) -> Any:
        line.say("input_audio_buffer.append", audio=part)
        line.say("input_audio_buffer.commit")
        return line.read()

    with serving(pipe, caps=Caps(segments=3, seconds=1.2)) as small:
        with Line(small) as line:
            line.say("conversation.item.create", item={"content": [text, text]})
            line.until("conversation.item.done")
            line.say("conversation.item.create", item={"content": [text, text]})
            assert line.read()["error"]["code"] == "too_many_segments"
            assert commit(line)["type"] == "input_audio_buffer.committed"  # there is room for one
            line.until("conversation.item.done")
            assert small.guard.held.bytes == 2 * RATE_HZ, "the samples of the item"
            assert commit(line)["error"]["code"] == "too_many_segments"
            assert small.guard.held.bytes == 3 * RATE_HZ, "what was refused is there still"
            line.say("input_audio_buffer.clear")
            line.until("input_audio_buffer.cleared")
            assert small.guard.held.bytes == 2 * RATE_HZ
        with Line(small) as line:
            for _ in range(2):
                commit(line)
                line.until("conversation.item.done")
            assert commit(line)["error"]["code"] == "too_long"
        while small.guard.sockets:
            time.sleep(0.01)
        assert small.guard.held.bytes == 0


def test_a_line_stays_open_while_something_is_made(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with serving(pipe, caps=Caps(idle_s=0.3)) as hasty, Line(hasty) as line:
        began = time.monotonic()
        line.say("conversation.item.create", item=said)
        line.say("response.create")
        assert line.until("response.done")[-1]["response"]["status"] == "completed"
        assert time.monotonic() - began > 0.6


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    from zipper.generation import Engine

    step = Engine.step

    def slowly(self: Engine) -> bool:
        time.sleep(0.03)
        return step(self)

    monkeypatch.setattr(Engine, "step", slowly)


def test_who_hangs_up_frees_the_row(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with Line(served) as line:
        line.say("conversation.item.create", item=said)
        line.say("response.create")
        line.until("response.output_item.added")
        line.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
    before = served.worker.steps
    served.idle()
    assert served.worker.steps <= before + 4


def test_the_key_the_origin_and_how_many_are_checked_before_the_line_is_open(
    pipe: Pipeline,
) -> None:
    caps = Caps(sockets=3)
    with serving(pipe, key="secret", caps=caps) as closed:
        known = {"Authorization": "Bearer secret"}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer secre"}, 401),
            (known | {"Origin": "http://evil.example"}, 403),
        ):
            with pytest.raises(InvalidStatus) as refused, Line(closed, additional_headers=headers):
                pass
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body)["error"]["message"]
        with ExitStack() as lines:
            for _ in range(3):
                lines.enter_context(Line(closed, additional_headers=known))
            for _ in range(40):  # a flood
                with (
                    pytest.raises(InvalidStatus) as refused,
                    Line(closed, additional_headers=known),
                ):
                    pass
                assert refused.value.response.status_code == 429
            asked = {"input": "call anna", "response_format": "flac"}
            with httpx.Client(base_url=closed.url, headers=known, timeout=30) as other:
                assert other.post("/v1/audio/speech", json=asked).status_code == 200
        while closed.guard.sockets:
            time.sleep(0.01)
        with Line(closed, additional_headers=known):
            pass


def test_too_much_and_nothing_at_all(pipe: Pipeline) -> None:
    with serving(pipe, caps=Caps(seconds=1.0, idle_s=0.6)) as small:
        part = base64.b64encode(bytes(40_000)).decode()
        with Line(small) as line:
            line.say("input_audio_buffer.append", audio=part)
            line.say("input_audio_buffer.append", audio=part)
            assert line.read()["error"]["code"] == "too_long"
            began = time.monotonic()
            with pytest.raises(ConnectionClosed):
                line.read()
            assert time.monotonic() - began < 10
        with Line(small) as line, pytest.raises(ConnectionClosed):
            line.socket.send("x" * (process.MESSAGE_BYTES + 1))
            line.read()
        assert small.guard.held.bytes == 0


def test_headers_that_come_slowly_and_lines_that_say_nothing_are_left(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEADERS_S", 0.5)
    with ExitStack() as lines:
        silent = [
            lines.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            for _ in range(20)
        ]
        for line in silent[:10]:
            line.sendall(b"POST /v1/run HTT")
        again = silent[0], socket.create_connection(("127.0.0.1", served.port))
        again[1].sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /hea")  # the second is late
        lines.enter_context(again[1])
        assert served.client.get("/health").status_code == 200, "others are answered meanwhile"
        for line in (*silent, again[1]):
            line.settimeout(10)
            while line.recv(1000):
                pass  # until it is closed


def test_a_half_closed_line_is_answered_or_left(served: Served) -> None:
    content = json.dumps({"input": "call anna", "response_format": "wav"}).encode()
    head = "POST /v1/audio/speech HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    for cut in (len(content), len(content) // 2):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
            line.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[:cut])
            line.shutdown(socket.SHUT_WR)
            while line.recv(65_536):
                pass
    served.idle()
    until = time.monotonic() + 10
    while served.guard.held.bytes:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_who_does_not_read_an_answer_is_left_and_keeps_nobody_waiting(pipe: Pipeline) -> None:
    with serving(pipe, caps=Caps(stalled_s=0.5, body_bytes=1 << 20), rows=2) as narrow:
        wanted = {"given": [{"tower": "text", "content": "call anna"}], "outputs": ["speech"] * 4}
        content = json.dumps(wanted).encode()
        head = "POST /v1/run HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        with ExitStack() as lines:
            for _ in range(3):
                line = lines.enter_context(socket.socket())
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                line.connect(("127.0.0.1", narrow.port))
                line.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            narrow.idle()  # the engine does not wait for them
            assert narrow.said("call anna", "flac").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_runs_and_then_the_process(spoken: bytes, way: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import time; from zipper.generation import Engine; step = Engine.step\n"
        "def slowly(self): time.sleep(0.03); return step(self)\n"
        "Engine.step = slowly\n"
        f"from zipper.cli import main; import sys; sys.argv = ['zipper', 'serve', '--port', '{port}']; main()"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{url}/ready").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < until and server.poll() is None
                time.sleep(0.1)
        found: list[Any] = []
        wanted = {"input": SENTENCE, "response_format": "wav"}
        ask = threading.Thread(
            target=lambda: found.append(
                httpx.post(f"{url}/v1/audio/speech", json=wanted, timeout=60)
            )
        )
        other = httpx.Client(base_url=url)
        other.get("/health")  # a connection that is open already
        ask.start()
        time.sleep(0.5)
        server.send_signal(way)
        time.sleep(0.1)
        with suppress(httpx.TransportError):  # or it is closed: nothing new is taken either way
            assert other.get("/ready").status_code == 503
        ask.join()
        assert found[0].status_code == 200 and len(found[0].content) > 50_000
        assert server.wait(30) in (0, -way)
    finally:
        server.kill()


def test_a_response_that_was_refused_for_its_options_can_be_asked_for_again(
    served: Served,
) -> None:
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with Line(served) as line:
        line.say("conversation.item.create", item=said)
        for wrong in ({"max_output_tokens": 9999}, {"audio": {"output": {"voice": "x"}}}):
            line.say("response.create", response={"output_modalities": ["audio"], **wrong})
            assert line.until("response.done")[-1]["response"]["status"] == "failed"
        line.say("response.create", response={"output_modalities": ["audio"]})
        assert line.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_response_reads_what_was_not_read_and_tells_why_it_ended(
    served: Served, pipe: Pipeline
) -> None:
    said = {"type": "message", "content": [{"type": "input_text", "text": SENTENCE}]}
    with Line(served) as line:
        line.say("session.update", session={"max_output_tokens": 9})
        assert line.until("session.updated")[-1]["session"]["max_output_tokens"] == 9
        line.say("conversation.item.create", item=said)
        line.say("response.create", response={"metadata": {"a": "b"}})
        done = line.until("response.done")[-1]["response"]
        assert (done["status"], done["metadata"]) == ("incomplete", {"a": "b"})
        read = len(pipe.modalities["text"].encode(SENTENCE))
        usage = {"input_tokens": read, "output_tokens": 9, "total_tokens": read + 9}
        assert done["usage"] == usage
        line.say("response.create")
        assert line.read()["error"]["code"] == "empty"


def test_a_setting_that_is_not_named_stays(served: Served, pipe: Pipeline) -> None:
    with Line(served) as line:
        spoken = {"voice": pipe.units.voices[1]}
        line.say("session.update", session={"audio": {"output": spoken}})
        line.say("session.update", session={"audio": {"input": {"transcription": {}}}})
        line.until("session.updated")
        audio = line.until("session.updated")[-1]["session"]["audio"]
        assert audio["output"]["voice"] == spoken["voice"]
        assert audio["input"]["transcription"] == {}


def test_an_item_of_sound_is_heard(served: Served, pipe: Pipeline, spoken: bytes) -> None:
    part = {"type": "input_audio", "audio": base64.b64encode(spoken).decode()}
    heard = Audio(np.frombuffer(spoken, "<i2").astype(np.float32) / 32768, RATE_HZ)
    with Line(served) as line:
        line.say("conversation.item.create", item={"content": [part]})
        line.say("response.create", response={"output_modalities": ["text"]})
        (item,) = line.until("response.done")[-1]["response"]["output"]
        assert item["content"][0]["text"] == pipe.transcribe(heard)


def test_so_many_transcriptions_run_at_once_and_none_waits_for_a_response(
    pipe: Pipeline, spoken: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zipper.generation import Engine

    step, goes_on = Engine.step, threading.Event()
    monkeypatch.setattr(Engine, "step", lambda self: goes_on.wait(30) and step(self))
    with serving(pipe, caps=Caps(segments=2)) as small, Line(small) as line:
        audio = {"input": {"transcription": {}}}
        line.say("session.update", session={"type": "transcription", "audio": audio})
        line.until("session.updated")
        for _ in range(AT_ONCE):
            line.speak(spoken)
            line.until("conversation.item.done")
        line.speak(spoken)
        assert line.read()["error"]["code"] == "busy"
        goes_on.set()
        for _ in range(AT_ONCE):
            assert line.until(f"{WRITTEN}.completed")[-1]["transcript"]
        line.say("response.create")
        assert line.read()["error"]["code"] == "empty"


def test_a_transcription_that_fails_is_told(pipe: Pipeline, spoken: bytes) -> None:
    with serving(pipe, rows=1, queue=0) as narrow, Line(narrow) as line:
        line.say("session.update", session={"audio": {"input": {"transcription": {}}}})
        line.until("session.updated")
        narrow.worker.enter()
        line.speak(spoken)
        assert line.until(f"{WRITTEN}.failed")[-1]["error"]["code"] == "busy"
        narrow.worker.leave()


def test_a_line_of_a_browser_is_opened_and_one_that_sends_bytes_is_closed(served: Served) -> None:
    with Line(served, subprotocols=["realtime"]) as line:
        assert line.socket.subprotocol == "realtime"
        line.socket.send(b"bytes")
        with pytest.raises(ConnectionClosed) as closed:
            line.read()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1003


def test_what_a_response_leaves_out_is_the_session_s(served: Served, pipe: Pipeline) -> None:
    said = {"type": "message", "content": [{"type": "input_text", "text": "call anna"}]}
    one, other = pipe.units.voices[:2]

    def sound(line: Line, **asked: Any) -> str:
        line.say("conversation.item.create", item=said)
        line.say("response.create", response=asked)
        events = line.until("response.done")
        return "".join(event["delta"] for event in of("response.output_audio.delta", events))

    with Line(served) as line:
        line.say("session.update", session={"audio": {"output": {"voice": one}}})
        line.until("session.updated")
        plain = sound(line)
        assert sound(line, audio={"output": {"format": {"type": "audio/pcm"}}}) == plain
        assert sound(line, audio={"output": {"voice": other}}) != plain
        assert sound(line, audio=None) == plain
