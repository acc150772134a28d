"""What a web server can do wrong: answers to one request for bytes of a file, by name."""

from __future__ import annotations

import contextlib
import gzip
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.client.scripted import Answer, Hangup, Line, head


@dataclass(frozen=True)
class Asked:
    """A request: the file's right bytes and the range that was asked for (all of it without one)."""

    line: Line
    data: bytes
    range: tuple[int, int] | None

    @property
    def span(self) -> tuple[int, int]:
        return self.range or (0, len(self.data))

    @property
    def body(self) -> bytes:
        return self.data[slice(*self.span)]

    @property
    def status(self) -> int:
        return 200 if self.range is None else 206

    @property
    def content_range(self) -> list[str]:
        """The right header, where there must be one."""
        start, stop = self.span
        return [] if self.range is None else [f"Content-Range: bytes {start}-{stop - 1}/{len(self.data)}"]

    def answer(self, *body: bytes | str, length: int | str | None = None, headers: Iterable[str] = ()) -> None:
        """Right status and range, and what is given for the rest; no Content-Length without `length`."""
        rows = [*self.content_range, *headers]
        self.line.send(head(self.status, None, *rows, *([] if length is None else [f"Content-Length: {length}"])))
        self.line.send(*body)


Attack = Callable[[Asked], None]


def honest(asked: Asked) -> None:
    asked.answer(asked.body, length=len(asked.body))


def end(attack: Attack) -> Attack:
    """The attack, and then the connection is closed."""

    def ends(asked: Asked) -> None:
        attack(asked)
        raise Hangup

    return ends


def raw(*parts: bytes | str) -> Attack:
    return end(lambda asked: asked.line.send(*parts))


def headers(*rows: str) -> Attack:
    return end(lambda asked: asked.answer(asked.body, length=len(asked.body), headers=rows))


def chunked(*parts: bytes | str) -> Attack:
    return end(lambda asked: asked.answer(*parts, headers=["Transfer-Encoding: chunked"]))


def drip(asked: Asked, parts: Iterable[bytes | str], pause_s: float = 0.002) -> None:
    """Send without end, or until the test is over."""
    for part in parts:
        if asked.line.over.wait(pause_s):
            raise Hangup
        asked.line.send(part)


def slowly(begin: Attack, part: bytes, pause_s: float = 0.005) -> Attack:
    """The beginning of an answer, and then `part` again and again."""

    def goes_on(asked: Asked) -> None:
        begin(asked)
        drip(asked, itertools.repeat(part), pause_s)

    return goes_on


def answer_and_one_more(asked: Asked) -> None:
    """The answer to this request, and at once one that is to be taken for the next request's."""
    extra = bytes(len(asked.data))
    asked.answer(asked.body, length=len(asked.body))
    asked.line.send(head(200, len(extra)), extra)


def answer_of_another_request(asked: Asked) -> None:
    """The range of the request before this one on the same line: all answers are one late."""
    before = next((span for span in reversed(asked.line.asked[:-1]) if span), None)
    start, stop = before or (0, 1)
    rows = f"Content-Range: bytes {start}-{stop - 1}/{len(asked.data)}"
    asked.line.send(head(206, stop - start, rows), asked.data[start:stop])


def shifted(asked: Asked) -> None:
    asked.answer((asked.data + asked.data)[asked.span[0] + 1 :][: len(asked.body)], length=len(asked.body))


def endless(asked: Asked) -> None:
    asked.answer(asked.body)
    drip(asked, itertools.repeat(bytes(65536)), 0)


def endless_chunks(asked: Asked) -> None:
    asked.answer(headers=["Transfer-Encoding: chunked"])
    drip(asked, itertools.repeat(b"10000\r\n" + bytes(65536) + b"\r\n"), 0)


CLOSE = "Connection: close"
MANY = [f"X-{i}: {'y' * 60_000}" for i in range(99)]
LONG = "1" * 5000

ATTACKS: dict[str, Attack] = {
    "all of it, other bytes": end(lambda a: a.line.send(head(200, len(a.data)), bytes(len(a.data)))),
    "all of it, too long": end(lambda a: a.line.send(head(200, len(a.data) + 9), a.data, bytes(9))),
    "all of it, empty": end(lambda a: a.line.send(head(200, 0))),
    "a byte late": shifted,
    "another request's range": answer_of_another_request,
    "an answer too many": answer_and_one_more,
    "range of another file": headers("Content-Range: bytes 0-0/1"),
    "two ranges": end(lambda a: a.line.send(head(206, len(a.body), *a.content_range, "Content-Range: bytes 0-1/2"))),
    "huge range": raw(head(206, 1, f"Content-Range: bytes 0-{LONG}/{LONG}"), b"x"),
    "unknown unit": raw(head(206, 1, "Content-Range: leaves 0-0/1"), b"x"),
    "416 inside the file": raw(head(416, 0, "Content-Range: bytes */1")),
    "clean end in the middle": end(lambda a: a.answer(a.body[: len(a.body) // 2])),
    "end before a byte": end(lambda a: a.answer(length=len(a.body))),
    "end in the middle": end(lambda a: a.answer(a.body[: len(a.body) // 2], length=len(a.body))),
    "gzip": end(lambda a: a.answer(gzip.compress(a.body), headers=["Content-Encoding: gzip"])),
    "gzip of gzip": headers("Content-Encoding: gzip, gzip"),
    "encoding that is none": headers("Content-Encoding: qdeploy"),
    "redirect to itself": end(lambda a: a.line.send(head(302, 0, f"Location: {a.line.path}"))),
    "redirect to a file": raw(head(301, 0, "Location: file:///etc/passwd")),
    "redirect without a place": raw(head(308, 0)),
    "endless": endless,
    "endless chunks": endless_chunks,
    "length below 0": end(lambda a: a.answer(a.body[:-1], length=-1)),
    "length of words": end(lambda a: a.answer(a.body[:-1], length="many")),
    "length beyond all": end(lambda a: a.answer(a.body, length="9" * 30)),
    "length of 5000 digits": end(lambda a: a.answer(a.body[:-1], length=LONG)),
    "two lengths": end(lambda a: a.answer(a.body[:5], length=5, headers=[f"Content-Length: {len(a.body)}"])),
    "length and chunks": end(
        lambda a: a.answer(b"1\r\n", a.body[:1], b"\r\n0\r\n\r\n", length=9, headers=["Transfer-Encoding: chunked"])
    ),
    "chunk of words": chunked("zz\r\n", bytes(40)),
    "chunk below 0": chunked("-5\r\n", bytes(40)),
    "chunk beyond all": chunked("f" * 40 + "\r\n", bytes(40)),
    "chunk of 60,000 digits": chunked("0" * 60_000 + "1\r\nx\r\n"),
    "chunk without an end": chunked("5;" + "x" * 100_000),
    "chunk without its line end": chunked("1\r\nx1\r\nx0\r\n\r\n"),
    "chunks that stop": chunked("5\r\nxx"),
    "no chunks at all": chunked("0\r\n\r\n"),
    "unknown transfer coding": end(lambda a: a.answer(b"", headers=["Transfer-Encoding: snow"])),
    "100 headers of 60,000 bytes": raw("HTTP/1.1 200 OK\r\n" + "\r\n".join(MANY) + "\r\n\r\n"),
    "1,000 headers": raw("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 1000 + "\r\n"),
    "a header of 200,000 bytes": raw("HTTP/1.1 200 OK\r\nX: " + "y" * 200_000 + "\r\n\r\n"),
    "header that is none": raw("HTTP/1.1 206 OK\r\nno colon here\r\n\r\nx"),
    "bytes that are no text": raw(b"HTTP/1.1 206 \xff\x00\xfe\r\n\xff\xfe: \x00\r\n\r\nx"),
    "status 99999": raw("HTTP/1.1 99999 No\r\n\r\n"),
    "status of words": raw("HTTP/1.1 yes OK\r\n\r\n"),
    "status below 0": raw("HTTP/1.1 -20 OK\r\n\r\n"),
    "HTTP/9.9": raw("HTTP/9.9 200 OK\r\n\r\n"),
    "no HTTP": raw("SSH-2.0-OpenSSH_9.6\r\n"),
    "line without an end": raw("HTTP/1.1 200 " + "O" * 100_000),
    "hang up": raw(),
    "multipart": end(
        lambda a: a.line.send(head(206, len(a.body), "Content-Type: multipart/byteranges; boundary=x"), a.body)
    ),
    "204": raw(head(204)),
    "304": raw(head(304)),
    "401": raw(head(401, 0, "WWW-Authenticate: Basic")),
    "429, come back in a year": raw(head(429, 0, "Retry-After: 31536000")),
    "500": raw(head(500, 5), b"sorry"),
    "a switch of protocols": raw(head(101, None, "Upgrade: h2c")),
}

# these only end by the rate floor: bytes come, but not those that were asked for, or too few
SLOW: dict[str, Attack] = {
    "a byte now and then": slowly(lambda a: a.answer(length=len(a.body)), b"x", 0.7),
    "silence": slowly(lambda a: None, b""),
    "silence in the body": slowly(lambda a: a.answer(a.body[:3], length=len(a.body)), b""),
    "100 Continue for ever": slowly(lambda a: None, b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a header that never ends": slowly(lambda a: a.line.send("HTTP/1.1 200 OK\r\nX: "), b"y"),
    "trailers for ever": slowly(
        lambda a: a.answer(f"{len(a.body):x}\r\n", a.body, "\r\n0\r\n", headers=["Transfer-Encoding: chunked"]),
        b"X: y\r\n",
    ),
}


def serving_files(root: Path, attack: Attack = honest, hits: Callable[[str], bool] = lambda path: True) -> Answer:
    """A server of the files below `root` that does `attack` to the paths that `hits` names."""

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        path = root / line.path.lstrip("/")
        if not path.is_file():
            line.send(head(404, 0))
            return
        with contextlib.suppress(BrokenPipeError):
            (attack if hits(line.path) else honest)(Asked(line, path.read_bytes(), asked))

    return answer
