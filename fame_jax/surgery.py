"""From a pre-trained tree to another model's tree, or an error that prints both differences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax

Tree = Mapping[str, Any]


class SurgeryError(ValueError):
    """The two trees do not fit the plan; the message lists what on either side."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which leaf comes from where; paths are joined by '/'.

    A path that neither `copy`, `fresh` nor `dropped` speaks of is copied to the same path.
    """

    copy: Mapping[str, str] = dataclasses.field(default_factory=dict)  # new path -> old path
    transform: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(
        default_factory=dict
    )  # new path -> what to do to the old leaf
    fresh: str = '\0'  # new paths with this prefix, if without a source, keep their initialisation
    dropped: str | tuple[str, ...] = ()  # old paths with such a prefix may be left behind


def transplant(old: Tree, new: Tree, plan: Plan) -> dict[str, Any]:
    """Fills a fresh tree with what the plan takes from a pre-trained one.

    Args:
      old: the pre-trained parameters.
      new: freshly initialised parameters of the model to be.
      plan: which leaf comes from where.

    Raises:
      SurgeryError: when a new leaf has no source, an old leaf no use, or shapes differ.
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
            unfit.append(f'{path}: wants {leaf.shape}, {source} gives {value.shape}')
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
