"""The built-in server beside nginx, on this machine over loopback: throughput, latency, memory, errors.

    python tools/bench_server.py [--seconds S] [--rounds N] [--case CONNECTIONS:BYTES]... [-o FILE]

Both serve the same folder from one worker process each, nginx with the configuration of docs/serving.md. A load client
in a process of its own keeps CONNECTIONS connections busy, each asking for an object of BYTES again as soon as it has
it all; it lets the kernel discard bodies unread, but reads and hashes one of 64, and counts every answer that is not
200, has another length or digest, or breaks off. The servers take turns, round by round. Prints the machine, then for
each case and server MiB/s (median of the rounds), milliseconds from request to last byte (all rounds), the server's
processor time for each answer and its largest resident memory, errors; and ours against nginx. Exits with 1 on an
error. On a machine with few cores the client takes its share of them; both servers meet the same client.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = ("256:1048576", "1000:1048576", "1000:65536")
VERIFIED = 64  # one answer of so many is read and hashed
READ = 1 << 20


# --- the load client -------------------------------------------------------------------------------------------------


class Line:
    """One connection that asks for the same object again and again."""

    def __init__(self, load: Load) -> None:
        self.load, self.start = load, 0.0
        self.socket: socket.socket | None = None

    def open(self) -> None:
        """Connect and ask; the connection itself is not timed."""
        self.socket = socket.create_connection(("127.0.0.1", self.load.port), timeout=30)
        self.socket.setblocking(False)
        self.load.poll.register(self.socket, select.EPOLLIN)
        self.load.lines[self.socket.fileno()] = self
        self.ask()

    def ask(self) -> None:
        """Send the request; it fits in an empty send buffer."""
        assert self.socket is not None
        self.digest = None if self.load.answers % VERIFIED else hashlib.sha256()
        self.head, self.left, self.start = b"", -1, time.perf_counter()
        self.socket.send(self.load.request)

    def take(self) -> bool:
        """Read what has come; True when the answer is complete. Raises OSError or ValueError when it is wrong."""
        assert self.socket is not None
        if self.left < 0:
            self._take_head()
        while self.left > 0:
            flags = 0 if self.digest is not None else socket.MSG_TRUNC
            count = self.socket.recv_into(self.load.buffer, min(READ, self.left), flags)
            if not count:
                raise ConnectionError("the answer broke off")
            if self.digest is not None:
                self.digest.update(self.load.buffer[:count])
            self.left -= count
        if self.left == 0 and self.digest is not None and self.digest.hexdigest() != self.load.sha256:
            raise ValueError("wrong bytes")
        return self.left == 0

    def _take_head(self) -> None:
        assert self.socket is not None
        # peek, so that the body stays to be discarded
        data = self.socket.recv(4096, socket.MSG_PEEK)
        if not data:
            raise ConnectionError("closed")
        end = data.find(b"\r\n\r\n")
        if end < 0:
            raise ValueError("the head came in parts")
        self.socket.recv(end + 4)
        length = re.search(rb"\r\nContent-Length: ([0-9]+)\r\n", data[: end + 4], re.I)
        if not data.startswith(b"HTTP/1.1 200 ") or length is None or int(length[1]) != self.load.size:
            raise ValueError(data[:end].decode("latin-1").splitlines()[0])
        self.left = self.load.size


class Load:
    """Keeps connections busy for a while."""

    def __init__(self, port: int, path: str, size: int, sha256: str) -> None:
        self.port, self.size, self.sha256 = port, size, sha256
        self.request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nAccept-Encoding: identity\r\n\r\n".encode()
        self.poll = select.epoll()
        self.lines: dict[int, Line] = {}
        self.buffer = memoryview(bytearray(READ))
        self.answers = 0
        self.errors: list[str] = []
        self.times: list[float] = []

    def run(self, connections: int, seconds: float) -> dict[str, Any]:
        """Answers that were complete within `seconds` after all connections stand; every one of `times` in seconds."""
        for _ in range(connections):
            try:
                Line(self).open()
            except OSError as e:
                self.errors.append(f"connect: {e}")
        start = time.perf_counter()
        self.answers, self.times = 0, []
        while (now := time.perf_counter()) < start + seconds and self.lines:
            for fd, _ in self.poll.poll(start + seconds - now):
                self._serve(self.lines[fd])
        span = time.perf_counter() - start
        for line in self.lines.values():
            assert line.socket is not None
            line.socket.close()
        return {"answers": self.answers, "seconds": span, "times": self.times, "errors": self.errors}

    def _serve(self, line: Line) -> None:
        assert line.socket is not None
        fd = line.socket.fileno()
        try:
            if line.take():
                self.answers += 1
                self.times.append(time.perf_counter() - line.start)
                line.ask()
        except BlockingIOError:
            return
        except (OSError, ValueError) as e:
            self.errors.append(str(e))
            del self.lines[fd]
            self.poll.unregister(fd)
            line.socket.close()


def client(arguments: list[str]) -> None:
    """The client's process: PORT PATH SIZE SHA256 CONNECTIONS SECONDS, JSON on standard output."""
    port, path, size, digest, connections, seconds = arguments
    print(json.dumps(Load(int(port), path, int(size), digest).run(int(connections), float(seconds))))


# --- the servers -----------------------------------------------------------------------------------------------------


def documented_nginx() -> str:
    """The configuration of docs/serving.md."""
    found = re.search(r"```nginx\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    assert found is not None
    return found[1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def nginx_files(folder: Path, tree: Path, port: int) -> Path:
    """A main file around the documented server block, with its tree and port filled in."""
    block = (
        documented_nginx().replace("/srv/qdeploy/tree", str(tree)).replace("listen 80;", f"listen 127.0.0.1:{port};")
    )
    temporary = "".join(
        f"{name}_temp_path {folder}/t; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "conf").write_text(
        f"pid {folder}/pid; error_log {folder}/error warn; worker_processes 1; {user} worker_rlimit_nofile 8192;\n"
        f"events {{ worker_connections 4096; }}\n"
        f"http {{ access_log off; {temporary}\n{block}\n}}\n"
    )
    return folder / "conf"


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[int]:
    """A server process that listens on `port`; yields its process id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(400):
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise SystemExit(f"{command[0]} ended: {process.stderr.read().decode()}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def family(pid: int) -> list[int]:
    """A process and its children: nginx's worker is one."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process of the family, in MiB."""
    found = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{one}/status").read_text()) for one in family(pid)]
    return max(int(match[1]) / 1024 for match in found if match is not None)


def cpu_seconds(pid: int) -> float:
    """User and system time of the family."""
    rows = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in family(pid)]
    return sum(int(row[11]) + int(row[12]) for row in rows) / os.sysconf("SC_CLK_TCK")


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """So many connections, each fetching an object of so many bytes."""

    connections: int
    size: int


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    pid: int


def percentile(times: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))] * 1000 if times else float("nan")


def measure(case: Case, servers: dict[str, Server], tree: Path, rounds: int, seconds: float) -> dict[str, list[Any]]:
    """The client's results of each server, a row a round."""
    data = os.urandom(case.size)
    digest = hashlib.sha256(data).hexdigest()
    (tree / "objects" / digest).write_bytes(data)
    found: dict[str, list[Any]] = {name: [] for name in servers}
    for number in range(rounds):
        for name in list(servers) if number % 2 else list(servers)[::-1]:
            server = servers[name]
            before = cpu_seconds(server.pid)
            arguments = [server.port, f"/objects/{digest}", case.size, digest, case.connections, seconds]
            command = [sys.executable, __file__, "--client", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, check=True)
            found[name].append(json.loads(done.stdout) | {"cpu": cpu_seconds(server.pid) - before})
    return found


def summary(case: Case, rows: list[Any], pid: int) -> dict[str, Any]:
    """Figures of one server in one case."""
    times = [t for row in rows for t in row["times"]]
    errors = [e for row in rows for e in row["errors"]]
    rates = [row["answers"] * case.size / row["seconds"] / 2**20 for row in rows]
    return {
        "mib_s": statistics.median(rates),
        "rounds_mib_s": [round(rate, 1) for rate in rates],
        "p50_ms": percentile(times, 0.5),
        "p99_ms": percentile(times, 0.99),
        "cpu_us": sum(row["cpu"] for row in rows) / max(1, len(times)) * 1e6,
        "peak_mib": peak_mib(pid),
        "answers": len(times),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def compare(cases: list[Case], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each case; each begins with fresh servers."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        print("nginx is not installed: ours alone")
    results = []
    for case in cases:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tree = folder / "tree"
            (tree / "objects").mkdir(parents=True)
            (tree / "release.json").write_text("{}\n")
            port = free_port()
            command = [sys.executable, "-m", "qdeploy.cli", "serve", str(tree), "--port", str(port)]
            servers = {"qdeploy": Server(port, stack.enter_context(running(command, port)))}
            if program is not None:
                port = free_port()
                command = [program, "-p", str(folder), "-c", str(nginx_files(folder, tree, port)), "-g", "daemon off;"]
                servers["nginx"] = Server(port, stack.enter_context(running(command, port)))
            found = measure(case, servers, tree, rounds, seconds)
            row: dict[str, Any] = {"connections": case.connections, "bytes": case.size}
            row |= {name: summary(case, rows, servers[name].pid) for name, rows in found.items()}
            results.append(row)
            report(row)
    return results


def report(row: dict[str, Any]) -> None:
    """Print one case."""
    print(f"{row['connections']} connections, {row['bytes']} bytes an object")
    for name in ("nginx", "qdeploy"):
        if name in row:
            r = row[name]
            first = f" ({r['first_error']})" if r["errors"] else ""
            print(
                f"  {name:8} {r['mib_s']:8.0f} MiB/s   p50 {r['p50_ms']:7.1f} ms   p99 {r['p99_ms']:7.1f} ms   "
                f"CPU {r['cpu_us']:5.0f} us   peak {r['peak_mib']:5.1f} MiB   "
                f"{r['answers']} answers, {r['errors']} errors{first}"
            )
    if "nginx" in row:
        ours, theirs = row["qdeploy"], row["nginx"]
        rate, p99 = ours["mib_s"] / theirs["mib_s"], ours["p99_ms"] / theirs["p99_ms"]
        print(f"  ours: {rate:.0%} of nginx's throughput, {p99:.2f} x its p99", flush=True)


def main() -> int:
    """Exit code 1 when any answer was wrong."""
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--case", action="append", metavar="CONNECTIONS:BYTES")
    parser.add_argument("-o", "--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from qdeploy.files import write_atomic
    from qdeploy.profile.latency import machine
    from qdeploy.profile.report import machine_line

    print(machine_line(machine()))
    cases = [Case(*map(int, text.split(":"))) for text in args.case or CASES]
    rows = compare(cases, args.rounds, args.seconds)
    if args.out is not None:
        write_atomic(args.out, (json.dumps(rows, indent=1) + "\n").encode())
    return int(any(row[name]["errors"] for row in rows for name in ("qdeploy", "nginx") if name in row))


if __name__ == "__main__":
    sys.exit(main())
