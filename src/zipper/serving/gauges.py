"""What is counted of a server, for Prometheus."""

from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as MEDIA_TYPE

from zipper.serving.worker import Worker

__all__ = ["MEDIA_TYPE", "Gauges"]

BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@final
class Gauges:
    """The numbers of one server; two in a process do not share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens = Counter(
            "zipper_tokens", "Tokens produced", ["tower"], registry=self.registry
        )
        self._refused = Counter(
            "zipper_refusals", "Requests refused", ["status", "code"], registry=self.registry
        )
        self._first = Histogram(
            "zipper_first_token_seconds",
            "From taking a request to its first token",
            ["tower"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._sound = Histogram(
            "zipper_first_sound_seconds",
            "From taking a request to the first sound of its stream",
            buckets=BUCKETS_S,
            registry=self.registry,
        )

    def watch(self, worker: Worker) -> None:
        """Tells rows in use and requests that wait, as they are when somebody looks."""
        rows = Gauge("zipper_rows", "Requests that run", registry=self.registry)
        rows.set_function(lambda: worker.load[0])
        queue = Gauge("zipper_queue", "Requests that wait for a row", registry=self.registry)
        queue.set_function(lambda: worker.load[1])

    def made(self, tower: str, tokens: int) -> None:
        """Tokens were produced."""
        self._tokens.labels(tower).inc(tokens)

    def waited(self, tower: str, seconds: float) -> None:
        """A request has its first token, of this tower."""
        self._first.labels(tower).observe(seconds)

    def sounded(self, seconds: float) -> None:
        """A stream has its first sound."""
        self._sound.observe(seconds)

    def refused(self, status: int, code: str) -> None:
        """A request got no answer."""
        self._refused.labels(str(status), code).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
