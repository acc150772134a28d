"""The one training loop: phases of steps, progress, checkpoints, and a resume that is bitwise the same run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD

from qdeploy.data import Dataset
from qdeploy.errors import DivergenceError, ModelError
from qdeploy.progress import Counter, Echo
from qdeploy.quant.parallel import average_losses, part, rank, synchronized_norms
from qdeploy.recipe import Recipe, Schedule, same_recipe
from qdeploy.train.checkpoint import load_checkpoint, load_module, momentum_tensors, restore_momentum, save_checkpoint
from qdeploy.train.images import batches
from qdeploy.train.metrics import log_metrics

CHECKPOINT_SECONDS = 20.0


class Phase(Protocol):
    """What a method gives the loop: a module, its optimizer groups, and one step's forward and backward."""

    name: str
    schedule: Schedule

    @property
    def module(self) -> nn.Module:
        """What is trained, and saved in checkpoints."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; each holds `params`, `weight_decay` and `rate` (a multiple of the learning rate)."""

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        """Add this batch's gradients to the parameters; returns losses by name.

        `step` counts the phase's steps from 0. Whatever is random is a function of it, so that a resumed run is the
        same run. Where several processes train, the gradients that it leaves are means over them.
        """

    def after_step(self) -> None:
        """Put parameters back into their legal range."""


def make_optimizer(phase: Phase) -> SGD:
    """SGD with momentum 0.9 over the phase's groups; fused, since a quantized network has hundreds of small tensors."""
    rate = phase.schedule.learning_rate
    groups = [group | {"lr": rate * group["rate"]} for group in phase.groups()]
    optimizer = SGD(groups, lr=rate, momentum=0.9, nesterov=phase.schedule.nesterov, fused=True)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        # fused steps need all buffers or none, and what a subnet does not use gets its first gradient later
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def cosine(step: int, total: int) -> float:
    """Cosine decay from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / total))


def run_phase(phase: Phase, recipe: Recipe, data: Dataset, run: Path, echo: Echo) -> None:
    """Train `phase` to its end, from its checkpoint in `run` if there is one.

    `data` holds at least one batch. A checkpoint is written every CHECKPOINT_SECONDS, at the end and on Ctrl-C, which
    is raised again.
    Several processes (torchrun) take a part of each batch; process 0 writes, the others read its checkpoints.
    Raises DivergenceError when a loss stops being finite, DeviceError when the disk is full.
    """
    schedule = phase.schedule
    per_epoch = len(data.labels) // schedule.batch
    total = per_epoch * schedule.epochs
    phase.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.3 times faster here
    optimizer = make_optimizer(phase)
    path = run / f"{phase.name}.checkpoint"
    done = resume(path, phase, recipe, optimizer, total) if path.exists() else 0
    counter = Counter(echo, phase.name, total, "step", done, of=schedule.batch, things="images")
    saved = time.monotonic()
    try:
        with synchronized_norms(phase.module):
            while done < total:
                epoch, first = divmod(done, per_epoch)
                flip, steepest = recipe.data.augment == "flip-shift", 0.0
                for images, labels in batches(data, schedule.batch, recipe.seed, epoch, first, flip):
                    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                        losses = train_step(phase, optimizer, part(images), part(labels), (done, total))
                    done, steepest = done + 1, max(steepest, losses.get("gradient", 0.0))
                    counter.at(done, describe(epoch + 1, schedule.epochs, losses))
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        store(path, phase, recipe, optimizer, (done, total), data)
                        saved = time.monotonic()
                if rank() == 0:
                    peak = {"greatest gradient": steepest} if "gradient" in losses else {}
                    log_metrics(run, phase.name, epoch + 1, losses | peak, counter.rate)
    except KeyboardInterrupt:
        store(path, phase, recipe, optimizer, (done, total), data)
        echo(f"stopped in {phase.name} at step {done}/{total}: the same command resumes there")
        raise
    store(path, phase, recipe, optimizer, (done, total), data)


def describe(epoch: int, epochs: int, losses: dict[str, float]) -> str:
    """Where a phase stands, behind its count of steps."""
    return f"epoch {epoch}/{epochs}, loss " + " ".join(f"{name} {value:.3f}" for name, value in losses.items())


def train_step(
    phase: Phase, optimizer: SGD, images: Tensor, labels: Tensor, steps: tuple[int, int]
) -> dict[str, float]:
    """One optimizer step; `steps`: how many are done, and how many there are in all."""
    decay = cosine(*steps)
    for group in optimizer.param_groups:
        group["lr"] = phase.schedule.learning_rate * group["rate"] * decay
    optimizer.zero_grad(set_to_none=True)
    losses = average_losses(phase.backward(images.contiguous(memory_format=torch.channels_last), labels, steps[0]))
    if not all(math.isfinite(value) for value in losses.values()):
        raise DivergenceError(f"the loss of {phase.name} is no longer finite ({losses}): lower the learning rate")
    optimizer.step()
    phase.after_step()
    return losses


def store(path: Path, phase: Phase, recipe: Recipe, optimizer: SGD, steps: tuple[int, int], data: Dataset) -> None:
    """Write the phase's checkpoint (process 0): `steps` done and in all, and what images the network takes."""
    if rank() != 0:
        return
    done, total = steps
    tensors = {f"model/{key}": value for key, value in phase.module.state_dict().items()}
    if done < total:
        tensors |= momentum_tensors(optimizer)
    images = {"shape": list(data.images.shape[1:]), "classes": data.classes}
    state = {"recipe": recipe.to_json(), "phase": phase.name, "done": done, "total": total, "images": images}
    save_checkpoint(path, state, tensors)


def resume(path: Path, phase: Phase, recipe: Recipe, optimizer: SGD, total: int) -> int:
    """Load a phase's checkpoint into it and return the number of steps done, of `total`."""
    state, tensors = load_checkpoint(path)
    if not same_recipe(state.get("recipe"), recipe) or state.get("phase") != phase.name:
        raise ModelError(f"{path} was made by another recipe: choose another output folder or restore that recipe")
    if state.get("total") != total:
        raise ModelError(f"{path} was made on other data: it counts {state.get('total')} steps, not {total}")
    load_module(phase.module, tensors, "model/", str(path))
    restore_momentum(optimizer, tensors)
    return int(state["done"])
