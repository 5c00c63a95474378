"""What this device can do and what a program asks of it: rates in hand, counts by XLA.

XLA's cost analysis takes the body of a loop once. Here each loop's body is counted by itself, as a
program of its own, and taken as often as the loop turns: XLA writes the number of turns beside a
loop it has compiled. A loop whose turns only the device will know is taken once, and told.
"""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib import xla_client

# Products grow until one takes so long that starting it is nothing beside it.
LONG_SECONDS = 0.02
SIZES = (512, 2048, 8192, 16_384)
FLOATS = {'cpu': 2**26}  # of the array that is copied; elsewhere 2**28, a GiB
WIDTHS = {'f64': 8, 'f32': 4, 'bf16': 2, 'f16': 2}  # bytes


def rates() -> dict[str, float]:
    """Products of matrices by precision, FLOP/s, and 'copy', bytes/s read and written.

    'float32' is as a program gets it that asks for nothing: on a CUDA device that is tf32.
    """
    names = {'float32': ('float32', None), 'bfloat16': ('bfloat16', None)}
    if jax.default_backend() != 'cpu':
        names |= {p: ('float32', p) for p in ('highest', 'tensorfloat32')}
    return {name: matmul_rate(*how) for name, how in names.items()} | {'copy': copy_rate()}


def matmul_rate(dtype: str = 'float32', precision: str | None = None) -> float:
    """Floating-point operations a second of a product of random square matrices."""
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    for size in SIZES:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
        b = b / size**0.5  # so that a product of products stays as large
        seconds = _seconds(lambda a, b=b: multiply(a, b), a)
        if seconds > LONG_SECONDS:
            break
    return 2 * size**3 / seconds


def copy_rate() -> float:
    """Bytes a second, read and written, of an array that is gone through in place."""
    x = jnp.ones(FLOATS.get(jax.default_backend(), 2**28))
    return 2 * x.nbytes / _seconds(jax.jit(jnp.negative, donate_argnums=0), x)


def _seconds(call: Callable[[Any], Any], x: Any, chain: int = 4, repeats: int = 8) -> float:
    """The best of a call on what the call before it gave: a ceiling is not a median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(chain):
            x = call(x)
        jax.block_until_ready(x)
        times.append(time.perf_counter() - began)
    return min(times) / chain


class Counts(NamedTuple):
    """What a compiled program does, by XLA's cost analysis with its loops counted out."""

    flops: float  # arithmetic on elements, whole numbers' too; a multiply-add is two
    bytes: float  # read and written by each fused operation, be it from memory or a cache
    loops: int  # that were taken as often as they turn
    once: int  # that were taken once, their turns unknown, and calls that XLA cannot look into


def count(compiled: Any) -> Counts:
    """Counts a compiled program (jax.stages.Compiled), whatever device it is for."""
    computations, entry = computations_of(compiled.as_text())
    loops = {'known': 0, 'unknown': 0}

    @functools.cache
    def once(root: str) -> np.ndarray:
        needed = reached(computations, root)
        found = _cost(_module(computations, needed))
        library = sum(_library_calls(computations[name]) for name in needed)
        return library + np.array([found.get('flops', 0), found.get('bytes accessed', 0)])

    def whole(root: str) -> np.ndarray:
        total = once(root).copy()
        for body, turns in _loops(computations, root):
            loops['known' if turns else 'unknown'] += 1
            # The body is in the root's own count once already.
            total += (turns or 1) * whole(body) - once(body)
        return total

    flops, moved = whole(entry).tolist()
    dark = sum(text.count('custom_call_target="__cudnn') for text in computations.values())
    return Counts(flops, moved, loops['known'], loops['unknown'] + dark)


def _cost(text: str) -> dict[str, float]:
    """XLA's analysis; by the CPU's client, since those of plug-ins such as CUDA's have none."""
    client = jax.local_devices(backend='cpu')[0].client
    module = xla_client.hlo.hlo_module_from_text(text)
    return xla_client._xla.hlo_module_cost_analysis(client, module)


def _library_calls(text: str) -> np.ndarray:
    """Operations and bytes of a computation's calls of cuBLAS, where the analysis has none."""
    total = np.zeros(2)
    for line in text.splitlines():
        if 'custom_call_target="__cublas$' not in line:
            continue
        name, operands = re.search(r'(%[\w.\-]+) = .* custom-call\(([^)]*)\)', line).groups()
        operands = re.findall(r'%[\w.\-]+', operands)
        summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line)[1]
        left, out = _shape(text, operands[0])[1], _shape(text, name)[1]
        terms = math.prod(left[int(axis)] for axis in re.findall(r'\d+', summed))
        # The analysis has -1 for what it does not know.
        flops = 2 * math.prod(out) * terms + 1
        arrays = [_shape(text, array) for array in (name, *operands)]
        total += flops, sum(WIDTHS[dtype] * math.prod(shape) for dtype, shape in arrays)
    return total


def _shape(text: str, name: str) -> tuple[str, list[int]]:
    """Dtype and shape of an array of a computation; of a tuple's first."""
    dtype, shape = re.search(re.escape(name) + r' = \(?(\w+)\[([\d,]*)\]', text).groups()
    return dtype, [int(size) for size in re.findall(r'\d+', shape)]


def computations_of(text: str) -> tuple[dict[str, str], str]:
    """The computations of a module's text by name, without the word ENTRY, and whose it was."""
    found, entry = {}, ''
    for match in re.finditer(r'^(ENTRY )?(%[\w.\-]+) .*?^}', text, re.M | re.S):
        found[match[2]] = match[0].removeprefix('ENTRY ')
        entry = match[2] if match[1] else entry
    return found, entry


def reached(computations: dict[str, str], root: str) -> list[str]:
    """A computation and all that it calls."""
    found, waiting = [], [root]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += _called(computations, name)
    return found


def _module(computations: dict[str, str], names: list[str]) -> str:
    """A module's text of some computations; the first is the entry, and the others keep order."""
    texts = [_without_places(computations[n]) for n in computations if n in names[1:]]
    entry = 'ENTRY ' + _without_places(computations[names[0]])
    return '\n\n'.join(['HloModule counted', *texts, entry])


def _without_places(text: str) -> str:
    """Without the places in the source, whose table is not kept."""
    return re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', '', text)


def _called(computations: dict[str, str], name: str) -> list[str]:
    body = _without_places(computations[name]).split('\n', 1)[1]
    return [word for word in re.findall(r'%[\w.\-]+', body) if word in computations]


def _loops(computations: dict[str, str], root: str) -> list[tuple[str, int | None]]:
    """Bodies and turns of the loops of a computation, not of those within their bodies."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        name = waiting.pop()
        text = computations[name]
        inside = set()
        for line in text.split('\n')[1:]:
            match = re.search(r' while\(.*\bbody=(%[\w.\-]+)', line)
            if not match:
                continue
            inside.add(match[1])
            turns = re.search(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"?(\d+)', line)
            found.append((match[1], int(turns[1]) if turns else None))
        for called in _called(computations, name):
            if called not in seen and called not in inside:
                seen.add(called)
                waiting.append(called)
    return found
