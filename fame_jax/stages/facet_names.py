"""The parts of the item vectors that have a facet, and the names of a model's views of items."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fame_jax import run_dir
from fame_jax.models.branches import Branches
from fame_jax.models.item_model import ItemModel
from fame_jax.text import facets

if TYPE_CHECKING:  # its settings are checked with the functions of this file
    from fame_jax.stages.context import RunContext


def facets_of_slices(module: ItemModel, names: Sequence[str]) -> list[str]:
    """The facet of each of the equal slices of the item vectors, from the first column on.

    A head has a slice, and a model without heads one for each facet; each branch has them all, in
    its own columns.

    Args:
      module: the model.
      names: of the facets, as in --facets.

    Raises:
      UserError: when there are more facets than heads, and they cannot be merged.
    """
    return facets.assign(names, num_heads(module) or len(names)) * num_branches(module)


def count_slices(module: ItemModel) -> int:
    """The slices of item vectors that have a facet each; 0: any number, without heads."""
    return num_heads(module) * num_branches(module)


def view_names(context: 'RunContext', module: ItemModel) -> list[str]:
    """The names of a model's heads, or of the branches of a model without views by heads.

    Returns:
      [] for heads without facets, whose names are then their numbers.
    """
    if isinstance(module, Branches) and not hasattr(module, 'intermediates'):
        return [f'branch {r}' for r in range(1, module.branches + 1)]
    return head_names(context, module)


def head_names(context: 'RunContext', module: ItemModel) -> list[str]:
    """The facet of each head, such as 'brand'; [] where heads have no facet of their own.

    A head has one if the item table started from the text stage, whose facet objective trained one
    slice of the item vectors for each head, by true labels, and if the head's projection W_f
    started from that slice.

    Args:
      context: the run.
      module: the model of a trained stage.
    """
    text, source = context.config.text, context.config.training.backbone
    was_trained_so = (
        text.item_init == 'text'
        and text.options['shuffled_labels'] == 'false'
        and getattr(module, 'facet_init', '') == 'slices'
    )
    folder = context.folder if source in ('pretrain', 'scratch') else Path(source)
    path = folder / 'text' / 'text.json'
    if not was_trained_so or not path.is_file():
        return []
    record: dict[str, Any] = run_dir.read_json(path)
    heads = record.get('heads', [])
    return distinct(heads) if len(heads) == count_slices(module) else []


def distinct(names: Sequence[str]) -> list[str]:
    """The names, each with its head's number where it could mean another head or all of them."""
    counts = collections.Counter(names)
    taken = {'all', *(f'head {h}' for h in range(1, len(names) + 1))}
    return [
        name if counts[name] == 1 and name not in taken else f'{name} (head {h})'
        for h, name in enumerate(names, 1)
    ]


def num_heads(module: ItemModel) -> int:
    """The heads of a model, or of each of its branches; 0: it has none."""
    return getattr(module, 'num_heads', 0)


def num_branches(module: ItemModel) -> int:
    """The branches of a model; 1: it is no model with branches."""
    return module.branches if isinstance(module, Branches) else 1
