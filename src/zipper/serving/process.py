"""The process that serves: uvicorn around the application, and a stop that lets requests end."""

from typing import Any, final

import uvicorn

from zipper.serving.app import Guard

HEADERS_BYTES = 32_768
IDLE_S = 5  # of a connection between two requests
CONNECTIONS = 512


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
            http="h11",  # whose limits are below
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,  # whoever wants one has it before this server
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            h11_max_incomplete_event_size=HEADERS_BYTES,
        )
    )
