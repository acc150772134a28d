"""Rounding of weights by layer-wise least squares, for one width or for all levels of a ladder at once.

A layer's codes are chosen column by column. The error that a column's codes leave in the layer's output is handed to
the columns that are not fixed yet, by the inverse of the inputs' second moments H (optimal brain quantization in the
fixed order of Frantar et al. 2022, "GPTQ", algorithm 1). A ladder has one target a level: every level's error is handed
on within that level, and each top code is the one whose truncations are nearest to all targets together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.ptq.weights import Grid, Level, values

DAMPING = 0.01  # part of the mean diagonal that is added to H
BLOCK = 64  # columns whose errors are handed on together
BEAM = 4  # prefixes that the search for a top code keeps at each level


def level_weights(levels: Sequence[Level], power: float) -> np.ndarray:
    """What the squared errors of each level weigh: 4^(power * bits), 1 for the lowest.

    power 0 counts plain squared errors, where the lowest level's are greatest; at power 1 each level's errors count in
    its own steps.
    """
    return np.array([4.0 ** (power * (level.bits - levels[0].bits)) for level in levels])


def least_squares(
    matrix: np.ndarray, second: np.ndarray, levels: Sequence[Level], grid: Grid, weights: np.ndarray
) -> np.ndarray:
    """Top codes [O, K] of weights [O, K]; the inputs of each of G groups of rows have second moments [G, K, K].

    `weights` weigh the levels.
    """
    groups, width = second.shape[:2]
    upper, order = _inverse_root(second)
    by_group = matrix.reshape(groups, -1, width)
    sorted_columns = np.take_along_axis(by_group, order[:, None], 2).astype(np.float64)
    targets = np.repeat(sorted_columns[None], len(levels), 0)  # [levels, G, O/G, K]
    codes = np.zeros(by_group.shape, np.int64)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = np.zeros((*targets.shape[:3], end - start))
        for j in range(start, end):
            now = targets[..., j]
            w = nearest_prefix(now.reshape(len(levels), -1), levels, grid, weights)
            codes[..., j] = w.reshape(now.shape[1:])
            real = np.stack([values(level, w[:, None], grid)[:, 0] for level in levels]).reshape(now.shape)
            error = (now - real) / upper[:, j, j][:, None]
            errors[..., j - start] = error
            targets[..., j + 1 : end] -= error[..., None] * upper[:, None, j, j + 1 : end]
        targets[..., end:] -= errors @ upper[:, start:end, end:]
    back = np.argsort(order, 1)
    return np.take_along_axis(codes, back[:, None], 2).reshape(matrix.shape)


def _inverse_root(second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(U [G, K, K], order [G, K]): U upper triangular, U^T U the inverse of each damped H with its columns in `order`.

    The greatest moments come first, while all others can still correct their errors.
    """
    order = np.argsort(-np.diagonal(second, axis1=1, axis2=2), 1, kind="stable")
    hessian = np.take_along_axis(np.take_along_axis(second, order[:, :, None], 1), order[:, None, :], 2)
    hessian = hessian.astype(np.float64)
    diagonal = np.arange(second.shape[1])
    mean = np.mean(hessian[:, diagonal, diagonal], 1, keepdims=True)
    hessian[:, diagonal, diagonal] += DAMPING * mean + 1e-12
    return np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1), order


def nearest_prefix(targets: np.ndarray, levels: Sequence[Level], grid: Grid, weights: np.ndarray) -> np.ndarray:
    """The top code [O] whose values at all levels lie nearest to `targets` [levels, O], by a beam over prefixes.

    A wrong prefix that would have been mended by later bits can fall out of the beam: a beam of 4 misses few.
    """
    top, held = levels[-1], 0
    count = targets.shape[1]
    prefixes, costs = np.zeros((count, 1), np.int64), np.zeros((count, 1))
    for level, target, weight in zip(levels, targets, weights, strict=True):
        least, greatest = (end >> (top.bits - level.bits) for end in (grid.lo, grid.hi))
        ideal = (target[:, None] / grid.scale + grid.zero - level.offset) / (1 << level.shift)
        below = np.floor(ideal).astype(np.int64)
        if held == 0:
            near = np.clip(below + np.arange(-1, 3), least, greatest)
            same = np.concatenate([np.zeros((count, 1), bool), near[:, 1:] == near[:, :-1]], 1)
        else:  # the two children of each prefix that are nearest to the target, or its one at that end
            low = prefixes << (level.bits - held)
            high = np.minimum(low + (1 << (level.bits - held)) - 1, greatest)
            low = np.maximum(low, least)
            near = np.concatenate([np.clip(below, low, high), np.clip(below + 1, low, high)], 1)
            same = np.zeros(near.shape, bool)
            same[:, prefixes.shape[1] :] = near[:, prefixes.shape[1] :] == near[:, : prefixes.shape[1]]
            costs = np.concatenate([costs, costs], 1)
        costs = costs + weight * (near - ideal) ** 2 * float(1 << level.shift) ** 2
        costs = np.where(same, np.inf, costs)
        keep = np.argsort(costs, 1, kind="stable")[:, : (BEAM if level is not top else 1)]
        prefixes, costs, held = np.take_along_axis(near, keep, 1), np.take_along_axis(costs, keep, 1), level.bits
    return prefixes[:, 0]


def refit_scale(matrix: np.ndarray, codes: np.ndarray, second: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 [O, 1]: the scale of least output error for fixed real codes [O, K] (container codes less zero points).

    `second` is [G, K, K] or, for unknown inputs, the identity's diagonal [G, K]. A scale that would not be positive
    stays as it was.
    """
    grouped, target = (m.reshape(second.shape[0], -1, m.shape[1]).astype(np.float64) for m in (codes, matrix))
    moved = grouped @ second if second.ndim == 3 else grouped * second[:, None]  # noqa: PLR2004
    above, below = np.sum(moved * target, 2).reshape(-1, 1), np.sum(moved * grouped, 2).reshape(-1, 1)
    fitted = above / np.where(below > 0, below, 1)
    return np.where((below > 0) & (fitted > 0), fitted, scale)
