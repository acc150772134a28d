"""Accuracy predictor: one-hot spec -> a line and an MLP of three hidden layers -> accuracy (QFA, section 4; CQAP).

CQAP is EQ-Net's. The columns of granularity and symmetry are its condition bits, beside those of widths and
architecture. An ensemble of networks, each trained without another fifth of the samples, gives the mean and its
uncertainty; what each says of the fifth that it has not seen gives honest figures of quality without setting samples
aside.

A scored spec costs seconds and a space has hundreds of columns, so samples are few: ridge regression, which a hundred
samples suffice for, says the main part and the MLP what is left of it, as far as that helps with unseen samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError

MEMBERS = 5
HIDDEN = (96, 96, 96)
EPOCHS, BATCH = 60, 64
STEPS = (300, 3000)  # at least and at most
RIDGES = tuple(10.0 ** (power / 2) for power in range(-4, 9))
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 2e-2
WARM_UP = 0.1  # of the steps
SQUARE_DECAY = 0.999
SAMPLES_LEAST = 2 * MEMBERS
WANTED_TAU = 0.8  # of held-out specs; below it, more samples are asked for
DOUBT = 2.0  # how many times more than on the samples members may differ on what is asked about
MOST_GROWTH = 4.0  # of the samples that a learning curve can speak of: as far as it goes the other way
CURVE = (0.25, 0.5)  # parts of the samples whose quality is measured too


@dataclass(frozen=True)
class Quality:
    """Of predictions of specs that a network has not seen: Kendall's tau-b, mean absolute error in points."""

    samples: int
    tau: float
    mae: float

    def to_json(self) -> dict[str, Any]:
        """{"samples", "kendall_tau", "mae"}."""
        return {"samples": self.samples, "kendall_tau": self.tau, "mae": self.mae}


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of two rankings [n]: pairs in order less pairs out of order, ties counted as they should be."""
    a, b = (np.sign(values[:, None] - values[None, :])[np.triu_indices(len(values), 1)] for values in (first, second))
    weight = np.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return float((a * b).sum() / weight) if weight else 0.0


class _Ensemble(nn.Module):
    """Members side by side: [members, n, columns] -> [members, n]."""

    def __init__(self, columns: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (columns, *HIDDEN, 1)

        def weight(inputs: int, outputs: int, gain: float) -> nn.Parameter:
            drawn = torch.randn(MEMBERS, inputs, outputs, generator=generator)
            return nn.Parameter(drawn * gain / max(1, inputs) ** 0.5)

        layers = list(zip(sizes, sizes[1:], strict=False))
        self.weights = nn.ParameterList([weight(i, o, 2**0.5 if o > 1 else 0.1) for i, o in layers])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(MEMBERS, 1, o)) for _, o in layers])

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if i < len(self.weights) - 1:
                hidden = torch.relu(hidden)
        return hidden[..., 0]


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [columns] and intercept of ridge regression; of RIDGES the one whose errors on samples left out one by
    one are least (Golub, Heath and Wahba 1979, eq. 1.2)."""
    middle, mean = x.mean(0), float(y.mean())
    u, s, vt = np.linalg.svd(x - middle, full_matrices=False)
    along = u.T @ (y - mean)
    best, least = np.zeros(len(s)), np.inf
    for strength in RIDGES:
        kept = s**2 / (s**2 + strength)
        seen = 1.0 / len(y) + (u**2 * kept).sum(1)
        error = float(np.mean(((y - mean - u @ (kept * along)) / np.maximum(1.0 - seen, 1e-6)) ** 2))
        if error < least:
            best, least = s / (s**2 + strength) * along, error
    weights = vt.T @ best
    return weights, mean - float(middle @ weights)


def folds(count: int, seed: int) -> np.ndarray:
    """The part [n] of 0..MEMBERS-1 that each sample belongs to, of equal sizes, at random."""
    return np.random.default_rng(seed).permutation(np.arange(count) % MEMBERS)


class _AdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) whose rate and first decay go through one cycle of `steps` (Smith
    and Topin 2018): up to LEARNING_RATE in a tenth of it, then down to nearly 0, decay the other way, along cosines.

    torch.optim has both; to make one of its optimizers imports torch's compiler, which takes longer than this training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int) -> None:
        self.parameters, self.steps, self.done = list(parameters), steps, 0
        self.mean = [torch.zeros_like(one) for one in self.parameters]
        self.square = [torch.zeros_like(one) for one in self.parameters]

    def _now(self) -> tuple[float, float]:
        """Learning rate and decay of the mean."""
        top = WARM_UP * self.steps - 1
        up = self.done <= top
        at = self.done / top if up else (self.done - top) / (self.steps - 1 - top)
        cosine = (1 + math.cos(math.pi * at)) / 2  # 1 -> 0
        first, last = (1 / 25, 1.0) if up else (1.0, 1 / 25e4)
        low, high = (0.95, 0.85) if up else (0.85, 0.95)
        return LEARNING_RATE * (last + (first - last) * cosine), high + (low - high) * cosine

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients, which are cleared."""
        rate, decay = self._now()
        self.done += 1
        for one, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            assert one.grad is not None
            mean.lerp_(one.grad, 1 - decay)
            square.mul_(SQUARE_DECAY).addcmul_(one.grad, one.grad, value=1 - SQUARE_DECAY)
            wide = (square / (1 - SQUARE_DECAY**self.done)).sqrt_().add_(1e-8)
            one.mul_(1 - rate * WEIGHT_DECAY).addcdiv_(mean, wide, value=-rate / (1 - decay**self.done))
            one.grad = None


def _fit(x: np.ndarray, y: np.ndarray, part: np.ndarray, seed: int) -> _Ensemble:
    """Member k learns from the samples outside part k; `y` float32 [members, n], of deviation about 1 or less."""
    network = _Ensemble(x.shape[1], seed)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    own = [torch.from_numpy(np.flatnonzero(part != k)) for k in range(MEMBERS)]
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, *(len(rows) for rows in own))
    steps = min(max(STEPS[0], EPOCHS * len(x) // batch), STEPS[1])
    optimizer = _AdamW(network.parameters(), steps)
    for _ in range(steps):
        picked = torch.stack([rows[torch.randint(len(rows), (batch,), generator=generator)] for rows in own])
        wanted = targets.gather(1, picked)
        loss = nn.functional.smooth_l1_loss(network(inputs[picked]), wanted, reduction="sum") / batch
        torch.autograd.backward(loss)
        optimizer.step()
    return network


class AccuracyPredictor:
    """Trained on samples: one-hot rows float32 [n, columns] and accuracies in per cent [n]. The same samples and seed
    give the same predictor. Raises ModelError for too few samples.

    `unseen` [n]: what the member that has not seen a sample says of it; `quality` and `error`, its root mean square,
    come from that. `curve`: the quality that parts of the samples give. `spread`: how much members differ on samples.
    """

    def __init__(self, x: np.ndarray, accuracy: np.ndarray, seed: int = 0, curve: bool = True) -> None:
        if len(x) < SAMPLES_LEAST:
            raise ModelError(f"{len(x)} scored specs teach no predictor: score {SAMPLES_LEAST} or more")
        self.curve = [self._train(*self._part(x, accuracy, share, seed), seed) for share in CURVE if curve]
        self.quality = self._train(x, accuracy, seed)
        self.curve = [one for one in self.curve if one.samples < len(x)] + [self.quality]
        self.spread = float(self(x)[1].mean())

    @staticmethod
    def _part(x: np.ndarray, y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(SAMPLES_LEAST, int(len(x) * share))
        index = np.random.default_rng(seed).permutation(len(x))[:count]
        return x[index], y[index]

    def _train(self, x: np.ndarray, accuracy: np.ndarray, seed: int) -> Quality:
        accuracy = np.asarray(accuracy, np.float64)
        self.mean, self.deviation = float(accuracy.mean()), float(accuracy.std()) or 1.0
        y, part = (accuracy - self.mean) / self.deviation, folds(len(x), seed)
        lines = [ridge(x[part != k].astype(np.float64), y[part != k]) for k in range(MEMBERS)]
        linear = np.stack([x @ weights + intercept for weights, intercept in lines])
        network = _fit(x, (y - linear).astype(np.float32), part, seed)
        with torch.no_grad():
            bent = network(torch.from_numpy(x).expand(MEMBERS, *x.shape)).numpy().astype(np.float64)
        which = part, np.arange(len(x))
        rest, said = y - linear[which], bent[which]
        share = float(np.clip(said @ rest / max(float(said @ said), 1e-12), 0.0, 1.0))
        self._weights = [w.detach().numpy() for w in network.weights]
        self._biases = [b.detach().numpy() for b in network.biases]
        self._weights[-1], self._biases[-1] = self._weights[-1] * share, self._biases[-1] * share
        self._biases[-1] = self._biases[-1] + np.array([b for _, b in lines], np.float32).reshape(MEMBERS, 1, 1)
        self._linear = np.stack([weights for weights, _ in lines])[..., None].astype(np.float32)
        self.unseen = (linear[which] + share * said) * self.deviation + self.mean
        self.error = float(np.sqrt(np.mean((self.unseen - accuracy) ** 2)))
        return Quality(len(x), kendall_tau(self.unseen, accuracy), float(np.abs(self.unseen - accuracy).mean()))

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy in per cent and its standard deviation between members, float64 [n] each."""
        said = np.stack([self._member(x, k) for k in range(MEMBERS)]).astype(np.float64) * self.deviation + self.mean
        return np.asarray(said.mean(0)), np.asarray(said.std(0))

    def _member(self, x: np.ndarray, k: int) -> np.ndarray:
        """What member k says, [n], in standard units."""
        hidden = x
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight[k] + bias[k], 0)
        return np.asarray((hidden @ self._weights[-1][k] + self._biases[-1][k] + x @ self._linear[k])[:, 0])

    def advice(self) -> str:
        """Whether the samples suffice; if not, about how many do, where a learning curve says it."""
        q = self.quality
        text = f"accuracy predictor: {q.samples} samples, Kendall tau {q.tau:.2f}, mean error {q.mae:.2f} points"
        if q.tau >= WANTED_TAU:
            return text
        first = self.curve[0]
        text += f": tau {WANTED_TAU} is wanted"
        if first.samples == q.samples:
            return text
        slope = np.log((1 - first.tau) / (1 - q.tau)) / np.log(q.samples / first.samples)
        growth = ((1 - q.tau) / (1 - WANTED_TAU)) ** (1 / slope) if slope > 0 else np.inf
        if growth <= MOST_GROWTH:
            return f"{text}, score about {int(growth * q.samples):d} specs"
        return (
            f"{text}, but {q.samples} samples have hardly raised it above what {first.samples} gave: hold out more "
            "images if accuracies differ by less than their noise"
        )

    def doubt(self, x: np.ndarray) -> str:
        """Words where the members agree much less on `x` than on the samples; "" where the samples cover it."""
        spread = float(self(x)[1].mean())
        if spread <= DOUBT * self.spread:
            return ""
        return (
            f"accuracy predictor: its members differ by {spread:.2f} points on these subnets, by {self.spread:.2f} on "
            f"the {self.quality.samples} samples: score some subnets like these"
        )
