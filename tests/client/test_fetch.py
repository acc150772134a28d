from __future__ import annotations

import gzip
import itertools
import random

import pytest

from qdeploy.client.fetch import GoneError, Patience, Source, Span, split_url
from qdeploy.errors import FetchError
from tests.client.scripted import Answer, Hangup, Line, head, partial, scripted

DATA = random.Random(0).randbytes(200_000)
QUICK = Patience(timeout_s=5, attempts=3, pause_s=0.001)
Range = tuple[int, int] | None


def fetch(
    url: str, *wanted: tuple[int, int], patience: Patience = QUICK
) -> tuple[dict[tuple[int, int], bytes], Source]:
    """Bytes by wanted range, and the source with its counts."""
    got = dict.fromkeys(wanted, b"")
    with Source(url, patience) as source:
        for offset, chunk in source.ranges("objects/x", len(DATA), [Span(*w) for w in wanted]):
            key = next(w for w in wanted if w[0] <= offset < w[1])
            assert offset == key[0] + len(got[key])
            got[key] += chunk
    return got, source


def check(url: str, *wanted: tuple[int, int]) -> Source:
    got, source = fetch(url, *wanted)
    assert all(data == DATA[start:stop] for (start, stop), data in got.items())
    return source


def test_ranges_come_over_one_connection() -> None:
    lines = set()

    def answer(line: Line, asked: Range) -> None:
        lines.add(id(line))
        line.send(partial(DATA, asked), DATA[slice(*(asked or (0, 0)))])

    with scripted(answer) as (url, asked):
        source = check(url, (0, 10), (50, 150_000), (199_999, 200_000))
    assert asked == [(0, 10), (50, 150_000), (199_999, 200_000)]
    assert (len(lines), source.requests, source.received, source.skipped) == (1, 3, 149_961, 0)


def test_a_server_without_ranges_is_read_through_once() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(head(200, len(DATA)), DATA)

    with scripted(answer) as (url, asked):
        source = check(url, (1000, 2000), (3000, 100_000))
    assert len(asked) == 1
    assert (source.received, source.skipped) == (100_000, 2000)


def test_a_chunked_body_is_read() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(head(200, None, "Transfer-Encoding: chunked"), f"{len(DATA):x}\r\n", DATA, "\r\n0\r\n\r\n")

    with scripted(answer) as (url, _):
        check(url, (5, 100_000))


def test_a_dropped_line_is_taken_up_where_it_ended() -> None:
    def answer(line: Line, asked: Range) -> None:
        assert asked is not None
        line.send(partial(DATA, asked), DATA[asked[0] : min(asked[1], asked[0] + 30_000)])
        if asked[1] - asked[0] > 30_000:
            raise Hangup

    with scripted(answer) as (url, asked):
        source = check(url, (100, 100_000))
    assert asked == [(100, 100_000), (30_100, 100_000), (60_100, 100_000), (90_100, 100_000)]
    assert source.received == 99_900


def test_passing_trouble_is_waited_for() -> None:
    numbers = itertools.count()

    def answer(line: Line, asked: Range) -> None:
        if next(numbers) < 2:
            line.send(head(503, 0))
        else:
            line.send(partial(DATA, asked), DATA[:10])

    with scripted(answer) as (url, asked):
        check(url, (0, 10))
    assert len(asked) == 3


def test_a_vanished_server_says_to_resume() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(partial(DATA, asked))
        raise Hangup

    with scripted(answer) as (url, asked):
        with pytest.raises(FetchError, match="run the same command again to resume"):
            fetch(url, (0, 10))
    assert len(asked) == 3
    with pytest.raises(FetchError, match="run the same command again to resume"):
        fetch(url, (0, 10))  # nobody listens now


def send(*parts: bytes | str, close: bool = False) -> Answer:
    def answer(line: Line, asked: Range) -> None:
        line.send(*parts)
        if close:
            raise Hangup

    return answer


CR = "Content-Range: bytes "
HOSTILE = {
    "wrong start": (send(head(206, 10, CR + "1-10/200000"), DATA[1:11]), "sent range"),
    "wrong length": (send(head(206, 11, CR + "0-10/200000"), DATA[:11]), "sent range"),
    "wrong total": (send(head(206, 10, CR + "0-9/5"), DATA[:10]), "sent range"),
    "no range": (send(head(206, 10), DATA[:10]), "sent range ''"),
    "range of words": (send(head(206, 10, CR + "a-b/c"), DATA[:10]), "sent range"),
    "several parts": (send(head(206, 10, "Content-Type: multipart/byteranges; boundary=x"), DATA[:10]), "sent range"),
    "body longer than range": (send(head(206, 99, CR + "0-9/200000"), DATA[:99]), "99 bytes follow"),
    "chunks longer than range": (
        send(head(206, None, CR + "0-9/200000", "Transfer-Encoding: chunked"), "14\r\n", DATA[:20], "\r\n0\r\n\r\n"),
        "more than was asked",
    ),
    "endless": (send(head(206, None, CR + "0-9/200000"), DATA[:99], close=True), "more than was asked"),
    "another size": (send(head(200, 10), DATA[:10]), "has 10 bytes, the manifest says 200000"),
    "416": (send(head(416, 0, "Content-Range: bytes */5")), "shorter than the manifest says"),
    "redirect": (send(head(302, 0, "Location: http://example.org/x")), "redirects are not followed.*example.org"),
    "gzip": (send(head(200, 99, "Content-Encoding: gzip"), gzip.compress(DATA[:10])), "'gzip' though identity"),
    "forbidden": (send(head(403, 0)), "answered 403"),
    "no content": (send(head(204)), "answered 204"),
    "bad chunk": (send(head(200, None, "Transfer-Encoding: chunked"), "zz\r\n", DATA[:20]), "not HTTP|resume"),
    "not http": (send("220 mail.example.org ESMTP\r\n", close=True), "resume"),
    "nothing": (send(close=True), "resume"),
    "endless header": (send("HTTP/1.1 200 OK\r\nX: " + "y" * 100_000, close=True), "resume"),
    "early clean end": (send(head(200, None), DATA[:5], close=True), "resume"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_refused(name: str) -> None:
    answer, match = HOSTILE[name]
    with scripted(answer) as (url, _):
        with pytest.raises(FetchError, match=match):
            fetch(url, (0, 10))


def test_an_absent_file_is_told_apart() -> None:
    with scripted(send(head(404, 0))) as (url, asked):
        with pytest.raises(GoneError, match="is not there"):
            fetch(url, (0, 10))
        with Source(url, QUICK) as source, pytest.raises(GoneError):
            source.small("release.json", 100)
    assert len(asked) == 2  # not tried again


def test_what_follows_an_answer_is_not_taken_for_the_next() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(head(200, len(DATA)), DATA)

    with scripted(answer) as (url, _), Source(url, QUICK) as source:
        for _ in range(2):
            assert b"".join(c for _, c in source.ranges("x", len(DATA), [Span(0, 10)])) == DATA[:10]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (send(head(200, 101), b"x" * 101), "has 101 bytes, at most 100"),
        (send(head(200, None), b"x" * 101, close=True), "more than the 100 bytes"),
        (send(head(200, 50), b"x" * 10, close=True), "ended early.*resume"),
        (send(head(206, 5, CR + "0-4/5"), b"x" * 5), "answered 206"),
        (send(head(200, 5, "Content-Encoding: br"), b"x" * 5), "'br' though identity"),
    ],
)
def test_small_files_are_bounded(answer: Answer, match: str) -> None:
    with scripted(answer) as (url, _), Source(url, QUICK) as source:
        with pytest.raises(FetchError, match=match):
            source.small("release.json", 100)


@pytest.mark.parametrize("length", [100, None])
def test_small_files_up_to_the_limit(length: int | None) -> None:
    with scripted(send(head(200, length), b"x" * 100, close=True)) as (url, _), Source(url, QUICK) as source:
        assert source.small("release.json", 100) == b"x" * 100


@pytest.mark.parametrize("endless", ["HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 200 OK\r\n" + "X: y\r\n"])
def test_an_answer_that_drips_for_ever_is_cut(endless: str) -> None:
    def answer(line: Line, asked: Range) -> None:
        while True:
            line.send(endless if "100" in endless else "X: y"[len(line.asked) % 4])

    impatient = Patience(timeout_s=5, attempts=3, pause_s=0.001, grace_s=0.2, floor_bytes_per_s=1e9)
    with scripted(answer) as (url, _):
        with pytest.raises(FetchError, match="slower than|resume"):
            fetch(url, (0, 10), patience=impatient)


def test_a_slow_body_is_cut() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(partial(DATA, asked), DATA[:5])  # and then silence

    impatient = Patience(timeout_s=30, attempts=1, pause_s=0.001, grace_s=0.2, floor_bytes_per_s=1e9)
    with scripted(answer) as (url, _):
        with pytest.raises(FetchError, match="came slower than"):
            fetch(url, (0, 10), patience=impatient)


def test_silence_is_not_waited_for_for_ever() -> None:
    with scripted(lambda line, asked: None) as (url, asked):
        with pytest.raises(FetchError, match="timed out.*resume"):
            fetch(url, (0, 10), patience=Patience(timeout_s=0.05, attempts=2, pause_s=0.001))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://h", ("http", "h", None, "")),
        ("https://h:8443/a/b/", ("https", "h", 8443, "/a/b")),
        ("http://[::1]:80/x", ("http", "::1", 80, "/x")),
    ],
)
def test_urls(url: str, parts: tuple[str, str, int | None, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize(
    "url",
    ["", "h:80", "file:///etc/passwd", "ftp://h/", "http://", "http://h:x/", "http://h:99999/", "http://h/?a=1",
     "http://h/#f", "http://u:p@h/", "http://h/a b", "http://h/\r\nX: y", "http://h\u00e4/", "/some/folder"],
)  # fmt: skip
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(FetchError, match="URL|leave out|encode"):
        Source(url)


def test_a_server_that_gives_a_few_bytes_a_request_is_given_up() -> None:
    def answer(line: Line, asked: Range) -> None:
        line.send(partial(DATA, asked), DATA[asked[0] : asked[0] + 5] if asked else b"")
        raise Hangup

    with scripted(answer) as (url, asked):
        with pytest.raises(FetchError, match="resume"):
            fetch(url, (0, 100_000))
    assert len(asked) == QUICK.attempts


def test_what_a_server_says_makes_one_line_of_an_error() -> None:
    with scripted(send("HTTP/1.1 yes \x1b[2J\r\n\r\n", close=True)) as (url, _):
        with pytest.raises(FetchError) as error:
            fetch(url, (0, 10))
    assert str(error.value).isprintable()
