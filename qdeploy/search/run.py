"""`qdeploy search`: sample, predict, search, measure the front for real, learn from it, and again.

DIR: search.json (what was asked for), specs.jsonl and scores.jsonl (as `qdeploy evaluate` has them), TARGET.jsonl
(measured on the device), foretold.jsonl (predicted before it was measured), geometry.npz, round-N.npz (its state),
history.csv, front.json, front.csv, levels/TARGET.json, report.html and *.png.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import ModelError, RecipeError
from qdeploy.evaluate import RunCopy, evaluate, packed_images, read_specs, spec_lines
from qdeploy.extract import calibration_set
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256, write_atomic
from qdeploy.quant.calibrate import CALIBRATION_BATCH
from qdeploy.quant.network import QuantNet
from qdeploy.search import folder as names
from qdeploy.search.baselines import Allocation, Genetic, RandomSearch
from qdeploy.search.chain import Fleet, measured_chain
from qdeploy.search.costs import Costs
from qdeploy.search.device import DeviceModel
from qdeploy.search.encoding import Encoding
from qdeploy.search.evolve import COLUMNS, Evolution, Frame
from qdeploy.search.front import NAME, Bar, Foretold, Front, Member, agreement, table
from qdeploy.search.geometry import geometry
from qdeploy.search.measure import Builder, Building, Device, LocalDevice, Measurements, Row, Spread
from qdeploy.search.nsga2 import Nsga2
from qdeploy.search.objectives import near, parse_bounds, parse_objectives
from qdeploy.search.predictor import AccuracyPredictor
from qdeploy.search.problem import Problem, Question, Scored, Values
from qdeploy.search.samples import read_samples
from qdeploy.search.strategy import Strategy
from qdeploy.search.table import networks
from qdeploy.space import SubnetSpec
from qdeploy.subnet import check_integer
from qdeploy.target import Target
from qdeploy.train.run import load_run
from qdeploy.workers import Workers

Echo = Callable[[str], None]
Ends = dict[str, tuple[np.ndarray, np.ndarray]]  # {Measured.key: (low, high) [n] each}
STRATEGIES = ("nsga2", "random", "genetic", "allocation")
IMPROVED = 40  # generations that a fleet's chains are searched on for after a measurement
DRAWN = 8  # random subnets measured on a device beside those that show every kernel


@dataclass(frozen=True)
class Request:
    """What is asked of a search. `limits` are upper and `floors` lower ones; `samples`: specs scored before the first
    round; `measured`: subnets of the front that are scored and measured after each round; `mirror`: as `Judge`'s."""

    objectives: tuple[str, ...]
    limits: tuple[str, ...]
    targets: tuple[Target, ...]
    strategy: str = "nsga2"
    population: int = 800
    generations: int = 500
    rounds: int = 1
    samples: int = 200
    measured: int = 8
    seed: int = 0
    floors: tuple[str, ...] = ()
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RecipeError(f"unknown strategy {self.strategy!r}: {near(self.strategy, STRATEGIES)}")
        targets = [target.name for target in self.targets]
        if len(set(targets)) < len(targets):
            raise RecipeError("a target is given twice")
        parse_objectives(self.objectives, targets)
        parse_bounds(self.limits, targets, self.floors)


class Search:
    """One search folder; `run` goes on where a killed one stopped.

    `devices`: what each target is measured on, by its name; "" is for the others (default: this process).
    `workers`: score specs and build subnets in place of this process.
    `scored`: samples of the run (qdeploy.search.samples), which count among those scored before the first round.
    """

    def __init__(
        self, run: Path, request: Request, seeds: Sequence[SubnetSpec], out: Path, data_dir: Path | None,
        echo: Echo, devices: Mapping[str, Device] | None = None, workers: Workers | None = None,
        scored: Path | None = None,
    ) -> None:  # fmt: skip
        self.run_folder, self.request, self.out = run, request, out
        self.data_dir, self.echo, self.workers = data_dir, echo, workers
        self.devices = dict(devices or {"": LocalDevice()})
        targets = [target.name for target in request.targets]
        self.objectives = tuple(parse_objectives(request.objectives, targets))
        self.bounds = tuple(parse_bounds(request.limits, targets, request.floors))
        self.recipe, self.net = load_run(run)
        self.encoding = Encoding(self.net.space)
        self.known = self.encoding.genomes(seeds)
        used = [*self.objectives, *(bound.what for bound in self.bounds)]
        self.scores = any(one.quantity.maximised for one in used)
        self.targets = request.targets if any(one.quantity.device for one in used) else ()
        if self.targets:
            check_integer(self.net)
        self.digest = sha256(read_bytes(run / "quantized.checkpoint", "the checkpoint", ModelError))[:12]
        wanted = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(request).items()}
        wanted |= {"targets": [_identity(target) for target in request.targets]}
        wanted |= {"space": self.net.space.id, "run": self.digest, "seeds": [spec.id for spec in seeds]}
        held = None if scored is None else read_samples(scored, self.encoding, self.digest)
        images = (self.recipe.data.held_out or 0) * (2 if request.mirror else 1)
        if held is not None and held.images != images:
            raise RecipeError(
                f"{scored} holds scores on {held.images} images, and this search scores on {images}: "
                + ("leave --mirror out" if request.mirror else "add --mirror, or leave --scored out")
            )
        wanted |= {"scored": None if held is None else sha256(held.to_bytes())[:12]}
        names.claim(out, wanted)
        self.given = self.known[:0]
        if held is not None:
            self.given = held.genomes
            if not (out / names.SCORES).exists():
                write_atomic(out / names.SPECS, spec_lines(self.encoding.specs(held.genomes)))
                write_atomic(out / names.SCORES, b"".join(canonical_json(row) for row in held.rows(self.encoding)))

    # ---- what is known ---------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Tables, first samples, first measurements."""
        # what is measured hardly depends on values: few images move a download by less than 0.01%
        calibration = calibration_set(self.recipe, self.data_dir).images[:CALIBRATION_BATCH]
        found = names.kept_geometry(self.out / names.GEOMETRY)
        if found is None:
            self.echo(f"reading {self.encoding.shape_count} shapes of {len(self.encoding.layers)} layers")
            found = geometry(self.net, self.encoding, calibration.shape[1:])
            names.keep_geometry(self.out / names.GEOMETRY, found)
        self.costs = Costs(self.encoding, found)
        random = np.random.default_rng(self.request.seed)
        ends = np.stack([np.zeros(len(self.encoding), np.int64), self.encoding.counts - 1])
        wanted = max(0, self.request.samples - len(self.given))
        drawn = [self.given, self.known, self.encoding.canonical(ends), self.encoding.spread(wanted // 2, random)]
        drawn.append(self.encoding.sample(wanted - wanted // 2, random))
        self.samples = self.encoding.unlike(np.concatenate(drawn), self.known[:0])
        if self.scores:
            self.score(self.samples)
        self.measurements = {
            target.name: Measurements(
                self.out / f"{target.name}.jsonl",
                Builder(self.net, self.recipe.name, calibration, target),
                self.devices.get(target.name, self.devices[""]),
                self.spread(calibration, target),
            )
            for target in self.targets
        }
        showing = networks(self.encoding, found.shifted)
        extra = self.encoding.spread(DRAWN, random)
        self.measure(self.encoding.unlike(np.concatenate([showing, extra]), showing[:0]))

    def spread(self, calibration: np.ndarray, target: Target) -> Spread | None:
        """What builds subnets elsewhere; None without workers."""
        if self.workers is None:
            return None
        making = Building(RunCopy.of(self.run_folder), self.recipe.name, packed_images(calibration), target)
        return partial(self.workers.map, making)

    def score(self, genomes: np.ndarray) -> None:
        """Score specs for real, those that are scored already not again."""
        path = self.out / names.SPECS
        held = read_specs(path) if path.exists() else []
        fresh = [spec for spec in self.encoding.specs(genomes) if spec not in set(held)]
        if fresh:
            write_atomic(path, spec_lines([*held, *fresh]))
        scores = self.out / names.SCORES
        rows = evaluate(self.run_folder, path, scores, self.data_dir, self.echo, self.workers, self.request.mirror)
        self.accuracy = {row["spec_id"]: float(row["accuracy"]) for row in rows}
        self.scored = self.encoding.genomes([SubnetSpec.from_json(row["spec"]) for row in rows])

    def measure(self, genomes: np.ndarray) -> None:
        """Measure specs on every target."""
        specs = self.encoding.specs(genomes)
        for target, found in self.measurements.items():
            found.measure(specs, partial(self._measured_one, target))

    def _measured_one(self, target: str, row: Row) -> None:
        count = len(self.measurements[target].rows)
        self.echo(f"{target}: subnet {count} measured, {row['latency_ms']:.4f} ms")

    # ---- a round ---------------------------------------------------------------------------------------------------

    def problem(self) -> Problem:
        """Predictors of all that is known now."""
        parts: list[Callable[[np.ndarray], Values]] = [self.costs]
        self._bars: list[Callable[[np.ndarray], Ends]] = []
        if self.scores:
            values = np.array([self.accuracy[spec.id] for spec in self.encoding.specs(self.scored)])
            predictor = AccuracyPredictor(self.encoding.one_hot(self.scored), values, self.request.seed)
            self.echo(predictor.advice())
            parts.append(lambda genomes: {"accuracy": predictor(self.encoding.one_hot(genomes))[0]})
            self._bars.append(partial(_accuracy_bars, predictor, self.encoding))
        for target, found in self.measurements.items():
            model = DeviceModel(self.costs, list(found.rows.values()))
            self.echo(f"{target}: {len(found.rows)} subnets measured; left out one by one: {model.advice()}")
            parts.append(partial(_of_target, model, target))
            self._bars.append(partial(_device_bars, model, target))
        return Problem(self.encoding, self.objectives, self.bounds, partial(_all_of, parts))

    def bars(self, genomes: np.ndarray) -> list[dict[str, Bar]]:
        """Error bars of what the last `problem` predicts, of each genome: of accuracy one standard deviation."""
        ends = {key: pair for part in self._bars for key, pair in part(genomes).items()}
        rows = zip(*(zip(low.tolist(), high.tolist(), strict=True) for low, high in ends.values()), strict=True)
        if not ends:
            return [{} for _ in genomes]
        return [
            {k: (low, high if np.isfinite(high) else None) for k, (low, high) in zip(ends, row, strict=True)}
            for row in rows
        ]

    def asked(self, problem: Problem) -> Problem | Fleet:
        """What is searched: subnets, or where bounds name several targets chains of levels."""
        return Fleet.of(problem) if len(problem.targets) > 1 else problem

    def strategy(self, problem: Problem | Fleet, seeds: np.ndarray, round_: int) -> Strategy:
        """The way to search that was asked for."""
        arguments = (problem, self.request.population, self.request.seed + round_, seeds)
        simple: dict[str, type[Strategy]] = {"nsga2": Nsga2, "random": RandomSearch, "genetic": Genetic}
        if self.request.strategy in simple:
            return simple[self.request.strategy](*arguments)
        if not isinstance(self.net, QuantNet):
            raise RecipeError("strategy allocation shares out the bit planes of a run of method vertical: use nsga2")
        if isinstance(problem, Fleet):
            raise RecipeError("strategy allocation serves one device class: use nsga2 for limits of several targets")
        return Allocation(problem, *arguments[1:], *allocation_tables(self.net, self.encoding))

    def check_reachable(self, problem: Question) -> None:
        """Refuse a limit that even the least genome breaks, before hours are spent."""
        if not self.bounds:
            return
        random = np.random.default_rng(self.request.seed)
        least = np.zeros((1, len(problem.encoding)), np.int64)
        seen = problem.score(np.concatenate([least, problem.encoding.spread(1000, random)]))
        hopeless = (seen.violations > 0).all(0) & (seen.violations.argmin(0) == 0)
        if hopeless.any():
            problem.check_reachable(seen)

    def round(self, number: int, seeds: np.ndarray | None) -> Scored:
        """Search, then score and measure a spread part of the front; returns the members. `seeds`: known ones."""
        problem = self.problem()
        asked = self.asked(problem)
        self.check_reachable(asked)
        if seeds is None:
            seeds = self.known
            if self.request.strategy != "random":
                seeds = np.concatenate([self.known, self.samples[-16:]])
            seeds = asked.encoding.alike(seeds) if isinstance(asked, Fleet) else seeds
        path = self.out / f"round-{number + 1}.npz"
        evolution = Evolution(self.strategy(asked, seeds, number), self.request.generations, path, number)
        members = evolution.run(self.echo)
        self.history += evolution.history
        asked.check_reachable(members)
        count = -(-self.request.measured // max(1, len(problem.targets)))
        genomes = self.subnets(asked, members.genomes[spread_part(members, count)])
        self.foretell(number, problem, genomes)
        self.learn(genomes)
        return members

    def subnets(self, asked: Problem | Fleet, genomes: np.ndarray) -> np.ndarray:
        """The subnets, each once, that genomes of what is asked consist of."""
        if isinstance(asked, Fleet):
            genomes = asked.encoding.levels(genomes).reshape(-1, len(self.encoding))
        return self.encoding.unlike(genomes, self.known[:0])

    def learn(self, genomes: np.ndarray) -> None:
        """Score and measure specs for real."""
        if self.scores and len(genomes):
            self.score(genomes)
        self.measure(genomes)

    def foretell(self, number: int, problem: Problem, genomes: np.ndarray) -> None:
        """Write down what is predicted of subnets before they are measured, so that it can be compared honestly."""
        path = self.out / names.FORETOLD
        rows = [] if not path.exists() else read_rows(path)
        if not any(row["round"] == number for row in rows):
            values, specs, bars = problem.predict(genomes), self.encoding.specs(genomes), self.bars(genomes)
            for i, spec in enumerate(specs):
                said = {key: float(column[i]) for key, column in values.items()}
                rows.append({"round": number, "spec": spec.to_json(), "predicted": said, "bars": bars[i]})
            write_atomic(path, b"".join(canonical_json(row) for row in rows))
        self.foretold = rows

    def run(self) -> Front:
        """All rounds; writes and returns the front."""
        self.prepare()
        self.history: list[list[float]] = []
        seeds: np.ndarray | None = None
        for number in range(self.request.rounds):
            members = self.round(number, seeds)
            seeds = members.genomes[members.front]
        problem = self.problem()
        asked = self.asked(problem)
        genomes = self.subnets(asked, members.genomes)
        front = self.front(problem, genomes)
        self.write(front)
        if isinstance(asked, Fleet):
            self.fleet(members.genomes)
            front = self.front(self.problem(), genomes)
            self.write(front)
        return front

    def fleet(self, genomes: np.ndarray) -> None:
        """Write a level for each device class: they nest, and each keeps its class's limits as measured."""
        for target, genome in measured_chain(self.problem, genomes, self.known_values, self.learn, self.improved):
            spec = self.encoding.specs(genome[None])[0]
            write_atomic(self.out / "levels" / f"{target}.json", canonical_json(spec.to_json()))
            values = self.measured(spec, {})
            said = ", ".join(f"{key} {values[key]:.4g}" for key in values if key.endswith(f"@{target}"))
            said += f", accuracy {values['accuracy']:.2f}" if self.scores else ""
            self.echo(f"level for {target}: {spec.id}, {said}")

    def improved(self, fleet: Fleet, genomes: np.ndarray) -> np.ndarray:
        """Chains after some more generations, from `genomes`."""
        strategy = self.strategy(fleet, genomes, self.request.rounds)
        for _ in range(min(IMPROVED, self.request.generations)):
            strategy.step()
        return strategy.members.genomes

    def known_values(self) -> tuple[np.ndarray, Values]:
        """Canonical genomes that were scored and measured on every target, and their values."""
        specs = [SubnetSpec.from_json(row["spec"]) for row in self.measurements[self.targets[0].name].rows.values()]
        found = [(spec, values) for spec in specs if (values := self.measured(spec, {}))]
        names_ = list(found[0][1]) if found else []
        return self.encoding.genomes([s for s, _ in found]), {k: np.array([v[k] for _, v in found]) for k in names_}

    # ---- results ---------------------------------------------------------------------------------------------------

    def measured(self, spec: SubnetSpec, predicted: dict[str, float]) -> dict[str, float]:
        """All values of a spec that was scored and measured on every target; empty for any other."""
        found = dict(predicted)
        if self.scores:
            if spec.id not in self.accuracy:
                return {}
            found["accuracy"] = self.accuracy[spec.id]
        for target, known in self.measurements.items():
            if spec.id not in known.rows:
                return {}
            row = known.rows[spec.id]
            found |= {f"{key}@{target}": float(row[key]) for key in ("latency_ms", "download_kib", "peak_memory_kib")}
        return found

    def front(self, problem: Problem, subnets: np.ndarray) -> Front:
        """Measured subnets that nothing measured dominates, then those of the last round that are predicted only."""
        again = problem.score(subnets)
        last = again.genomes[again.front]
        known = self.scored if self.scores else subnets[:0]
        genomes = self.encoding.unlike(np.concatenate([known, last]), known[:0])
        values, specs, bars = problem.predict(genomes), self.encoding.specs(genomes), self.bars(genomes)
        rows = []
        for i, spec in enumerate(specs):
            predicted = {key: float(column[i]) for key, column in values.items()}
            rows.append(Member(spec, predicted, self.measured(spec, predicted), bars[i]))
        real = [i for i, row in enumerate(rows) if row.measured]
        kept: list[Member] = []
        if real:
            table_ = {key: np.array([rows[i].measured[key] for i in real]) for key in values}
            signs = [-1.0 if one.quantity.maximised else 1.0 for one in self.objectives]
            minimised = np.stack([s * table_[one.key] for s, one in zip(signs, self.objectives, strict=True)], 1)
            scored = Scored(genomes[real], minimised, problem.violations(table_, len(real)))
            kept = [rows[real[i]] for i in scored.front]
        ids = {spec.id for spec in self.encoding.specs(last)}
        kept += [row for row in rows if not row.measured and row.spec.id in ids]
        keys = tuple(one.key for one in self.objectives)
        return Front(self.net.space.id, self.digest, keys, tuple(t.name for t in self.targets), tuple(kept))

    def summary(self, front: Front) -> str:
        """What was asked for, and how each round's predictions fared, which is also said."""
        compared = ["accuracy"] if self.scores else []
        compared += [f"latency_ms@{target.name}" for target in self.targets]
        known = []
        for row in self.foretold:
            spec = SubnetSpec.from_json(row["spec"])
            if measured := self.measured(spec, row["predicted"]):
                known.append(Foretold(row["round"], spec.id, row["predicted"], measured))
        rounds = agreement(known, front, compared)
        for line in rounds:
            self.echo(line)
        limits = ", ".join(f"{bound.what.key} {bound.sign} {bound.limit:g}" for bound in self.bounds) or "no limits"
        text = f"{self.recipe.name}: {self.request.strategy}, {limits}; run {self.digest}, space {self.net.space.id}."
        return text + "".join(f" {line[0].upper()}{line[1:]}." for line in rounds)

    def write(self, front: Front) -> None:
        """front.json, front.csv, history.csv."""
        write_atomic(self.out / NAME, front.to_bytes())
        write_atomic(self.out / "front.csv", csv_bytes(*table(front)))
        write_atomic(
            self.out / names.HISTORY, csv_bytes(list(COLUMNS), [[*map(int, row[:-1]), row[-1]] for row in self.history])
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a file of ours, one a line; raises ModelError."""
    lines = read_bytes(path, "the rows", ModelError).splitlines()
    return [parse_json(line, f"{path} line {number}", ModelError) for number, line in enumerate(lines, 1)]


def _identity(target: Target) -> dict[str, Any]:
    """What results on a target depend on; where it is reached is not of it."""
    found = {name: value for name, value in vars(target).items() if name != "device"}
    return found | {"features": list(target.features)}


def _all_of(parts: Sequence[Callable[[np.ndarray], Values]], genomes: np.ndarray) -> Values:
    return {key: column for part in parts for key, column in part(genomes).items()}


def _of_target(model: DeviceModel, target: str, genomes: np.ndarray) -> Values:
    return {f"{key}@{target}": column for key, column in model(genomes).items()}


def _accuracy_bars(predictor: AccuracyPredictor, encoding: Encoding, genomes: np.ndarray) -> Ends:
    mean, deviation = predictor(encoding.one_hot(genomes))
    return {"accuracy": (mean - deviation, mean + deviation)}


def _device_bars(model: DeviceModel, target: str, genomes: np.ndarray) -> Ends:
    return {f"{key}@{target}": ends for key, ends in model.bounds(genomes).items()}


def csv_bytes(head: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    """A CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue().encode()


def spread_part(members: Scored, count: int) -> np.ndarray:
    """Indices of `count` members of the front: the best in the first objective, then always the farthest one."""
    front = members.front
    if len(front) <= count or not count:
        return front[:count]
    frame = Frame.around(members.minimised[front])
    points = (members.minimised[front] - frame.low) / (frame.high - frame.low)
    chosen = [int(points[:, 0].argmin())]
    while len(chosen) < count:
        distance = np.linalg.norm(points[:, None, :] - points[chosen][None], axis=2).min(1)
        chosen.append(int(distance.argmax()))
    return np.asarray(front[chosen])


def allocation_tables(net: QuantNet, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and coded bytes of each layer at each width, [L, bits]; infinite and 0 where there is no width."""
    from qdeploy.allocate import layer_options
    from qdeploy.space import MAX_BITS

    errors, sizes = (np.full((len(encoding.layers), MAX_BITS + 1), v) for v in (np.inf, 0.0))
    for row, name in enumerate(encoding.layers):
        for option in layer_options(net, net.steps[name]):
            errors[row, option.bits], sizes[row, option.bits] = option.error, option.bytes
    return errors, sizes
