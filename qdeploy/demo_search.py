"""The demo's search: which subnet of the shipped run is most accurate under a limit in time and one in bytes, here?

Accuracy is predicted from the scores that ship with the run. Latency is not known of this machine, so the shape of it
is taken from subnets that were measured on another one (they ship too), and a line through four subnets measured here
corrects it; download likewise. The margin of the pick is the error of that line on subnets left out. What is picked is
built and measured; if it breaks a limit, the search learns from that and picks again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.bundle.write import write_bundle
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.data import Dataset
from qdeploy.errors import ModelError
from qdeploy.export import export_onnx
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256, write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.profile.timing import timed
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.calibrate import CALIBRATION_BATCH
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.search.costs import Costs
from qdeploy.search.device import DeviceModel, LinearModel
from qdeploy.search.encoding import Encoding
from qdeploy.search.evolve import Evolution
from qdeploy.search.geometry import geometry
from qdeploy.search.measure import KIB, tree_bytes
from qdeploy.search.nsga2 import Nsga2
from qdeploy.search.objectives import parse_bounds, parse_objectives
from qdeploy.search.predictor import AccuracyPredictor
from qdeploy.search.problem import Problem, Scored, Values
from qdeploy.search.samples import NAME, read_samples
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.target import Target

MEASURED = "measured.jsonl"  # subnets of the run that were measured on some machine, as a search folder has them
POPULATION, GENERATIONS, SEED = 100, 40, 0
PASSES = 3  # a latency is the least of so many medians: other processes only ever add to it
ATTEMPTS = 3
MARGIN = 0.5  # at most: with a larger one the limits would leave no subnet
KEYS = ("latency_ms", "download_kib")
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """The shipped run: its folder, name and network, and calibration images uint8 [n, C, H, W]."""

    folder: Path
    name: str
    net: SimulatedNet
    calibration: np.ndarray
    target: Target


def cost(model: Path, artifact: Path) -> dict[str, float]:
    """{"latency_ms", "download_kib"} of a level, measured on this machine."""
    loaded, params = load_artifact(artifact), arrays(load_model(model)[1])
    latency = min(timed(loaded, params, float("inf"))["latency"]["median"] for _ in range(PASSES))
    with tempfile.TemporaryDirectory(prefix="qdeploy-demo-") as where:
        write_bundle(read_ladder([model]), [artifact], Path(where) / "tree")
        return {"latency_ms": latency, "download_kib": tree_bytes(Path(where) / "tree") / KIB}


def build(run: Run, spec: SubnetSpec, folder: Path, images: int) -> tuple[Path, Path]:
    """Extract `spec` with `images` calibration images, export and compile it: its ONNX file and its artifact."""
    model, artifact = folder / "level.onnx", folder / "artifact"
    export_onnx(extract(run.net, spec, run.name, run.calibration[:images], None), model)
    compile_model(model, run.target, artifact)
    return model, artifact


def accuracy(model: Path, artifact: Path, test: Dataset) -> float:
    """Top-1 in per cent of the compiled program on `test`."""
    loaded = load_artifact(artifact)
    packed = loaded.prepare(arrays(load_model(model)[1]))
    inputs = test.images.astype(np.float32) / np.float32(255)
    right = sum(
        int(loaded.run(image[None], packed).argmax()) == label for image, label in zip(inputs, test.labels, strict=True)
    )
    return 100.0 * right / len(test)


class Corrected:
    """Costs here of genomes: `elsewhere`'s, each corrected by the line through what was measured here."""

    def __init__(self, elsewhere: DeviceModel, genomes: np.ndarray, here: Sequence[Mapping[str, float]]) -> None:
        self.elsewhere = elsewhere
        said = elsewhere(genomes)
        self.lines = {key: LinearModel(_line(said[key]), np.array([row[key] for row in here])) for key in KEYS}

    def __call__(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """{key: float64 [n]}."""
        said = self.elsewhere(genomes)
        return {key: line(_line(said[key])) for key, line in self.lines.items()}

    @property
    def margins(self) -> dict[str, float]:
        """Relative errors on measured subnets left out: of the lines, or of `elsewhere` where those are larger."""
        bands = {key: max(line.band, self.elsewhere.models[key].band) for key, line in self.lines.items()}
        return {key: min(band, MARGIN) for key, band in bands.items()}


def _line(values: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(values)), values], 1)


class DemoSearch:
    """One search; `ladder`: (spec, ONNX file, artifact) of levels that are built already, two or more."""

    def __init__(self, run: Run, ladder: Sequence[tuple[SubnetSpec, Path, Path]], out: Path, echo: Echo) -> None:
        self.run, self.out, self.echo, self.began = run, out, echo, time.monotonic()
        self.encoding = Encoding(run.net.space)
        self.costs = Costs(self.encoding, geometry(run.net, self.encoding, run.calibration.shape[1:]))
        lines = read_bytes(run.folder / MEASURED, "the measured subnets", ModelError).splitlines()
        rows = [parse_json(line, MEASURED, ModelError) for line in lines]
        self.elsewhere, self.where = DeviceModel(self.costs, rows), str(rows[0]["machine"])
        digest = sha256(read_bytes(run.folder / "quantized.checkpoint", "the checkpoint", ModelError))[:12]
        self.samples = read_samples(run.folder / NAME, self.encoding, digest)
        x = self.encoding.one_hot(self.samples.genomes)
        self.predictor = AccuracyPredictor(x, self.samples.accuracy, SEED, curve=False)
        self.echo(self.predictor.advice())
        ends = np.stack([np.zeros(len(self.encoding), np.int64), self.encoding.counts - 1])
        self.genomes = np.concatenate([ends, self.encoding.genomes([spec for spec, _, _ in ladder])])
        self.here = []
        for name, spec in zip(("smallest", "largest"), self.encoding.specs(ends), strict=True):
            echo(f"search: measuring the {name} subnet on this machine")  # times do not depend on values
            self.here.append(cost(*build(run, spec, out / name, CALIBRATION_BATCH)))
        self.here += [cost(model, artifact) for _, model, artifact in ladder]
        self.limits = {key: _between(self.here[0][key], self.here[1][key]) for key in KEYS}

    def problem(self, costs: Corrected) -> Problem:
        """Accuracy and latency under both limits, each less its margin."""
        targets = [self.run.target.name]

        def predict(genomes: np.ndarray) -> Values:
            found = {f"{key}@{targets[0]}": values for key, values in costs(genomes).items()}
            return found | {"accuracy": self.predictor(self.encoding.one_hot(genomes))[0]}

        limits = [f"{key}={self.limits[key] / (1 + costs.margins[key]):.6g}" for key in KEYS]
        objectives = tuple(parse_objectives(["accuracy", "latency"], targets))
        return Problem(self.encoding, objectives, tuple(parse_bounds(limits, targets)), predict)

    def attempt(self, number: int) -> tuple[Scored, dict[str, Any], dict[str, float]]:
        """Search, pick, build, measure: the members, the pick and the margins."""
        costs = Corrected(self.elsewhere, self.genomes, self.here)
        problem = self.problem(costs)
        strategy = Nsga2(problem, POPULATION, SEED + number, self.genomes[:1])
        members = Evolution(strategy, GENERATIONS, self.out / f"round-{number + 1}.npz", number).run(self.echo)
        problem.check_reachable(members)
        if doubt := self.predictor.doubt(self.encoding.one_hot(members.genomes[members.front])):
            self.echo(doubt)
        best = members.front[int(members.minimised[members.front, 0].argmin())]
        genome = members.genomes[best : best + 1]
        said = {key: float(values[0]) for key, values in costs(genome).items()} | {
            "accuracy": -float(members.minimised[best, 0])
        }
        spec = self.encoding.specs(genome)[0]
        self.echo(f"search: building and measuring subnet {spec.id}, said to take {said['latency_ms']:.4f} ms")
        folder = self.out / f"pick-{number + 1}"
        write_atomic(folder / "spec.json", canonical_json(spec.to_json()))
        measured = cost(*build(self.run, spec, folder, len(self.run.calibration)))
        self.genomes, self.here = np.concatenate([self.genomes, genome]), [*self.here, measured]
        kept = all(measured[key] <= self.limits[key] for key in KEYS)
        pick = {"spec_id": spec.id, "folder": str(folder), "predicted": said, "measured": measured, "kept": kept}
        return members, pick, costs.margins

    def __call__(self, test: Dataset) -> dict[str, Any]:
        """Search until a pick keeps both limits, at most ATTEMPTS times; what the report shows."""
        attempts: list[dict[str, Any]] = []
        while len(attempts) < ATTEMPTS and not (attempts and attempts[-1]["kept"]):
            members, pick, margins = self.attempt(len(attempts))
            attempts.append(pick | {"margins": margins})
        last = attempts[-1]
        folder = Path(last["folder"])
        last["measured"]["accuracy"] = accuracy(folder / "level.onnx", folder / "artifact", test)
        front = members.front[np.argsort(members.minimised[members.front, 1])]
        rows = [{"accuracy": -float(a), "latency_ms": float(b)} for a, b in members.minimised[front].tolist()]
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "population": POPULATION,
            "generations": GENERATIONS,
            "samples": self.predictor.quality.to_json(),
            "limits": self.limits,
            "measured_elsewhere": self.where,
            "ends": {name: row for name, row in zip(("smallest", "largest"), self.here, strict=False)},
            "front": rows,
            "attempts": attempts,
            "pick": last,
        }


def _between(low: float, high: float) -> float:
    """The middle, to three digits."""
    return float(f"{(low + high) / 2:.3g}")


def search_text(search: Mapping[str, Any]) -> str:
    """What came of a search, in one sentence."""
    pick, limits = search["pick"], search["limits"]
    measured, said = pick["measured"], pick["predicted"]
    broken = [attempt["spec_id"] for attempt in search["attempts"] if not attempt["kept"]]
    return (
        f"search under {limits['latency_ms']:g} ms and {limits['download_kib']:g} KiB: subnet {pick['spec_id']} takes "
        f"{measured['latency_ms']:.4f} ms and {measured['download_kib']:.1f} KiB here (said: {said['latency_ms']:.4f}, "
        f"{said['download_kib']:.1f}), {measured['accuracy']:.2f}% on the test images; "
        f"it {'keeps both limits' if pick['kept'] else 'BREAKS a limit'}"
        + (f", after {len(broken)} that did not" if pick["kept"] and broken else "")
        + f"; {search['population']} x {search['generations']} evaluations, {search['seconds']} s"
    )
