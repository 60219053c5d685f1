"""What surrounds the page: its address, the size of requests, and the folder of all temporary files."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from filelock import FileLock

from srl_utils.errors import UserError
from srl_utils.files import LOCK

PREFIX = "srl-vae-app-"
"""Begins the name of the folder of an app's temporary files."""
LAST_PORT = 2**16 - 1
FRAMES = 2**20
"""Bytes around the files of a request: their names and separators."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def check_address(host: str, port: int | None) -> None:
    """Raise a UserError if the app cannot listen there, before the models are loaded.

    Args:
        host: a name or an address.
        port: None for any.
    """
    if port is not None and port > LAST_PORT:
        raise UserError(f"a port is at most {LAST_PORT}, got {port}", parameter="port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"'{host}' is no address of this machine", parameter="host") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except OSError as error:
            raise _refused(error, host, port) from None


def _refused(error: OSError, host: str, port: int | None) -> UserError:
    """Return what the user can do about an address that the system refuses."""
    if port is None or error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"'{host}' is no address of this machine", parameter="host")
    if error.errno == errno.EADDRINUSE:
        return port_in_use(port)
    return UserError(f"{port} cannot be used: {os.strerror(error.errno or 0)}", parameter="port")


def port_in_use(port: int | None) -> UserError:
    """Return the error for a port of the user's choice, or for all that are tried by default (None)."""
    problem = "no port from 7860 on is free; choose another" if port is None else f"{port} is in use; choose another"
    return UserError(problem, parameter="port")


class BodyLimit:
    """Middleware of ASGI that refuses a request with a large body, or one of unknown size, before it is kept.

    Args:
        app: gets the other requests.
        most: bytes of the files in a request.
    """

    def __init__(self, app: Application, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        headers = dict(scope.get("headers", ()))
        if int(headers.get(b"content-length", 0)) > self.most + FRAMES:
            await _refuse(413, f"Together, files may have {self.most // 2**20} MB.", receive, send)
        elif b"transfer-encoding" in headers:
            await _refuse(411, "A request has to tell its size.", receive, send)
        else:
            await self.app(scope, receive, send)


async def _refuse(status: int, reason: str, receive: Receive, send: Send) -> None:
    """Answer with a line, after the rest of the body: a browser that still sends would not read the answer."""
    while (await receive()).get("more_body"):
        pass
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": reason.encode()})


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which ends services and containers, raise KeyboardInterrupt within, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Keep all temporary files of this process in one folder within, and delete it at the end.

    Folders of killed processes are deleted first: nobody holds their locks.
    """
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder, before = Path(name), tempfile.tempdir
        with FileLock(folder / LOCK):
            delete_left_over(folder)
            tempfile.tempdir = name
            try:
                yield folder
            finally:
                tempfile.tempdir = before


def delete_left_over(mine: Path) -> None:
    """Delete the folders of this user beside `mine` whose processes have ended."""
    owner = mine.lstat().st_uid  # another user's folder could hold a link in place of the lock
    for folder in mine.parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # such as the timeout of a lock that is held
            if folder != mine and folder.lstat().st_uid == owner:
                with FileLock(folder / LOCK).acquire(timeout=0):
                    rmtree(folder)
