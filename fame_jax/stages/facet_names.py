"""The facets of a model's heads or branches, where each has one of its own (FAME+)."""

import collections
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.models.item_model import ItemModel
from fame_jax.stages.context import RunContext


def head_names(context: RunContext, module: ItemModel) -> list[str]:
    """The facet of each head, such as 'brand'; [] where heads have no facet of their own.

    A head has one if its part of the item vectors was trained for one by the stage text, and if
    its projection W_f started from that part. All heads of a branch have the facet of the branch.

    Args:
      context: the run.
      module: the model of a trained stage.
    """
    if getattr(module, 'facet_init', '') != 'slices':
        return []
    heads = module.num_heads if has_branches(module) else 1
    facets = _facets_of_slices(context, module)
    return distinct([facet for facet in facets for _ in range(heads)], 'head')


def view_names(context: RunContext, module: ItemModel) -> list[str]:
    """The names of a model's views of the items, its heads or, where it has none, its branches.

    Returns:
      [] for heads without facets, whose names are then their numbers.
    """
    if has_branches(module) and not hasattr(module, 'intermediates'):
        return branch_names(context, module)
    return head_names(context, module)


def branch_names(context: RunContext, module: ItemModel) -> list[str]:
    """The facet of each branch, or 'branch 1', 'branch 2', ... where they have none.

    Args:
      context: the run.
      module: the model of a trained stage, with branches.
    """
    numbers = [f'branch {r}' for r in range(1, module.branches + 1)]
    return distinct(_facets_of_slices(context, module), 'branch') or numbers


def has_branches(module: ItemModel) -> bool:
    """Whether a model is several models side by side."""
    return getattr(module, 'branches', 1) > 1


def count_slices(module: ItemModel) -> int:
    """The slices of item vectors that can have a facet each: one for a branch, or else for a head.

    Returns:
      0 for a model that has neither branches nor heads, which may have any number.
    """
    return module.branches if has_branches(module) else getattr(module, 'num_heads', 0)


def _facets_of_slices(context: RunContext, module: ItemModel) -> list[str]:
    """The facet of each slice; [] where the stage text trained none, or by permuted labels."""
    text, source = context.config.text, context.config.training.backbone
    folder = context.folder if source in ('pretrain', 'scratch') else Path(source)
    path = folder / 'text' / 'text.json'
    was_trained = text.item_init == 'text' and text.options['shuffled_labels'] == 'false'
    if not was_trained or not path.is_file():
        return []
    record: dict[str, Any] = run_dir.read_json(path)
    facets = record.get('heads', [])
    return facets if len(facets) == count_slices(module) else []


def distinct(names: list[str], part: str) -> list[str]:
    """The names, each with its number where it could mean another head or branch, or all of them.

    Args:
      names: of all heads, or of all branches.
      part: 'head' or 'branch'.
    """
    counts = collections.Counter(names)
    taken = {'all', *(f'{part} {n}' for n in range(1, len(names) + 1))}
    return [
        name if counts[name] == 1 and name not in taken else f'{name} ({part} {n})'
        for n, name in enumerate(names, 1)
    ]
