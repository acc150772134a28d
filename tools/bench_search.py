"""A search's own time against bare pymoo on a free objective, and its hypervolume against random search."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def bare(variables: int, population: int, generations: int) -> float:
    """Seconds of pymoo's NSGA-II with its own operators on two sums."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Bare
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    class Free(Bare):
        def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = np.stack([x.sum(1), ((2 - x) ** 2).sum(1)], 1)

    algorithm = NSGA2(
        pop_size=population, sampling=IntegerRandomSampling(), crossover=UniformCrossover(),
        mutation=PM(vtype=float, repair=RoundingRepair()),
    )  # fmt: skip
    start = time.perf_counter()
    minimize(Free(n_var=variables, n_obj=2, xl=0, xu=2, vtype=int), algorithm, ("n_gen", generations), seed=0)
    return time.perf_counter() - start


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("models/fashion-mobilenetv3.toml"))
    parser.add_argument("--population", type=int, default=800)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = problem(options.recipe, 200)
    none = np.zeros((0, len(asked.encoding)), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            free = bare(len(asked.encoding), options.population, options.generations)
            ends, seconds = [], []
            for kind in (Nsga2, RandomSearch):
                strategy = kind(asked, options.population, seed, none)
                start = time.perf_counter()
                path = Path(folder) / f"{kind.__name__}-{seed}.npz"
                ends.append(Evolution(strategy, options.generations, path, 0).run(lambda _: None))
                seconds.append(time.perf_counter() - start)
            frame = Frame.around(np.concatenate([end.minimised for end in ends]))
            volumes = [frame.hypervolume(end) for end in ends]
            print(
                f"seed {seed}: bare pymoo {free:.1f} s, nsga2 {seconds[0]:.1f} s ({seconds[0] / free:.2f} x); "
                f"hypervolume {volumes[0]:.4f}, random search {volumes[1]:.4f}"
            )


if __name__ == "__main__":
    main()
