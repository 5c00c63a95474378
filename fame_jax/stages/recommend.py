"""The stage recommend: the best items for many histories, to a file."""

import collections
import time
import warnings
from collections.abc import Iterable, Iterator

from fame_jax.errors import UserError
from fame_jax.screen import duration
from fame_jax.serving import answers, histories
from fame_jax.serving.answers import Answer
from fame_jax.serving.histories import History
from fame_jax.serving.ids import some
from fame_jax.serving.recommender import Recommender, UnknownItemsWarning
from fame_jax.stages.context import RunContext
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.output import output_path


def recommend(context: RunContext) -> None:
    """Writes the best items for each history of --histories, or for every user of the data set.

    The devices of the run's mesh share the catalogue.
    """
    serving, screen = context.config.serving, context.screen
    path = output_path(context, 'recommendations.jsonl')
    write = answers.writer(path)
    # The file's ids are strings, whatever their type in the log.
    recommender = open_recommender(context, context.mesh).with_string_ids()
    allow, deny = item_lists(context, recommender)
    if serving.filter_seen is None and not recommender.filter_seen:
        screen.say(
            'recommend: items of a history may be recommended to it, since epochs are selected by '
            f'the unmasked ranking ({context.repeats["validation"]:.0%} of the validation targets '
            'stand in their history); --filter_seen leaves them out'
        )
    if serving.histories:
        total = histories.count(serving.histories)
        source: Iterable[History] = histories.read(serving.histories)
    else:
        total = context.data.num_users
        source = (History(str(user), items) for user, items in context.data.histories())
    began, counts = time.monotonic(), collections.Counter()
    found = answers.answer(
        recommender, source, serving.top_k, filter_seen=serving.filter_seen, allow=allow, deny=deny
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UnknownItemsWarning)  # the counts below say it
        write(path, screen.count('recommend', _count(found, counts), total))
    seconds = time.monotonic() - began
    screen.say(
        f'recommend: {counts["histories"]:,} histories in {duration(seconds)} '
        f'({counts["histories"] / max(seconds, 1e-9):,.0f} a second), in {path}'
    )
    if counts['unknown']:
        screen.say(
            f'recommend: {counts["unknown"]:,} items of {counts["with_unknown"]:,} histories are '
            'not in the catalogue and were left out'
        )
    if counts['popularity']:
        screen.say(
            f'recommend: {counts["popularity"]:,} histories without a known item got the most '
            'popular items'
        )


def item_lists(context: RunContext, recommender: Recommender) -> tuple[list[str] | None, list[str]]:
    """The items of --allow_items (None: all) and of --deny_items.

    Raises:
      UserError: when no item of --allow_items is known, or the two leave no item.
    """
    serving = context.config.serving
    allow = histories.read_ids(serving.allow_items) if serving.allow_items else None
    deny = histories.read_ids(serving.deny_items) if serving.deny_items else []
    if allow is not None and not len(recommender.to_indices(allow)[0]):
        raise UserError(
            f'--allow_items={serving.allow_items}: none of {some(allow)} is in the catalogue, '
            f'whose ids are like {recommender.item_ids[1]!r}; name items of the data set'
        )
    mask_V, unknown = recommender.candidate_mask(allow, deny)
    if unknown:
        context.screen.say(
            f'{len(unknown):,} items of --allow_items and --deny_items are not in the catalogue '
            f'and have no effect: {some(unknown)}'
        )
    if not mask_V.any():
        raise UserError(
            '--allow_items and --deny_items leave nothing to recommend; change one of the lists'
        )
    return allow, deny


def _count(answers: Iterable[Answer], counts: collections.Counter) -> Iterator[Answer]:
    for answer in answers:
        counts['histories'] += 1
        counts['unknown'] += len(answer.found.unknown)
        counts['with_unknown'] += bool(answer.found.unknown)
        counts['popularity'] += bool(answer.found.fallback)
        yield answer
