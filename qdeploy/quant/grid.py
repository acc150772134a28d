"""The common integer grid on which every width of a weight tensor stands (vertical layering eqs. 4 to 6).

A raw code w_b of b bits is a prefix of the top code w_N: w_b = w_N >> (N - b). What a model holds is the container
code c_b = (w_b << (C - b)) + m_b, with m_b the midpoint of the top codes that w_b stands for (positive compensation).
In units of the top step s_N the weight is c_b * 2^(N - C), at every width with the same scale.
"""

from __future__ import annotations

import numpy as np


def container_bits(top: int) -> int:
    """Width C of the container for top width N: one spare bit keeps |c| <= 64 (N <= 6) and holds half units (N = 7)."""
    return 7 if top <= 6 else 8


def midpoint(bits: int, top: int) -> int:
    """Compensation m_b in container units, an exact integer but for N = 8, where half a unit is floored."""
    if bits == top:
        return 0
    container = container_bits(top)
    if top == 8:
        return (1 << (7 - bits)) - 1
    return (1 << (container - 1 - bits)) - (1 << (container - 1 - top))


def container_codes(top_codes: np.ndarray, bits: int, top: int, compensation: bool = True) -> np.ndarray:
    """int8 container codes of width `bits` from raw top codes in [-2^(N-1), 2^(N-1)-1], any shape."""
    shift = container_bits(top) - bits
    offset = midpoint(bits, top) if compensation else 0
    return (((top_codes.astype(np.int32) >> (top - bits)) << shift) + offset).astype(np.int8)
