"""Two replicas by Ray Serve: the same answers and streams as one server, and one of them is killed
under load."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
httpx = pytest.importorskip("httpx2")

from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.serving import sounds
from zipper.serving.deployment import deployment

pytestmark = pytest.mark.slow
SENTENCE = "send forty two oranges to vienna"


#: As somebody writes it who deploys.
PROGRAM = """
import sys
import ray
from ray import serve
from zipper.serving.deployment import deployment

port, paths = int(sys.argv[1]), sys.argv[2]
environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, runtime_env=environment)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(deployment(replicas=(2, 2), key="secret"), name="zipper", route_prefix="/")
print("serving", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(port), os.environ.get("PYTHONPATH", "")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin and program.stdout
        try:
            said = iter(program.stdout.readline, "")
            assert any(line.strip().endswith("serving") for line in said), program.wait()
            drain = threading.Thread(target=lambda: [*said], daemon=True)
            drain.start()
            yield f"http://127.0.0.1:{port}"
        finally:
            program.stdin.close()
            program.wait(60)


def replicas() -> list[int]:
    """Process ids."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if place.read_bytes().startswith(b"ray::ServeReplica:zipper:zipper"):
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found


def test_two_replicas_answer_as_one_and_stream(url: str) -> None:
    pipe = Pipeline.from_pretrained()
    spoken = sounds.content(pipe.speak(SENTENCE), "wav")
    with httpx.Client(
        base_url=url, headers={"authorization": "Bearer secret"}, timeout=120
    ) as client:
        assert len(replicas()) == 2
        for _ in range(6):
            files = {"file": ("a", spoken)}
            answer = client.post("/v1/audio/transcriptions", files=files)
            assert answer.json() == {"text": SENTENCE}
        wanted = {"input": SENTENCE, "response_format": "pcm"}
        with client.stream("POST", "/v1/audio/speech", json=wanted) as streamed:
            parts = [len(part) for part in streamed.iter_raw()]
        assert len(parts) > 2, "sound comes while it is made, through the proxy too"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


def test_only_what_ran_on_a_killed_replica_is_lost(url: str) -> None:
    """A request that was killed in the middle is an error; every other one is answered."""
    headers = {"authorization": "Bearer secret"}
    wanted = {"given": [{"tower": "text", "content": SENTENCE}], "outputs": ["speech"]}
    before = replicas()

    async def load() -> list[Any]:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:

            async def ask(number: int) -> Any:
                await asyncio.sleep(number * 0.1)
                try:
                    return (await client.post("/v1/run", json=wanted)).status_code
                except httpx.HTTPError as error:
                    return type(error).__name__

            tasks = [asyncio.create_task(ask(number)) for number in range(60)]
            await asyncio.sleep(2.0)
            running = sum(not task.done() for task in tasks[:21])
            os.kill(before[0], signal.SIGKILL)
            return [running, *await asyncio.gather(*tasks)]

    running, *found = asyncio.run(load())
    lost = [status for status in found if status != 200]
    print(json.dumps({"requests": len(found), "ran": running, "lost": lost}))
    assert len(lost) <= running, lost
    until = time.monotonic() + 90
    while len(replicas()) < 2 or before[0] in replicas():
        assert time.monotonic() < until, "no replica came in its place"
        time.sleep(0.5)
    assert httpx.post(f"{url}/v1/run", json=wanted, headers=headers, timeout=120).is_success


def test_numbers_of_replicas_that_are_none() -> None:
    with pytest.raises(ZipperError, match="2 to 1 replicas"):
        deployment(replicas=(2, 1))
