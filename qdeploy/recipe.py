"""Recipe: models/NAME.toml as frozen dataclasses; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qdeploy.errors import RecipeError
from qdeploy.files import read_bytes
from qdeploy.space import MAX_BITS, MIN_BITS, SubnetSpec

FOLDER = "folder"  # the name of the dataset that images of one's own are


@dataclass(frozen=True)
class NetworkChoice:
    """Which backbone: a name of `qdeploy.nets`, its base width and the stride of its first convolution; or a function
    of one's own, "package.module:function", which is called with (channels, classes) and returns a torch.nn.Module.

    Of an elastic network also which input `resolutions` in pixels and base `widths` subnets may have, rising; the last
    of `widths` is `width`. Left out, all subnets have the images' size and `width`.
    """

    name: str
    width: int | None = None
    stem_stride: int = 1
    resolutions: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("resolutions", "widths"):
            numbers = getattr(self, key)
            if list(numbers) != sorted(set(numbers)) or any(number < 1 for number in numbers):
                raise RecipeError(f"network.{key} {list(numbers)} must be rising whole numbers from 1 up")
        if ":" in self.name and (self.width is not None or self.stem_stride != 1 or self.resolutions or self.widths):
            raise RecipeError(f"network {self.name} is made by your function: leave every other key of [network] out")
        if self.widths and self.widths[-1] != self.width:
            raise RecipeError(f"network.widths {list(self.widths)} must end with network.width, which is {self.width}")


@dataclass(frozen=True)
class DataChoice:
    """Which images: a dataset's name, how many training images (all by default), augmentation.

    `held_out` training images, a fixed random choice, are kept from training: `evaluate` scores specs on them.

    With the name "folder" they are images of one's own (image_folder.py): in `folder`, of `classes`, in order, as
    `channels` (1 or 3) of `size` [height, width]. `resize` "crop" scales the shorter side and cuts out the centre;
    without it all have that size. About `test_percent` of a hundred are for testing.
    """

    name: str
    split: Literal["train", "sample"] = "train"
    train_images: int | None = None
    augment: Literal["none", "flip-shift"] = "flip-shift"
    held_out: int | None = None
    folder: str | None = None
    classes: tuple[str, ...] = ()
    size: tuple[int, ...] = ()
    channels: Literal[1, 3] | None = None
    resize: Literal["crop"] | None = None
    test_percent: int | None = None

    def __post_init__(self) -> None:
        self._check_folder()
        for key in ("train_images", "held_out"):
            number = getattr(self, key)
            if number is not None and number < 1:
                raise RecipeError(f"data.{key} is {number}: choose a whole number from 1 up, or leave it out")

    def _check_folder(self) -> None:
        """Raise RecipeError unless the keys of one's own images are there for them, and for them alone."""
        keys = ("folder", "classes", "size", "channels", "test_percent")
        given = [key for key in (*keys, "resize") if getattr(self, key) not in (None, ())]
        if self.name != FOLDER:
            if given:
                raise RecipeError(f'data.{given[0]} is for images of your own: set name = "{FOLDER}", or leave it out')
            return
        if lacking := [key for key in keys if key not in given]:
            raise RecipeError(f"the recipe lacks data.{lacking[0]}: `qdeploy init` writes it for your images")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):  # noqa: PLR2004
            raise RecipeError(f"data.classes {list(self.classes)} must name two classes or more, none of them twice")
        if len(self.size) != 2 or min(self.size) < 1:  # noqa: PLR2004
            raise RecipeError(f"data.size is {list(self.size)}: give [height, width] in pixels")
        if not 1 <= (self.test_percent or 0) <= 90:  # noqa: PLR2004
            raise RecipeError(f"data.test_percent is {self.test_percent}: choose from 1 to 90, for example 20")
        if self.split != "train":
            raise RecipeError(f'data.split is "{self.split}": images of your own have the split "train" alone')


@dataclass(frozen=True)
class Quantization:
    """What is quantized and how (vertical layering).

    `widths` are trained together; the greatest is the top width K. `activation_bits` "same" follows the weights' width
    in every layer, 8 keeps all activations at 8 bits. `first_last` are the first and the last layer's widths: 8, or
    "float" as in the paper (such a network cannot be frozen). One width alone is plain LSQ.
    """

    method: Literal["vertical"] = "vertical"
    widths: tuple[int, ...] = (2, 3, 4)
    activation_bits: Literal["same", 8] = "same"
    first_last: Literal[8, "float"] = 8
    compensation: bool = True
    distillation: bool = True
    scalarization: Literal["unitary", "mgd"] = "unitary"

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise RecipeError(f"quantization.widths {list(self.widths)} must be rising, for example [2, 3, 4]")
        if not all(MIN_BITS <= b <= MAX_BITS for b in self.widths):
            raise RecipeError(f"quantization.widths {list(self.widths)} must lie in {MIN_BITS}..{MAX_BITS}")


def _check_widths(key: str, bits: tuple[int, ...]) -> None:
    """Raise RecipeError unless `bits` are rising widths of integers."""
    if not bits or list(bits) != sorted(set(bits)) or not all(MIN_BITS <= b <= MAX_BITS for b in bits):
        raise RecipeError(f"quantization.{key} {list(bits)} must be rising and lie in {MIN_BITS}..{MAX_BITS}")


@dataclass(frozen=True)
class EQNetQuantization:
    """What is quantized and how (EQ-Net): every layer's widths, granularity and symmetry may be chosen after training.

    The first and the last layer have 8 bits. `kurtosis_weight` and `skewness_weight` weigh the regularization of the
    weights' distribution, `guidance` is lambda of group progressive guidance: the part of a lower subnet's loss that is
    its distance from its teacher. `only`: this one subnet is trained, as a network of its own that learns from the
    labels alone, without guidance and regularization.
    """

    method: Literal["eqnet"]
    weight_bits: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))
    activation_bits: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))
    granularity: tuple[Literal["tensor", "channel"], ...] = ("tensor", "channel")
    symmetry: tuple[Literal["symmetric", "asymmetric"], ...] = ("symmetric", "asymmetric")
    kurtosis_weight: float = 0.015
    skewness_weight: float = 1.0
    guidance: float = 0.5
    only: SubnetSpec | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Weight widths, as `Quantization` calls them."""
        return self.weight_bits

    def __post_init__(self) -> None:
        for key in ("weight_bits", "activation_bits"):
            _check_widths(key, getattr(self, key))
        for key in ("granularity", "symmetry"):
            names = getattr(self, key)
            if not names or len(set(names)) != len(names):
                raise RecipeError(f"quantization.{key} {list(names)} must name at least one choice, none of them twice")
        weights = (self.kurtosis_weight, self.skewness_weight)
        if not (all(math.isfinite(w) and w >= 0 for w in weights) and 0 <= self.guidance <= 1):
            raise RecipeError(
                "quantization.kurtosis_weight and skewness_weight are finite and not negative, guidance lies in 0..1"
            )


@dataclass(frozen=True)
class Schedule:
    """One training phase: SGD with momentum 0.9, cosine decay to zero."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch: int = 128
    nesterov: bool = False

    def __post_init__(self) -> None:
        rates = math.isfinite(self.learning_rate) and math.isfinite(self.weight_decay)
        if self.epochs < 1 or self.batch < 2 or not rates or self.learning_rate <= 0 or self.weight_decay < 0:
            raise RecipeError(
                f"a training phase needs epochs >= 1, batch >= 2 and finite learning_rate > 0: got {self}"
            )


@dataclass(frozen=True)
class BatchQuantization:
    """What is quantized and how (BatchQuant, QFA): any architecture of an elastic network with any widths a layer.

    `estimator` is that of an activation's extreme values: the mean of each channel's (eq. 8), those of all (eq. 7), or
    mean and three deviations (eq. 9). To compare with: "running" quantizes by running averages of a batch's extremes,
    "learned" by a learned step and offset (LSQ+). Without `affine` there is no gamma and beta. `weights` "lsq" learns a
    step for every width; with "vertical" low-bit codes are prefixes of the top ones, so that subnets of one
    architecture make a ladder. Smaller `kernels` are the centre of
    larger ones, or that times a learned matrix (which does not nest). `mixed_phase` comes before the quantized phase
    and also draws layers in floating point (left out: training in one stage). A step sums the gradients of the largest,
    the smallest and `random_subnets` subnets and is bounded by `gradient_norm`. `only`: every step of every phase runs
    this one subnet, as a network of its own, which learns from the labels and from its own float form.
    """

    method: Literal["batchquant"]
    weight_bits: tuple[int, ...] = (2, 3, 4)
    activation_bits: tuple[int, ...] = (2, 3, 4)
    estimator: Literal["channel-mean", "extremes", "three-sigma", "running", "learned"] = "channel-mean"
    affine: bool = True
    weights: Literal["lsq", "vertical"] = "lsq"
    kernels: Literal["crop", "transform"] = "crop"
    mixed_phase: Schedule | None = None
    random_subnets: int = 4
    gradient_norm: float = 500.0
    only: SubnetSpec | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Weight widths, as `Quantization` calls them."""
        return self.weight_bits

    def __post_init__(self) -> None:
        for key in ("weight_bits", "activation_bits"):
            _check_widths(key, getattr(self, key))
        if self.weights == "vertical" and self.kernels == "transform":
            raise RecipeError(
                'quantization.kernels is "transform": a transformed kernel is no slice of the larger one\'s codes, so '
                'weights = "vertical" would not nest; choose kernels = "crop"'
            )
        if self.estimator == "learned" and not self.affine:
            raise RecipeError(
                'quantization.affine is false: estimator "learned" has no gamma and beta that could be left out'
            )
        if self.random_subnets < 0 or not (math.isfinite(self.gradient_norm) and self.gradient_norm > 0):
            raise RecipeError(
                "quantization.random_subnets is 0 or more, quantization.gradient_norm finite and positive"
            )


Scaling = Literal["ste", "ewgs", "pbgs", "acos", "tanh", "invtanh"]


@dataclass(frozen=True)
class DifferentiableQuantization:
    """What is quantized and how (differentiable mixed precision): widths are learned within two budgets of memory.

    `weight_kib` bounds the weights, `activation_kib` the sum of one image's activations that layers read; the first
    and the last layer count with 8 bits. Three phases: `uniform_phase` trains with `start_bits` everywhere,
    `precision_phase` learns the widths under a penalty that grows to `penalty` times the square of each budget's
    relative excess, and the quantized phase goes on with the widths that were found. Steps and ranges change every
    `update_steps` steps, at first by `range_rate` octaves. `weight_gradient` and `activation_gradient` scale the
    gradient through rounding, with `gradient_delta` and `gradient_alpha`. `percentile` is where activation ranges
    start. `distillation`: "soft" learns from the float network's outputs instead of the labels, "penalty" from both.

    To compare with, `allocation` "uniform" trains the greatest equal widths within the budgets, "mixquant" those that
    MixQuant picks; they have no `precision_phase`.
    """

    method: Literal["differentiable"]
    weight_kib: float
    activation_kib: float
    uniform_phase: Schedule
    precision_phase: Schedule | None = None
    allocation: Literal["learned", "uniform", "mixquant"] = "learned"
    start_bits: int = 4
    penalty: float = 10.0
    update_steps: int = 20
    range_rate: float = 0.1
    weight_gradient: Scaling = "ewgs"
    activation_gradient: Scaling = "invtanh"
    gradient_delta: float = 5e-3
    gradient_alpha: float = 1.8
    percentile: float = 99.99
    distillation: Literal["none", "soft", "penalty"] = "none"

    @property
    def widths(self) -> tuple[int, ...]:
        """Weight widths to choose from after training, as `Quantization` calls them: none."""
        return ()

    def __post_init__(self) -> None:
        _check_widths("start_bits", (self.start_bits,))
        for key in ("weight_kib", "activation_kib", "penalty", "range_rate"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise RecipeError(f"quantization.{key} is {value}: a positive number is needed")
        if (self.precision_phase is None) == (self.allocation == "learned"):
            raise RecipeError(
                'quantization.precision_phase goes with allocation = "learned", and with that alone: it learns widths'
            )
        if self.update_steps < 1:
            raise RecipeError(f"quantization.update_steps is {self.update_steps}: choose 1 or more, for example 20")
        if not 0 <= self.gradient_delta < 1 or not 0 < abs(self.gradient_alpha) < 2:  # noqa: PLR2004
            raise RecipeError(
                "quantization.gradient_delta lies in 0..1, gradient_alpha between -2 and 2 and is not 0 (arctanh of "
                "half of it must be finite)"
            )
        if not 50 < self.percentile <= 100:  # noqa: PLR2004
            raise RecipeError(f"quantization.percentile is {self.percentile}: give more than 50 and at most 100")


AnyQuantization = Quantization | EQNetQuantization | BatchQuantization | DifferentiableQuantization


@dataclass(frozen=True)
class Recipe:
    """A whole training: network, data, quantization, the float phase and the quantized phase.

    `precision` "bfloat16" computes convolutions in that type (autocast); quantizers and sums stay in float32.
    """

    name: str
    network: NetworkChoice
    data: DataChoice
    quantization: AnyQuantization = field(default_factory=Quantization)
    float_phase: Schedule = field(default_factory=lambda: Schedule(8, 0.1, 5e-4, nesterov=True))
    quantized_phase: Schedule = field(default_factory=lambda: Schedule(8, 0.01, 1e-4))
    seed: int = 0
    precision: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise RecipeError(f"seed is {self.seed}: choose a whole number from 0 to 2^63 - 1")
        for key in ("resolutions", "widths"):
            if getattr(self.network, key) and not isinstance(self.quantization, BatchQuantization):
                raise RecipeError(f"network.{key} vary in elastic networks: choose method batchquant, or leave it out")
        only = getattr(self.quantization, "only", None)
        if only is not None and only.network != self.network.name:
            raise RecipeError(f"quantization.only is a subnet of {only.network}, the network is {self.network.name}")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; `quantization` may be a dict of its own changes."""
        if isinstance(changes.get("quantization"), dict):
            changes["quantization"] = dataclasses.replace(self.quantization, **changes["quantization"])
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value with every field; `from_dict` is its inverse."""
        plain: dict[str, Any] = _plain(self)
        return plain


def _plain(value: Any) -> Any:
    """Tuples become lists, specs their JSON, absent and empty entries go."""
    if isinstance(value, SubnetSpec):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        items = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {key: _plain(item) for key, item in items.items() if item not in (None, ())}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _method(kinds: tuple[type, ...], value: Any, where: str) -> type:
    """Which of several tables `value` is, by its key `method`; the first one where that is absent."""
    methods = {typing.get_args(typing.get_type_hints(kind)["method"])[0]: kind for kind in kinds}
    name = value.get("method", next(iter(methods))) if isinstance(value, dict) else next(iter(methods))
    if not isinstance(name, str) or name not in methods:
        raise RecipeError(f"{where}.method is {name!r}: choose one of {', '.join(map(repr, methods))}")
    return methods[name]


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as type `kind`, or RecipeError at `where`; integers pass for floats, lists for tuples."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is SubnetSpec:
        return _spec(value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, where)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise RecipeError(f"{where} is {value!r}: choose one of {', '.join(repr(a) for a in args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{where} is {value!r}: a list is needed")
        return tuple(_convert(args[0], item, where) for item in value)
    if args and all(dataclasses.is_dataclass(a) for a in args):
        return _build(_method(args, value, where), value, where)
    if args:  # X | None: absent is None, so a given value must be an X
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"{where} is {value!r}: {kind.__name__} is needed")
    return value


def _spec(value: Any, where: str) -> SubnetSpec:
    try:
        return SubnetSpec.from_json(value)
    except RecipeError as e:
        raise RecipeError(f"{where}: {e}") from e


def _build(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"{where or 'the recipe'} must be a table")
    kinds = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in kinds:
            raise RecipeError(f"unknown key {prefix}{key}: known keys are {', '.join(sorted(kinds))}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, entry in fields.items():
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise RecipeError(f"the recipe lacks {prefix}{name}")
    return cls(**{key: _convert(kinds[key], item, prefix + key) for key, item in value.items()})


def from_dict(value: Any) -> Recipe:
    """Recipe from a plain dict; raises RecipeError that names the key at fault."""
    recipe = _build(Recipe, value, "")
    assert isinstance(recipe, Recipe)
    return recipe


def same_recipe(stored: Any, recipe: Recipe) -> bool:
    """True when the plain dict `stored`, which another version may have written, means `recipe`."""
    try:
        return from_dict(stored) == recipe
    except RecipeError:
        return False


def with_only(recipe: Recipe, spec: SubnetSpec) -> Recipe:
    """`recipe` for training the one subnet `spec` alone; RecipeError for a method that has no subnets."""
    if not isinstance(recipe.quantization, EQNetQuantization | BatchQuantization):
        raise RecipeError(
            "one subnet alone can be trained with method eqnet or batchquant; vertical has widths instead"
        )
    return recipe.replace(quantization={"only": spec})


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file."""
    data = read_bytes(path, "the recipe", RecipeError)
    try:
        value = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path} is not valid TOML: {e}") from e
    value.setdefault("name", Path(path).stem)
    return from_dict(value)
