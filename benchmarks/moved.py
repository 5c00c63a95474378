"""Bytes that each operation of a compiled program reads and writes, as the device would.

XLA's own count takes a table for read and written whole where an operation of a loop reads some
rows of it, or writes some in their place, behind a change of layout. Here only what is read of an
array counts that is sliced or gathered from, and only what is new of one that is written in place.
"""

import re

from benchmarks import roofline

WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8, 'f64': 8}
SOME_OF = {'slice', 'dynamic-slice', 'gather'}
IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}  # the operand that holds what is new
OPERATION = re.compile(r'^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)', re.M)


def size(shape: str) -> int:
    """Bytes of an array as XLA writes it, such as f32[8,64], or of all in a tuple."""
    total = 0
    for dtype, dimensions in re.findall(r'(\w+)\[([\d,]*)\]', shape):
        one = WIDTHS.get(dtype, 4)
        for dimension in re.findall(r'\d+', dimensions):
            one *= int(dimension)
        total += one
    return total


def moved(text: str) -> dict[str, int]:
    """By the name of each fusion, copy and library call, what one run of it reads and writes."""
    computations, _ = roofline._computations(text)
    several = {name: _Computation(body) for name, body in computations.items()}
    found = {}
    for computation in several.values():
        for name, (shape, kind, rest) in computation.operations.items():
            if kind not in ('fusion', 'copy', 'custom-call') and not kind.endswith('-start'):
                continue
            operands = [computation.size(operand) for operand in _operands(rest)]
            called = re.search(r'calls=(%[\w.\-]+)', rest)
            if kind == 'fusion' and called and called[1] in several:
                found[name] = several[called[1]].moved(operands, size(shape))
            else:
                found[name] = sum(operands) + size(shape)
    return found


def _operands(rest: str) -> list[str]:
    return re.findall(r'%([\w.\-]+)', rest.split(')')[0])


class _Computation:
    """The operations of a computation: shape, kind, and the rest of the line, by name."""

    def __init__(self, text: str):
        self.operations, self.root, self.users = {}, '', {}
        for root, name, shape, kind, rest in OPERATION.findall(text):
            self.operations[name] = shape, kind, rest
            self.root = name if root else self.root
            for place, operand in enumerate(_operands(rest)):
                self.users.setdefault(operand, []).append((name, place))

    def size(self, name: str) -> int:
        return size(self.operations[name][0]) if name in self.operations else 0

    def moved(self, operands: list[int], out: int) -> int:
        """Bytes, given those of the operands and of the result."""
        total = 0
        for name, (_, kind, rest) in self.operations.items():
            if kind == 'parameter':
                index = int(re.match(r'\d+', rest)[0])
                whole = operands[index] if index < len(operands) else 0
                read = self.read(name)
                total += whole if read is None else min(read, whole)
        return total + self.written(self.root, out)

    def read(self, name: str) -> int | None:
        """Of an array, where only some of it is; None: all."""
        total = 0
        for user, place in self.users.get(name, []):
            _, kind, _ = self.operations[user]
            if kind in SOME_OF and place == 0:
                total += self.size(user)
            elif kind in IN_PLACE and place == 0:
                continue
            elif kind in ('bitcast', 'get-tuple-element'):
                further = self.read(user)
                if further is None:
                    return None
                total += further
            elif kind == 'tuple' and user == self.root:
                continue
            else:
                return None
        return total

    def written(self, name: str, out: int) -> int:
        """Of the result."""
        _, kind, rest = self.operations[name]
        if kind in IN_PLACE:
            operands = _operands(rest)
            held = self.operations.get(self._behind(operands[0]), ('', '', ''))[1]
            if held == 'parameter':
                new = self.size(operands[IN_PLACE[kind]])
                return new if kind == 'dynamic-update-slice' else 2 * new
            return out
        if kind == 'bitcast':
            return self.written(_operands(rest)[0], out)
        if kind == 'tuple':
            return sum(self.written(part, self.size(part)) for part in _operands(rest))
        return out

    def _behind(self, name: str) -> str:
        """What an array is before changes of its layout."""
        while name in self.operations and self.operations[name][1] == 'bitcast':
            name = _operands(self.operations[name][2])[0]
        return name
