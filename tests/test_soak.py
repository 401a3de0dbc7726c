"""A server for hours, made short: 32 clients with mixed requests, of which some hang up and some are
nonsense; every answer is the offline one, and nothing grows.

ZIPPER_SOAK says how many requests, 400 if it is not set.
"""

import asyncio
import base64
import io
import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("espeakng_loader", reason="recordings are made by the extra `speech`")

import many
import test_hostile_sound as heard
from PIL import Image

from zipper.pipeline import Pipeline
from zipper.serving import sounds
from zipper.strand import Segment
from zipper_lab.bench import serving
from zipper_lab.bench.serving import Job, ask, ask_form, ask_json, post, running
from zipper_lab.corpora.commands import sentences, synthesize

CLIENTS = 32
ABORTS, NONSENSE = 0.10, 0.05
# Tokens of speech in most requests: what is long is the vocoder, and it is not tried here.
LIMIT = 12


def asked(pipe: Pipeline) -> list[tuple[Job, Any]]:
    """Requests, and what of each answer must be what."""
    found: list[tuple[Job, Any]] = []
    for number, utterance in enumerate(sentences("test", 16)):
        recording = sounds.content(synthesize(utterance), "wav")
        text = pipe.transcribe(recording)
        path = "/v1/audio/transcriptions"
        found.append((Job("json", ask_form(path, recording)), {"text": text}))
        timed = ask_form(path, recording, response_format="verbose_json")
        found.append((Job("verbose", timed), text))
        found.append((Job("events", ask_form(path, recording, stream="true")), text))
        given = [{"tower": "text", "content": utterance.text}]
        for seed in (number, number + 100):
            wanted = {"given": given, "outputs": ["speech"], "limits": {"speech": LIMIT}}
            wanted |= {"seed": seed, "sampling": {"temperature": 0.8}}
            how = serving.Sampling(0.8, seed=seed)
            prompt = pipe.asked([Segment("text", utterance.text)], ["speech"])
            assert prompt is not None
            ((made,),) = pipe.generate([prompt.segments], ["speech"], how, {"speech": LIMIT})
            found.append((Job("run", ask_json("/v1/run", wanted)), made.content))
    for word in ("call anna", "turn off the light"):
        wanted = {"input": word, "response_format": "flac"}
        content = sounds.content(pipe.speak(word), "flac")
        found.append((Job("speech", ask_json("/v1/audio/speech", wanted)), content))
    return found


def right(kind: str, body: bytes, wanted: Any) -> bool:
    """Whether an answer is the offline one."""
    if kind == "speech":
        return bool(body == wanted)
    if kind == "events":
        lines = body.decode().split("\n\n")
        return bool(json.loads(lines[-3].removeprefix("data: "))["text"] == wanted)
    told = json.loads(body)
    if kind == "run":
        return bool(told["produced"][0]["ids"] == wanted)
    return bool(told == wanted if kind == "json" else told["text"] == wanted)


def nonsense(dice: random.Random) -> bytes:
    """A request that must be refused."""
    long = base64.b64encode(dice.randbytes(3000)).decode()
    return dice.choice(
        [
            ask_json("/v1/run", {"outputs": ["smell"]}),
            ask_json("/v1/run", {"given": [{"tower": "speech", "content": long}], "outputs": ["text"]}),
            ask_json("/v1/audio/speech", {"input": ""}),
            ask_form("/v1/audio/transcriptions", dice.randbytes(500)),
            post("/v1/run", "application/json", b"{"),
            post("/v1/run", "text/plain", b"{}"),
            post("/v1/nowhere", "application/json", b"{}"),
            b"GET /v1/run HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
            dice.randbytes(100) + b"\r\n\r\n",
        ]
    )  # fmt: skip


def size(pid: int) -> dict[str, int]:
    """What a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "rss_mb": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
    }


async def soak(port: int, pid: int, work: list[tuple[Job, Any]], count: int) -> dict[str, Any]:
    """Sends them; returns what came, and what the process held along the way."""
    seen: Counter[str] = Counter()
    held, seconds = list[dict[str, int]](), list[float]()
    turn = iter(range(count))
    began = time.monotonic()

    async def client(number: int) -> None:
        dice = random.Random(number)
        for at in turn:
            if at % max(1, count // 12) == 0:
                held.append(size(pid))
            lot = dice.random()
            if lot < NONSENSE:
                status = (await ask(port, Job("nonsense", nonsense(dice)))).status
                seen[f"nonsense {status}"] += 1
            elif lot < NONSENSE + ABORTS:
                job, _ = dice.choice(work)
                await ask(port, job, leave_after_s=dice.uniform(0.0, 0.3))
                seen["left"] += 1
            else:
                job, wanted = dice.choice(work)
                found = await ask(port, job)
                seconds.append(found.seconds)
                same = found.status == 200 and right(job.kind, found.body, wanted)
                seen[f"{job.kind} {'right' if same else f'wrong {found.status}'}"] += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    held.append(size(pid))
    return {
        "seen": dict(sorted(seen.items())),
        "held": held,
        "took_s": time.monotonic() - began,
        "p50_s": sorted(seconds)[len(seconds) // 2],
        "p99_s": sorted(seconds)[int(0.99 * len(seconds))],
    }


def rows(port: int) -> float:
    """Rows and places in use, as the server tells."""
    answer = asyncio.run(ask(port, Job("metrics", b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")))  # fmt: skip
    lines = answer.body.decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(("zipper_rows ", "zipper_queue ")))  # fmt: skip


@pytest.mark.slow
def test_every_answer_is_right_and_nothing_grows() -> None:
    count = int(os.environ.get("ZIPPER_SOAK", "400"))
    work = asked(Pipeline.from_pretrained())
    with running("zipper", "") as (port, pid):
        asyncio.run(soak(port, pid, work, 150))  # what the first requests make once
        found = asyncio.run(soak(port, pid, work, count))
        until = time.monotonic() + 30
        while rows(port):
            assert time.monotonic() < until, "a row stays taken"
            time.sleep(0.2)
        found["after"] = size(pid)
    print(json.dumps(found))
    seen = found["seen"]
    assert not [what for what in seen if "wrong" in what], seen
    assert not [what for what in seen if what.startswith("nonsense") and what[9] not in "40"], seen
    assert sum(seen.values()) == count
    first, after = found["held"][0], found["after"]
    assert after["rss_mb"] <= first["rss_mb"] + 64 and after["files"] <= first["files"], found
    assert after["threads"] <= first["threads"], found


def pictures(dice: random.Random) -> Iterator[bytes]:
    """Files that are no picture, damaged, or far too large for what they hold."""
    square = io.BytesIO()
    Image.fromarray(many.pictures()[0]).save(square, "PNG")
    good = square.getvalue()
    for _ in range(150):
        place, size = dice.randrange(len(good)), dice.randrange(1, 40)
        yield good[:place] + dice.randbytes(size) + good[place + size :]
    for cut in range(1, 41):
        yield good[: len(good) * cut // 41]
    for side in (5_000, 30_000, 2**31 - 1):  # says so
        yield good[:16] + struct.pack(">II", side, side) + good[24:]
    yield from (b"", b"\0", b"<svg/>", b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4", b"#!/bin/sh\n")


@pytest.mark.slow
def test_hostile_files_through_http(tmp_path: Path) -> None:
    """Sounds and pictures that break readers: typed refusals or answers, no memory, and others are
    answered meanwhile."""
    hostile = [*heard.headers(), *heard.streams(tmp_path), *heard.others(tmp_path)]
    files = [file.content for file in [*hostile, *heard.mutations(tmp_path), *heard.bombs()]]
    small = [content for content in files if len(content) < 25_000_000]
    assert len(small) >= 400
    looked_at = [*pictures(random.Random(0))]
    assert len(looked_at) >= 200
    many.pipe().save_pretrained(tmp_path / "many", include=["text", "picture", "motion", "protein"])
    with running("zipper", str(tmp_path / "many")) as (port, pid):
        good = ask_json("/v1/run", {"given": [], "outputs": ["text"], "limits": {"text": 2}})
        for _ in range(20):
            asyncio.run(ask(port, Job("good", good)))
        idle, most, seen, waited = size(pid)["rss_mb"], 0, Counter[int](), list[float]()
        for number, content in enumerate([*small, *looked_at]):
            if number < len(small):
                sent = ask_form("/v1/audio/transcriptions", content)
            else:
                coded = base64.b64encode(content).decode()
                given = [{"tower": "picture", "content": coded}]
                sent = ask_json("/v1/run", {"given": given, "outputs": ["text"]})
            found = asyncio.run(ask(port, Job("hostile", sent)))
            seen[found.status] += 1
            assert found.status in (200, 400, 413, 422), (number, found)
            if found.status != 200:
                assert json.loads(found.body)["error"]["code"], number
            most = max(most, size(pid)["rss_mb"])
            if number % 10 == 0:
                waited.append(asyncio.run(ask(port, Job("good", good))).seconds)
    print(json.dumps({"seen": dict(seen), "idle_mb": idle, "most_mb": most, "good_s": max(waited)}))
    assert most <= idle + 512


async def _trickle(port: int) -> None:
    """An upload of a byte a second."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post("/v1/run", "application/json", b" " * 1000)[:-990])
    with suppress(ConnectionError):
        while True:
            await writer.drain()
            await asyncio.sleep(1.0)
            writer.write(b" ")


async def _silent(port: int) -> None:
    """A connection that says nothing, or half of what it wants and no more."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/run HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n")
    writer.write_eof()
    await asyncio.sleep(3600)


async def _knock(port: int) -> None:
    """Websockets that are opened again and again."""
    head = b"GET /v1/realtime HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    head += b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    open_ones = []
    while True:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        open_ones = [*open_ones[-20:], writer]
        await asyncio.sleep(0.1)


async def _asked(port: int, job: Job, count: int) -> float:
    """The time that 99 of 100 requests, one after the other, stay below."""
    found = sorted([(await ask(port, job)).seconds for _ in range(count)])
    return found[int(0.99 * count)]


@pytest.mark.slow
def test_clients_that_misuse_their_lines_keep_nobody_waiting() -> None:
    """In turn: alone, beside 120 of them, alone ... The ratio of 99 percentiles, its median."""
    given = [{"tower": "text", "content": "call anna"}]
    wanted = {"given": given, "outputs": ["speech"], "limits": {"speech": 6}}
    job = Job("run", ask_json("/v1/run", wanted))

    async def rounds(port: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(5):
            alone = await _asked(port, job, 60)
            bad = [asyncio.create_task(_trickle(port)) for _ in range(60)]
            bad += [asyncio.create_task(_silent(port)) for _ in range(55)]
            bad += [asyncio.create_task(_knock(port)) for _ in range(5)]
            await asyncio.sleep(1.0)
            beside = await _asked(port, job, 60)
            for one in bad:
                one.cancel()
            await asyncio.gather(*bad, return_exceptions=True)
            found.append((alone, beside))
        return found

    with running("zipper", "") as (port, _):
        found = asyncio.run(rounds(port))
    ratios = sorted(beside / alone for alone, beside in found)
    print(json.dumps({"alone_and_beside_s": found, "ratios": ratios}))
    assert ratios[len(ratios) // 2] < 2, ratios
