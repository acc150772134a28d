"""A search space as numpy: whole populations of genomes are decoded, encoded and drawn at once.

A genome is a row of `SearchSpace.variables` as indices of their choices, int64 [V]. Canonical genomes have 0 where a
gene is inactive, so two specs are equal exactly when their canonical genomes are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import product

import numpy as np

from qdeploy.space import SearchSpace, SubnetSpec


class Genomes(ABC):
    """What a strategy needs of genomes. `counts`: how many choices each gene has, int64 [V]."""

    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @abstractmethod
    def active(self, genomes: np.ndarray) -> np.ndarray:
        """Which genes say something, bool [n, V]."""

    @abstractmethod
    def canonical(self, genomes: np.ndarray) -> np.ndarray:
        """The same choices, in the one form that equal ones share."""

    def sample(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Canonical genomes, every gene drawn uniformly; one may come twice."""
        return self.canonical(random.integers(0, self.counts, (count, len(self))))

    def spread(self, count: int, random: np.random.Generator) -> np.ndarray:
        """As `sample`, but each genome first draws how high its choices lie, so that costs spread evenly.

        Uniform genes alone give costs that gather at their mean: nothing is learned of the ends.
        """
        level = random.random((count, 1))
        return self.canonical(random.binomial(self.counts - 1, np.broadcast_to(level, (count, len(self)))))

    def unlike(self, genomes: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The first of each among canonical `genomes` that is not in `known`, in their order."""
        seen = set(keys(known))
        fresh = []
        for i, key in enumerate(keys(genomes)):
            if key not in seen:
                seen.add(key)
                fresh.append(i)
        return genomes[fresh]


class Encoding(Genomes):
    """Arrays that decode genomes of `space`.

    A *shape* is one choice of resolution, base width and a block's kernel and expansion, as one index below
    `shape_count`: all that the shape of a layer depends on. Layers outside blocks have the first kernel and expansion.
    `kinds`: the most choices that a layer has of granularity and of symmetry, at least 1 each.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.counts = np.array([len(gene.choices) for gene in space.variables], np.int64)
        self._column = {gene.name: i for i, gene in enumerate(space.variables)}
        self._block = {reference: i for i, reference in enumerate(space.blocks)}
        self._block_of = np.array([self._block.get(g.block, -1) if g.block else -1 for g in space.variables], np.int64)
        self.layers = [layer.layer for layer in space.layers]
        self.layer_block = np.array([-1 if x.block is None else self._block[x.block] for x in space.layers], np.int64)
        self._around = (max(1, len(space.resolutions)), max(1, len(space.widths)))
        self._inside = (max(1, len(space.kernels)), max(1, len(space.expands)))
        self.shape_count = int(np.prod((*self._around, *self._inside)))
        kinds = [(layer.granularity, layer.symmetry) for layer in space.layers]
        self.kinds = tuple(max(1, *(len(both[i]) for both in kinds)) for i in range(2))

    def column(self, name: str) -> int | None:
        """Where a variable's gene is; None for one that does not vary."""
        return self._column.get(name)

    def _gather(self, genomes: np.ndarray, names: Sequence[str], choices: Sequence[Sequence[int]]) -> np.ndarray:
        """Values of the variables `names`, int64 [n, names]; one that does not vary has the first of its `choices`."""
        padded = np.concatenate([genomes, np.zeros((len(genomes), 1), np.int64)], axis=1)
        columns = np.array([self._column.get(name, -1) for name in names], np.int64)
        table = np.zeros((len(names), max(map(len, choices), default=1)), np.int64)
        for row, values in zip(table, choices, strict=True):
            row[: len(values)] = values
        return np.asarray(table[np.arange(len(names)), padded[:, columns]])

    def blocks(self, genomes: np.ndarray) -> np.ndarray:
        """Which of `space.blocks` a genome keeps, bool [n, blocks]."""
        names = [f"stage {stage} depth" for stage in range(len(self.space.depths))]
        depths = self._gather(genomes, names, self.space.depths)
        stages = np.array([stage for stage, _ in self.space.blocks], np.int64)
        return np.asarray(np.array([block for _, block in self.space.blocks], np.int64) < depths[:, stages])

    def _kept(self, genomes: np.ndarray, block: np.ndarray) -> np.ndarray:
        """For each entry of `block` (-1: of every subnet) whether a genome has it, bool [n, entries]."""
        kept = np.concatenate([self.blocks(genomes), np.ones((len(genomes), 1), bool)], axis=1)
        return np.asarray(kept[:, block])

    def active(self, genomes: np.ndarray) -> np.ndarray:
        return self._kept(genomes, self._block_of)

    def canonical(self, genomes: np.ndarray) -> np.ndarray:
        """The same specs, inactive genes 0."""
        return np.where(self.active(genomes), genomes, 0)

    def present(self, genomes: np.ndarray) -> np.ndarray:
        """Which of `layers` a genome has, bool [n, L]."""
        return self._kept(genomes, self.layer_block)

    def bits(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight and activation widths, int64 [n, L] each; 0 for a layer that is not present."""
        present, layers = self.present(genomes), self.space.layers
        weights = self._gather(genomes, [f"{x.layer} weight_bits" for x in layers], [x.weight_bits for x in layers])
        names = [f"{x.shares or x.layer} activation_bits" for x in layers]
        activations = self._gather(genomes, names, [x.activation_bits for x in layers])
        return weights * present, activations * present

    def kind(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the granularity and of the symmetry of each layer, int64 [n, L] each."""
        fields = zip(("granularity", "symmetry"), self.kinds, strict=True)
        found = [
            self._gather(genomes, [f"{x} {f}" for x in self.layers], [range(n)] * len(self.layers)) for f, n in fields
        ]
        return found[0], found[1]

    def _index(self, genomes: np.ndarray, name: str) -> np.ndarray:
        """Index of a choice, int64 [n]; 0 for what does not vary."""
        column = self._column.get(name)
        return np.zeros(len(genomes), np.int64) if column is None else np.asarray(genomes[:, column])

    def shapes(self, genomes: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Shape of the block that each entry of `block` (-1: outside all blocks) names, int64 [n, entries]."""
        (_, widths), (kernels, expands) = self._around, self._inside
        around = self._index(genomes, "resolution") * widths + self._index(genomes, "width")
        inside = [
            self._index(genomes, f"stage {s} block {b} kernel") * expands
            + self._index(genomes, f"stage {s} block {b} expand")
            for s, b in self.space.blocks
        ]
        table = np.stack([*inside, np.zeros(len(genomes), np.int64)], axis=1)
        return np.asarray(around[:, None] * (kernels * expands) + table[:, block])

    def covering(self) -> np.ndarray:
        """A genome for each shape: the deepest network with it throughout, all else at its last choice; [shapes, V]."""
        rows = []
        resolutions, widths, kernels, expands = (range(n) for n in (*self._around, *self._inside))
        for shape in product(resolutions, widths, kernels, expands):
            row = self.counts - 1
            for gene, column in self._column.items():
                for index, word in enumerate(("resolution", "width", "kernel", "expand")):
                    if gene == word or (gene.startswith("stage ") and gene.endswith(f" {word}")):
                        row[column] = shape[index]
                if gene.startswith("stage ") and gene.endswith(" depth"):
                    row[column] = int(np.argmax(self.space.variables[column].choices))
            rows.append(row)
        return np.array(rows, np.int64).reshape(self.shape_count, len(self))

    @cached_property
    def _first_columns(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])[:-1]

    def one_hot(self, genomes: np.ndarray) -> np.ndarray:
        """`SearchSpace.one_hot` of each genome, float32 [n, columns]."""
        found = np.zeros((len(genomes), int(self.counts.sum())), np.float32)
        rows, columns = np.nonzero(self.active(genomes))
        found[rows, self._first_columns[columns] + genomes[rows, columns]] = 1.0
        return found

    # ---- specs -----------------------------------------------------------------------------------------------------

    def specs(self, genomes: np.ndarray) -> list[SubnetSpec]:
        """The specs of genomes."""
        return [self.space.from_genes(row) for row in genomes.tolist()]

    def genomes(self, specs: Sequence[SubnetSpec]) -> np.ndarray:
        """Inverse of `specs`, canonical; RecipeError for a spec outside the space."""
        rows = [self.space.genes(spec) for spec in specs]
        return np.array(rows, np.int64).reshape(len(rows), len(self))


def keys(genomes: np.ndarray) -> list[bytes]:
    """A hashable value of each genome."""
    compact = np.ascontiguousarray(genomes, np.uint8)
    return [row.tobytes() for row in compact]
