"""A server on a loopback socket that sends exactly the bytes it is told to: for answers that no decent server gives."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Line:
    """One connection. `path` is the request's; `asked` are the ranges of all requests so far; `over` ends the test."""

    connection: socket.socket
    over: threading.Event
    path: str = ""
    asked: list[tuple[int, int] | None] = field(default_factory=list)

    def send(self, *parts: bytes | str) -> None:
        for part in parts:
            self.connection.sendall(part.encode() if isinstance(part, str) else part)


Answer = Callable[[Line, tuple[int, int] | None], None]  # to the range asked for; returning keeps the line open


def head(status: int, length: int | None = None, *headers: str) -> str:
    """Status line and headers."""
    rows = [f"HTTP/1.1 {status} Whatever", *headers]
    if length is not None:
        rows.append(f"Content-Length: {length}")
    return "\r\n".join(rows) + "\r\n\r\n"


def partial(data: bytes, asked: tuple[int, int] | None) -> str:
    """Headers of a right 206."""
    assert asked is not None
    return head(206, asked[1] - asked[0], f"Content-Range: bytes {asked[0]}-{asked[1] - 1}/{len(data)}")


class Hangup(Exception):
    """Close the connection now."""


@contextlib.contextmanager
def scripted(answer: Answer) -> Iterator[tuple[str, list[tuple[int, int] | None]]]:
    """Serve with `answer`; yields (URL, list that grows by the range of each request)."""
    asked: list[tuple[int, int] | None] = []
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()
    lines: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        line = Line(connection, over, "", asked)
        with contextlib.suppress(OSError, Hangup), connection:
            text = b""
            while not over.is_set():
                while b"\r\n\r\n" not in text:
                    block = connection.recv(65536)
                    if not block:
                        return
                    text += block
                request, _, text = text.partition(b"\r\n\r\n")
                line.path = request.split()[1].decode()
                match = re.search(rb"\r\nRange: bytes=(\d+)-(\d+)", request)
                asked.append((int(match[1]), int(match[2]) + 1) if match else None)
                answer(line, asked[-1])

    def accept() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                connection, _ = listener.accept()
                lines.append(connection)
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
