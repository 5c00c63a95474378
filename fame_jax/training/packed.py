"""Small parameters as one vector, so that the optimizer is one operation for all of them.

packed = pack_all(params, state)     each part of the state that is like the parameters, joined
state = unpack_all(packed)           and as it was

A GPU starts a kernel for each array that Adam updates; most arrays of a model are so small that
starting a kernel takes longer than computing. With small arrays joined, a step of SASRec has 157
kernels in place of 174, and one of FAME 185 in place of 209 (width 64, two blocks).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any
Shape = tuple[int, ...]

# Numbers of the largest array that is joined. Joining copies an array; item tables stay apart.
LARGEST = 2**16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['vector', 'others'],
    meta_fields=['structure', 'shapes'],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree whose small float32 arrays are joined.

    Attributes:
      vector: float32, the small arrays one after the other; leading axes are those of the tree.
      others: the other arrays, in their order.
      structure: of the tree.
      shapes: of each array without leading axes; None for one of `others`.
    """

    vector: Array
    others: list[Array]
    structure: jax.tree_util.PyTreeDef
    shapes: tuple[Shape | None, ...]

    def unpack(self) -> Tree:
        """The tree. Its gradients are joined by one operation."""
        parts, others = iter(_split(self.vector, self.shapes)), iter(self.others)
        leaves = [next(others if shape is None else parts) for shape in self.shapes]
        return jax.tree.unflatten(self.structure, leaves)


def pack(tree: Tree, num_axes: int = 0) -> Packed:
    """Joins the small float32 arrays of a tree.

    Args:
      tree: of arrays.
      num_axes: leading axes that all arrays have, such as that of the members; they stay.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple(
        leaf.shape[num_axes:]
        if leaf.dtype == jnp.float32 and math.prod(leaf.shape[num_axes:]) <= LARGEST
        else None
        for leaf in leaves
    )
    small = [leaf for leaf, shape in zip(leaves, shapes) if shape is not None]
    others = [leaf for leaf, shape in zip(leaves, shapes) if shape is None]
    return Packed(_join(small, num_axes), others, structure, shapes)


def pack_all(params: Tree, tree: Tree, num_axes: int = 0) -> Tree:
    """Packs every part of a tree that has the structure of the parameters, such as moments."""
    structure = jax.tree.structure(params)

    def is_like_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def pack_part(node: Any) -> Any:
        return pack(node, num_axes) if is_like_params(node) else node

    return jax.tree.map(pack_part, tree, is_leaf=is_like_params)


def unpack_all(tree: Tree) -> Tree:
    """The inverse of `pack_all`; a tree without packed parts is unchanged."""

    def is_packed(node: Any) -> bool:
        return isinstance(node, Packed)

    def unpack_part(node: Any) -> Any:
        return node.unpack() if is_packed(node) else node

    return jax.tree.map(unpack_part, tree, is_leaf=is_packed)


def _join(leaves: Sequence[Array], num_axes: int) -> Array:
    if not leaves:
        return jnp.zeros(0)
    return jnp.concatenate([x.reshape(*x.shape[:num_axes], -1) for x in leaves], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(vector: Array, shapes: tuple[Shape | None, ...]) -> list[Array]:
    """The arrays in a vector. Its own gradient joins theirs; that of slices would pad and add."""
    leaves, start = [], 0
    for shape in shapes:
        if shape is not None:
            end = start + math.prod(shape)
            leaves.append(vector[..., start:end].reshape(*vector.shape[:-1], *shape))
            start = end
    return leaves


def _split_forward(vector: Array, shapes: tuple[Shape | None, ...]) -> tuple[list[Array], None]:
    return _split(vector, shapes), None


def _split_backward(_: tuple, __: None, gradients: Sequence[Array]) -> tuple[Array]:
    return (_join(gradients, 0),)


_split.defvjp(_split_forward, _split_backward)
