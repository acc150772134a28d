"""`qdeploy train`: a recipe becomes a RUN folder.

RUN/recipe.json, float.checkpoint, [those of phases in between,] quantized.checkpoint, metrics.jsonl, report.json
(accuracy of every width on the test images). Each phase resumes from its checkpoint; a finished phase is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.data import Dataset
from qdeploy.errors import ModelError, RecipeError
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.image_folder import load_split
from qdeploy.nets import SPACES, build, build_supernet
from qdeploy.nets.elastic import Supernet
from qdeploy.nets.own import FUNCTION, check_own, make_own
from qdeploy.progress import Echo, silent
from qdeploy.quant.calibrate import CALIBRATION_BATCH, calibrated
from qdeploy.quant.differentiable import DifferentiableNet
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.graph import read_graph
from qdeploy.quant.network import QuantNet
from qdeploy.quant.parallel import barrier, processes
from qdeploy.quant.parallel import joined as joined
from qdeploy.quant.parallel import rank as rank
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import (
    FOLDER,
    BatchQuantization,
    DifferentiableQuantization,
    EQNetQuantization,
    Recipe,
    Schedule,
    from_dict,
    same_recipe,
)
from qdeploy.space import Architecture, SubnetSpec
from qdeploy.train.batchquant import ElasticFullPrecision, full_precision_teacher
from qdeploy.train.batchquant import phases as batchquant_phases
from qdeploy.train.checkpoint import load_checkpoint, load_module
from qdeploy.train.differentiable import phases as differentiable_phases
from qdeploy.train.eqnet import GroupProgressive
from qdeploy.train.full_precision import FullPrecision
from qdeploy.train.images import as_input, generator
from qdeploy.train.loop import Phase, run_phase
from qdeploy.train.memory import keep_freed_memory
from qdeploy.train.vertical import Vertical


def _held_out(recipe: Recipe, images: int) -> np.ndarray:
    """Which of a split's images are held out, rising."""
    held = recipe.data.held_out or 0
    if held >= images:
        raise ModelError(f"data.held_out is {held}: the split has {images} images, and some must be left to train on")
    return np.sort(generator(0, "held out", held).permutation(images)[:held])


def training_set(recipe: Recipe, data_dir: Path | None) -> Dataset:
    """The recipe's training images: its split without what is held out, or a fixed random subset of `train_images`."""
    data = load_split(recipe.data, recipe.data.split, data_dir)
    if recipe.data.train_images is None and recipe.data.held_out is None:
        return data
    index = np.setdiff1d(np.arange(len(data.labels)), _held_out(recipe, len(data.labels)))
    wanted = recipe.data.train_images
    if wanted is not None:
        if wanted > len(index):
            raise ModelError(f"data.train_images is {wanted}: the split has {len(index)}")
        index = index[np.sort(generator(0, "subset", wanted).permutation(len(index))[:wanted])]
    return data.with_images(data.images[index], data.labels[index])


def held_out_set(recipe: Recipe, data_dir: Path | None) -> Dataset:
    """The images of the recipe's split that training never sees; RecipeError where it keeps none."""
    if recipe.data.held_out is None:
        raise RecipeError(
            "the run trained on all images of its split, so none can judge it: set held_out under [data] in the recipe "
            "and train again"
        )
    data = load_split(recipe.data, recipe.data.split, data_dir)
    index = _held_out(recipe, len(data.labels))
    return data.with_images(data.images[index], data.labels[index])


def new_network(recipe: Recipe, channels: int, classes: int) -> nn.Module:
    """The recipe's float backbone, or supernet, with its seed's initial weights."""
    choice, quantization = recipe.network, recipe.quantization
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if isinstance(quantization, BatchQuantization) and choice.name in SPACES:
            only = quantization.only
            return build_supernet(
                choice.name,
                channels,
                classes,
                choice.width,
                choice.stem_stride,
                quantization.kernels == "transform" and only is None,
                resolutions=choice.resolutions,
                widths=choice.widths,
                only=None if only is None else only.architecture or Architecture(),
            )
        if FUNCTION.fullmatch(choice.name):
            return make_own(choice.name, channels, classes)
        if choice.resolutions or choice.widths:
            raise RecipeError(
                f"network {choice.name} is not elastic: leave resolutions and widths out, or choose one of "
                f"{', '.join(sorted(SPACES))}"
            )
        return build(choice.name, channels, classes, choice.width, choice.stem_stride)


def new_quantized(recipe: Recipe, network: nn.Module, image_shape: tuple[int, ...]) -> SimulatedNet:
    """The quantized network of the recipe's method over a float backbone.

    Raises RecipeError where the recipe's one subnet is not a subnet of it.
    """
    choice, elastic = recipe.quantization, isinstance(network, Supernet)
    largest = network.network if isinstance(network, Supernet) else network
    graph = read_graph(largest, torch.zeros(1, *image_shape), scoped=elastic)
    net: SimulatedNet
    if isinstance(choice, BatchQuantization):
        net = BatchQuantNet(network, graph, recipe.network.name, choice)
    elif isinstance(choice, EQNetQuantization):
        net = EQNet(network, graph, recipe.network.name, choice)
    elif isinstance(choice, DifferentiableQuantization):
        net = DifferentiableNet(network, graph, recipe.network.name, choice, image_shape)
    else:
        net = QuantNet(network, graph, recipe.network.name, choice)
    if net.only is not None:
        net.check_spec(net.only)
    return net


def float_phase(recipe: Recipe, network: nn.Module) -> Phase:
    """The recipe's training of the float backbone or supernet."""
    if isinstance(network, Supernet):
        assert isinstance(recipe.quantization, BatchQuantization)
        return ElasticFullPrecision(network, recipe.float_phase, recipe.quantization, recipe.seed)
    return FullPrecision(network, recipe.float_phase)


def quantized_phases(recipe: Recipe, net: SimulatedNet, teacher: nn.Module, images: int) -> Sequence[Phase]:
    """The recipe's training of a quantized network on so many images; `teacher` is the float one."""
    if isinstance(net, BatchQuantNet):
        return batchquant_phases(net, recipe.quantized_phase, teacher, recipe.seed)
    if isinstance(net, EQNet):
        return [GroupProgressive(net, recipe.quantized_phase, net.choice, recipe.seed)]
    if isinstance(net, DifferentiableNet):
        return differentiable_phases(net, recipe.quantized_phase, teacher, images)
    assert isinstance(net, QuantNet)
    return [Vertical(net, recipe.quantized_phase, net.choice)]


@torch.no_grad()
def top1(predict: Callable[[Tensor], Tensor], data: Dataset, batch: int = 500) -> float:
    """Top-1 accuracy in per cent of `predict`, images [n, C, H, W] in [0, 1] -> logits [n, classes]."""
    right = 0
    for i in range(0, len(data.labels), batch):
        output = predict(as_input(data.images[i : i + batch]))
        right += int((output.argmax(1) == torch.from_numpy(data.labels[i : i + batch])).sum())
    return 100.0 * right / len(data.labels)


def accuracy(net: SimulatedNet, spec: SubnetSpec, data: Dataset) -> float:
    """Top-1 accuracy in per cent of the simulation under `spec`."""
    net.eval()
    return top1(lambda images: net(images, spec), data)


def level_accuracy(net: SimulatedNet, spec: SubnetSpec, data: Dataset, test: Dataset) -> float:
    """Accuracy of one of `levels` on `test`; statistics that specs share are first estimated for it on `data`."""
    return accuracy(net if net.learned_in else calibrated(net, spec, data.images), spec, test)


def schedules(recipe: Recipe) -> list[Schedule]:
    """Of all phases of a recipe, in order."""
    own = ("mixed_phase", "uniform_phase", "precision_phase")  # of one method or another
    between = [getattr(recipe.quantization, key, None) for key in own]
    return [recipe.float_phase, *(phase for phase in between if phase is not None), recipe.quantized_phase]


def check_parallel(recipe: Recipe) -> None:
    """Raise RecipeError where several processes cannot train as one would."""
    count = processes()
    for schedule in schedules(recipe):
        if schedule.batch % count:
            raise RecipeError(f"a batch of {schedule.batch} cannot be divided among {count} processes: change either")


def check_precision(recipe: Recipe, network: nn.Module) -> None:
    """Raise RecipeError where bfloat16 would only make training slower."""
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in network.modules())
    if recipe.precision == "bfloat16" and depthwise:
        raise RecipeError(
            f'precision "bfloat16" makes depthwise networks such as {recipe.network.name} slower: leave precision out'
        )


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Keep the recipe in the run; another recipe's run is refused."""
    path = run / "recipe.json"
    there = path.exists()
    if there and not same_recipe(_stored_recipe(run), recipe):
        raise ModelError(f"{run} holds a run of another recipe: choose another output folder")
    barrier()  # all have looked before process 0 writes
    if rank() == 0 and not there:
        write_atomic(path, canonical_json(recipe.to_json()))


def _stored_recipe(run: Path) -> Any:
    return parse_json(read_bytes(run / "recipe.json", "the run's recipe", ModelError), "recipe.json", ModelError)


def train(
    recipe: Recipe, run: Path, data_dir: Path | None, echo: Echo, float_from: Path | None = None
) -> dict[str, Any]:
    """Train to the end and return the report {float, levels: {width: per cent}}.

    `float_from` is the `float.checkpoint` of another run with the same network, data and seed: the float phase is then
    taken from there (for tables that compare methods from one starting point).
    """
    keep_freed_memory()
    run = Path(run)
    if rank() != 0:
        echo = silent  # the first process speaks for all
    data, test = training_set(recipe, data_dir), load_split(recipe.data, "test", data_dir)
    network = new_network(recipe, test.images.shape[1], test.classes)
    if FUNCTION.fullmatch(recipe.network.name):
        check_own(network, recipe.network.name, test.images.shape[1:], test.classes)
    net = new_quantized(recipe, network, test.images.shape[1:])  # what cannot be quantized is refused before training
    for schedule in schedules(recipe):
        if len(data.labels) < schedule.batch:
            raise ModelError(f"{len(data.labels)} images make no batch of {schedule.batch}: lower the recipe's batch")
    if (not net.learned_in or recipe.data.name == FOLDER) and len(data.labels) < CALIBRATION_BATCH:
        raise ModelError(f"{len(data.labels)} images are too few for statistics: give {CALIBRATION_BATCH} or more")
    check_parallel(recipe)
    check_precision(recipe, network)
    write_recipe(run, recipe)
    if float_from is None:
        run_phase(float_phase(recipe, network), recipe, data, run, echo)
    else:
        _, tensors = load_checkpoint(float_from)
        load_module(network, tensors, "model/", str(float_from))
    teacher = full_precision_teacher(network, data.images)
    report: dict[str, Any] = {"float": top1(teacher, test)}
    echo(f"float: {report['float']:.2f}% on {len(test.labels)} test images")
    net = new_quantized(recipe, network, test.images.shape[1:])
    for phase in quantized_phases(recipe, net, teacher, len(data.labels)):
        run_phase(phase, recipe, data, run, echo)
    report["levels"] = {name: level_accuracy(net, spec, data, test) for name, spec in net.levels.items()}
    for name, value in report["levels"].items():
        what = f"{name} bits" if net.only is None else "the one subnet"
        echo(f"{what}: {value:.2f}% on {len(test.labels)} test images (simulation)")
    if isinstance(net, DifferentiableNet):
        report["size_kib"] = net.size_kib()
        echo("KiB: " + ", ".join(f"{name} {value:g}" for name, value in report["size_kib"].items()))
    if rank() == 0:
        write_atomic(run / "report.json", canonical_json(report))
    return report


def load_run(run: Path) -> tuple[Recipe, SimulatedNet]:
    """The recipe and the trained network of a finished run; ModelError when it is not finished or damaged."""
    run = Path(run)
    if not run.is_dir():
        raise ModelError(f"{run} is not a run folder: make one with `qdeploy train`")
    recipe = from_dict(_stored_recipe(run))
    state, tensors = load_checkpoint(run / "quantized.checkpoint")
    if state.get("done") != state.get("total"):
        raise ModelError(
            f"{run} stopped at step {state.get('done')} of {state.get('total')}: run `qdeploy train` on it again"
        )
    if not same_recipe(state["recipe"], recipe):
        raise ModelError(f"the checkpoint in {run} belongs to another recipe than its recipe.json")
    try:
        shape, classes = tuple(int(v) for v in state["images"]["shape"]), int(state["images"]["classes"])
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError(f"the checkpoint in {run} does not say which images it takes: train again") from e
    net = new_quantized(recipe, new_network(recipe, shape[0], classes), shape)
    load_module(net, tensors, "model/", str(run))
    return recipe, net
