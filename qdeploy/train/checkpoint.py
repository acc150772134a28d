"""One file holds a whole training state: a JSON line with the digest, where the run stands (JSON), tensors.

The state of randomness is a position: shuffling and augmentation are functions of (seed, phase, epoch, step), so a run
that resumes at a step continues as the uninterrupted one would, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import SGD

from qdeploy.errors import ModelError
from qdeploy.files import canonical_json, read_bytes, sha256, write_atomic

FORMAT = "qdeploy-checkpoint/1"


def save_checkpoint(path: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write atomically. `state` is plain JSON; tensors of any shape and dtype."""
    content = save({k: v.detach().contiguous().clone() for k, v in sorted(tensors.items())})
    head = canonical_json(state)
    prefix = canonical_json({"format": FORMAT, "sha256": sha256(head + content), "state": len(head)})
    write_atomic(path, prefix + head + content)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inverse of `save_checkpoint`; raises ModelError when the file is damaged, edited or of another kind."""
    data = read_bytes(path, "the checkpoint", ModelError)
    line, _, rest = data.partition(b"\n")
    try:
        prefix = json.loads(line)
        if prefix["format"] != FORMAT:
            raise ValueError("it is of another format")
        if prefix["sha256"] != sha256(rest):
            raise ValueError("its digest does not match")
        size = int(prefix["state"])
        return json.loads(rest[:size]), load(rest[size:])
    except (ValueError, KeyError, AttributeError, TypeError, SafetensorError) as e:
        raise ModelError(f"{path} is not a sound qdeploy checkpoint ({e}): train or copy it again") from e


def momentum_tensors(optimizer: SGD) -> dict[str, Tensor]:
    """Momentum buffers by the index of their parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = ((i, optimizer.state[p].get("momentum_buffer")) for i, p in enumerate(parameters) if p in optimizer.state)
    return {f"momentum/{i}": buffer for i, buffer in buffers if buffer is not None}


def restore_momentum(optimizer: SGD, tensors: dict[str, Tensor]) -> None:
    """Inverse of `momentum_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        if f"momentum/{i}" in tensors:
            buffer = torch.empty_like(parameter, requires_grad=False)  # the fused optimizer needs one layout in memory
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(tensors[f"momentum/{i}"])


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str, what: str) -> None:
    """Load every tensor under `prefix` into `module`; a checkpoint of another recipe is a ModelError."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    expected = module.state_dict()
    wrong = sorted(set(own) ^ set(expected)) + sorted(
        k for k in set(own) & set(expected) if own[k].shape != expected[k].shape
    )
    if wrong:
        raise ModelError(f"{what} belongs to another recipe: {len(wrong)} tensors differ, the first is {wrong[0]}")
    with torch.no_grad():
        module.load_state_dict(own)
