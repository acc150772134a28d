"""Client processes to be killed: a host process has everything imported and forks one child for each command.

A child dies by SIGKILL from its own hand at the byte or the call that it was told, so the place is exact: byte `at` of
what its sockets receive ("net"), byte `at` of what it writes through the disk layer ("disk"), or its `at`-th call that
changes the disk ("call"; python-tuf's are seen by an audit hook). What its sockets received is noted in a trace.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kill:
    """Where to die. `late`: in the middle of a write, or only when the next byte is asked for."""

    kind: str  # net, disk, call
    at: int
    late: bool = False


@dataclass(frozen=True)
class Job:
    """One command of a client: pull, climb, drop, evict."""

    verb: str
    folder: Path
    url: str = ""
    level: str | None = None
    root: Path | None = None


@dataclass(frozen=True)
class Request:
    """One request of a child: what it asked for, and how many bytes of the body its socket received."""

    path: str
    start: int
    stop: int | None
    received: int


@dataclass
class Ended:
    """How a child ended: exit code (-9 killed), its error, its requests, and how far each kind of kill could go."""

    code: int
    error: str = ""
    requests: list[Request] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def body(self) -> int:
        """Body bytes received."""
        return sum(request.received for request in self.requests)


class Host:
    """Starts children; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.host"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, job: Job, kill: Kill | None = None) -> Ended:
        """Run a command until it ends or is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        trace = job.folder.with_name(f"{job.folder.name}.trace")
        trace.unlink(missing_ok=True)
        row = {"job": asdict(job), "kill": None if kill is None else asdict(kill), "trace": trace}
        self._process.stdin.write(json.dumps(row, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the host process is gone"
        return _ended(json.loads(line)["code"], trace)


def _ended(code: int, trace: Path) -> Ended:
    found = Ended(code)
    for line in trace.read_text().splitlines() if trace.exists() else ():
        word, _, rest = line.partition(" ")
        if word == "request":
            path, start, stop = rest.split()
            found.requests.append(Request(path, int(start), None if stop == "-" else int(stop), 0))
        elif word == "body":
            last = found.requests[-1]
            found.requests[-1] = Request(last.path, last.start, last.stop, last.received + int(rest))
        elif word == "error":
            found.error += rest
        else:
            found.totals[word] = int(rest)
    return found


# --- in the child ----------------------------------------------------------------------------------------------------


def die() -> None:
    """kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


class _Tap:
    """Counts what arrives on sockets, and dies there."""

    def __init__(self, kill: Kill | None, trace: int) -> None:
        self.at = kill.at if kill is not None and kill.kind == "net" else None
        self.late = kill is not None and kill.late
        self.total, self.trace = 0, trace
        self.head: bytes | None = None  # of the answer that is awaited

    def install(self) -> None:
        real, ask = socket.socket.recv_into, http.client.HTTPConnection.request

        def request(connection: Any, method: str, url: str, *args: Any, **more: Any) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", more.get("headers", {}).get("Range", ""))
            spans = (match[1], int(match[2]) + 1) if match else (0, "-")
            os.write(self.trace, f"request {url} {spans[0]} {spans[1]}\n".encode())
            self.head = b""
            ask(connection, method, url, *args, **more)

        def recv_into(sock: socket.socket, buffer: Any, size: int = 0, flags: int = 0) -> int:
            view = memoryview(buffer).cast("B")
            want = size or len(view)
            if self.at is not None:
                if self.total >= self.at:
                    die()
                want = min(want, self.at - self.total)
            got = real(sock, view[:want], want, flags)
            self.note(bytes(view[:got]))
            if self.at is not None and self.total >= self.at and not self.late:
                die()
            return got

        http.client.HTTPConnection.request = request  # type: ignore[assignment,method-assign]
        socket.socket.recv_into = recv_into  # type: ignore[assignment,method-assign]

    def note(self, data: bytes) -> None:
        self.total += len(data)
        if self.head is not None:
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            self.head = None
        if data:
            os.write(self.trace, f"body {len(data)}\n".encode())


def _watch_disk(kill: Kill | None, folder: str, totals: dict[str, int]) -> None:
    """Count calls and bytes, and die there."""
    from qdeploy.client import disk as edge

    def step(torn: Any = None) -> None:
        totals["call"] += 1
        if kill is not None and kill.kind == "call" and totals["call"] == kill.at:
            if torn is not None and kill.late:
                torn()
            die()

    def write(real: Any, data: bytes | memoryview) -> int:
        step(lambda: real(data[: len(data) // 2]))
        if kill is not None and kill.kind == "disk" and totals["disk"] + len(data) > kill.at:
            real(data[: kill.at - totals["disk"]])
            die()
        done: int = real(data)
        totals["disk"] += done
        return done

    class Watched(edge.Disk):
        def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
            return write(lambda part: os.pwrite(fd, part, at), data)

        def write(self, fd: int, data: bytes | memoryview) -> int:
            return write(lambda part: os.write(fd, part), data)

        def fsync(self, fd: int) -> None:
            step()  # a killed process loses nothing that it wrote, so that nothing waits for the disk here

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_TRUNC)
        changes = writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if changes and str(args[0]).startswith(folder):
            step()

    edge.disk = Watched()
    sys.addaudithook(hook)


def _work(row: dict[str, Any]) -> int:
    from qdeploy.client.evict import evict
    from qdeploy.client.pull import climb, drop, pull
    from qdeploy.errors import QDeployError

    job, kill = Job(**row["job"]), None if row["kill"] is None else Kill(**row["kill"])
    folder, trace = Path(job.folder), os.open(row["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    totals = {"call": 0, "disk": 0}
    tap = _Tap(kill, trace)
    tap.install()
    _watch_disk(kill, str(folder), totals)
    try:
        if job.verb == "pull":
            pull(job.url, folder, job.level, root=None if job.root is None else Path(job.root))
        elif job.verb == "evict":
            evict(folder)
        else:
            assert job.level is not None
            {"climb": climb, "drop": drop}[job.verb](folder, job.level)
    except QDeployError as e:
        os.write(trace, f"error {e}\n".encode())
        return 2
    os.write(trace, "".join(f"{key} {n}\n" for key, n in (totals | {"net": tap.total}).items()).encode())
    return 0


def main() -> None:
    """Read jobs, answer with exit codes."""
    import tuf.ngclient  # noqa: F401

    import qdeploy.client.evict
    import qdeploy.client.pull
    import qdeploy.target  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 3
            try:
                code = _work(json.loads(line))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code}), flush=True)


if __name__ == "__main__":
    main()
