"""Metrics of a run: RUN/metrics.jsonl and metrics.csv; RUN/tensorboard if TensorBoard is installed.

One row an epoch: phase, epoch, the last step's losses by name (the norm of its gradient and the epoch's greatest
where a method bounds it), and images a second. A resumed run appends. The CSV has a row a figure
(phase, epoch, name, value), since phases and methods have different losses.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

from qdeploy.errors import DeviceError

CSV_HEAD = ("phase", "epoch", "name", "value")


def log_metrics(run: Path, phase: str, epoch: int, losses: dict[str, float], rate: float) -> None:
    """Append one epoch; `rate` in images a second. Raises DeviceError when the disk is full."""
    row = {"phase": phase, "epoch": epoch, "loss": losses, "images_per_second": round(rate, 1)}
    figures = losses | {"images_per_second": row["images_per_second"]}
    try:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
        with (run / "metrics.csv").open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(CSV_HEAD)
            writer.writerows((phase, epoch, name, value) for name, value in figures.items())
        _tensorboard(run, phase, epoch, figures)
    except OSError as e:
        raise DeviceError(f"cannot write the metrics in {run}: {e.strerror or e}") from e


def _tensorboard(run: Path, phase: str, epoch: int, figures: dict[str, Any]) -> None:
    """The same figures as TensorBoard scalars named PHASE/NAME; nothing where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        for name, value in figures.items():
            writer.add_scalar(f"{phase}/{name}", value, epoch)
