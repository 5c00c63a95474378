"""Copies the parameters of a pre-trained model into another model, or lists the differences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax

Tree = Mapping[str, Any]


class SurgeryError(ValueError):
    """The two trees do not fit the plan; the message lists the differences on either side."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The source of each leaf; a path is the names joined by '/'.

    A path that is in none of `copy`, `fresh` and `dropped` is copied to the same path.

    Attributes:
      copy: new path -> old path.
      transform: new path -> the function applied to the old leaf.
      fresh: new paths with this prefix keep their initialisation if they have no source.
      dropped: old paths with one of these prefixes need no use.
    """

    copy: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transform: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(
        default_factory=dict
    )
    fresh: str = '\0'
    dropped: str | tuple[str, ...] = ()


def transplant(old: Tree, new: Tree, plan: Plan) -> dict[str, Any]:
    """Copies pre-trained parameters into a freshly initialised tree.

    Args:
      old: the pre-trained parameters.
      new: freshly initialised parameters of the other model.
      plan: the source of each leaf.

    Raises:
      SurgeryError: a new leaf has no source, an old leaf no use, or shapes differ.
    """
    old_leaves = flax.traverse_util.flatten_dict(old, sep='/')
    new_leaves = flax.traverse_util.flatten_dict(new, sep='/')
    result, used, missing, unfit = {}, set(), [], []
    for path, leaf in new_leaves.items():
        source = plan.copy.get(path, path)
        if source not in old_leaves:
            if path not in plan.copy and path.startswith(plan.fresh):
                result[path] = leaf
            else:
                missing.append(f'{path} (from {source})')
            continue
        used.add(source)
        value = plan.transform.get(path, lambda x: x)(old_leaves[source])
        if value.shape != leaf.shape:
            unfit.append(f'{path}: needs {leaf.shape}, {source} has {value.shape}')
        result[path] = value.astype(leaf.dtype)
    left = [p for p in old_leaves if p not in used and not p.startswith(plan.dropped)]
    unknown = [f'{p} (from {s})' for p, s in plan.copy.items() if p not in new_leaves]
    unknown += [f'{p} (transform)' for p in plan.transform if p not in new_leaves]
    if missing or left or unfit or unknown:
        raise SurgeryError(_explain(missing, left, unfit, unknown))
    return flax.traverse_util.unflatten_dict(result, sep='/')


def _explain(missing: list[str], left: list[str], unfit: list[str], unknown: list[str]) -> str:
    parts = {
        'in the new tree, without a source': missing,
        'in the pre-trained tree, without a use': left,
        'of another shape': unfit,
        'in the plan, but not in the new tree': unknown,
    }
    lines = ['the pre-trained tree does not fit the new one']
    for title, paths in parts.items():
        lines += [f'  {title}:', *(f'    {path}' for path in sorted(paths))] if paths else []
    return '\n'.join(lines)
