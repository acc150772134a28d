"""A torch network as what is quantized: a function that makes it, and its weights, become a float32 ONNX file."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.nets.own import first_line, make_own
from qdeploy.ptq.graph import run, session
from qdeploy.qdq import load_model

OPSET = 17
NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts keep the weights in a checkpoint
SAME = 1e-3  # of the greatest output: what exporting may change

Shape = tuple[str, tuple[int, ...]]


@contextmanager
def exported(factory: str, weights: Path | None, shape: Shape | None) -> Iterator[Path]:
    """A float32 ONNX file of the network that `factory`, "package.module:function", returns; it goes away at the end.

    The function is called without arguments; its module may lie in the working directory. `weights` is a state
    dictionary as .safetensors, or as .pt or .pth of nothing but tensors: it is never unpickled. `shape`: the input's
    name, which is free to choose, and its sizes. Raises ModelError for what cannot be imported, loaded or exported.
    """
    if shape is None:
        raise ModelError(f"the input of {factory} has no shape yet: give --shape input=1,3,224,224, with its sizes")
    network = make_own(factory)
    if weights is not None:
        load_weights(network, read_weights(weights))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{factory.partition(':')[2]}.onnx"
        export(network.eval(), factory, shape, path)
        yield path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors, .pt or .pth file; raises ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"cannot read the weights {path}: there is no such file")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _unnested(path)
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{path} is damaged ({first_line(e)}): save the weights again") from e
    except Exception as e:  # torch.load raises many kinds for what holds more than tensors
        raise ModelError(f"{path} holds more than tensors or is damaged: save the state_dict as .safetensors") from e
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path} holds no state_dict of tensors: save the network's state_dict")
    return found


def _unnested(path: Path) -> Any:
    found = torch.load(path, map_location="cpu", weights_only=True)
    inner = next((found[key] for key in NESTED if key in found), found) if isinstance(found, dict) else found
    return dict(inner) if isinstance(inner, dict) else inner


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `weights` into the network; raises ModelError unless names and shapes are the network's."""
    own = network.state_dict()
    missing, more = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    unlike = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    problems = (("lack", missing), ("have too much:", more), ("have another shape at", unlike))
    for what, names in problems:
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"the weights {what} {names[0]}{rest}: give those of this network")
    network.load_state_dict(weights)


def export(network: nn.Module, factory: str, shape: Shape, path: Path) -> None:
    """Write `network` as ONNX; raises ModelError unless ONNX Runtime computes what torch does, on other input too."""
    name, sizes = shape
    noise = np.random.default_rng(0).random((2, *sizes[1:]), np.float32) * np.array([1, -1], np.float32).reshape(
        2, *[1] * (len(sizes) - 1)
    )
    first, second = (torch.from_numpy(one[None]) for one in noise)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch announces that this exporter is the older one
            torch.onnx.export(network, (first,), str(path), opset_version=OPSET, dynamo=False, input_names=[name])
            expected = _first_output(network(second))
    except Exception as e:  # the network's own code runs here
        sizes_text = ",".join(map(str, sizes))
        raise ModelError(f"{factory} cannot be exported for --shape {name}={sizes_text}: {first_line(e)}") from e
    model = load_model(path)[1]
    found = next(run(session(model), noise[1:], [model.graph.output[0].name]))[0]
    worst = float(np.nanmax(np.abs(expected), initial=0)) * SAME + 1e-6
    if found.shape != expected.shape or not np.allclose(found, expected, 0, worst, equal_nan=True):
        raise ModelError(f"{factory} computes other things for other inputs: take branches on data out of its forward")


def _first_output(value: Any) -> np.ndarray:
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return np.asarray(value.numpy())
