"""Traced JAX programs as ONNX graphs, for serving without JAX.

A program is a jaxpr: a list of primitive operations. Each has one rule here, a method of `_Graph`
of the primitive's name, which adds the ONNX operators for it; operations of constants alone are
computed at once. The rules are those that the models of this package need, and another primitive
raises `NotConvertible` with its name. Only the package onnx is needed, and only inside `convert`.

jax2onnx is not used: it needs an older orbax-checkpoint than training does (0.17.1 asks for less
than 0.11.37), and its GRU4Rec, MiaSRec and AttenMixer are refused by ONNX Runtime (2026-11-26).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.extend import core

Array = jax.Array

# The operators' version, of 2022, which current runtimes and onnxruntime-web have, and the version
# of the file's own layout that belongs to it.
OPSET, IR_VERSION = 18, 8

# Operations of constants are computed at once if they do not blow a constant up beyond this.
FOLDED_SIZE = 2**16

# Primitives with one operator of the same arguments, whose inputs may be broadcast.
ELEMENTWISE = {
    **{'abs': 'Abs', 'ceil': 'Ceil', 'cos': 'Cos', 'erf': 'Erf', 'exp': 'Exp', 'floor': 'Floor'},
    **{'log': 'Log', 'logistic': 'Sigmoid', 'neg': 'Neg', 'sign': 'Sign', 'sin': 'Sin'},
    **{'sqrt': 'Sqrt', 'tanh': 'Tanh', 'add': 'Add', 'div': 'Div', 'mul': 'Mul', 'sub': 'Sub'},
    **{'pow': 'Pow', 'eq': 'Equal', 'ge': 'GreaterOrEqual', 'gt': 'Greater'},
    **{'le': 'LessOrEqual', 'lt': 'Less'},
}
# The same, of truth values alone.
LOGICAL = {'and': 'And', 'or': 'Or', 'xor': 'Xor', 'not': 'Not'}
REDUCTIONS = {
    **{'reduce_sum': 'ReduceSum', 'reduce_prod': 'ReduceProd'},
    **{'reduce_max': 'ReduceMax', 'reduce_min': 'ReduceMin'},
}
SAME = ('copy', 'copy_p', 'optimization_barrier', 'reduce_precision', 'stop_gradient')
# Primitives that call another jaxpr, and the parameter that has it.
CALLS = {
    **{'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr', 'checkpoint': 'jaxpr'},
    **{'core_call': 'call_jaxpr', 'remat2': 'jaxpr', 'custom_jvp_call': 'call_jaxpr'},
    **{'custom_vjp_call': 'call_jaxpr', 'custom_vjp_call_jaxpr': 'fun_jaxpr'},
}


class NotConvertible(Exception):
    """A program has an operation that has no rule here; the line says which."""


class Value(NamedTuple):
    """A value of the graph.

    Fields:
      name: in the graph; '' for a constant that the graph does not have yet.
      shape: of the value in the graph, whose axes of size 1 may stand for larger ones.
      dtype: in the graph.
      constant: its content, or None.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype
    constant: Any = None


def convert(
    function: Callable[[Array], Array], width: int, input_name: str, output_name: str
) -> Any:
    """A function of int32 [B, width] as an onnx.ModelProto, for any number of rows B.

    Numbers of 16 bits are computed in float32.

    Args:
      function: returns one array, whose first axis is B; arrays that it closes over become
        constants of the graph.
      width: columns of the input.
      input_name, output_name: the graph's names of the two.

    Raises:
      NotConvertible: if the function has an operation without a rule, or is too large for a file.
      ModuleNotFoundError: if the package onnx is not installed.
    """
    import onnx

    (batch,) = export.symbolic_shape('B')
    try:
        closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, width), jnp.int32))
    except (jax.errors.InconclusiveDimensionOperation, jax.errors.ConcretizationTypeError) as error:
        raise NotConvertible('its program depends on the number of rows') from error
    graph = _Graph(input_name, width)
    (out,) = graph.run(closed, [Value(input_name, (batch, width), np.dtype(np.int32))])
    (aval,) = closed.out_avals
    graph.node('Identity', [graph.name(graph.full(out, aval.shape))], output=output_name)
    nodes, initializers = graph.finish(output_name)
    if sum(len(tensor.raw_data) for tensor in initializers) > 2**31 - 2**20:
        raise NotConvertible('it is larger than the 2 GB of one ONNX file')
    info = onnx.helper.make_tensor_value_info
    sizes = [str(n) if not isinstance(n, int) else n for n in aval.shape]
    made = onnx.helper.make_graph(
        nodes,
        'fame_jax',
        [info(input_name, onnx.TensorProto.INT32, ['B', width])],
        [info(output_name, onnx.TensorProto.FLOAT, sizes)],
        initializers,
    )
    model = onnx.helper.make_model(
        made,
        opset_imports=[onnx.helper.make_opsetid('', OPSET)],
        ir_version=IR_VERSION,
        producer_name='fame_jax',
    )
    onnx.checker.check_model(model)
    return model


class _Graph:
    """The nodes and constants of a graph, and the rules that add them."""

    def __init__(self, input_name: str, width: int):
        self._nodes: list[Any] = []
        self._constants: dict[Any, tuple[str, np.ndarray]] = {}
        self._known: dict[Any, str] = {}
        self._input = input_name

    # Nodes and constants

    def node(self, op: str, inputs: Sequence[str], output: str = '', **attributes: Any) -> str:
        """Adds an operator, or finds the same one; returns the name of its output."""
        from onnx import helper

        key = (op, *inputs, str(sorted(attributes.items())))
        if not output and key in self._known:
            return self._known[key]
        name = output or f'{op}_{len(self._nodes)}'
        self._nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        self._known[key] = name
        return name

    def split_node(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """The parts of a value along an axis."""
        from onnx import helper

        names = [f'Split_{len(self._nodes)}_{n}' for n in range(len(sizes))]
        inputs = [value, self.integers(sizes)]
        self._nodes.append(helper.make_node('Split', inputs, names, names[0], axis=axis))
        return names

    def store(self, array: Any) -> str:
        """The name of a constant of the graph; equal ones are stored once."""
        array = np.asarray(array)
        if array.dtype.itemsize == 2 and array.dtype.kind in 'fV':
            array = array.astype(np.float32)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = f'constant_{len(self._constants)}', array
        return self._constants[key][0]

    def integers(self, values: Sequence[int]) -> str:
        """A constant int64 vector, as shapes and axes are given."""
        return self.store(np.array(values, np.int64))

    def finish(self, output: str) -> tuple[list[Any], list[Any]]:
        """The nodes that the output needs, in order, and their constants."""
        from onnx import numpy_helper

        needed, nodes = {output}, []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        stored = [(n, a) for n, a in self._constants.values() if n in needed]
        return nodes[::-1], [numpy_helper.from_array(array, name) for name, array in stored]

    def name(self, value: Value) -> str:
        """The name of a value, which is stored if it is a constant."""
        return value.name or self.store(value.constant)

    def full(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """The value with all its axes expanded to a shape."""
        if value.shape == tuple(shape):
            return value
        name = self.node('Expand', [self.name(value), self.sizes(shape)])
        return Value(name, tuple(shape), value.dtype)

    def sizes(self, shape: Sequence[Any]) -> str:
        """A shape as an int64 vector; sizes that depend on the number of rows are computed."""
        if all(isinstance(n, int) for n in shape):
            return self.integers(shape)
        parts = []
        for size in shape:
            if isinstance(size, int):
                parts.append(self.integers([size]))
                continue
            slope, start = _linear(size)
            rows = self.node('Shape', [self._input], start=0, end=1)
            if slope != 1:
                rows = self.node('Mul', [rows, self.integers([slope])])
            if start:
                rows = self.node('Add', [rows, self.integers([start])])
            parts.append(rows)
        return self.node('Concat', parts, axis=0)

    def reshape(self, value: Value, shape: tuple[Any, ...]) -> Value:
        """The value in another shape; one size of it may depend on the number of rows."""
        if value.shape == tuple(shape):
            return value
        if value.constant is not None and all(isinstance(n, int) for n in shape):
            return _constant(np.asarray(value.constant).reshape(shape))
        given = [n if isinstance(n, int) else -1 for n in shape]
        to = self.integers(given) if given.count(-1) < 2 else self.sizes(shape)
        return Value(self.node('Reshape', [self.name(value), to]), tuple(shape), value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """The value with its axes in another order."""
        if list(order) == sorted(order):
            return value
        if value.constant is not None:
            return _constant(np.asarray(value.constant).transpose(order))
        name = self.node('Transpose', [self.name(value)], perm=[int(n) for n in order])
        return Value(name, tuple(value.shape[n] for n in order), value.dtype)

    def cast(self, value: Value, dtype: Any) -> Value:
        """The value in another dtype."""
        dtype = _graph_dtype(dtype)
        if dtype == value.dtype:
            return value
        from onnx import helper

        to = helper.np_dtype_to_tensor_dtype(dtype)
        return Value(self.node('Cast', [self.name(value)], to=to), value.shape, dtype)

    def apply(self, op: str, *values: Value, dtype: Any = None, **attributes: Any) -> Value:
        """An operator whose inputs may be broadcast."""
        name = self.node(op, [self.name(value) for value in values], **attributes)
        shape = _broadcast([value.shape for value in values])
        return Value(name, shape, _graph_dtype(dtype or values[0].dtype))

    # Jaxprs

    def run(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """Adds the operations of a closed jaxpr; returns its outputs."""
        jaxpr, values = closed.jaxpr, {}
        values.update(zip(jaxpr.constvars, map(_constant, closed.consts)))
        values.update(zip(jaxpr.invars, inputs))

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return _constant(np.asarray(atom.val, atom.aval.dtype))
            return values[atom]

        for equation in jaxpr.eqns:
            outputs = self.add(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

    def add(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """Adds one operation."""
        primitive, params = equation.primitive.name, equation.params
        if primitive in CALLS:
            inner = params[CALLS[primitive]]
            closed = inner if hasattr(inner, 'consts') else core.ClosedJaxpr(inner, ())
            return self.run(closed, inputs)
        if primitive in SAME:
            return inputs
        if primitive == 'scan':
            return self.scan(equation, inputs)
        avals_in = [atom.aval for atom in equation.invars]
        if _is_constant(equation, inputs):
            found = equation.primitive.bind(*(value.constant for value in inputs), **params)
            return [
                _constant(x) for x in (found if equation.primitive.multiple_results else [found])
            ]
        (aval, *more) = (atom.aval for atom in equation.outvars)
        if primitive == 'split':
            value = self.full(inputs[0], avals_in[0].shape)
            names = self.split_node(self.name(value), params['sizes'], params['axis'])
            return [
                Value(name, out.aval.shape, value.dtype)
                for name, out in zip(names, equation.outvars)
            ]
        rule = getattr(self, f'_{primitive}', None)
        if primitive in ELEMENTWISE:
            made = self.apply(ELEMENTWISE[primitive], *inputs, dtype=aval.dtype)
        elif primitive in LOGICAL and inputs[0].dtype == bool:
            made = self.apply(LOGICAL[primitive], *inputs)
        elif primitive in REDUCTIONS:
            made = self.reduce(
                REDUCTIONS[primitive], self.full(inputs[0], avals_in[0].shape), params
            )
        elif rule is None or more:
            raise NotConvertible(f'there is no rule for the operation {primitive}')
        elif primitive in ('select_n', 'max', 'min', 'integer_pow', *PER_ELEMENT):
            made = rule(*inputs, **params)
        else:
            whole = [self.full(value, x.shape) for value, x in zip(inputs, avals_in)]
            made = rule(*whole, aval=aval, **params)
        return [made]

    def scan(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """The body of a loop, once for each of its turns, whose number is known."""
        params, counts = (
            equation.params,
            (equation.params['num_consts'], equation.params['num_carry']),
        )
        shapes = [atom.aval.shape for atom in equation.invars]
        inputs = [self.full(value, shape) for value, shape in zip(inputs, shapes)]
        fixed, carry, columns = np.split(np.arange(len(inputs)), np.cumsum(counts))
        fixed, carry = [inputs[i] for i in fixed], [inputs[i] for i in carry]
        turns = range(params['length'])
        given = params['jaxpr'].in_avals
        stacked: list[list[Value]] = []
        for turn in reversed(turns) if params['reverse'] else turns:
            column = [
                self.reshape(self.slice(inputs[i], {0: (turn, turn + 1, 1)}), inputs[i].shape[1:])
                for i in columns
            ]
            out = self.run(params['jaxpr'], [*fixed, *carry, *column])
            carry = [
                self.full(value, aval.shape)
                for value, aval in zip(out, given[counts[0] : sum(counts)])
            ]
            stacked.append(out[counts[1] :])
        if params['reverse']:
            stacked.reverse()
        made = []
        for place, variable in enumerate(equation.outvars[counts[1] :]):
            shape = variable.aval.shape
            parts = [self.full(turn[place], shape[1:]) for turn in stacked]
            parts = [self.name(self.reshape(part, (1, *shape[1:]))) for part in parts]
            made.append(Value(self.node('Concat', parts, axis=0), shape, stacked[0][place].dtype))
        return [*carry, *made]

    # Rules of single primitives: values in, a value out

    def _max(self, x: Value, y: Value) -> Value:
        return self._extreme('Max', 'Or', x, y)

    def _min(self, x: Value, y: Value) -> Value:
        return self._extreme('Min', 'And', x, y)

    def _extreme(self, op: str, of_bools: str, x: Value, y: Value) -> Value:
        return self.apply(of_bools if x.dtype == bool else op, x, y)

    def _ne(self, x: Value, y: Value) -> Value:
        return self.apply('Not', self.apply('Equal', x, y, dtype=bool))

    def _integer_pow(self, x: Value, y: int) -> Value:
        if not 0 < abs(y) <= 8:
            return self.apply('Pow', x, _constant(np.asarray(y, x.dtype)))
        power = functools.reduce(lambda made, _: self.apply('Mul', made, x), range(abs(y) - 1), x)
        return power if y > 0 else self.apply('Reciprocal', power)

    def _rem(self, x: Value, y: Value) -> Value:
        return self.apply('Mod', x, y, fmod=1)

    def _square(self, x: Value) -> Value:
        return self.apply('Mul', x, x)

    def _rsqrt(self, x: Value, **_: Any) -> Value:
        return self.apply('Reciprocal', self.apply('Sqrt', x))

    def _log1p(self, x: Value, **_: Any) -> Value:
        return self.apply('Log', self.apply('Add', x, _constant(np.ones((), x.dtype))))

    def _erfc(self, x: Value, **_: Any) -> Value:
        return self.apply('Sub', _constant(np.ones((), x.dtype)), self.apply('Erf', x))

    def _is_finite(self, x: Value) -> Value:
        # A NaN and an infinity times zero are NaN, and every other number is 0.
        zero = self.apply('Mul', x, _constant(np.zeros((), x.dtype)))
        return self.apply('Equal', zero, _constant(np.zeros((), x.dtype)), dtype=bool)

    def _convert_element_type(self, x: Value, *, new_dtype: Any, **_: Any) -> Value:
        return self.cast(x, new_dtype)

    def _clamp(self, low: Value, x: Value, high: Value) -> Value:
        return self._min(self._max(x, low), high)

    def _select_n(self, which: Value, *cases: Value) -> Value:
        if which.dtype != bool:
            raise NotConvertible('there is no rule for a choice of more than two')
        no, yes = cases
        if no.dtype == bool:  # which `Where` does not take in all runtimes
            first = self.apply('And', which, yes)
            return self.apply('Or', first, self.apply('And', self.apply('Not', which), no))
        return self.apply('Where', which, yes, no, dtype=no.dtype)

    def reduce(self, op: str, x: Value, params: dict[str, Any]) -> Value:
        """A sum, product or extreme over axes."""
        name = self.node(op, [self.name(x), self.integers(params['axes'])], keepdims=0)
        shape = tuple(n for axis, n in enumerate(x.shape) if axis not in params['axes'])
        return Value(name, shape, x.dtype)

    def _reduce_or(self, x: Value, *, aval: Any, **params: Any) -> Value:
        return self.cast(self.reduce('ReduceMax', self.cast(x, np.int32), params), bool)

    def _reduce_and(self, x: Value, *, aval: Any, **params: Any) -> Value:
        return self.cast(self.reduce('ReduceMin', self.cast(x, np.int32), params), bool)

    def _argmax(self, x: Value, *, aval: Any, axes: Sequence[int], **_: Any) -> Value:
        name = self.node('ArgMax', [self.name(x)], axis=axes[0], keepdims=0)
        return self.cast(Value(name, aval.shape, np.dtype(np.int64)), aval.dtype)

    def _cumsum(self, x: Value, *, aval: Any, axis: int, reverse: bool) -> Value:
        axes = self.store(np.array(axis, np.int64))
        name = self.node('CumSum', [self.name(x), axes], reverse=int(reverse))
        return Value(name, x.shape, x.dtype)

    def _sort(self, x: Value, *, aval: Any, dimension: int, **_: Any) -> Value:
        from onnx import helper

        names = [f'TopK_{len(self._nodes)}', f'TopK_{len(self._nodes)}_places']
        inputs = [self.name(x), self.integers([x.shape[dimension]])]
        options = {'axis': dimension, 'largest': 0, 'sorted': 1}
        self._nodes.append(helper.make_node('TopK', inputs, names, names[0], **options))
        return Value(names[0], x.shape, x.dtype)

    def _dim_as_value(self, *, aval: Any, dim: Any) -> Value:
        size = Value(self.sizes([dim]), (1,), np.dtype(np.int64))
        return self.cast(self.reshape(size, ()), aval.dtype)

    def _transpose(self, x: Value, *, aval: Any, permutation: Sequence[int]) -> Value:
        return self.transpose(x, permutation)

    def _reshape(self, x: Value, *, aval: Any, dimensions: Any, **_: Any) -> Value:
        if dimensions is not None:
            raise NotConvertible('there is no rule for a reshape in another order')
        return self.reshape(x, aval.shape)

    def _squeeze(self, x: Value, *, aval: Any, **_: Any) -> Value:
        return self.reshape(x, aval.shape)

    _expand_dims = _squeeze

    def _broadcast_in_dim(
        self, x: Value, *, aval: Any, shape: Any, broadcast_dimensions: Sequence[int], **_: Any
    ) -> Value:
        # Axes of size 1, which operators broadcast; others expand them when they need to.
        sizes = [1] * len(shape)
        for axis, place in enumerate(broadcast_dimensions):
            sizes[place] = x.shape[axis]
        return self.reshape(x, tuple(sizes))

    def _concatenate(self, *parts: Value, aval: Any, dimension: int) -> Value:
        name = self.node('Concat', [self.name(part) for part in parts], axis=dimension)
        return Value(name, aval.shape, parts[0].dtype)

    def _stack(self, *parts: Value, aval: Any, axis: int, **_: Any) -> Value:
        sizes = (*aval.shape[:axis], 1, *aval.shape[axis + 1 :])
        parts = tuple(self.reshape(part, sizes) for part in parts)
        return self._concatenate(*parts, aval=aval, dimension=axis)

    def _rev(self, x: Value, *, aval: Any, dimensions: Sequence[int]) -> Value:
        count = len(dimensions)
        vectors = [-1] * count, [-(2**31)] * count, dimensions, [-1] * count
        name = self.node('Slice', [self.name(x), *map(self.integers, vectors)])
        return Value(name, x.shape, x.dtype)

    def slice(self, x: Value, ranges: dict[int, tuple[int, int, int]]) -> Value:
        """Parts of some axes: start, end and step of each."""
        ranges = {axis: r for axis, r in ranges.items() if r != (0, x.shape[axis], 1)}
        if not ranges:
            return x
        starts, ends, steps = zip(*ranges.values())
        vectors = starts, ends, [*ranges], steps
        name = self.node('Slice', [self.name(x), *map(self.integers, vectors)])
        shape = list(x.shape)
        for axis, (start, end, step) in ranges.items():
            shape[axis] = max(0, -((start - end) // step))
        return Value(name, tuple(shape), x.dtype)

    def _slice(
        self, x: Value, *, aval: Any, start_indices: Any, limit_indices: Any, strides: Any
    ) -> Value:
        steps = strides or [1] * len(start_indices)
        return self.slice(x, dict(enumerate(zip(start_indices, limit_indices, steps))))

    def _dynamic_slice(self, x: Value, *starts: Value, aval: Any, slice_sizes: Any) -> Value:
        if any(start.constant is None for start in starts):
            raise NotConvertible('there is no rule for a slice whose place is computed')
        return self._cut(x, dict(enumerate(int(s.constant) for s in starts)), slice_sizes)

    def _cut(self, x: Value, starts: dict[int, int], sizes: Sequence[Any]) -> Value:
        """A slice of given sizes, whose start is moved so that it fits."""
        ranges = {}
        for axis, start in starts.items():
            if isinstance(sizes[axis], int) and isinstance(x.shape[axis], int):
                start = min(max(start, 0), x.shape[axis] - sizes[axis])
                ranges[axis] = (start, start + sizes[axis], 1)
        return self.slice(x, ranges)

    def _pad(self, x: Value, fill: Value, *, aval: Any, padding_config: Any) -> Value:
        if any(inner for _, _, inner in padding_config):
            raise NotConvertible('there is no rule for padding between entries')
        low, high, _ = zip(*padding_config)
        cut = {
            axis: (max(0, -first), size - max(0, -last), 1)
            for axis, (first, last, size) in enumerate(zip(low, high, x.shape))
            if first < 0 or last < 0
        }
        x, low, high = self.slice(x, cut), np.maximum(low, 0), np.maximum(high, 0)
        if not any((*low, *high)):
            return x
        if x.dtype == bool:  # which `Pad` does not take in all runtimes
            of_int = self.cast(x, np.int32), self.cast(fill, np.int32)
            config = [(first, last, 0) for first, last in zip(low, high)]
            whole = self._pad(*of_int, aval=aval, padding_config=config)
            return self.cast(whole, bool)
        name = self.node('Pad', [self.name(x), self.integers([*low, *high]), self.name(fill)])
        return Value(name, aval.shape, x.dtype)

    def _dot_general(
        self, x: Value, y: Value, *, aval: Any, dimension_numbers: Any, **_: Any
    ) -> Value:
        (sum_x, sum_y), (batch_x, batch_y) = dimension_numbers
        free_x = [n for n in range(len(x.shape)) if n not in (*sum_x, *batch_x)]
        free_y = [n for n in range(len(y.shape)) if n not in (*sum_y, *batch_y)]
        x, y = self.cast(x, aval.dtype), self.cast(y, aval.dtype)

        def size(value: Value, axes: Sequence[int]) -> Any:
            return math.prod(value.shape[n] for n in axes)

        batch = (size(x, batch_x),) if batch_x else ()
        left = (*batch, size(x, free_x), size(x, sum_x))
        right = (*batch, size(y, sum_y), size(y, free_y))
        left = self.reshape(self.transpose(x, [*batch_x, *free_x, *sum_x]), left)
        right = self.reshape(self.transpose(y, [*batch_y, *sum_y, *free_y]), right)
        name = self.node('MatMul', [self.name(left), self.name(right)])
        product = Value(name, (*batch, left.shape[-2], right.shape[-1]), _graph_dtype(aval.dtype))
        return self.reshape(product, aval.shape)

    def _gather(
        self,
        x: Value,
        index: Value,
        *,
        aval: Any,
        dimension_numbers: Any,
        slice_sizes: Sequence[Any],
        mode: Any,
        fill_value: Any,
        **_: Any,
    ) -> Value:
        numbers = dimension_numbers
        axes, batch = list(numbers.start_index_map), list(numbers.operand_batching_dims)
        if index.constant is not None and len(index.shape) == 1:
            starts = dict(zip(axes, np.asarray(index.constant).tolist()))
            return self.reshape(self._cut(x, starts, slice_sizes), aval.shape)
        whole = all(
            slice_sizes[n] == (1 if n in (*axes, *batch) else size)
            for n, size in enumerate(x.shape)
        )
        leading = list(range(len(batch)))
        is_known = (
            whole
            and set(numbers.collapsed_slice_dims) == set(axes)
            and batch == leading == list(numbers.start_indices_batching_dims)
        )
        if not is_known:
            raise NotConvertible('there is no rule for this kind of gather')
        last = [x.shape[n] - 1 for n in axes]
        inside = _constant(np.array(last, index.dtype))
        zero = _constant(np.zeros((), index.dtype))
        fits = self._clamp(zero, index, inside)
        rest = [n for n in range(len(x.shape)) if n not in (*batch, *axes)]
        found = self.transpose(x, [*batch, *axes, *rest])
        places = self.cast(fits, np.int64)
        name = self.node('GatherND', [self.name(found), self.name(places)], batch_dims=len(batch))
        shape = (*index.shape[:-1], *(x.shape[n] for n in rest))
        made = Value(name, shape, x.dtype)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            is_inside = self.apply('Equal', fits, index, dtype=bool)
            is_inside = self._reduce_and(is_inside, aval=None, axes=[len(index.shape) - 1])
            is_inside = self.reshape(is_inside, (*index.shape[:-1], *[1] * len(rest)))
            fill = _constant(np.asarray(_fill(fill_value, x.dtype), x.dtype))
            made = self._select_n(is_inside, fill, made)
        # The axes of the index come first; in the result they stand between those of the slices.
        offsets = list(numbers.offset_dims)
        others = [n for n in range(len(aval.shape)) if n not in offsets]
        return self.transpose(made, np.argsort([*others, *offsets], kind='stable').tolist())

    def _scatter(
        self, x: Value, index: Value, update: Value, *, aval: Any, dimension_numbers: Any, **_: Any
    ) -> Value:
        """One slice of the array, at a known place, is replaced."""
        numbers = dimension_numbers
        axes = list(numbers.inserted_window_dims)
        is_known = (
            index.constant is not None
            and len(index.shape) == len(axes) == 1
            and axes == list(numbers.scatter_dims_to_operand_dims)
            and len(update.shape) == len(x.shape) - 1
        )
        if not is_known:
            raise NotConvertible('there is no rule for this kind of scatter')
        (axis,), (place,) = axes, np.asarray(index.constant).tolist()
        is_place = np.arange(x.shape[axis]) == place
        is_place = is_place.reshape([-1 if n == axis else 1 for n in range(len(x.shape))])
        update = self.reshape(update, (*x.shape[:axis], 1, *x.shape[axis + 1 :]))
        return self._select_n(_constant(is_place), x, update)


# Rules that take values which are not expanded.
PER_ELEMENT = (
    *('ne', 'rem', 'square', 'rsqrt', 'log1p', 'erfc', 'is_finite', 'clamp'),
    'convert_element_type',
)


def _constant(array: Any) -> Value:
    return Value('', tuple(np.shape(array)), _graph_dtype(array.dtype), array)


def _graph_dtype(dtype: Any) -> np.dtype:
    """The dtype in the graph: numbers of 16 bits are float32 there."""
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32)
    if dtype not in (np.int32, np.int64, np.bool_):
        raise NotConvertible(f'there is no rule for values of {dtype}')
    return dtype


def _is_constant(equation: Any, inputs: Sequence[Value]) -> bool:
    """Whether an operation of constants is computed at once."""
    shapes = [atom.aval.shape for atom in equation.outvars]
    is_source = equation.primitive.name in ('iota', 'empty')
    if not (inputs or is_source) or any(value.constant is None for value in inputs):
        return False
    # A constant whose axes of size 1 stand for larger ones is not the whole array.
    if any(value.shape != atom.aval.shape for value, atom in zip(inputs, equation.invars)):
        return False
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return False
    largest = max([FOLDED_SIZE, *(math.prod(value.shape) for value in inputs)])
    return all(math.prod(shape) <= largest for shape in shapes)


def _broadcast(shapes: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The shape that operators give to inputs of these shapes."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded))


def _linear(size: Any) -> tuple[int, int]:
    """The factors a and b of a size a B + b that depends on the number of rows B."""
    one, two, three = (int(size._evaluate({'B': rows})) for rows in (1, 2, 3))
    if three - two != two - one:
        raise NotConvertible(f'there is no rule for an axis of size {size}')
    return two - one, 2 * one - two


def _fill(fill_value: Any, dtype: np.dtype) -> Any:
    """The value of entries that a gather finds outside of its array."""
    if fill_value is not None:
        return fill_value
    return np.nan if dtype.kind == 'f' else np.iinfo(dtype).min if dtype.kind == 'i' else True
