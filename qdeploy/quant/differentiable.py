"""DifferentiableNet: a network whose widths are learned under budgets of memory (Schaefer et al. 2023).

Every weight has a step and a range for each output channel, every activation one of each (quant/learned.py). The first
and the last layer, and those that read pooled values, have 8 bits and count as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.errors import RecipeError
from qdeploy.frozen import WeightBits
from qdeploy.ptq.mixquant import WIDTHS, choose, error_table, for_size
from qdeploy.quant.gradients import GradientScaling
from qdeploy.quant.graph import Graph, Step
from qdeploy.quant.grid import container_bits
from qdeploy.quant.layers import MIN_STEP, ActivationQuantizer, WeightQuantizer
from qdeploy.quant.learned import LearnedActivation, LearnedRange, LearnedWeight
from qdeploy.quant.simulated import MIN_NORM_FACTOR, LayerCodes, SimulatedNet, safe
from qdeploy.recipe import DifferentiableQuantization
from qdeploy.space import MAX_BITS, LayerBits, LayerSpace, SubnetSpec

KIB = 8 * 1024  # bits
NORM_BITS = 2 * 16  # of a channel's batch norm: factor and offset as bfloat16, as the paper counts
BIAS_BITS = 32  # of a layer's own bias, which is an int32 here
WIDEST_SHIFT = 8.0  # octaves: more than from the greatest width to the least
BISECTIONS = 30
SMOOTHING = 0.9  # of the mean square of gradients
TINY = 1e-12


def _layer(step: Step) -> nn.Conv2d | nn.Linear:
    return cast("nn.Conv2d | nn.Linear", step.module)


class DifferentiableNet(SimulatedNet):
    """See the module's docstring. `image_shape` [C, H, W] decides what activations count."""

    def __init__(
        self,
        network: nn.Module,
        graph: Graph,
        name: str,
        choice: DifferentiableQuantization,
        image_shape: tuple[int, ...],
    ) -> None:
        super().__init__(network, graph, name, WIDTHS)
        self.choice = choice
        of_weights, of_activations = (
            GradientScaling(kind, choice.gradient_delta, choice.gradient_alpha)
            for kind in (choice.weight_gradient, choice.activation_gradient)
        )
        self.weights, self.streams, self.lows = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for step in graph.layers:
            weight, fixed = _layer(step).weight, step.name in self.fixed
            own = WeightQuantizer(weight, MAX_BITS) if fixed else LearnedWeight(weight, choice.start_bits, of_weights)
            self.weights[safe(step.name)] = own
        for tensor, place in self.placements.items():
            if self.has_stream_quantizer(tensor):
                self.streams[safe(tensor)] = ActivationQuantizer(MAX_BITS, place.signed)
            if place.low:
                low = LearnedActivation(choice.start_bits, place.signed, choice.percentile, of_activations)
                self.lows[safe(tensor)] = low
        if not self.learned_layers:
            raise RecipeError(f"network {name} has no layer but the first and the last: no width can be learned")
        self.mean_squares: Tensor
        self.register_buffer("mean_squares", torch.zeros(2))
        self.counts = self._count(image_shape)
        self._check_budgets()
        if choice.allocation != "learned":
            self._allocate()

    # ---- what counts -------------------------------------------------------------------------------------------

    @property
    def learned_layers(self) -> list[Step]:
        """The layers whose width is learned, in graph order."""
        return [step for step in self.graph.layers if step.name not in self.fixed]

    @torch.no_grad()
    def _count(self, image_shape: tuple[int, ...]) -> dict[str, int]:
        """Numbers of values of every tensor of one image."""
        training, spec = self.training, self.only
        self.eval()
        values = {self.graph.input: torch.zeros(1, *image_shape)}
        for step in self.graph.steps:
            values[step.name] = self.compute(step, [values[name] for name in step.inputs], spec)
        self.train(training)
        return {name: value.numel() for name, value in values.items()}

    def _fixed_weight_bits(self) -> int:
        return sum(MAX_BITS * _layer(step).weight.numel() for step in self.graph.layers if step.name in self.fixed)

    def _fixed_activation_bits(self) -> int:
        read = {step.inputs[0] for step in self.graph.layers if not self.reads_low(step)}
        return sum(MAX_BITS * self.counts[tensor] for tensor in read)

    def low_tensors(self) -> list[str]:
        """The tensors whose width is learned."""
        return [tensor for tensor, place in self.placements.items() if place.low]

    def weight_bits(self, coarser: float | None = None) -> Tensor:
        """Bits of all weights, a scalar: each channel's width times its weights; differentiable (eq. 2).

        With `coarser`, what `settle` of so many octaves would leave.
        """
        found = [_width(self.learned(s), coarser).double().sum() * self.learned(s).channel for s in self.learned_layers]
        return torch.stack(found).sum() + self._fixed_weight_bits()

    def activation_bits(self, coarser: float | None = None) -> Tensor:
        """Bits of all tensors that layers read, of one image, each counted once; otherwise as `weight_bits`."""
        pairs = [(self.activation(tensor).range, self.counts[tensor]) for tensor in self.low_tensors()]
        return torch.stack([_width(r, coarser).double() * n for r, n in pairs]).sum() + self._fixed_activation_bits()

    def size_kib(self) -> dict[str, float]:
        """Size as the paper counts it: weights, the sum of activations, batch norms, biases, and all together."""
        layers = self.graph.layers
        norms = sum(step.norm.num_features for step in layers if step.norm is not None)
        biases = sum(cast(Tensor, _layer(step).bias).numel() for step in layers if _layer(step).bias is not None)
        bits = {
            "weights": float(self.weight_bits().detach()),
            "activations": float(self.activation_bits().detach()),
            "batch norms": float(NORM_BITS * norms),
            "biases": float(BIAS_BITS * biases),
        }
        return {name: round(value / KIB, 3) for name, value in (bits | {"all": sum(bits.values())}).items()}

    # ---- where widths start ------------------------------------------------------------------------------------

    def _uniform_bits(self, weights: bool, bits: int) -> int:
        """Size with one width everywhere."""
        if weights:
            return self._fixed_weight_bits() + sum(bits * _layer(s).weight.numel() for s in self.learned_layers)
        return self._fixed_activation_bits() + sum(bits * self.counts[tensor] for tensor in self.low_tensors())

    def _check_budgets(self) -> None:
        """Raise RecipeError for a budget below the size at the least widths."""
        for key, weights in (("weight_kib", True), ("activation_kib", False)):
            budget, least = getattr(self.choice, key), self._uniform_bits(weights, WIDTHS[0])
            if budget * KIB < least:
                raise RecipeError(
                    f"quantization.{key} is {budget:g}: the least is {-(-least * 100 // KIB) / 100:g}, with "
                    f"{WIDTHS[0]} bits in all layers but the first and the last"
                )

    def _allocate(self) -> None:
        """Set the widths that are not learned: by MixQuant, or the greatest uniform ones within the budgets."""
        choice, layers = self.choice, self.learned_layers
        if choice.allocation == "mixquant":
            widths = self._mixquant()
        else:
            most = max(b for b in WIDTHS if self._uniform_bits(True, b) <= choice.weight_kib * KIB)
            widths = dict.fromkeys((step.name for step in layers), most)
        for step in layers:
            self.learned(step).set_width(widths[step.name])
        most = max(b for b in WIDTHS if self._uniform_bits(False, b) <= choice.activation_kib * KIB)
        for tensor in self.low_tensors():
            self.activation(tensor).set_width(most)

    def _mixquant(self) -> dict[str, int]:
        """Widths from the weights' own quantization errors, with the least multiplier that fits the budget."""
        tensors = {step.name: _layer(step).weight.detach().numpy() for step in self.learned_layers}
        table = error_table(tensors)

        def size(chosen: Mapping[str, int]) -> int:
            return self._fixed_weight_bits() + sum(bits * tensors[name].size for name, bits in chosen.items())

        return choose(table, for_size(table, size, int(self.choice.weight_kib * KIB)))

    # ---- the one spec ------------------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        return ()

    @property
    def only(self) -> SubnetSpec:
        """What the quantizers say now; a layer's weight width is that of its widest channel."""
        entries = []
        for step in self.graph.layers:
            if step.name in self.fixed:
                entries.append(LayerBits(step.name, MAX_BITS, MAX_BITS))
                continue
            reads = self.activation(step.inputs[0]).range.width
            entries.append(LayerBits(step.name, int(self.learned(step).width.max()), int(reads)))
        return SubnetSpec(self.name, tuple(entries))

    @property
    def learned_in(self) -> tuple[SubnetSpec, ...]:
        return (self.only,)

    def layer_space(self, step: Step) -> LayerSpace:
        entry = self.only[step.name]
        return LayerSpace(step.name, (entry.weight_bits,), (entry.activation_bits,))

    def uniform(self, width: int) -> SubnetSpec:
        raise RecipeError("the run learned one width for each channel: it has no uniform levels")

    def check_spec(self, spec: SubnetSpec) -> None:
        """Raise RecipeError unless `spec` is the learned one."""
        if spec != self.only:
            raise RecipeError(f"spec {spec.id} is not what the run learned, which is {self.only.id}: leave --spec out")

    # ---- what the spec selects ---------------------------------------------------------------------------------

    def learned(self, step: Step) -> LearnedWeight:
        """The weight quantizer of a layer whose width is learned."""
        return cast(LearnedWeight, self.weights[safe(step.name)])

    def activation(self, tensor: str) -> LearnedActivation:
        """The learned quantizer of a tensor."""
        return cast(LearnedActivation, self.lows[safe(tensor)])

    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        return step.norm

    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        return cast(ActivationQuantizer, self.streams[safe(tensor)]) if safe(tensor) in self.streams else None

    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        return self.activation(tensor)

    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        quantizer, weight = self.weights[safe(step.name)], _layer(step).weight
        found = quantizer(weight, MAX_BITS) if isinstance(quantizer, WeightQuantizer) else quantizer(weight)
        return cast(Tensor, found)

    def layer_codes(self, step: Step, spec: SubnetSpec) -> LayerCodes:
        quantizer, weight = self.weights[safe(step.name)], _layer(step).weight
        if isinstance(quantizer, LearnedWeight):
            return quantizer.layer_codes(weight)
        fixed, bits = cast(WeightQuantizer, quantizer), WeightBits(MAX_BITS, MAX_BITS, container_bits(MAX_BITS))
        return LayerCodes(fixed.codes(weight, MAX_BITS), fixed.container_step, 0, bits)

    # ---- parameters --------------------------------------------------------------------------------------------

    def ranges(self) -> Iterator[LearnedRange]:
        """Every learned step and range."""
        return (module for module in self.modules() if isinstance(module, LearnedRange))

    def network_parameters(self) -> list[nn.Parameter]:
        """Weights, biases, batch norms and the steps of 8-bit tensors: what every training step changes."""
        learned = {id(p) for module in self.ranges() for p in module.parameters()}
        return [p for p in self.parameters() if id(p) not in learned]

    def _kinds(self) -> tuple[list[LearnedRange], list[LearnedRange]]:
        """Steps and ranges of weights, and of activations."""
        activations = [self.activation(tensor).range for tensor in self.low_tensors()]
        return [self.learned(step) for step in self.learned_layers], activations

    @torch.no_grad()
    def update_ranges(self, rate: float, learn_width: bool) -> None:
        """One step against the gradients collected, `rate` octaves in the root mean square of each kind.

        As in RMSProp that is a running mean, but one for all weights and one for all activations: what counts is how a
        channel's gradient compares with the others'. Without `learn_width`, step and range move alike.
        """
        for kind, ranges in enumerate(self._kinds()):
            for entry in ranges if not learn_width else ():
                entry.keep_width()
            now = torch.cat([entry.pending.flatten() for entry in ranges]).square().mean()
            before = self.mean_squares[kind]
            self.mean_squares[kind] = SMOOTHING * before + (1 - SMOOTHING) * now if before > 0 else now
            for entry in ranges:
                entry.move(rate / (float(self.mean_squares[kind]) ** 0.5 + TINY))

    @torch.no_grad()
    def settle(self) -> None:
        """Fix every width: learned ones with steps as much coarser or finer as the budgets ask or allow."""
        finest = -WIDEST_SHIFT if self.choice.allocation == "learned" else 0.0
        sizes = (self.weight_bits, self.choice.weight_kib), (self.activation_bits, self.choice.activation_kib)
        for ranges, (size, budget) in zip(self._kinds(), sizes, strict=True):
            coarser = least_shift(size, budget * KIB, finest)
            for entry in ranges:
                entry.settle(coarser)
        self.mean_squares.zero_()

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps and batch-norm factors positive: runtimes refuse negative scales."""
        for module in self.modules():
            if isinstance(module, WeightQuantizer):
                module.step.clamp_(min=MIN_STEP)
            elif isinstance(module, ActivationQuantizer):
                module.project()
        for step in self.graph.steps:
            if step.norm is not None and step.norm.affine:
                step.norm.weight.clamp_(min=MIN_NORM_FACTOR)


def _width(entry: LearnedRange, coarser: float | None) -> Tensor:
    return entry.width if coarser is None else entry.coarser_width(coarser)


def least_shift(size: Callable[[float], Tensor], budget: float, finest: float) -> float:
    """The least shift in octaves, `finest` or more, with size(shift) <= budget; `size` falls."""
    if size(finest) <= budget:
        return finest
    low, high = finest, WIDEST_SHIFT
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= budget else (middle, high)
    return high
