"""The noise check, on times that are made up: no assertion looks at a clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qdeploy.errors import DeviceError
from qdeploy.profile.timing import ATTEMPTS, drift, quiet


def test_drift_sees_steps_and_not_outliers() -> None:
    flat = np.full(15, 2.0)
    assert drift(flat) == 0
    outliers = flat.copy()
    outliers[[0, 6, 12]] = 50.0  # one interruption in each third
    assert drift(outliers) == 0
    step = np.concatenate([np.full(8, 1.0), np.full(7, 2.0)])
    assert drift(step) >= 0.5
    assert drift(np.linspace(1.0, 1.3, 15)) == pytest.approx(0.3 * 10 / 14 / 1.15)


def test_a_noisy_machine_is_refused_and_a_quiet_attempt_taken() -> None:
    noisy, calm = np.concatenate([np.ones(8), np.full(7, 2.0)]), np.ones(15)

    def attempts(rows: list[np.ndarray]) -> Any:
        it: Iterator[np.ndarray] = iter(rows)
        return lambda: next(it)

    assert quiet(attempts([noisy, noisy, calm]), lambda x: x, 0.2, "it") is calm
    with pytest.raises(DeviceError, match="it is too noisy.* 100%, 20% is allowed"):
        quiet(attempts([noisy] * ATTEMPTS), lambda x: x, 0.2, "it")
    assert quiet(attempts([noisy]), lambda x: x, 1.5, "it") is noisy
