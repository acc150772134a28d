"""Rows of the claims table: every training that it needs, and what is measured of each."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from qdeploy.data import CLASSES
from qdeploy.recipe import Recipe, from_dict
from qdeploy.space import SubnetSpec
from qdeploy.train.run import new_network, new_quantized

IMAGES, MOBILE_IMAGES = 20_000, 10_000  # training images without --full
WIDTHS = (2, 3, 4)
SEEDS = 3  # of headline rows
SPECS = 5  # subnets that are also trained alone, the first ALONE_SEEDS of them with all seeds
ALONE_SEEDS = 2
GRANULARITIES, SYMMETRIES = ("tensor", "channel"), ("symmetric", "asymmetric")
CIFAR_SHAPE = (3, 32, 32)
THINNEST = 1
SIZE_3 = {"weight_kib": 28.99, "activation_kib": 9.44}  # of the ResNet-8 with 3 bits, 8 in the first and last layer
SIZE_2 = {"weight_kib": 19.68, "activation_kib": 7.32}
SIZE_BETWEEN = {"weight_kib": 24.33, "activation_kib": 8.38}  # halfway
SCALINGS = (  # of the gradients through rounding weights, activations
    *(("ste", "ste"), ("ewgs", "ste"), ("ste", "invtanh"), ("ewgs", "invtanh"), ("ewgs", "ewgs")),
    *(("pbgs", "pbgs"), ("acos", "acos"), ("tanh", "tanh")),
)
POST_WIDTHS = (4, 3)  # uniform widths whose sizes MixQuant's must not exceed
POST_STEPS = 200  # of block reconstruction, a block

FLOAT = {"epochs": 8, "learning_rate": 0.1, "weight_decay": 5e-4, "nesterov": True}
QUANTIZED = {"epochs": 5, "learning_rate": 0.01, "weight_decay": 1e-4}
MOBILE_STAGE = QUANTIZED | {"epochs": 3}
LAST = QUANTIZED | {"epochs": 1}
RESNET = {"name": "resnet8", "width": 16, "stem_stride": 2}
MOBILE = {"name": "mobilenetv3-small", "width": 8, "stem_stride": 2}


@dataclass(frozen=True)
class Row:
    """One training: the tables of its recipe, what is measured of it, and how many seeds it is run with.

    Top-1 accuracy is measured at the uniform `widths`, of an EQ-Net in every granularity and symmetry, and of `specs`.
    With `post` nothing but the float phase is trained: claims_post.py quantizes that network as `post` says.
    """

    name: str
    quantization: dict[str, Any]
    widths: tuple[int, ...] = WIDTHS
    specs: tuple[SubnetSpec, ...] = ()
    seeds: int = 1
    network: dict[str, Any] = field(default_factory=lambda: RESNET)
    data: dict[str, Any] = field(default_factory=lambda: {"name": "cifar-10", "train_images": IMAGES})
    float_phase: dict[str, Any] = field(default_factory=lambda: FLOAT)
    quantized_phase: dict[str, Any] = field(default_factory=lambda: QUANTIZED)
    post: dict[str, Any] | None = None

    def recipe(self, seed: int, full: bool) -> Recipe:
        """The whole recipe of a cell; `full`: of all training images."""
        data = {key: value for key, value in self.data.items() if not (full and key == "train_images")}
        tables = {key: getattr(self, key) for key in ("network", "quantization", "float_phase", "quantized_phase")}
        return from_dict({"name": f"claims-{self.name}", "data": data, "seed": seed} | tables)


def _mobile(name: str, seeds: int = 1, **changes: Any) -> Row:
    """BatchQuant on the elastic MobileNetV3, in two stages of equal length."""
    quantization = {"method": "batchquant", "mixed_phase": MOBILE_STAGE, "random_subnets": 2} | changes
    return Row(
        name,
        {key: value for key, value in quantization.items() if value is not None},
        widths=(2, 4),
        seeds=seeds,
        network=MOBILE,
        data={"name": "cifar-10", "train_images": MOBILE_IMAGES},
        float_phase=FLOAT | {"learning_rate": 0.05},
        quantized_phase=MOBILE_STAGE,
    )


def _eqnet(name: str, seeds: int = 1, **changes: Any) -> Row:
    """EQ-Net of all widths from 2 to 4 (what the tables compare) and 8."""
    bits = [*WIDTHS, 8]
    quantization = {"method": "eqnet", "weight_bits": bits, "activation_bits": bits} | changes
    return Row(name, quantization, widths=tuple(bits), seeds=seeds)


def lsq_name(bits: int, granularity: str, symmetry: str) -> str:
    """Row of a network trained for one width, granularity and symmetry alone."""
    return f"lsq{bits}-{granularity}-{symmetry}"


def _lsq(bits: int, granularity: str, symmetry: str) -> Row:
    """One choice of EQ-Net's alone, without what is there for the sake of many: LSQ."""
    choice: dict[str, Any] = {
        "weight_bits": [bits],
        "activation_bits": [bits],
        "granularity": [granularity],
        "symmetry": [symmetry],
    }
    row = _eqnet(lsq_name(bits, granularity, symmetry), 1, **choice, kurtosis_weight=0.0, skewness_weight=0.0)
    return replace(row, widths=(bits,))


def random_specs(row: Row, count: int) -> tuple[SubnetSpec, ...]:
    """Different subnets of a row's space, every choice drawn at random; the same for all seeds of its training."""
    thin = replace(row, network=row.network | {"width": THINNEST}).recipe(0, False)  # has the same space
    network = new_network(thin, CIFAR_SHAPE[0], len(CLASSES[thin.data.name]))
    space, random = new_quantized(thin, network, CIFAR_SHAPE).space, Random("claims")
    found: dict[SubnetSpec, None] = {}
    while len(found) < count:
        found[space.sample(random)] = None
    return tuple(found)


def _with_alone(row: Row) -> list[Row]:
    """`row`, measured at random specs too, and rows that train each of these alone for as many epochs."""
    specs = random_specs(row, SPECS)
    found = [replace(row, specs=specs)]
    for number, spec in enumerate(specs, 1):
        quantization = row.quantization | {"only": spec.to_json()}
        seeds = SEEDS if number <= ALONE_SEEDS else 1
        name = f"{row.name}-alone-{number}"
        found.append(replace(row, name=name, quantization=quantization, widths=(), specs=(spec,), seeds=seeds))
    return found


@functools.cache
def rows() -> dict[str, Row]:
    """Every training of the tables, by name, headline rows first."""
    eqnet, *eqnet_alone = _with_alone(_eqnet("eqnet", SEEDS))
    nested, *nested_alone = _with_alone(_mobile("batchquant-nested", SEEDS, weights="vertical"))
    found = [Row("vertical", {"widths": list(WIDTHS)}, seeds=SEEDS)]
    found += [Row(f"lsq{bits}", {"widths": [bits]}, (bits,), seeds=SEEDS) for bits in WIDTHS]
    found += [eqnet, _mobile("batchquant-eq8", SEEDS), _mobile("batchquant-eq7", SEEDS, estimator="extremes"), nested]
    found += [*nested_alone, *eqnet_alone]
    found += [Row("no-compensation", {"compensation": False})]
    found += [
        _mobile("batchquant-no-gamma-beta", affine=False),
        _mobile("batchquant-running", estimator="running"),
        _mobile("batchquant-learned-steps", estimator="learned"),
        _one_stage(_mobile("batchquant-one-stage", mixed_phase=None)),
        _mobile("batchquant-transform", kernels="transform"),
    ]
    found += [_eqnet(f"eqnet-lambda-{part}", guidance=part) for part in (0.1, 0.9)]
    found += [_lsq(bits, *kind) for bits in WIDTHS for kind in itertools.product(GRANULARITIES, SYMMETRIES)]
    found += _differentiable() + post_rows()
    return {row.name: row for row in found}


def _differentiable() -> list[Row]:
    """Widths learned within a size, other ways to share that out, and gradient scalings at 2 bits."""

    def row(name: str, phases: dict[str, int], **choices: Any) -> Row:
        epochs = {f"{key}_phase": QUANTIZED | {"epochs": number} for key, number in phases.items()}
        return Row(f"diff-{name}", {"method": "differentiable"} | SIZE_3 | epochs | choices, (), quantized_phase=LAST)

    found = [row("learned", {"uniform": 1, "precision": 2})]
    found += [row(kind, {"uniform": 3}, allocation=kind) for kind in ("uniform", "mixquant")]
    found += [row("learned-long", {"uniform": 1, "precision": 6})]
    found += [row("uniform-long", {"uniform": 7}, allocation="uniform")]
    found += [row("learned-between", {"uniform": 1, "precision": 2}, **SIZE_BETWEEN)]
    found += [row("mixquant-between", {"uniform": 3}, allocation="mixquant", **SIZE_BETWEEN)]
    for weights, activations in SCALINGS:
        choices = {"allocation": "uniform", "weight_gradient": weights, "activation_gradient": activations}
        found.append(row(f"2bit-{weights}-{activations}", {"uniform": 1}, **choices, **SIZE_2))
    return found


def post_rows() -> list[Row]:
    """Rows that quantize the trained float ResNet-8 without training (claims_post.py)."""
    methods: dict[str, dict[str, Any]] = {
        "uniform": {},
        "brecq": {"reconstruct": POST_STEPS},
        "mixquant": {"mixquant": True},
        "mixquant-brecq": {"mixquant": True, "reconstruct": POST_STEPS},
    }
    found = []
    for name, bits in (("uniform", 8), *((name, bits) for bits in POST_WIDTHS for name in methods)):
        settings = {"weight_bits": bits, "activation_bits": 8}
        found.append(Row(f"post-{name}{bits}", {}, (), post={"settings": settings} | methods[name]))
    return found


def _one_stage(row: Row) -> Row:
    """All epochs in the one stage that is left."""
    return replace(row, quantized_phase=MOBILE_STAGE | {"epochs": 2 * MOBILE_STAGE["epochs"]})
