"""Read a plain torch network into steps that a quantized network can mirror: Conv+BN+Relu, Linear, Add, Mul, pools...

The network is traced by torch.fx; nothing is asked of it but ordinary modules or functions. What cannot be mirrored is
refused by name, all of it at once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qdeploy.errors import ModelError

KNOWN_MODULES = (
    "Conv2d, BatchNorm2d, Linear, ReLU, ReLU6, Hardswish, Hardsigmoid, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d(1), "
    "Flatten, Dropout, Identity"
)


@dataclass(frozen=True)
class Step:
    """One operator of the network with what is folded into it.

    `op` and `attributes` are those of `qdeploy.frozen`; `module` is the conv or linear, `norm` the batch norm behind
    it. `ceiling` is the upper bound of a Relu6.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    norm: nn.BatchNorm2d | None = None
    relu: bool = False
    ceiling: float | None = None


@dataclass(frozen=True)
class Graph:
    """Steps in order; a step's name is also its output tensor's. `input` names the image tensor."""

    input: str
    steps: tuple[Step, ...]

    @property
    def output(self) -> str:
        return self.steps[-1].name

    def consumers(self, tensor: str) -> list[Step]:
        """The steps that read `tensor`."""
        return [step for step in self.steps if tensor in step.inputs]

    @property
    def layers(self) -> list[Step]:
        """The steps that hold weights, in order."""
        return [step for step in self.steps if step.op in ("conv", "linear")]


def _pair(value: Any) -> list[int]:
    return [int(value), int(value)] if isinstance(value, int) else [int(v) for v in value]


def _conv(module: nn.Conv2d) -> dict[str, Any]:
    if module.padding_mode != "zeros":
        raise ModelError(f"padding mode {module.padding_mode!r}: only zeros can be quantized")
    if isinstance(module.padding, str):
        if module.padding == "valid":
            top = left = bottom = right = 0
        else:  # "same": torch puts the odd pixel at the bottom and right
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            top, left = total[0] // 2, total[1] // 2
            bottom, right = total[0] - top, total[1] - left
    else:
        top, left = _pair(module.padding)
        bottom, right = top, left
    return {
        "stride": _pair(module.stride),
        "padding": [top, left, bottom, right],
        "dilation": _pair(module.dilation),
        "groups": module.groups,
    }


def _max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any = 1, ceil_mode: bool = False) -> dict[str, Any]:
    if _pair(dilation) != [1, 1] or ceil_mode:
        raise ModelError("max pooling with dilation or ceil_mode cannot be exported")
    height, width = _pair(padding)
    stride = kernel if stride in (None, [], ()) else stride
    return {"kernel": _pair(kernel), "stride": _pair(stride), "padding": [height, width, height, width]}


class _Reader:
    """Walks a traced graph once; `names` maps fx nodes to the tensor that stands for them.

    `scoped`: an operator that is no module is called after the module whose forward has it, `MODULE.add`, so that it
    has one name in all networks of a search space. Else as torch.fx calls it.
    """

    def __init__(self, traced: fx.GraphModule, scoped: bool) -> None:
        self.traced, self.scoped = traced, scoped
        self.modules = dict(traced.named_modules())
        self.steps: dict[str, Step] = {}
        self.names: dict[fx.Node, str] = {}
        self.input = ""
        self.output: fx.Node | None = None
        self.shapes: set[fx.Node] = set()  # values that are a shape, and those that are the batch size
        self.batch: set[fx.Node] = set()

    def read(self) -> Graph:
        problems = []
        for node in self.traced.graph.nodes:
            try:
                self.visit(node)
            except (ModelError, IndexError, KeyError, TypeError) as e:
                text = str(e) if isinstance(e, ModelError) else f"its arguments cannot be read ({e!r})"
                problems.append(f"{node.name}: {text}")
                self.names[node] = self.input
        if problems:
            raise ModelError("the network cannot be quantized: " + "; ".join(problems))
        if self.output is None or not self.steps or self.names[self.output] != next(reversed(self.steps)):
            raise ModelError("the network must return the one tensor that its last operator makes")
        return Graph(self.input, tuple(self.steps.values()))

    def tensor(self, node: Any) -> str:
        if not isinstance(node, fx.Node):
            raise ModelError(f"operand {node!r} is not a tensor of the network")
        return self.names[node]

    def add(self, node: fx.Node, op: str, inputs: tuple[str, ...], name: str = "", **fields: Any) -> None:
        name = name or self.function_name(node, op)
        if name in self.steps:
            raise ModelError("the same module is called twice: give each call its own module")
        self.steps[name] = Step(name, op, inputs, **fields)
        self.names[node] = name

    def function_name(self, node: fx.Node, op: str) -> str:
        """Name of an operator that is no module."""
        return ".".join([*list(node.meta.get("nn_module_stack", {}))[-1:], op]) if self.scoped else node.name

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.input:
                raise ModelError("a second input; networks with one image input can be quantized")
            self.input = self.names[node] = "image"
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise ModelError("the network must return one tensor")
            self.output = result
        elif node.op == "call_module":
            self.module(node, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            if not self.size(node):
                self.function(node)
        else:
            raise ModelError(f"{node.op} is not supported")

    def module(self, node: fx.Node, module: nn.Module) -> None:
        source, name = self.tensor(node.args[0]), str(node.target)
        if isinstance(module, nn.Conv2d):
            self.add(node, "conv", (source,), name, module=module, attributes=_conv(module))
        elif isinstance(module, nn.Linear):
            self.add(node, "linear", (source,), name, module=module)
        elif isinstance(module, nn.BatchNorm2d):
            self.fold_norm(node, source, module)
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            self.fold_relu(node, source, 6.0 if isinstance(module, nn.ReLU6) else None)
        elif isinstance(module, nn.Hardswish | nn.Hardsigmoid):
            self.add(node, "hard_swish" if isinstance(module, nn.Hardswish) else "hard_sigmoid", (source,), name)
        elif isinstance(module, nn.MaxPool2d):
            attributes = _max_pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            self.add(node, "max_pool", (source,), name, attributes=attributes)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1]):
            self.add(node, "global_average_pool", (source,), name)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self.add(node, "flatten", (source,), name)
        elif isinstance(module, nn.Identity | nn.Dropout):
            self.names[node] = source
        else:
            raise ModelError(f"{type(module).__name__} is not among {KNOWN_MODULES}")

    def function(self, node: fx.Node) -> None:
        target = node.target
        args, kwargs = node.args, dict(node.kwargs)
        if target in (operator.add, operator.iadd, torch.add, "add", "add_"):
            if kwargs.pop("alpha", 1) != 1:
                raise ModelError("add with alpha")
            self.add(node, "add", (self.tensor(args[0]), self.tensor(args[1])))
        elif target in (operator.mul, operator.imul, torch.mul, "mul", "mul_"):
            self.add(node, "mul", (self.tensor(args[0]), self.tensor(args[1])))
        elif target in (F.hardswish, F.hardsigmoid):
            self.add(node, "hard_swish" if target is F.hardswish else "hard_sigmoid", (self.tensor(args[0]),))
        elif target in (F.relu, torch.relu, "relu", "relu_"):
            self.fold_relu(node, self.tensor(args[0]), None)
        elif target is F.relu6:
            self.fold_relu(node, self.tensor(args[0]), 6.0)
        elif target in (F.max_pool2d, torch.max_pool2d):
            call: dict[str, Any] = dict(
                zip(("kernel", "stride", "padding", "dilation", "ceil_mode"), args[1:], strict=False)
            )
            call |= {"kernel" if k == "kernel_size" else k: v for k, v in kwargs.items() if k != "return_indices"}
            attributes = _max_pool(call.pop("kernel"), call.pop("stride", None), call.pop("padding", 0), **call)
            self.add(node, "max_pool", (self.tensor(args[0]),), attributes=attributes)
        elif target is F.adaptive_avg_pool2d:
            if _pair(args[1] if len(args) > 1 else kwargs["output_size"]) != [1, 1]:
                raise ModelError("adaptive_avg_pool2d to another size than 1")
            self.add(node, "global_average_pool", (self.tensor(args[0]),))
        elif target in (torch.mean, "mean"):
            self.mean(node)
        elif target in (torch.flatten, "flatten"):
            axes = dict(zip(("start_dim", "end_dim"), args[1:], strict=False)) | kwargs
            if (axes.get("start_dim", 0), axes.get("end_dim", -1)) != (1, -1):
                raise ModelError("flatten must go from axis 1 to the last")
            self.add(node, "flatten", (self.tensor(args[0]),))
        elif target in ("view", "reshape", torch.reshape):
            self.reshape(node)
        elif target is F.avg_pool2d:
            raise ModelError("avg_pool2d as a function: use the module torch.nn.AvgPool2d")
        elif target in (F.dropout, "contiguous"):
            self.names[node] = self.tensor(args[0])
        else:
            raise ModelError(f"function {getattr(target, '__name__', target)} cannot be quantized")

    def reshape(self, node: fx.Node) -> None:
        """view(batch, -1), as flattening is often written; `batch` is x.size(0), x.shape[0] or 1."""
        shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
        batch, rest = shape if len(shape) == 2 else (None, None)
        if rest != -1 or not (batch == 1 or (isinstance(batch, fx.Node) and batch in self.batch)):
            raise ModelError("only view(x.size(0), -1) can be read: write torch.flatten(x, 1)")
        self.add(node, "flatten", (self.tensor(node.args[0]),))

    def size(self, node: fx.Node) -> bool:
        """True where `node` only asks for a tensor's shape; the batch size among it is remembered for `reshape`."""
        args = node.args
        if node.target == "size" or (node.target is getattr and args[1] == "shape"):
            (self.batch if len(args) > 1 and args[1] == 0 else self.shapes).add(node)
            return True
        if node.target is operator.getitem and args[0] in self.shapes:
            if args[1] == 0:
                self.batch.add(node)
            return True
        return False

    def mean(self, node: fx.Node) -> None:
        source = self.tensor(node.args[0])
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)  # noqa: PLR2004
        if sorted(a % 4 for a in (axes if isinstance(axes, list | tuple) else [])) != [2, 3]:
            raise ModelError("mean over other axes than height and width")
        if keep:
            self.add(node, "global_average_pool", (source,))
            return
        pooled = f"{node.name}_pool"
        self.steps[pooled] = Step(pooled, "global_average_pool", (source,))
        self.add(node, "flatten", (pooled,))

    def alone(self, node: fx.Node, source: str) -> Step | None:
        """The step that makes `source`, if `node` is all that reads it: then `node` can be folded into it."""
        made = [n for n, name in self.names.items() if name == source]
        users = {user for n in made for user in n.users if user not in made}
        return self.steps.get(source) if users == {node} else None

    def fold_norm(self, node: fx.Node, source: str, norm: nn.BatchNorm2d) -> None:
        step = self.alone(node, source)
        if step is None or step.op != "conv" or step.norm is not None or step.relu:
            raise ModelError("a BatchNorm2d must stand right behind a Conv2d that nothing else reads")
        self.steps[source] = replace(step, norm=norm)
        self.names[node] = source

    def fold_relu(self, node: fx.Node, source: str, ceiling: float | None) -> None:
        step = self.alone(node, source)
        if step is not None and not step.relu and step.op in ("conv", "linear", "add", "mul", "requantize"):
            self.steps[source] = replace(step, relu=True, ceiling=ceiling)
            self.names[node] = source
        else:
            self.add(node, "requantize", (source,), relu=True, ceiling=ceiling)


def _pool_as_conv(module: nn.AvgPool2d, channels: int) -> nn.Conv2d:
    """Average pooling as the depthwise convolution that it is; padding counts as zeros, as in torch's default."""
    uncounted = not module.count_include_pad and module.padding not in (0, (0, 0))
    if module.ceil_mode or module.divisor_override or uncounted:
        raise ModelError("AvgPool2d with ceil_mode, divisor_override or count_include_pad=False cannot be quantized")
    kernel = _pair(module.kernel_size)
    conv = nn.Conv2d(channels, channels, tuple(kernel), module.stride, module.padding, groups=channels, bias=False)  # type: ignore[arg-type]
    nn.init.constant_(conv.weight, 1.0 / (kernel[0] * kernel[1]))
    return conv


def _replace_average_pools(network: nn.Module, sample: torch.Tensor) -> None:
    """Replace every AvgPool2d module by a depthwise convolution, in place; channels are read off one run."""
    channels: dict[str, int] = {}
    pools = {name: module for name, module in network.named_modules() if isinstance(module, nn.AvgPool2d)}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: channels.__setitem__(name, args[0].shape[1]))
        for name, module in pools.items()
    ]
    if not hooks:
        return
    with torch.no_grad():
        network(sample)
    for hook in hooks:
        hook.remove()
    for name, module in pools.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, _pool_as_conv(module, channels[name]))


@torch.no_grad()
def fold_norms(graph: Graph) -> Graph:
    """The same network with every batch norm folded into its convolution's weight and bias, in place."""
    steps = []
    for step in graph.steps:
        if step.norm is not None and isinstance(step.module, nn.Conv2d):
            folded = fuse_conv_bn_eval(step.module.eval(), step.norm.eval())
            step.module.weight.copy_(folded.weight)
            step.module.bias = folded.bias
        steps.append(replace(step, norm=None))
    return Graph(graph.input, tuple(steps))


class _Tracer(fx.Tracer):
    """torch.fx's, to which any kind of batch norm is one operator."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def read_graph(network: nn.Module, sample: torch.Tensor | None = None, scoped: bool = False) -> Graph:
    """Steps of a torch network. `sample` [n, C, H, W] is needed when it holds AvgPool2d, which become convolutions.

    `scoped` names operators that are no modules after the module that has them, not by torch.fx's counter.

    Raises ModelError with every operator that cannot be quantized.
    """
    try:
        if sample is not None:
            _replace_average_pools(network, sample)
        tracer = _Tracer()
        graph = tracer.trace(network)
        traced = fx.GraphModule(tracer.root, graph)
    except ModelError:
        raise
    except Exception as e:  # fx raises many kinds for control flow that depends on data
        raise ModelError(f"torch.fx cannot trace the network ({e}): its forward may not depend on values") from e
    return _Reader(traced, scoped).read()
