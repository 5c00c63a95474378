"""DenseRec (Lichtenberg et al., 2025, arXiv 2508.18442): item vectors on two paths, id and text.

    v_i = E_i                  the id path: the item's row of the table
    v_i = W e_i + b            the text path: one linear map of its frozen text vector e_i

The map is trained with the model: in every step each item takes the text path with a given
probability, so that W and b come to send texts to where the ids of such items are. Items with few
or no training actions, whose rows the data cannot place, always take it.

One draw serves an item wherever it occurs in a step: in histories, as a target and as a negative.
Models here tie the table of the input and of the output, and both so read one vector. After
training `fold` writes the chosen vectors into a plain table. The paper's abstract states the linear
projection and the two paths; the draw and the limit of actions are our form.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Tree = Mapping[str, Any]

NAME = 'text_path'  # of the map in a tree of parameters
# Folded into a step's key for the draw of this module. Small numbers would repeat a key that the
# model derives from the same one, since `jax.random.split` folds in 0, 1, ...
DRAW = 2508_18442


def init(key: Array, text_width: int, width: int, scale: float = 0.02) -> dict[str, Array]:
    """The map W, 'kernel' [E, D] from N(0, scale^2), and b, 'bias' [D] zeros.

    Text vectors have unit length, so coordinates of the item vectors start at about `scale` too.
    """
    kernel_ED = scale * jax.random.normal(key, (text_width, width))
    return {'kernel': kernel_ED, 'bias': jnp.zeros(width)}


def items(text_VE: np.ndarray, actions_V: np.ndarray, below: int, rows: int) -> dict[str, Array]:
    """The constant arrays of the text path.

    Args:
      text_VE: float32 [V + 1, E], the frozen text vectors; a row of zeros means no text.
      actions_V: [V + 1], how often each item occurs in training.
      below: items with fewer actions always take the text path; 0: none.
      rows: of the item table, V + 1 or, on several devices, a few more.

    Returns:
      'text_vectors' [rows, E], of unit length or zeros; bool [rows] 'has_text', and 'always', the
      items that have a text and fewer actions.
    """
    length_V1 = np.linalg.norm(text_VE, axis=1, keepdims=True)
    unit_VE = np.divide(text_VE, length_V1, out=np.zeros_like(text_VE), where=length_V1 > 0)
    has_V = length_V1[:, 0] > 0
    has_V[0] = False  # the padding
    always_V = has_V & (actions_V < below)
    more = rows - len(text_VE)
    return {
        'text_vectors': jnp.asarray(np.pad(unit_VE, ((0, more), (0, 0)))),
        'has_text': jnp.asarray(np.pad(has_V, (0, more))),
        'always': jnp.asarray(np.pad(always_V, (0, more))),
    }


def mix(params: Tree, constants: Mapping[str, Array], key: Array, share: Array | float) -> dict:
    """Parameters whose item table has the text path's vectors, as one training step reads them.

    Args:
      params: with 'item_table' and the map.
      constants: of `items`.
      key: of the step; the draw folds a number of its own into it.
      share: probability with which an item with a text takes the text path in this step.
    """
    has_text_V = constants['has_text']
    drawn_V = jax.random.bernoulli(jax.random.fold_in(key, DRAW), share, has_text_V.shape)
    return _select(params, constants, constants['always'] | (drawn_V & has_text_V))


@jax.jit
def fold(params: Tree, constants: Mapping[str, Array]) -> dict:
    """The parameters to rank and serve with: a plain table, and no map."""
    return _select(params, constants, constants['always'])


def _select(params: Tree, constants: Mapping[str, Array], takes_text_V: Array) -> dict:
    path, table = params[NAME], params['item_table']
    text_VD = constants['text_vectors'] @ path['kernel'] + path['bias'][None]
    table_VD = jnp.where(takes_text_V[:, None], text_VD.astype(table.dtype), table)
    return {name: p for name, p in params.items() if name != NAME} | {'item_table': table_VD}


def objective(
    params: Tree,
    batch: Any,
    key: Array,
    *,
    of_model: Any,
    constants: Mapping[str, Array],
    share: Array | float,
) -> tuple[Array, Array, dict[str, Array]]:
    """A model's objective with the item vectors of `mix`; arguments and results as there.

    Args:
      params: with the map.
      batch: of the model's `row_layout`.
      key: consumed by the model's objective.
      of_model: (params, batch, key) -> (loss sum, weight sum, metrics).
      constants: of `items`.
      share: as in `mix`.
    """
    return of_model(mix(params, constants, key, share), batch, key)
