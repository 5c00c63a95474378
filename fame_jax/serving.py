"""The stages that make use of a trained run: recommend, explain, export."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fame_jax import explain as explanations
from fame_jax import export as exports
from fame_jax import plots, recommendations, records, serve
from fame_jax.data import download, histories, item_text, sequences
from fame_jax.data.histories import History
from fame_jax.errors import UserError
from fame_jax.run import TRAINED, Run, label
from fame_jax.screen import duration, explanation
from fame_jax.sharding import by_items

Array = jax.Array
Tree = Any


def recommend(run: Run) -> None:
    """Writes the best items for each history of --histories, or for every user of the data set.

    The devices of the run's mesh share the catalogue.
    """
    config, screen = run.config, run.screen
    path = Path(config.recommendations or run.folder / 'recommendations.jsonl')
    write = recommendations.writer(path)
    recommender = open_recommender(run, run.mesh)
    allowed_V = _candidates(run, recommender)
    if config.histories:
        asked, total = histories.read(config.histories), histories.count(config.histories)
    else:
        asked, total = _everybody(run.data), run.data.num_users
    began, told = time.monotonic(), collections.Counter()
    answers = answer_all(
        recommender, asked, config.top_k, filter_seen=config.filter_seen, allowed_V=allowed_V
    )
    write(path, screen.count('recommend', _tally(answers, told), total))
    seconds = time.monotonic() - began
    screen.say(
        f'recommend: {told["histories"]:,} histories in {duration(seconds)} '
        f'({told["histories"] / max(seconds, 1e-9):,.0f} a second), in {path}'
    )
    if told['unknown']:
        screen.say(
            f'recommend: {told["unknown"]:,} items that the catalogue does not hold were passed '
            f'over, in {told["with_unknown"]:,} histories'
        )
    if told['popularity']:
        screen.say(
            f'recommend: {told["popularity"]:,} histories hold no known item and got the most '
            'popular ones'
        )


def answer_all(
    recommender: serve.Recommender, asked: Iterable[History], top_k: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """Answers as dicts for JSON, in the order of the histories, a few thousand in memory."""
    users: collections.deque[str] = collections.deque()

    def items() -> Iterator[list[str]]:
        for history in asked:
            users.append(history.user)
            yield history.items

    for answer in recommender.recommend_all(items(), top_k, **options):
        told = {'user': users.popleft(), **answer._asdict()}
        yield {name: value for name, value in told.items() if value or name in ('items', 'scores')}


def explain(run: Run) -> None:
    """Tells why these items, for a user of the data set or the first line of --histories."""
    config = run.config
    # On one device, whatever the mesh: of one history all scores and item vectors are looked at.
    recommender = open_recommender(run)
    history, target = _one_history(run)
    found = explanations.explain(
        recommender,
        history.items,
        config.top_k,
        filter_seen=config.filter_seen,
        allowed_V=_candidates(run, recommender),
        target=target,
    )
    stem = Path(config.explanation or run.folder / 'explanation')
    records.write_json(stem.with_name(stem.name + '.json'), {'user': history.user, **found})
    print(explanation(found))
    if not found['fallback']:
        plots.explanation(found, stem.with_name(stem.name + '.svg'))
    run.screen.say(f'explain: {stem}.json' + (' and .svg' if not found['fallback'] else ''))


def export(run: Run) -> None:
    """Writes the folder that serves without this run."""
    folder = Path(run.config.export or run.folder / 'export')
    # On one device, whatever the mesh: files and programs are of a table of V + 1 rows.
    recommender = open_recommender(run)
    exports.save(recommender, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    run.screen.say(f'export: {recommender.card["model"]}, {size / 2**20:.1f} MiB, in {folder}')


def open_recommender(run: Run, mesh: Mesh | None = None) -> serve.Recommender:
    """The run's model, the best epoch of its last trained stage, with its catalogue.

    Args:
      run: a trained run.
      mesh: devices that share the item tables and vectors; None: one has them.

    Raises:
      UserError: when nothing is trained there.
    """
    data = run.data
    stage = next((stage for stage in reversed(TRAINED) if run.is_trained(stage)), None)
    if stage is None:
        raise UserError(f'{run.folder} holds no trained model; run pretrain or finetune first')
    module = run.module(stage, mesh)
    params, progress = run.best(stage, module)
    name = label(run.config, stage)
    if not progress['finished']:
        run.screen.say(f'{stage} of {run.folder} is not finished; its best epoch so far serves')
    return serve.Recommender(
        model_of(module, params, run.config.max_length),
        data.item_ids,
        np.bincount(data.items, minlength=data.num_items + 1),
        read_titles(run),
        _card(run, stage, name, progress),
    )


def model_of(module: Any, params: Tree, max_length: int) -> serve.Model:
    """A module with its parameters as serving takes it, on the module's mesh."""

    def encode(params: Tree, tokens_BL: Array, positions_BL: Array, segments_BL: Array) -> Array:
        return module.apply({'params': params}, tokens_BL, positions_BL, segments_BL, last=True)[0]

    def look(params: Tree, *rows: Array) -> dict[str, Array]:
        return module.apply({'params': params}, *rows, method='look')

    item_vectors = jax.jit(
        lambda params: module.apply({'params': params}, method='item_vectors'),
        out_shardings=by_items(module.mesh),
    )
    return serve.Model(
        encode=encode,
        combine=module.combine,
        params=params,
        item_VD=item_vectors(params),
        max_length=max_length,
        look=look if hasattr(module, 'look') else None,
        mesh=module.mesh,
    )


def _card(run: Run, stage: str, name: str, progress: dict[str, Any]) -> dict[str, Any]:
    """What an export says of where it comes from; figures only if the run was judged."""
    card = {
        'model': name,
        'stage': stage,
        'best_epoch': progress['best_epoch'],
        'dataset': run.data.card,
        'seed': run.config.seed,
        'dtype': run.config.dtype,
    }
    results = run.folder / 'results.json'
    if results.is_file():
        judged = records.read_json(results)
        card['protocol'] = {
            name: judged['card'][name] for name in ('split', 'candidates', 'masked', 'ties')
        }
        card['test'] = judged['results'].get(stage, {}).get('test')
    return card


def read_titles(run: Run) -> list[str]:
    """The items' titles, from --titles, or from what lies beside the data set; else none."""
    config = run.config
    path = config.titles or config.items
    if not path:
        if config.dataset == 'synthetic':
            return []
        with contextlib.suppress(UserError):
            path = download.locate_items(config.dataset, config.data_dir)
    if not path:
        return []
    return item_text.read(path, run.data.item_ids, id_column=config.item_id_column).titles


def _candidates(run: Run, recommender: serve.Recommender) -> np.ndarray | None:
    """What --allow_items and --deny_items leave; None: everything."""
    config = run.config
    if not config.allow_items and not config.deny_items:
        return None
    allow = histories.read_ids(config.allow_items) if config.allow_items else None
    deny = histories.read_ids(config.deny_items) if config.deny_items else []
    allowed_V, unknown = recommender.candidates(allow, deny)
    if unknown:
        run.screen.say(
            f'{len(unknown):,} items of the lists are not in the catalogue, such as {unknown[0]!r}'
        )
    if not allowed_V.any():
        raise UserError(
            '--allow_items and --deny_items leave nothing to recommend; mend one of the lists'
        )
    return allowed_V


def _everybody(data: sequences.Sequences) -> Iterator[History]:
    """Every user of the data set with all that is known of them."""
    for user, start, end in zip(data.user_ids, data.offsets[:-1], data.offsets[1:]):
        yield History(user, [data.item_ids[item] for item in data.items[start:end].tolist()])


def _one_history(run: Run) -> tuple[History, str]:
    """Whom to explain, and the item that came next, where it is known."""
    config, data = run.config, run.data
    if config.histories:
        first = next(histories.read(config.histories), None)
        if first is None:
            raise UserError(f'--histories={config.histories} holds no history; write one in a line')
        return first, ''
    name = config.user or data.user_ids[0]
    if name not in data.user_ids:
        raise UserError(
            f'--user={name}: the data set has no such user; its ids are like {data.user_ids[0]!r}'
        )
    user = data.user_ids.index(name)
    items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
    *before, target = (data.item_ids[item] for item in items)
    return History(name, before), target


def _tally(answers: Iterable[dict[str, Any]], told: collections.Counter) -> Iterator[dict]:
    for answer in answers:
        told['histories'] += 1
        told['unknown'] += len(answer.get('unknown', ()))
        told['with_unknown'] += 'unknown' in answer
        told['popularity'] += 'fallback' in answer
        yield answer


STAGES: dict[str, Callable[[Run], None]] = {
    'recommend': recommend,
    'explain': explain,
    'export': export,
}
