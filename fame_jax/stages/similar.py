"""The stage similar: the items most similar to each item, to a file."""

import time

from fame_jax.errors import UserError
from fame_jax.screen import duration
from fame_jax.serving import answers
from fame_jax.serving.ids import some
from fame_jax.serving.recommender import Recommender
from fame_jax.stages.context import RunContext
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.output import output_path


def similar(context: RunContext) -> None:
    """Writes the items similar to those of --similar_items, or to every item.

    Of FAME there is a list by whole item vectors and one by each head's view of the items. The
    devices of the run's mesh share the catalogue.
    """
    serving, screen = context.config.serving, context.screen
    path = output_path(context, 'similar.jsonl')
    write = answers.writer(path)
    # The file's ids are strings, whatever their type in the log.
    recommender = open_recommender(context, context.mesh).with_string_ids()
    items = _items(context, recommender)
    ways = ['all', *recommender.facets]
    began = time.monotonic()
    lists = answers.similar(recommender, items, serving.top_k)
    write(path, screen.count('similar', lists, len(items) * len(ways)))
    screen.say(
        f'similar: {len(items):,} items by {", ".join(ways)}, in '
        f'{duration(time.monotonic() - began)}, in {path}'
    )


def _items(context: RunContext, recommender: Recommender) -> list[str]:
    """The items of --similar_items, or all.

    Raises:
      UserError: when one of them is not in the catalogue.
    """
    given = list(context.config.serving.similar_items)
    indices, unknown = recommender.to_indices(given)
    if unknown:
        raise UserError(
            f'--similar_items: {some(unknown)} not in the catalogue, whose ids are like '
            f'{recommender.item_ids[1]!r}; name items of the data set'
        )
    return recommender.to_ids(indices) if given else recommender.item_ids[1:]
