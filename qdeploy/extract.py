"""`qdeploy subnet`: a RUN folder and a choice of widths become a FrozenNet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from qdeploy.allocate import allocate
from qdeploy.data import SPLITS, Dataset
from qdeploy.errors import RecipeError
from qdeploy.files import read_bytes
from qdeploy.frozen import FrozenNet, load_frozen
from qdeploy.image_folder import load_split
from qdeploy.quant.differentiable import DifferentiableNet
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import Recipe
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract


def read_spec(path: Path) -> SubnetSpec:
    """A spec file, or the spec of a subnet folder."""
    if Path(path).is_dir():
        return load_frozen(path).spec
    return SubnetSpec.parse(read_bytes(path, "the subnet spec", RecipeError))


def choose_spec(
    net: SimulatedNet,
    bits: int | None,
    budget_kib: float | None,
    spec: Path | None,
    nested_with: Path | None,
    options: Mapping[str, str],
    architecture: Path | None = None,
) -> SubnetSpec:
    """The one choice that the command line made; RecipeError when it made none, two, or one outside the space.

    `options`: granularity and symmetry of a uniform level, where they were given. `architecture`: a spec whose
    architecture and activation widths a level of a supernet has, by budget.
    """
    given = [name for name, value in (("bits", bits), ("budget-kib", budget_kib), ("spec", spec)) if value is not None]
    if isinstance(net, DifferentiableNet):
        if set(given) - {"spec"} or architecture is not None or nested_with is not None or options:
            raise RecipeError("the run learned its widths: leave --bits, --budget-kib and their options out")
        if not given:
            return net.only
    if len(given) != 1:
        raise RecipeError("choose one of --bits, --budget-kib and --spec" + (f", not {len(given)}" if given else ""))
    if nested_with is not None and budget_kib is None:
        raise RecipeError("--nested-with goes with --budget-kib: it says which level the new one must extend")
    if architecture is not None and (
        budget_kib is None or nested_with is not None or not isinstance(net, BatchQuantNet)
    ):
        raise RecipeError(
            "--architecture goes with --budget-kib and a run of method batchquant, without --nested-with, which has one"
        )
    if options and (bits is None or not isinstance(net, EQNet)):
        raise RecipeError(f"--{min(options)} goes with --bits and a run of method eqnet")
    if bits is not None:
        if bits not in net.widths:
            raise RecipeError(f"--bits {bits} was not trained: choose from {list(net.widths)}")
        return net.uniform(bits, **options) if isinstance(net, EQNet) else net.uniform(bits)
    if budget_kib is not None:
        if not (math.isfinite(budget_kib) and budget_kib > 0):
            raise RecipeError(f"--budget-kib {budget_kib} is no size: give a positive number of KiB")
        low, shape = (None if path is None else read_spec(path) for path in (nested_with, architecture))
        return allocate(net, int(budget_kib * 1024), low, shape)
    assert spec is not None
    chosen = read_spec(spec)
    net.check_spec(chosen)
    return chosen


def calibration_set(recipe: Recipe, data_dir: Path | None) -> Dataset:
    """Training images for calibration: the part that ships with the repository where there is one."""
    split = "sample" if "sample" in SPLITS.get(recipe.data.name, ()) else "train"
    return load_split(recipe.data, split, data_dir)


def extract_subnet(recipe: Recipe, net: SimulatedNet, spec: SubnetSpec, data_dir: Path | None) -> FrozenNet:
    """Freeze `spec` and record its accuracy on the test images."""
    calibration = calibration_set(recipe, data_dir).images
    return extract(net, spec, recipe.name, calibration, load_split(recipe.data, "test", data_dir))
