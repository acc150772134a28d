"""A network of one's own, by the name of the function that makes it: "package.module:function"."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qdeploy.errors import ModelError

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


def import_function(name: str) -> Callable[..., Any]:
    """What `name` says; its module may lie in the working directory. Raises ModelError."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(name)
    except Exception as e:  # importing runs the user's code, which may raise anything
        raise ModelError(
            f"{name} cannot be imported ({first_line(e)}): name a function as package.module:function"
        ) from e
    return found


def build_own(name: str, channels: int, classes: int) -> nn.Module:
    """The network that the function `name` returns for (channels, classes), in float32 on the processor.

    It must take float32 images [n, channels, H, W] and return logits [n, classes]. Raises ModelError.
    """
    make = import_function(name)
    try:
        network = make(channels, classes)
    except Exception as e:  # the user's code
        raise ModelError(f"{name}({channels}, {classes}) failed ({first_line(e)}): it takes (channels, classes)") from e
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name} returned a {type(network).__name__}: it has to return a torch.nn.Module")
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
