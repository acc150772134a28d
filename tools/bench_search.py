"""A search's own time against bare pymoo on a free objective, and its hypervolume against random search.

    python tools/bench_search.py [--recipe FILE] [--population N] [--generations N] [--seeds N] [-o ROWS.jsonl]

Processor times of this process, one thread; bare pymoo and the search take turns, a block of generations each. The
search prices subnets by the accuracy predictor (an ensemble taught by a formula) and by counted BitOPs. Hypervolumes
are of the fronts after equal evaluations, in the ranges of both last generations together. A row a seed is kept in
ROWS.jsonl; seeds that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.profile.latency import machine
from qdeploy.profile.report import machine_line
from qdeploy.recipe import load_recipe
from qdeploy.search.baselines import RandomSearch
from qdeploy.search.costs import Costs
from qdeploy.search.encoding import Encoding
from qdeploy.search.evolve import Evolution, Frame
from qdeploy.search.geometry import geometry
from qdeploy.search.nsga2 import Nsga2
from qdeploy.search.objectives import parse_objectives
from qdeploy.search.predictor import AccuracyPredictor
from qdeploy.search.problem import Problem, Values
from qdeploy.train.run import new_network, new_quantized

IMAGE = (1, 28, 28)
BLOCK = 25  # generations of each turn


def bare(variables: int, population: int, seed: int) -> Any:
    """pymoo's NSGA-II with its own operators on two sums; each `next` is a generation."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Bare
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    class Free(Bare):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = np.stack([x.sum(1), ((2 - x) ** 2).sum(1)], 1)

    algorithm = NSGA2(
        pop_size=population, sampling=IntegerRandomSampling(), crossover=UniformCrossover(),
        mutation=PM(vtype=float, repair=RoundingRepair()),
    )  # fmt: skip
    free = Free(n_var=variables, n_obj=2, xl=0, xu=2, vtype=int)
    algorithm.setup(free, termination=("n_gen", 10**9), seed=seed, verbose=False)
    return algorithm


def problem(recipe: Path, samples: int) -> Problem:
    """Accuracy by a predictor that a formula taught, and BitOPs, over the recipe's space with untrained weights."""
    found = load_recipe(recipe)
    net = new_quantized(found, new_network(found, IMAGE[0], 10), IMAGE)
    encoding = Encoding(net.space)
    costs, random = Costs(encoding, geometry(net, encoding, IMAGE)), np.random.default_rng(0)
    seen = encoding.spread(samples, random)
    gain = random.exponential(1, len(encoding))
    accuracy = ((np.sqrt(seen / (encoding.counts - 1)) + 0.3) * encoding.active(seen) * gain).sum(1)
    predictor = AccuracyPredictor(encoding.one_hot(seen), accuracy, curve=False)

    def predict(genomes: np.ndarray) -> Values:
        return costs(genomes) | {"accuracy": predictor(encoding.one_hot(genomes))[0]}

    return Problem(encoding, tuple(parse_objectives(["accuracy", "bitops"], [])), (), predict)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(asked: Problem, population: int, generations: int, seed: int) -> dict[str, Any]:
    """One seed: seconds of bare pymoo, of the search and of random search, and both hypervolumes."""
    none = np.zeros((0, len(asked.encoding)), np.int64)
    free = bare(len(asked.encoding), population, seed)
    spent = dict.fromkeys(("bare", "nsga2", "random"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        ours, baseline = (
            Evolution(kind(asked, population, seed, none), generations, Path(folder) / f"{kind.__name__}.npz", 0)
            for kind in (Nsga2, RandomSearch)
        )
        for done in range(0, generations, BLOCK):
            turn = min(BLOCK, generations - done)
            ours.generations = done + turn
            spent["bare"] += seconds(lambda count=turn: [free.next() for _ in range(count)])  # type: ignore[misc]
            spent["nsga2"] += seconds(lambda: ours.run(lambda _: None))
        spent["random"] = seconds(lambda: baseline.run(lambda _: None))
    ends = [ours.strategy.members, baseline.strategy.members]
    frame = Frame.around(np.concatenate([end.minimised for end in ends]))
    volumes = [frame.hypervolume(end) for end in ends]
    return {"seed": seed, "seconds": spent, "hypervolume": dict(zip(("nsga2", "random"), volumes, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("models/fashion-mobilenetv3.toml"))
    parser.add_argument("--population", type=int, default=800)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine_line(machine())}; {options.population} x {options.generations}")
    size = {"population": options.population, "generations": options.generations}
    held = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out and options.out.exists()
        else []
    )
    known = {row["seed"]: row for row in held if size.items() <= row.items()}
    asked = problem(options.recipe, 200)
    for seed in range(options.seeds):
        if seed not in known:
            known[seed] = size | compared(asked, options.population, options.generations, seed)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(known[seed]) + "\n")
        spent, volume = known[seed]["seconds"], known[seed]["hypervolume"]
        print(
            f"seed {seed}: bare pymoo {spent['bare']:.1f} s, nsga2 {spent['nsga2']:.1f} s "
            f"({spent['nsga2'] / spent['bare']:.2f} x), random {spent['random']:.1f} s; "
            f"hypervolume {volume['nsga2']:.4f}, random search {volume['random']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
