"""The names of a model's heads, where each was trained for a facet of its own (FAME+)."""

import collections
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.models.item_model import ItemModel
from fame_jax.stages.context import RunContext


def head_names(context: RunContext, module: ItemModel) -> list[str]:
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
    # The slice of a facet is not that of a head where branches have heads of their own.
    if len(heads) != getattr(module, 'num_heads', 0) or getattr(module, 'branches', 1) > 1:
        return []
    return distinct(heads)


def distinct(names: list[str]) -> list[str]:
    """The names, each with its head's number where it could mean another head or all of them."""
    counts = collections.Counter(names)
    taken = {'all', *(f'head {h}' for h in range(1, len(names) + 1))}
    return [
        name if counts[name] == 1 and name not in taken else f'{name} (head {h})'
        for h, name in enumerate(names, 1)
    ]
