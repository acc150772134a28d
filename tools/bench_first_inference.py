"""Time to the first inference over a thin link: the base of a ladder against an int8 download by the same codec.

    python tools/bench_first_inference.py [--rate BITS] [--model FILE]... [-o JSON]

From each QDQ model a ladder of 2, 4 and 8 bits is cut and bundled, and beside it a bundle of the 8-bit level alone;
both hold the same compiled artifact. A device of each, a process of its own with an empty folder, pulls through a
proxy on the loopback interface that passes RATE bits a second (a token bucket over all bytes from the server, headers
too) and infers once on the compiled artifact. Printed are, for both, body bytes (those that the server logged, which
must be those that the client read, the artifact among them) and seconds from the first request to the first output
(Python and TVM are loaded before);
then the share of the base in seconds and in bytes. Exits with 1 if the shares are more than 5 points apart, or if
ResNet-18's base takes more than 35% of its int8 download's seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_swap import ROOT, ladder_tree

from qdeploy.errors import QDeployError
from qdeploy.files import write_atomic

MODELS = ("resnet18", "mobilenetv2", "demo")
SEGMENT = 1448  # bytes passed on at once, as one packet of Ethernet holds
BURST = 2 * SEGMENT  # bytes that a link at rest passes at once
MOST_SHARE, MOST_APART = 0.35, 0.05


class TokenBucket:
    """`rate` bytes a second, at most `BURST` saved up; shared by all connections of a link."""

    def __init__(self, rate: float) -> None:
        self.rate, self.tokens, self.seen = rate, float(BURST), time.monotonic()
        self.lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may pass."""
        with self.lock:
            now = time.monotonic()
            self.tokens = min(BURST, self.tokens + (now - self.seen) * self.rate) - count
            self.seen, wait = now, max(0.0, -self.tokens / self.rate)
        time.sleep(wait)


def pass_on(source: socket.socket, target: socket.socket, bucket: TokenBucket | None) -> None:
    """Copy until the end of `source`; then close both."""
    with contextlib.suppress(OSError):
        while data := source.recv(SEGMENT):
            if bucket is not None:
                bucket.take(len(data))
            target.sendall(data)
    for line in (source, target):
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def shaped(url: str, rate: float) -> Iterator[str]:
    """A proxy of `url` that passes `rate` bytes a second from the server; yields its URL."""
    parts, bucket = urlsplit(url), TokenBucket(rate)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SEGMENT)  # what waits there has passed already

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((parts.hostname, parts.port))
                threading.Thread(target=pass_on, args=(near, far, None), daemon=True).start()
                threading.Thread(target=pass_on, args=(far, near, bucket), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{parts.path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def publish(model: Path, folder: Path) -> None:
    """Trees `base` (the ladder) and `int8` (its top level alone) below `folder`, with the same compiled artifact."""
    from qdeploy.bundle.write import write_bundle
    from qdeploy.ladder import read_ladder

    paths = ladder_tree(model, folder, folder / "base")
    write_bundle(read_ladder(paths[-1:]), [folder / "artifact"], folder / "int8")


def first_inference(url: str, folder: Path) -> dict[str, Any]:
    """In a process of its own that has loaded the runtime: pull the lowest level and infer once."""
    import tvm  # noqa: F401

    from qdeploy.client.pull import pull
    from qdeploy.client.runtime import LevelRunner

    start = time.perf_counter()
    report = pull(url, folder, unsigned=True)
    pulled = time.perf_counter()
    runner = LevelRunner(folder, "tvm")
    output = runner.run(np.zeros((1, *runner.sample), np.float32))
    if not np.isfinite(output).all():
        raise SystemExit("the output is not finite")
    seconds = time.perf_counter() - start
    return {"level": report.level, "received": report.received, "seconds": seconds, "pull_s": pulled - start}


def measure(tree: Path, folder: Path, rate: float) -> dict[str, Any]:
    """Serve `tree` over the link to a device in `folder`."""
    from qdeploy.serve.app import serving
    from qdeploy.serve.byte_log import read_byte_log

    log = folder.with_suffix(".log")
    with serving(tree, log=log) as url, shaped(url, rate) as link:
        command = [sys.executable, __file__, "--measure", link, str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found["sent"] = sum(row.sent for row in read_byte_log(log))
    if found["sent"] != found["received"]:
        raise SystemExit(f"the server sent {found['sent']} bytes, the client read {found['received']}")
    return found


def compare(model: Path, rate: float) -> dict[str, Any]:
    """One row: bytes and seconds of base and int8."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        publish(model, folder)
        row: dict[str, Any] = {"model": model.name, "bits_a_second": 8 * rate}
        for side in ("base", "int8"):
            row[side] = measure(folder / side, folder / f"{side}-device", rate)
        artifact = sum(path.stat().st_size for path in (folder / "artifact").iterdir())
    row["artifact_bytes_unpacked"] = artifact
    row["seconds_share"] = row["base"]["seconds"] / row["int8"]["seconds"]
    row["bytes_share"] = row["base"]["sent"] / row["int8"]["sent"]
    return row


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    sides = "; ".join(
        f"{side} {row[side]['sent']:,} bytes, {row[side]['seconds']:.2f} s ({row[side]['pull_s']:.2f} of it pull)"
        for side in ("base", "int8")
    )
    return f"{row['model']}: {sides}; base {row['seconds_share']:.1%} of seconds, {row['bytes_share']:.1%} of bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="QDQ file; default: " + ", ".join(MODELS))
    parser.add_argument("--rate", type=float, default=1e6, help="bits a second of the link (default: 1,000,000)")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(first_inference(args.measure[0], Path(args.measure[1]))))
        return
    from qdeploy.profile.latency import machine
    from qdeploy.profile.report import machine_line

    models = args.model or [ROOT / "build" / "bench" / f"{name}.qdq.onnx" for name in MODELS]
    if missing := [path for path in models if not path.is_file()]:
        raise SystemExit(f"{missing[0]} is missing: make it by tools/bench_compile.py --networks {','.join(MODELS)}")
    print(f"{machine_line(machine())}; link of {args.rate:,.0f} bits a second")
    rows = []
    for model in models:
        try:
            rows.append(compare(model, args.rate / 8))
        except QDeployError as e:
            raise SystemExit(f"{model}: {e}") from e
        print(line(rows[-1]), flush=True)
    if args.out:
        write_atomic(args.out, (json.dumps(rows, indent=1) + "\n").encode())
    apart = max(abs(row["seconds_share"] - row["bytes_share"]) for row in rows)
    share = max((row["seconds_share"] for row in rows if row["model"].startswith(MODELS[0])), default=0.0)
    if apart > MOST_APART or share > MOST_SHARE:
        raise SystemExit(f"above the bounds: shares {apart:.1%} apart, {MODELS[0]} {share:.1%} of seconds")


if __name__ == "__main__":
    main()
