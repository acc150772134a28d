"""`python -m qdeploy.client DIR --images FILE`: a device process that needs no more than the client (see loop.py)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qdeploy.client.loop import serve_inference
from qdeploy.client.runtime import MODES, RUNTIMES
from qdeploy.errors import QDeployError


def main() -> int:
    """Exit code 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m qdeploy.client", description="Run inference; take commands.")
    parser.add_argument("folder", type=Path, help="device folder that `qdeploy pull` made")
    parser.add_argument("--images", type=Path, required=True, help=".npy, IDX (.gz), PGM, PPM or PNG")
    parser.add_argument("--labels", type=Path, help="class numbers, .npy or IDX: adds counts of correct answers")
    parser.add_argument("--runtime", choices=RUNTIMES, default="tvm")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds of rest between images")
    parser.add_argument("--mode", choices=MODES, default="swap", help="how levels change: two in memory, or a pause")
    parser.add_argument("--rate", type=float, help="most bytes a second of a climb")
    args = parser.parse_args()
    try:
        # a file object of its own: the interpreter must not wait at its end for the thread that reads commands
        commands = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8", errors="replace")
        serve_inference(
            args.folder, args.images, args.labels, commands, sys.stdout, args.runtime, args.interval, args.mode,
            args.rate,
        )  # fmt: skip
    except QDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
