"""The process that serves: uvicorn around the application, and a stop that lets requests end."""

import asyncio
from typing import Any, final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from zipper.serving.app import Guard

HEADERS_BYTES = 32_768
HEADERS_S = 10.0  # until the headers of a request are there
IDLE_S = 5  # of a connection between two requests
MESSAGE_BYTES = 1 << 20  # of a websocket
CONNECTIONS = 512


@final
class Impatient(H11Protocol):
    """Leaves whoever sends its headers too slowly, or none: connections are counted, and those
    that wait for nothing would keep others out."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See uvicorn."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADERS_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """See uvicorn."""
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if self._late is not None and not begun:
            self._late.cancel()
            self._late = None
        elif self._late is None and begun:
            self._late = self.loop.call_later(HEADERS_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)


@final
class Server(uvicorn.Server):
    """At the first signal no new requests are taken, and those that run end."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """See uvicorn."""
        app: Any = self.config.app
        app.service.worker.stop()
        super().handle_exit(sig, frame)


def server(app: Guard, host: str = "127.0.0.1", port: int = 8000) -> Server:
    """A server, not yet begun: `run()` blocks, and returns when it was told to stop."""
    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Impatient,
            ws="websockets-sansio",
            ws_max_size=MESSAGE_BYTES,
            ws_max_queue=4,
            lifespan="off",
            log_level="warning",
            access_log=False,  # whoever wants one has it before this server
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            h11_max_incomplete_event_size=HEADERS_BYTES,
        )
    )
