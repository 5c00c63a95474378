"""What the stages that use a trained run take. No part of a run's flags.cfg."""

import dataclasses
from collections.abc import Sequence

from fame_jax.config.fields import check_fields, field, no_effect, show
from fame_jax.errors import UserError

# Stages that write what a trained run is used for.
WRITERS = ('recommend', 'similar', 'explain', 'export', 'report')
# The stages that read a flag.
READERS = {
    'shuffle_histories': ('evaluate',),
    'histories': ('recommend', 'explain'),
    'top_k': ('recommend', 'similar', 'explain'),
    'similar_items': ('similar',),
    'filter_seen': ('recommend', 'explain'),
    'allow_items': ('recommend', 'explain'),
    'deny_items': ('recommend', 'explain'),
    'user': ('explain',),
    'out': WRITERS,
}


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a trained run is used."""

    shuffle_histories: str = field(
        'none',
        'evaluate: all_but_last also ranks the test targets after histories in random order, but '
        'for their last item. The loss of NDCG is the use that data and model make of the order.',
        choices=('none', 'all_but_last'),
    )
    histories: str = field(
        '',
        'File with one history per line, oldest item first: {"user": "ann", "items": ["7", "12"]} '
        'or ["7", "12"]; .gz too. Empty: the users of the data set.',
    )
    top_k: int = field(
        20, 'Items of a list: recommended to a history, or similar.', low=1, high=1_000_000
    )
    similar_items: tuple[str, ...] = field(
        (),
        'similar: ids of the items whose similar items are written, as 7,12; one with a comma in '
        'double quotes. Empty: all items.',
    )
    filter_seen: bool | None = field(
        None,
        'Items of a history are not recommended to it. Empty: they are not, unless epochs are '
        'selected by the unmasked ranking (--select_on).',
        kind=bool,
    )
    allow_items: str = field('', 'File with one item per line: only these are recommended.')
    deny_items: str = field('', 'File with one item per line: these are not recommended.')
    user: str = field(
        '', 'explain: a user of the data set, whose last item is the target. Empty: the first user.'
    )
    out: str = field(
        '', 'Output folder, or a file where one stage runs (lists.parquet). Empty: the workdir.'
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check_fields(self)

    def check_stages(self, stages: Sequence[str]) -> None:
        """Refuses flags that no stage of a command reads.

        A command that trains may have a flag of the stages that write, in its flag file, though
        none of them is there.

        Args:
          stages: those of the command.

        Raises:
          UserError: naming the flag and the stages that read it.
        """
        writes = set(stages) & set(WRITERS)
        for item in dataclasses.fields(self):
            value, readers = getattr(self, item.name), READERS[item.name]
            concerned = writes or (item.name == 'shuffle_histories' and stages)
            if value != item.default and concerned and not set(readers) & set(stages):
                raise no_effect(
                    f'{item.name}={show(value)}',
                    f'stages={",".join(stages)}',
                    f'add the stage {" or ".join(readers)}',
                )
        if self.user and self.histories and 'explain' in stages:
            raise UserError(
                f'--user={self.user} and --histories={self.histories} both name the history that '
                'is explained; leave one of them out'
            )
