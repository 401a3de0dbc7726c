"""What a client sends, read as far as it may go and no further: bytes, JSON, forms, base64.

The body is read as a stream into memory. It ends where it becomes too large or too slow, before
anything is made of it; it never touches the disk.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, final

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from zipper.errors import ZipperError
from zipper.serving.refusals import Busy, Refused

DRAIN_S = 1.0  # for what is still on its way when a body is refused, so that the answer is read
DRAIN_BYTES = 64 << 20
MOST_FIELDS = 32
FIELD_BYTES = 1 << 18  # of one that is no file

Shape = TypeVar("Shape", bound=BaseModel)


@dataclass(frozen=True)
class Caps:
    """What one request may cost.

    body_bytes: of what is sent. upload_s: until all of it is there. seconds: of all sound in it.
    segments: given and produced, each. tokens: of one produced segment, unless it has less room.
    letters: of one text. held_bytes: of the bodies of all requests that are being answered.
    sockets: that are open at once, and idle_s until one is closed on which nothing is said.
    stalled_s: until a client that does not read its answer is left.
    """

    body_bytes: int = 26_000_000
    upload_s: float = 30.0
    seconds: float = 600.0
    segments: int = 16
    tokens: int = 4096
    letters: int = 20_000
    held_bytes: int = 256_000_000
    sockets: int = 64
    idle_s: float = 120.0
    stalled_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ZipperError(f"{name} is {value}; give more than 0.")


@final
class Held:
    """How many bytes of bodies lie in memory. All of one loop."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    def take(self, count: int) -> None:
        """Raises Busy where there is no room for so many more."""
        if self.bytes + count > self.most:
            raise Busy(f"{self.bytes:,} bytes of requests lie here already. Come again later.")
        self.bytes += count


@final
class Share:
    """What one request holds of it, given back in the end. whole: no more of its body comes."""

    def __init__(self, held: Held) -> None:
        self._held, self._mine, self.whole = held, 0, False

    def take(self, count: int) -> None:
        """As `Held.take`."""
        self._held.take(count)
        self._mine += count

    def keep(self, count: int) -> None:
        """Holds so many bytes, which lie here already, instead of what it held."""
        self._held.bytes += count - self._mine
        self._mine = count

    def give(self) -> None:
        """Gives all of it back."""
        self.keep(0)


#: Where a request's share is found.
SHARE = "zipper.share"


def check_length(headers: Mapping[str, str], caps: Caps) -> None:
    """Raises Refused for a body that says it is too large."""
    told = headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,15}", told):
        raise Refused(400, "bad_length", f"content-length {told!r:.40} is no number of bytes.")
    if int(told) > caps.body_bytes:
        raise _large(caps)


async def body(request: Request, caps: Caps) -> AsyncGenerator[bytes, None]:
    """The parts of a body. Raises Refused where it is too large or too slow."""
    try:
        check_length(request.headers, caps)
        there, deadline = 0, asyncio.get_running_loop().time() + caps.upload_s
        parts, share = request.stream(), request.scope[SHARE]
        while True:
            async with asyncio.timeout_at(deadline):
                part = await anext(parts, None)
            if part is None:
                return
            there += len(part)
            if there > caps.body_bytes:
                raise _large(caps)
            share.take(len(part))
            yield part
    except ClientDisconnect as error:
        raise Refused(499, "gone", "The client has left.") from error
    except TimeoutError as error:
        raise Refused(
            408, "slow", f"The request was not there after {caps.upload_s:g} s. Send it faster."
        ) from error


async def drain(request: Request) -> None:
    """Throws away what is still on its way: a connection that is closed before loses the answer."""
    there = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while there < DRAIN_BYTES and not request.scope[SHARE].whole:
                there += len((await request.receive()).get("body", b""))
    except TimeoutError:
        return


async def sent(request: Request, shape: type[Shape], caps: Caps) -> Shape:
    """A body of JSON of this shape. Raises Refused: 415, 400 for no JSON, 422 for another shape."""
    if media_type(request) != "application/json":
        raise _media(request, "application/json")
    content = bytearray()
    async for part in body(request, caps):
        content += part
    return parsed(bytes(content), shape)


def parsed(content: str | bytes, shape: type[Shape]) -> Shape:
    """JSON of this shape. Raises Refused: 400 for no JSON, 422 for another shape."""
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, "bad_json", f"The body is no JSON: {first['msg']}.") from error
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Refused(422, "bad_request", f"{where}: {first['msg']}.") from error


class _InMemory(MultiPartParser):
    """Files of a form, as long as a body may be, without the disk."""

    spool_max_size = 1 << 40


async def form(request: Request, caps: Caps, files: int = 1) -> FormData:
    """A form with so many files at most. Raises Refused: 415, or 400 for a form that is none."""
    if media_type(request) != "multipart/form-data":
        raise _media(request, "multipart/form-data")
    parser = _InMemory(
        Headers(raw=request.headers.raw),
        body(request, caps),
        max_files=files,
        max_fields=MOST_FIELDS,
        max_part_size=FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except (MultiPartException, FormParserError, KeyError, UnicodeError, LookupError) as error:
        raise Refused(
            400, "bad_form", f"The body is no form that can be read: {error!s:.200}."
        ) from error


async def filled(
    request: Request, shape: type[Shape], caps: Caps
) -> tuple[Shape, dict[str, bytes]]:
    """A form with a field `request` of JSON of this shape, and files by the names of their parts;
    the names that they have where they come from are not looked at. Raises Refused."""
    found = await form(request, caps, caps.segments)
    try:
        if "request" not in found:
            raise Refused(400, "bad_form", "The form has no field 'request'. Send JSON in it.")
        wanted = parsed(field(found, "request"), shape)
        files: dict[str, bytes] = {}
        for name in found:
            if name != "request":
                if len(found.getlist(name)) > 1:
                    raise Refused(400, "bad_form", f"Two parts have the name {name!r:.40}.")
                files[name] = await upload(found, name)
        return wanted, files
    finally:
        await found.close()


async def upload(found: FormData, name: str) -> bytes:
    """The file in a form. Raises Refused where there is none; its name is not looked at."""
    file = found.get(name)
    if not isinstance(file, UploadFile):
        raise Refused(400, "no_file", f"The form has no file {name!r:.40}. Send it as one.")
    content: bytes = await file.read()
    return content


def field(found: FormData, name: str, default: str = "") -> str:
    """A field of a form. Raises Refused where it is a file."""
    value = found.get(name, default)
    if not isinstance(value, str):
        raise Refused(400, "bad_form", f"{name!r} is a file; send it as a field.")
    return value


def flag(found: FormData, name: str) -> bool:
    """A field that says yes or no. Raises Refused for anything else."""
    value = field(found, name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise Refused(422, "bad_request", f"{name} is {value!r:.40}; send true or false.")
    return value in ("true", "1")


def decoded(content: str, where: str) -> bytes:
    """The bytes that stand in base64. Raises Refused for anything else, a path or a URL too:
    nothing that a client names is opened."""
    try:
        found = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            422,
            "bad_base64",
            f"{where} is not base64 ({error!s:.80}). Send the content of the file itself; paths "
            "and URLs are not opened.",
        ) from error
    if not found:
        raise Refused(422, "empty", f"{where} is empty. Send the content of a file.")
    return found


def media_type(request: Request) -> str:
    """What a body is said to be, without its options."""
    told: Any = request.headers.get("content-type", "")
    return str(told).partition(";")[0].strip().lower()


def _media(request: Request, wanted: str) -> Refused:
    told = media_type(request) or "nothing"
    return Refused(415, "media_type", f"The body is said to be {told!r:.60}; send {wanted}.")


def _large(caps: Caps) -> Refused:
    return Refused(
        413, "too_large", f"The body has more than {caps.body_bytes:,} bytes. Send less at a time."
    )
