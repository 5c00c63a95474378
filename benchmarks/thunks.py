"""What a program compiled for CUDA makes the host and the device do, from what XLA writes of it.

XLA's CUDA backend turns a program into thunks: kernels, copies, library calls, loops, and command
buffers (CUDA graphs) that hold many of the former and are started at once. With --xla_dump_to it
writes their sequence beside the optimized program. Here they are counted: loops as often as they
turn, where XLA knows it, and once where only the device will know.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import roofline
from benchmarks.moved import size

# Thunks that start nothing on the device.
IDLE = {'kSequential', 'kCommandBuffer', 'kWhile', 'kConditional', 'kWaitForStreams'}
IDLE |= {'kReplicaId', 'kPartitionId', 'kHostExecuteStart', 'kHostExecuteDone'}
COLLECTIVES = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
MOVING = {'parameter', 'transpose', 'copy', 'bitcast', 'tuple', 'get-tuple-element'}


@dataclasses.dataclass
class Thunk:
    """A thunk and those within it, by part: '', condition, body, true_branch, ..."""

    kind: str
    name: str  # of its operation in the program
    parts: dict[str, list['Thunk']] = dataclasses.field(default_factory=dict)


class Launches(NamedTuple):
    """What one run of some thunks starts."""

    kernels: float = 0  # on the device: kernels, copies, fills, library calls, collectives
    products: float = 0  # of which multiply matrices
    copies: float = 0  # of which copy memory and do nothing else
    starts: float = 0  # by the host: command buffers, and what stands outside of them
    reads: float = 0  # a number that the host waits for: the way of a condition, the end of a loop
    bytes: float = 0  # that the device reads and writes

    def __add__(self, other: 'Launches') -> 'Launches':
        return Launches(*(a + b for a, b in zip(self, other)))

    def times(self, turns: float) -> 'Launches':
        """So many of them one after another."""
        return Launches(*(turns * a for a in self))


def read(sequence: str, metadata: str) -> Thunk:
    """The tree of thunks, from XLA's two texts of them."""
    names = {}
    for info in re.findall(r'thunk_info \{(.*?)\n  \}', metadata, re.S):
        name = re.search(r'profile_annotation: "([^"]*)"', info)
        number = re.search(r'thunk_id: (\d+)', info)
        if name and number:
            names[int(number[1])] = name[1]
    root = Thunk('kSequential', '')
    # Each: how far it stands in, the thunk, and the part of it that is being read.
    stack: list[list] = [[-1, root, '']]
    for line in sequence.splitlines():
        part = re.match(r'( *)(\w+):\s*$', line)
        if part:
            if part[2] != 'condition':  # which alone is written at the margin, wherever it belongs
                while stack[-1][0] > len(part[1]) - 2:
                    stack.pop()
            stack[-1][2] = part[2]
        elif found := re.match(r'( *)(\d+): (k\w+)', line):
            while stack[-1][0] >= len(found[1]):
                stack.pop()
            thunk = Thunk(found[3], names.get(int(found[2]), ''))
            _, above, within = stack[-1]
            above.parts.setdefault(within, []).append(thunk)
            stack.append([len(found[1]), thunk, ''])
    return root


def walk(thunk: Thunk) -> Iterator[Thunk]:
    """It and all within it."""
    yield thunk
    for several in thunk.parts.values():
        for one in several:
            yield from walk(one)


def count(
    thunk: Thunk,
    turns: Mapping[str, int | None],
    is_product: Callable[[str], bool] = lambda name: name.startswith('gemm_fusion'),
    moved: Mapping[str, int] | None = None,
    buffered: bool = False,
) -> Launches:
    """What a thunk starts.

    Args:
      thunk: its parts counted; of the branches of a condition, the one with most kernels.
      turns: of loops by name; None, or no entry: unknown, and the body is taken once, with its
        condition once more than the body.
      is_product: whether an operation of this name multiplies matrices.
      moved: bytes of operations by name.
      buffered: whether it is in a command buffer.
    """
    held = buffered or thunk.kind == 'kCommandBuffer'
    parts = {
        name: sum((count(t, turns, is_product, moved, held) for t in within), Launches())
        for name, within in thunk.parts.items()
    }
    if thunk.kind == 'kWhile':
        body, condition = parts.get('body', Launches()), parts.get('condition', Launches())
        if known := turns.get(thunk.name):
            return body.times(known)
        return body + condition + Launches(reads=1)
    if thunk.kind == 'kConditional':
        return max(parts.values(), default=Launches()) + Launches(reads=1)
    total = sum(parts.values(), Launches())
    if thunk.kind == 'kCommandBuffer':
        return total._replace(starts=1)
    if thunk.parts or thunk.kind in IDLE or thunk.kind.endswith('Done'):
        return total  # what holds others starts nothing beside them
    product = 'Gemm' in thunk.kind or 'Cublas' in thunk.kind or is_product(thunk.name)
    copy = thunk.kind in ('kCopy', 'kMemcpy') or thunk.name.startswith('wrapped_transpose')
    return total + Launches(1, product, copy, not buffered, 0, (moved or {}).get(thunk.name, 0))


def step_of(root: Thunk, turns: dict[str, int | None]) -> Thunk | None:
    """The loop over the steps of a dispatch: the outermost one of unknown turns."""
    for thunk in root.parts.get('', []):
        if thunk.kind == 'kWhile' and not turns.get(thunk.name):
            return thunk
    return None


def program_turns(text: str) -> dict[str, int | None]:
    """Turns of a program's loops by name, None where XLA does not know them."""
    found = {}
    for line in text.splitlines():
        if name := re.match(r'\s+(?:ROOT )?%([\w.\-]+) = .* while\(', line):
            known = re.search(r'known_trip_count\\?"?:\{\\?"?n\\?"?:\\?"?(\d+)', line)
            found[name[1]] = int(known[1]) if known else None
    return found


def products(text: str) -> set[str]:
    """Names of the operations of a program that multiply matrices."""
    computations, _ = roofline._computations(text)
    with_dot = {name for name, body in computations.items() if re.search(r' dot\(', body)}
    # A product with its own tiles is a computation within the fusion's.
    reached = {n for n in computations if with_dot & set(roofline._reached(computations, n))}
    found = re.findall(r'%([\w.\-]+) = .* fusion\(.*calls=(%[\w.\-]+)', text)
    return {name for name, called in found if called in reached}


def look(text: str, started: set[str], rows: int) -> dict[str, object]:
    """What stands out in a program: operations that a GPU does not like, by kind and number.

    Args:
      text: the optimized program.
      started: names of the operations that are thunks of their own.
      rows: of a table; what is as long along an axis, copied or transposed alone, is told.
    """
    computations, _ = roofline._computations(text)
    moves = {name for name, body in computations.items() if _operations(body) <= MOVING}
    copied = []
    pattern = r'^\s+(?:ROOT )?%([\w.\-]+) = (\w+\[[\d,]*\])\S* (?:copy|fusion)\((.*)'
    for name, shape, rest in re.findall(pattern, text, re.M):
        called = re.search(r'calls=(%[\w.\-]+)', rest)
        long = max(map(int, re.findall(r'\d+', shape.split('[')[1])), default=0) >= rows
        if name in started and long and (not called or called[1] in moves):
            copied.append(f'{name} {shape}')
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    return {
        'scatters': len(re.findall(r' scatter\(', text)),
        'sorts': len(re.findall(r' sort\(|"__cub\$', text)),
        'float64': len(re.findall(r' f64\[', text)),
        'library_calls': {target: targets.count(target) for target in sorted(set(targets))},
        'table_copies': copied,
        'collectives': collectives(text),
    }


def _operations(computation: str) -> set[str]:
    return set(re.findall(r'^\s+(?:ROOT )?%[\w.\-]+ = .*? ([a-z][\w\-]*)\(', computation, re.M))


def collectives(text: str) -> list[dict[str, object]]:
    """Each collective of a program: its kind, how many arrays it joins, and all their bytes."""
    found = []
    pattern = rf'^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ({COLLECTIVES})(?:-start)?\('
    for shapes, kind in re.findall(pattern, text, re.M):
        arrays = re.findall(r'\w+\[[\d,]*\]', shapes)
        found.append({'kind': kind, 'arrays': len(arrays), 'bytes': sum(map(size, arrays))})
    return found


def dumped(folder: Path) -> tuple[str, str]:
    """The texts of the last program dumped in a folder, which is emptied."""
    last = max(folder.glob('*.thunk_sequence_after_thunk_passes.txt'), default=None)
    texts = ('', '')
    if last:
        beside = last.with_name(last.name.split('.thunk_')[0] + '.thunk_metadata.txt')
        texts = last.read_text(), beside.read_text()
    for path in sorted(folder.rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return texts
