"""The stage explain: why these items were recommended to one history."""

import warnings

from fame_jax import run_dir
from fame_jax.errors import UserError
from fame_jax.report import figures, terminal
from fame_jax.serving import histories
from fame_jax.serving.histories import History
from fame_jax.serving.recommender import UnknownItemsWarning
from fame_jax.stages.context import RunContext
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.output import output_path
from fame_jax.stages.recommend import item_lists


def explain(context: RunContext) -> None:
    """Explains a user of the data set, or the first line of --histories, as JSON, SVG and text."""
    serving = context.config.serving
    # On one device, whatever the mesh: one history's scores and all item vectors are needed.
    recommender = open_recommender(context).with_string_ids()
    allow, deny = item_lists(context, recommender)
    history, target = _choose_history(context)
    path = output_path(context, 'explanation.json')
    if path.suffix != '.json':
        raise UserError(
            f'--out={path}: an explanation is written to .json, with an .svg; rename it'
        )
    compiling = context.screen.waiting('explain: compiling, scoring without each item')
    with compiling, warnings.catch_warnings():
        warnings.simplefilter('ignore', UnknownItemsWarning)  # the screen says it
        explanation = recommender.explain(
            history.items,
            serving.top_k,
            filter_seen=serving.filter_seen,
            allow=allow,
            deny=deny,
            target=target,
        ).to_dict()
    run_dir.write_json(path, {'user': history.user, **explanation})
    print(terminal.explanation(explanation))
    if not explanation['fallback']:
        figures.explanation(explanation, path.with_suffix('.svg'))
    context.screen.say(f'explain: {path}' + (' and .svg' if not explanation['fallback'] else ''))


def _choose_history(context: RunContext) -> tuple[History, str | None]:
    """The history to explain, and the item that came next where it is known."""
    serving, data = context.config.serving, context.data
    if serving.histories:
        first = next(histories.read(serving.histories), None)
        if first is None:
            raise UserError(
                f'--histories={serving.histories} holds no history; write one history a line'
            )
        return first, None
    name = serving.user or data.user_ids[0]
    if name not in data.user_ids:
        raise UserError(
            f'--user={name}: the data set has no such user; its ids are like {data.user_ids[0]!r}'
        )
    user = data.user_ids.index(name)
    items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
    *before, target = (data.item_ids[item] for item in items)
    return History(name, before), target
