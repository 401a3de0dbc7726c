"""What is told to a client that gets no answer: a status, and one shape for all of them. Knows
nothing of the web.
"""

from typing import Any, final

from zipper.errors import MissingExtra, NoRoom, ZipperError

#: What a status is called in the clients' own words.
KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "server_error",
}


class Busy(ZipperError):
    """The queue is full."""


class Stopping(ZipperError):
    """The server takes no new requests, those that it has taken end."""


@final
class Refused(ZipperError):
    """A request that gets no answer. status: of HTTP. code: a word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def shape(self) -> dict[str, Any]:
        """As clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "code": self.code, "param": None},
        }

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What goes with it: when to come again, and how to be let in."""
        if self.status in (429, 503):
            return [("Retry-After", "1")]
        # Basic, for browsers, which then ask for it themselves: the key is the password.
        ways = ("Bearer", 'Basic realm="zipper"') if self.status == 401 else ()
        return [("WWW-Authenticate", way) for way in ways]


def refusal(error: Exception) -> Refused:
    """What an error means for a client. What went wrong in our own code is not told."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, "busy", str(error))
    if isinstance(error, Stopping):
        return Refused(503, "stopping", str(error))
    if isinstance(error, MissingExtra):
        return Refused(503, "not_installed", str(error))
    if isinstance(error, NoRoom):
        return Refused(422, "no_room", str(error))
    if isinstance(error, ZipperError):
        return Refused(422, "unprocessable", str(error))
    return Refused(500, "internal", "Something went wrong here, and it is not the request.")
