"""A network of one's own, by the name of the function that makes it: "package.module:function"."""

from __future__ import annotations

import os
import pkgutil
import re
import sys

import torch
from torch import nn

from qdeploy.errors import ModelError

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


def make_own(name: str, *arguments: int) -> nn.Module:
    """The network that the function `name` returns for `arguments`, in float32 on the processor.

    The function's module may lie in the working directory. Raises ModelError.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        make = pkgutil.resolve_name(name)
    except Exception as e:  # importing runs the user's code, which may raise anything
        raise ModelError(
            f"{name} cannot be imported ({first_line(e)}): name a function as package.module:function"
        ) from e
    call = f"{name}({', '.join(map(str, arguments))})"
    try:
        network = make(*arguments)
    except Exception as e:
        taken = "(channels, classes)" if arguments else "no arguments"
        raise ModelError(f"{call} failed ({first_line(e)}): give a function that takes {taken}") from e
    if not isinstance(network, nn.Module):
        raise ModelError(f"{call} returned a {type(network).__name__}: it has to return a torch.nn.Module")
    return network.float().cpu()


def check_own(network: nn.Module, name: str, image_shape: tuple[int, ...], classes: int) -> None:
    """Raise ModelError unless `network` turns images [2, *image_shape] into logits [2, classes]."""
    training = network.training
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(2, *image_shape))
    except Exception as e:  # the user's code
        raise ModelError(f"{name} cannot take images {list(image_shape)} ({first_line(e)}): change either") from e
    finally:
        network.train(training)
    shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != [2, classes]:
        raise ModelError(f"{name} turns two images into {shape}, not into logits {[2, classes]}: change its last layer")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
