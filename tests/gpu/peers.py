"""What runs beside an artifact on a GPU: ONNX Runtime's CUDA and TensorRT providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


def peer(model: bytes, x: np.ndarray) -> tuple[str, Callable[[], Any], Callable[[], np.ndarray]]:
    """(provider, run once from host memory to host memory, that run's output); skips where ONNX Runtime has none."""
    import onnxruntime

    available = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    if not available:
        pytest.skip("ONNX Runtime has no CUDA provider here: pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = available[0]
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    if provider not in session.get_providers():
        pytest.skip(f"ONNX Runtime cannot start {provider} here: its libraries are missing")
    feed = {session.get_inputs()[0].name: x}
    return provider, lambda: session.run(None, feed), lambda: np.asarray(session.run(None, feed)[0])
