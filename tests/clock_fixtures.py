"""A model whose scores are a script, and a run of it whose best epochs are known beforehand.

Nothing is learned: before each epoch the model's clock moves on by one, and the clock decides the
score of each item, the same for all users. The best epoch by validation is neither the last one
nor the best by test, in both trained stages.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from run_fixtures import make_world

from fame_jax.main import main
from fame_jax.models import options, surgery
from fame_jax.models.item_model import ItemModel

# Of each user the last item, 2, is the test target, and the one before, 1, that of validation. The
# latter is popular only by what was held out. User e has an item that no other user has.
HISTORIES = {
    'a': [3, 4, 1, 2],
    'b': [4, 3, 1, 2],
    'c': [3, 5, 1, 2],
    'd': [3, 4, 5, 1, 2],
    'e': [8, 3, 7, 1, 2],
    'f': [6, 3, 4, 1, 2],
}
ITEMS = range(1, 9)

# The scores of items 3 to 8 at all times; item 6 ties with item 2 at time 2 of the backbone.
OTHERS = {3: 9.0, 4: 8.0, 5: 6.0, 6: 5.0, 7: 4.0, 8: 3.0}
# The scores of items 1 and 2 by the clock, of the backbone and of the model grown from it.
BACKBONE = [(1.0, 3.5), (4.5, 1.0), (7.0, 5.0), (5.5, 7.5), (3.5, 5.5)]
GROWN = [(0.5, 0.5), (0.6, 0.6), (4.5, 2.0), (7.0, 3.5), (5.5, 7.5), (3.5, 1.0)]
WIDTH = 16
GROWN_FROM = 8  # the first column of GROWN

EPOCHS = {'pretrain': 4, 'finetune': 3}
# The best epoch by validation, and the clock then: fine-tuning goes on from the best backbone's.
BEST_EPOCH = {'pretrain': 2, 'finetune': 1}
BEST_TIME = {'pretrain': 2, 'finetune': 3}


def score_table():
    """The scores as item vectors, [V + 1, D]: a column for each time of each stage."""
    table_VD = np.zeros((len(ITEMS) + 1, WIDTH), np.float32)
    for first, script in ((0, BACKBONE), (GROWN_FROM, GROWN)):
        for time, (one, two) in enumerate(script):
            for item, score in {1: one, 2: two, **OTHERS}.items():
                table_VD[item, first + time] = score
    return table_VD


class Clock(ItemModel):
    """The query selects the column of the table that the clock points at."""

    width: options.Width = WIDTH
    similarity: str = 'dot'

    title: ClassVar[str] = 'Clock'
    first_column: ClassVar[int] = 0
    frozen_params: ClassVar[tuple[str, ...]] = ('item_table', 'clock')

    def setup(self):
        self.item_table = self.param('item_table', lambda key: jnp.asarray(score_table()))
        self.clock = self.param('clock', lambda key: jnp.zeros(1))

    def __call__(self, tokens_BL, positions_BL, segments_BL, *, train=False, last=False):
        column = self.first_column + jnp.round(self.clock[0]).astype(int)
        query_D = jax.nn.one_hot(column, WIDTH)
        shape_BL = (tokens_BL.shape[0], 1) if last else tokens_BL.shape
        return jnp.broadcast_to(query_D[None, None], (*shape_BL, WIDTH)), {}

    @nn.nowrap
    def before_epoch(self, params, batches, key):
        return params | {'clock': params['clock'] + 1}


class GrownClock(Clock):
    """A model over the backbone Clock, whose time it takes over."""

    title: ClassVar[str] = 'Grown clock'
    first_column: ClassVar[int] = GROWN_FROM
    backbone: ClassVar[type[ItemModel]] = Clock

    @nn.nowrap
    def backbone_module(self):
        return Clock(num_items=self.num_items, width=self.width)

    @nn.nowrap
    def surgery_plan(self, key):
        return surgery.Plan()


def score(stage, time, item):
    """The score of an item for every user."""
    one, two = {'pretrain': BACKBONE, 'finetune': GROWN}[stage][time]
    return {1: one, 2: two, **OTHERS}[item]


def held_out(user, split):
    """A user's history before the target of a split, and the target."""
    last = {'validation': 2, 'test': 1}[split]
    return HISTORIES[user][:-last], HISTORIES[user][-last]


def rank(stage, time, user, split, protocol):
    """1 + the other items that score as high as the target or higher, by a loop."""
    history, target = held_out(user, split)
    left_out = history if protocol == 'masked' else []
    ahead = [
        item
        for item in ITEMS
        if item != target
        and item not in left_out
        and score(stage, time, item) >= score(stage, time, target)
    ]
    return 1 + len(ahead)


def ranks(stage, time, split, protocol):
    return [rank(stage, time, user, split, protocol) for user in HISTORIES]


def best_items(stage, time, seen, k):
    """The k items of the highest scores that are not among the seen ones."""
    left = [item for item in ITEMS if item not in seen]
    return sorted(left, key=lambda item: -score(stage, time, item))[:k]


def make_clock_run(folder, *more, stages='pretrain,finetune,evaluate'):
    """Train and evaluate the clocks in a folder."""
    make_world(folder, list(HISTORIES.values()), users=list(HISTORIES))
    epochs = [f'--{stage}_epochs={number}' for stage, number in EPOCHS.items()]
    argv = [*epochs, '--patience=9', '--row_length=8', '--max_length=8', '--rows_per_step=2']
    argv += ['--model=clock_fixtures:GrownClock', f'--stages={stages}', '--progress=none']
    assert main([*argv, f'--workdir={folder}', *more]) == 0
    return folder
