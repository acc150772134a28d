"""Scored specs of one run as one small file: genomes and accuracies, and how they came about.

A run that ships with its samples can be searched at once: nobody has to score specs again. Specs are genomes of the
run's search space (qdeploy.search.encoding), one digit a gene.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.files import parse_json, read_bytes
from qdeploy.search.encoding import Encoding
from qdeploy.space import SubnetSpec

FORMAT = "qdeploy-samples/1"
NAME = "samples.json"


@dataclass(frozen=True)
class Samples:
    """`genomes` int64 [n, V] of space `space` and `accuracy` in per cent, float64 [n], on `images` images.

    `run`: first 12 hex digits of the checkpoint's SHA-256. `made`: the commands that made them, seeds included.
    """

    run: str
    space: str
    images: int
    made: tuple[str, ...]
    genomes: np.ndarray
    accuracy: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], encoding: Encoding, made: Sequence[str]) -> Samples:
        """Rows of `qdeploy evaluate`, of one run and the same images; raises ModelError, RecipeError."""
        if len({(row["run"], row["images"]) for row in rows}) != 1:
            raise ModelError("samples are scores of one run on the same images: score the specs into one file")
        genomes = encoding.genomes([SubnetSpec.from_json(row["spec"]) for row in rows])
        accuracy = np.array([row["accuracy"] for row in rows], np.float64)
        return cls(rows[0]["run"], encoding.space.id, rows[0]["images"], tuple(made), genomes, accuracy)

    def rows(self, encoding: Encoding) -> list[dict[str, Any]]:
        """Inverse of `of`: one row a sample as `qdeploy evaluate` writes it."""
        about = {"run": self.run, "images": self.images}
        pairs = zip(encoding.specs(self.genomes), self.accuracy.tolist(), strict=True)
        return [about | {"spec_id": spec.id, "spec": spec.to_json(), "accuracy": score} for spec, score in pairs]

    def to_bytes(self) -> bytes:
        """JSON with one sample a line."""
        head = {"format": FORMAT, "run": self.run, "space": self.space, "images": self.images, "made": list(self.made)}
        lines = [
            f'["{"".join(map(str, genome))}",{round(accuracy, 6)}]'
            for genome, accuracy in zip(self.genomes.tolist(), self.accuracy.tolist(), strict=True)
        ]
        return (json.dumps(head)[:-1] + ', "samples": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def read_samples(path: Path, encoding: Encoding, run: str) -> Samples:
    """Inverse of `Samples.to_bytes`; ModelError for another run's or space's samples and for anything else."""
    value = parse_json(read_bytes(path, "the samples", ModelError), str(path), ModelError)
    try:
        if value["format"] != FORMAT:
            raise ModelError(f"{path} has format {value['format']!r}, not {FORMAT}: make it again")
        genomes = np.array([[int(digit) for digit in genome] for genome, _ in value["samples"]], np.int64)
        accuracy = np.array([accuracy for _, accuracy in value["samples"]], np.float64)
        found = Samples(
            str(value["run"]), str(value["space"]), int(value["images"]), tuple(value["made"]), genomes, accuracy
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError(f"{path} holds no samples ({e}): make it again") from e
    if (found.run, found.space) != (run, encoding.space.id):
        raise ModelError(f"{path} holds samples of another run or space: score specs of this run")
    if genomes.shape != (len(accuracy), len(encoding)) or (genomes >= encoding.counts).any():
        raise ModelError(f"{path} holds genomes that the space has not: make it again")
    return found
