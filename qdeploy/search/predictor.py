"""Accuracy predictor: one-hot spec -> MLP of three hidden layers -> accuracy (QFA, section 4; EQ-Net's CQAP).

The columns of granularity and symmetry are EQ-Net's condition bits, beside those of widths and architecture. An
ensemble of networks, each trained without another fifth of the samples, gives the mean and its uncertainty; what each
says of the fifth that it has not seen gives honest figures of quality without setting samples aside.
"""

from __future__ import annotations

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
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 2e-2
SAMPLES_LEAST = 2 * MEMBERS
WANTED_TAU = 0.8  # of held-out specs; below it, more samples are asked for
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
    """Members side by side: [members, n, columns] -> [members, n]; a linear path beside the hidden layers."""

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
        self.linear = weight(columns, 1, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if i < len(self.weights) - 1:
                hidden = torch.relu(hidden)
        return (hidden + torch.bmm(x, self.linear))[..., 0]


def folds(count: int, seed: int) -> np.ndarray:
    """The part [n] of 0..MEMBERS-1 that each sample belongs to, of equal sizes, at random."""
    return np.random.default_rng(seed).permutation(np.arange(count) % MEMBERS)


def _fit(x: np.ndarray, y: np.ndarray, part: np.ndarray, seed: int) -> _Ensemble:
    """Member k learns from the samples outside part k; `y` has mean 0 and deviation 1."""
    network = _Ensemble(x.shape[1], seed)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    own = [torch.from_numpy(np.flatnonzero(part != k)) for k in range(MEMBERS)]
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH, *(len(rows) for rows in own))
    steps = min(max(STEPS[0], EPOCHS * len(x) // batch), STEPS[1])
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        picked = torch.stack([rows[torch.randint(len(rows), (batch,), generator=generator)] for rows in own])
        loss = nn.functional.smooth_l1_loss(network(inputs[picked]), targets[picked], reduction="sum") / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


class AccuracyPredictor:
    """Trained on samples: one-hot rows float32 [n, columns] and accuracies in per cent [n]. The same samples and seed
    give the same predictor. Raises ModelError for too few samples."""

    def __init__(self, x: np.ndarray, accuracy: np.ndarray, seed: int = 0, curve: bool = True) -> None:
        if len(x) < SAMPLES_LEAST:
            raise ModelError(f"{len(x)} scored specs teach no predictor: score {SAMPLES_LEAST} or more")
        self.quality, network = self._train(x, accuracy, seed)
        self.curve = [self._train(*self._part(x, accuracy, share, seed), seed)[0] for share in CURVE if curve]
        self.curve = [one for one in self.curve if one.samples < len(x)] + [self.quality]
        self._weights = [w.detach().numpy() for w in network.weights]
        self._biases = [b.detach().numpy() for b in network.biases]
        self._linear = network.linear.detach().numpy()

    @staticmethod
    def _part(x: np.ndarray, y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(SAMPLES_LEAST, int(len(x) * share))
        index = np.random.default_rng(seed).permutation(len(x))[:count]
        return x[index], y[index]

    def _train(self, x: np.ndarray, accuracy: np.ndarray, seed: int) -> tuple[Quality, _Ensemble]:
        accuracy = np.asarray(accuracy, np.float64)
        self.mean, self.deviation = float(accuracy.mean()), float(accuracy.std()) or 1.0
        part = folds(len(x), seed)
        network = _fit(x, ((accuracy - self.mean) / self.deviation).astype(np.float32), part, seed)
        with torch.no_grad():
            said = network(torch.from_numpy(x).expand(MEMBERS, *x.shape)).numpy()
        unseen = said[part, np.arange(len(x))] * self.deviation + self.mean
        quality = Quality(len(x), kendall_tau(unseen, accuracy), float(np.abs(unseen - accuracy).mean()))
        self.error = float(np.sqrt(np.mean((unseen - accuracy) ** 2)))
        return quality, network

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
        """Whether the samples suffice; if not, about how many do, by the learning curve."""
        q = self.quality
        text = f"accuracy predictor: {q.samples} samples, Kendall tau {q.tau:.2f}, mean error {q.mae:.2f} points"
        if q.tau >= WANTED_TAU:
            return text
        first = self.curve[0]
        if first.samples == q.samples or first.tau >= q.tau:
            return f"{text}: tau {WANTED_TAU} is wanted, but more samples have not raised it; try {2 * q.samples}"
        slope = np.log((1 - first.tau) / (1 - q.tau)) / np.log(q.samples / first.samples)
        needed = q.samples * ((1 - q.tau) / (1 - WANTED_TAU)) ** (1 / slope)
        return f"{text}: tau {WANTED_TAU} is wanted, score about {int(min(needed, 10 * q.samples)):d} specs"
