"""Networks as lists of operations with fixed shapes, which kernels.js runs in a browser.

`torch.export` writes a network as a graph of ATen operations, for a batch of one. Here each of them
becomes a step of a few kinds:

- `linear`, `conv`, `conv_transpose`, `norm`, `attention`, `matmul`, `softmax`, `reduce`;
- `unary` and `binary`: functions of each element, with broadcasting;
- `copy`: out[i] = in[offset + sum of i times strides]. It stands for every change of order or size:
  permute, slice, chunk, pixel shuffle, nearest upsampling;
- `pad` and `join` (concatenation).

What does not depend on the input, such as the spectral norm of a weight, is computed here and
becomes a constant.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import map_arg

from poise.errors import InputError

Step = dict[str, Any]


class Value(NamedTuple):
    """A tensor that is known only when the graph runs: its number and its shape."""

    number: int
    shape: tuple[int, ...]


@dataclass
class Graph:
    """A network as steps. All values are float32 and contiguous.

    Attributes:
        sizes: number of elements of each value.
        steps: each with its kind `op`, the values `in` and `out`, and its settings.
        inputs, outputs: values that a caller gives and gets.
        constants: values that are known: weights, and what follows from them.
    """

    sizes: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int]] = {}

    def value(self, shape: Sequence[int]) -> Value:
        """Return a new value."""
        self.sizes.append(math.prod(shape))
        return Value(len(self.sizes) - 1, tuple(shape))

    def operand(self, given: Any) -> Value:
        """Return a value, or a tensor or a number as a constant."""
        if isinstance(given, Value):
            return given
        if isinstance(given, Tensor) and id(given) in self._known:
            return Value(self._known[id(given)][1], tuple(given.shape))
        tensor = given if isinstance(given, Tensor) else torch.tensor(float(given))
        made = self.value(tensor.shape)
        self.constants[made.number] = tensor.detach().float().cpu().contiguous()
        self._known[id(tensor)] = tensor, made.number  # a tensor that is kept keeps its id
        return made

    def step(
        self, op: str, inputs: Sequence[Any], shape: Sequence[int], /, **settings: Any
    ) -> Value:
        """Append a step and return its output."""
        operands = [self.operand(given).number for given in inputs]
        out = self.value(shape)
        self.steps.append({"op": op, "in": operands, "out": out.number, **settings})
        return out

    def description(self) -> dict[str, Any]:
        """Return the graph without its constants, as plain values."""
        return {
            "sizes": self.sizes,
            "steps": self.steps,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "constants": list(self.constants),
        }


def graph_of(network: nn.Module, inputs: Sequence[Tensor], name: str) -> Graph:
    """Return a network in evaluation mode as a graph, for inputs of these shapes.

    Args:
        network: module that returns a tensor.
        inputs: tensors of the shapes that it will get, with a batch of one.
        name: name of the network for error messages, such as "the decoder".

    Raises:
        InputError: `torch.export` cannot trace the network, or it has an operation without a
            kernel.
    """
    try:
        with torch.no_grad():
            traced = torch.export.export(network.eval(), tuple(inputs), strict=False).module()
    except Exception as error:  # torch.export raises dozens of types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be traced by torch.export ({reason})") from error
    graph, found = Graph(), dict[Any, Any]()
    shapes = iter(inputs)
    nodes: Any = traced.graph.nodes  # pyright: ignore[reportAttributeAccessIssue]
    order = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "placeholder":
            found[node] = graph.value(next(shapes).shape)
            graph.inputs.append(found[node].number)
        elif node.op == "get_attr":
            found[node] = operator.attrgetter(node.target)(traced)
        elif node.op == "call_function":
            arguments = map_arg(node.args, found.__getitem__)
            keywords = map_arg(node.kwargs, found.__getitem__)
            found[node] = _result(graph, node.target, arguments, keywords, name)
            if _name_of(node.target).endswith("_") and isinstance(found[node], Value):
                _check_in_place(node, order, name)
                found[node.args[0]] = found[node]
        elif node.op == "output":
            results = map_arg(node.args[0], found.__getitem__)
            results = [results] if isinstance(results, (Value, Tensor)) else results
            graph.outputs += [graph.operand(result).number for result in results]
    return graph


def _check_in_place(node: Any, order: dict[Any, int], name: str) -> None:
    """Refuse an operation in place whose memory is read later through another view."""
    changed = node.args[0]
    for other in order:
        if other in (node, changed) or order[other] > order[node]:
            continue
        if _memory(other) == _memory(changed) and any(order[u] > order[node] for u in other.users):
            raise InputError(
                f"{name} changes a view in place ({_name_of(node.target)}), for which a page has "
                "no kernel: use the form that returns a new tensor"
            )


def _memory(node: Any) -> int | None:
    """Return what tells the memory of a node's tensor from that of others. None: not a tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _result(graph: Graph, target: Any, arguments: Any, keywords: Any, name: str) -> Any:
    if not _has_value([arguments, keywords]):
        return target(*arguments, **keywords)
    operation = _name_of(target)
    if operation.startswith("_assert"):
        return None
    try:
        return RULES[operation.removesuffix("_")](graph, *arguments, **keywords)
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"{name} has the operation {operation}, for which a page has no kernel in this form: "
            "use `poise export` and a runtime of ONNX"
        ) from error


def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[1] if schema else target.__name__


def _has_value(given: Any) -> bool:
    if isinstance(given, Value):
        return True
    if isinstance(given, dict):
        given = given.values()
    return isinstance(given, (list, tuple, type({}.values()))) and any(map(_has_value, given))


def _like(shape: Sequence[int]) -> Tensor:
    """Return a tensor without data, from which PyTorch computes shapes and strides."""
    return torch.empty(tuple(shape), device="meta")


def _copied(graph: Graph, x: Value, view: Tensor, shape: Sequence[int] | None = None) -> Value:
    """Return the view of a value as a value.

    Args:
        graph: it gets the step, if elements change their places.
        x: the value.
        view: the same view of `_like(x.shape)`.
        shape: shape of the result, if it is another than the view's.
    """
    shape = tuple(view.shape if shape is None else shape)
    if view.is_contiguous() and view.storage_offset() == 0 and view.numel() == math.prod(x.shape):
        return Value(x.number, shape)
    return graph.step(
        "copy",
        [x],
        shape,
        shape=list(view.shape),
        strides=list(view.stride()),
        offset=view.storage_offset(),
    )


def _viewed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of an operation whose result, or each of whose results, is a view."""

    def rule(graph: Graph, x: Value, *arguments: Any, **keywords: Any) -> Any:
        views = function(_like(x.shape), *arguments, **keywords)
        if isinstance(views, Tensor):
            return _copied(graph, x, views)
        return [_copied(graph, x, view) for view in views]

    return rule


def _unary(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, x: Value, *settings: Any, **keywords: Any) -> Value:
        numbers = [float(s) for s in (*settings, *keywords.values()) if isinstance(s, (int, float))]
        return graph.step("unary", [x], x.shape, kind=kind, settings=numbers)

    return rule


def _clamp(graph: Graph, x: Value, low: float | None = None, high: float | None = None) -> Value:
    largest = torch.finfo(torch.float32).max
    limits = [-largest if low is None else low, largest if high is None else high]
    if not all(isinstance(limit, (int, float)) for limit in limits):
        raise NotImplementedError
    return graph.step("unary", [x], x.shape, kind="clamp", settings=limits)


def _hardtanh(graph: Graph, x: Value, low: float = -1.0, high: float = 1.0) -> Value:
    return _clamp(graph, x, low, high)


def _gelu(graph: Graph, x: Value, *, approximate: str = "none") -> Value:
    if approximate != "none":
        raise NotImplementedError
    return graph.step("unary", [x], x.shape, kind="gelu", settings=[])


def _constant(value: float | None) -> Callable[..., Tensor]:
    def rule(graph: Graph, x: Value, given: float = 0.0, **_: Any) -> Tensor:
        return torch.full(x.shape, given if value is None else value)

    return rule


def _binary(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, a: Any, b: Any, *, alpha: float = 1) -> Value:
        a, b = graph.operand(a), graph.operand(b)
        if alpha != 1:
            b = rule_of_mul(graph, b, alpha)
        views = torch.broadcast_tensors(_like(a.shape), _like(b.shape))
        shape = views[0].shape
        strides = [list(view.stride()) for view in views]
        return graph.step("binary", [a, b], shape, kind=kind, shape=list(shape), strides=strides)

    return rule


rule_of_mul = _binary("mul")


def _reversed(rule: Callable[..., Value]) -> Callable[..., Value]:
    return lambda graph, a, b, **keywords: rule(graph, b, a, **keywords)


def _linear(graph: Graph, x: Value, weight: Any, bias: Any = None) -> Value:
    outputs, inputs = graph.operand(weight).shape
    operands = [x, weight] if bias is None else [x, weight, bias]
    return graph.step("linear", operands, (*x.shape[:-1], outputs), inputs=inputs, outputs=outputs)


def _check_one_item(x: Value) -> None:
    """The kernels of convolutions compute one item, (1, channels, height, width)."""
    if len(x.shape) != 4 or x.shape[0] != 1:
        raise NotImplementedError


def _conv(
    graph: Graph,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    _check_one_item(x)
    view = F.conv2d(_like(x.shape), _like(weight.shape), None, stride, padding, dilation, groups)
    stride, dilation = _pair(stride), _pair(dilation)
    kernel = weight.shape[2:]
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    padding = [0, 0] if padding == "valid" else _pair(padding)
    return graph.step(
        "conv",
        [x, weight] if bias is None else [x, weight, bias],
        view.shape,
        input=list(x.shape[1:]),
        output=list(view.shape[1:]),
        kernel=list(kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def _conv_transpose(
    graph: Graph,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    _check_one_item(x)
    view = F.conv_transpose2d(
        _like(x.shape),
        _like(weight.shape),
        None,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )
    # In the browser the weight is the left factor of a product: (outputs times kernel, inputs).
    inputs = x.shape[1] // groups
    rows = weight.reshape(groups, inputs, -1).transpose(1, 2).contiguous()
    return graph.step(
        "conv_transpose",
        [x, rows] if bias is None else [x, rows, bias],
        view.shape,
        input=list(x.shape[1:]),
        output=list(view.shape[1:]),
        kernel=list(weight.shape[2:]),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
    )


def _pair(given: Any) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return [*values, *values][:2]


def _batch_norm(
    graph: Graph,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Value:
    """y = scale x + shift, with one scale and one shift for each channel."""
    scale = (variance.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * scale
    shape = (-1,) + (1,) * (len(x.shape) - 2)
    scaled = rule_of_mul(graph, x, scale.float().reshape(shape))
    return _binary("add")(graph, scaled, shift.float().reshape(shape))


def _norm(
    graph: Graph, x: Value, rows: int, eps: float, weight: Any, bias: Any, channels: int, each: int
) -> Value:
    """Normalise each of `rows` parts of x; apply weight and bias of channel (i / each) % channels.

    i is the place of an element in x.
    """
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    return graph.step(
        "norm", [x, weight, bias], x.shape, rows=rows, eps=eps, channels=channels, each=each
    )


def _group_norm(
    graph: Graph, x: Value, groups: int, weight: Any = None, bias: Any = None, eps=1e-5, *_: Any
) -> Value:
    each = math.prod(x.shape[2:])
    return _norm(graph, x, x.shape[0] * groups, eps, weight, bias, x.shape[1], each)


def _layer_norm(
    graph: Graph, x: Value, shape: Any, weight: Any = None, bias: Any = None, eps=1e-5, *_: Any
) -> Value:
    size = math.prod(shape)
    return _norm(graph, x, math.prod(x.shape) // size, eps, weight, bias, size, 1)


def _reduce(kind: str) -> Callable[..., Value]:
    def rule(graph: Graph, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
        count = len(x.shape)
        dims = (
            range(count)
            if dims is None or dims == []
            else [dims]
            if isinstance(dims, int)
            else dims
        )
        dims = sorted(dim % count for dim in dims)
        kept = [dim for dim in range(count) if dim not in dims]
        last = _copied(graph, x, _like(x.shape).permute(*kept, *dims))
        shape = [
            1 if dim in dims else side
            for dim, side in enumerate(x.shape)
            if keepdim or dim not in dims
        ]
        size = math.prod(x.shape[dim] for dim in dims)
        return graph.step("reduce", [last], shape, kind=kind, size=size)

    return rule


def _pad(
    graph: Graph, x: Value, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    """Add a margin, or cut where a pad is negative."""
    if mode != "constant":
        raise NotImplementedError
    before = [0] * len(x.shape)
    shape = list(x.shape)
    for number, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = len(shape) - 1 - number
        before[dim] = left
        shape[dim] += left + right
    return graph.step(
        "pad", [x], shape, given=list(x.shape), shape=shape, before=before, fill=value or 0.0
    )


def _join(graph: Graph, parts: Sequence[Any], dim: int = 0) -> Value:
    values = [graph.operand(part) for part in parts]
    shape = list(values[0].shape)
    dim %= len(shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    inner = [math.prod(value.shape[dim:]) for value in values]
    return graph.step("join", values, shape, inner=inner, rows=math.prod(shape[:dim]))


def _pixel_shuffle(graph: Graph, x: Value, factor: int) -> Value:
    n, channels, height, width = x.shape
    inner = channels // factor**2
    parts = _like((n, inner, factor, factor, height, width)).permute(0, 1, 4, 2, 5, 3)
    return _copied(graph, x, parts, (n, inner, height * factor, width * factor))


def _pixel_unshuffle(graph: Graph, x: Value, factor: int) -> Value:
    n, channels, height, width = x.shape
    rows, columns = height // factor, width // factor
    parts = _like((n, channels, rows, factor, columns, factor)).permute(0, 1, 3, 5, 2, 4)
    return _copied(graph, x, parts, (n, channels * factor**2, rows, columns))


def _upsample(graph: Graph, x: Value, size: Any = None, scales: Any = None, *_: Any) -> Value:
    n, channels, height, width = x.shape
    rows, columns = size or [int(side * s) for side, s in zip((height, width), scales, strict=True)]
    if rows % height or columns % width:
        raise NotImplementedError
    by = rows // height, columns // width
    parts = _like(x.shape)[:, :, :, None, :, None].expand(-1, -1, -1, by[0], -1, by[1])
    return _copied(graph, x, parts, (n, channels, rows, columns))


def _attention(
    graph: Graph,
    query: Value,
    key: Value,
    value: Value,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if mask is not None or causal or enable_gqa:
        raise NotImplementedError
    *batch, rows, width = query.shape
    return graph.step(
        "attention",
        [query, key, value],
        (*batch, rows, value.shape[-1]),
        batch=math.prod(batch),
        rows=rows,
        keys=key.shape[-2],
        width=width,
        outputs=value.shape[-1],
        scale=width**-0.5 if scale is None else scale,
    )


def _matmul(graph: Graph, a: Any, b: Any) -> Value:
    a, b = graph.operand(a), graph.operand(b)
    if len(b.shape) != 2 or len(a.shape) < 2:
        raise NotImplementedError
    weight = _copied(graph, b, _like(b.shape).t())
    return _linear(graph, a, weight)


def _softmax(graph: Graph, x: Value, dim: int, *_: Any) -> Value:
    if dim % len(x.shape) != len(x.shape) - 1:
        raise NotImplementedError
    return graph.step("softmax", [x], x.shape, size=x.shape[-1])


def _same(graph: Graph, x: Value, *settings: Any, **named: Any) -> Value:
    given = (*settings, *named.values())
    if any(isinstance(kind, torch.dtype) and not kind.is_floating_point for kind in given):
        raise NotImplementedError
    return x


def _item(graph: Graph, parts: Sequence[Any], number: int) -> Any:
    return parts[number]


RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "conv2d": _conv,
    "conv_transpose2d": _conv_transpose,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
    "matmul": _matmul,
    "mm": _matmul,
    "softmax": _softmax,
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "pad": _pad,
    "cat": _join,
    "getitem": _item,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "upsample_nearest2d": _upsample,
    "pow": _binary("pow"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "hardtanh": _hardtanh,
    "gelu": _gelu,
    "full_like": _constant(None),
    "zeros_like": _constant(0.0),
    "ones_like": _constant(1.0),
    "rsub": _reversed(_binary("sub")),
    **{kind: _binary(kind) for kind in ("add", "sub", "mul", "div", "maximum", "minimum")},
    **{
        kind: _unary(kind)
        for kind in (
            *("relu", "leaky_relu", "silu", "sigmoid", "tanh", "softplus", "elu"),
            *("exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "neg", "abs", "sin", "cos"),
        )
    },
    **{
        name: _viewed(function)
        for name, function in {
            "view": Tensor.reshape,
            "reshape": Tensor.reshape,
            "flatten": Tensor.flatten,
            "unflatten": Tensor.unflatten,
            "unsqueeze": Tensor.unsqueeze,
            "squeeze": Tensor.squeeze,
            "permute": Tensor.permute,
            "transpose": Tensor.transpose,
            "t": Tensor.t,
            "expand": Tensor.expand,
            "select": Tensor.select,
            "slice": torch.ops.aten.slice.Tensor,
            "chunk": Tensor.chunk,
            "split": Tensor.split,
            "split_with_sizes": Tensor.split,
            "unbind": Tensor.unbind,
        }.items()
    },
    **dict.fromkeys(
        (
            *("clone", "contiguous", "detach", "alias", "dropout", "to", "_to_copy"),
            "lift_fresh_copy",
        ),
        _same,
    ),
}
