"""The stage report: what a run holds, as one page."""

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import charts, facts, plots, published, records
from fame_jax.data import pipeline, sequences
from fame_jax.errors import UserError
from fame_jax.explain import explain, look
from fame_jax.models.build import MODELS
from fame_jax.page import page
from fame_jax.run import TRAINED, Run
from fame_jax.screen import duration
from fame_jax.serve import Recommender
from fame_jax.serving import open_recommender

SAMPLE = 2000  # test users whose gates are looked at
TOP_K = 10

Results = dict[str, Any]


def report(run: Run) -> None:
    """Writes the page about a run that was judged."""
    began = time.monotonic()
    path = Path(run.config.report or run.folder / 'report.html')
    if not path.parent.is_dir():
        raise UserError(f'--report={path}: {path.parent} is no folder; make it, or name another')
    written = page(collect(run))
    records.write_text(path, written)
    size, seconds = len(written.encode()) / 2**20, duration(time.monotonic() - began)
    run.screen.say(f'report: {size:.1f} MiB in {seconds}, in {path}')


def collect(run: Run) -> dict[str, Any]:
    """Everything that the page tells, as plain values and SVG files.

    Returns:
      A dict:
        final    the stage that the page is about
        names    stage -> the model's name, popularity too
        card, results   as results.json has them
        paper    stage -> (the model's name, metrics, remarks)
        curves   [{stage, about, svg}]
        groups   [{by, rows, svg}], rows as `facts.judge_groups` has them
        heads    as `facts.use` has it, and svg; None for a model without heads
        facets, items   SVG files; ''
        cases    [{rule, user, found}], found as `explain.explain` has it
        titles   whether any are known
        flags, code   flags.cfg without what only uses the run, and the version that judged

    Raises:
      UserError: when the run was not judged, or on other data.
    """
    path = run.folder / 'results.json'
    if not path.is_file():
        raise UserError(f'{run.folder} was not judged; run --stages=evaluate first')
    judged = records.read_json(path)
    card, results = _check(judged, path)
    final = next(stage for stage in reversed(TRAINED) if stage in results)
    found = {
        'final': final,
        'names': {stage: of_stage['model'] for stage, of_stage in results.items()},
        'card': card,
        'results': results,
        'paper': _paper(run, results),
        'curves': _curves(run, card),
        'groups': [],
        'heads': None,
        'facets': _facets(run, results),
        'items': _read(run.folder / 'items.svg'),
        'cases': [],
        'titles': False,
        'flags': _flags(_read(run.folder / 'flags.cfg')),
        'code': card['judged_on']['code'],
    }
    return found | (_of_users(run, found) if run.prepared else {})


def _check(judged: Any, path: Path) -> tuple[dict[str, Any], Results]:
    try:
        card, results = judged['card'], judged['results']
        if any(stage in results for stage in TRAINED):
            return card, results
    except (KeyError, TypeError):
        pass
    raise UserError(f'{path} holds no figures of a trained model; run --stages=evaluate again')


def _read(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def _flags(text: str) -> str:
    """The flags that make the run; others may change from one use of it to the next."""
    parts = text.split('\n\n')
    return '\n\n'.join(part for part in parts if not part.startswith('# Using a trained run'))


def _paper(run: Run, results: Results) -> dict[str, tuple[str, dict[str, float], list[str]]]:
    """What the paper printed for the models of the stages, where it did."""
    found = {}
    for stage in filter(results.get, TRAINED):
        name = run.name(stage)
        metrics, remarks = published.beside(name, run.config.dataset)
        if metrics:
            found[stage] = MODELS[name].title, metrics, remarks
    return found


def _curves(run: Run, card: Mapping[str, Any]) -> list[dict[str, str]]:
    """Losses and validation NDCG@20 of each stage by epoch."""
    by_stage: dict[str, dict[str, dict[int, float]]] = {}
    for line in run.metrics.read():
        lines = by_stage.setdefault(str(line.get('stage')), {})
        for name, value in line.items():
            wanted = name.startswith('loss') or (name, line.get('split')) == WATCHED
            if wanted and isinstance(value, int | float) and isinstance(line.get('epoch'), int):
                lines.setdefault(name, {})[line['epoch']] = value
    found = []
    for stage, lines in by_stage.items():
        in_order = sorted(lines.items(), key=lambda item: item[0] == WATCHED[0])
        named = {_name(name): sorted(line.items()) for name, line in in_order}
        if named:
            best = card['stages'].get(stage, {}).get('best_epoch')
            about = f'{" and ".join(named)} by epoch' + (
                '' if best is None else f', the best one {best}'
            )
            drawn = charts.svg(charts.curves, named, best)
            found.append({'stage': stage, 'about': about, 'svg': drawn})
    return found


WATCHED = ('ndcg@20', 'validation')


def _name(name: str) -> str:
    """A figure of metrics.jsonl as the page calls it; loss/1_brand is brand's."""
    if name == WATCHED[0]:
        return 'validation NDCG@20'
    return 'loss ' + name.partition('_')[2] if '/' in name else name


def _facets(run: Run, results: Results) -> str:
    """Heads against facets, from stage to stage."""
    found = results.get('finetune', {}).get('facets')
    if not found:
        return ''
    stages, path = {}, run.folder / 'text' / 'text.json'
    if path.is_file():
        probes = records.read_json(path)['probes']
        stages = {f'text, {when}': probes[when] for when in ('before', 'after') if when in probes}
    return charts.svg(plots.heads_by_facets, stages | {'fine-tuned': found})


def _of_users(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of groups of test users, of a sample of them, and of single ones."""
    if found['card']['dataset']['fingerprint'] != run.data.card['fingerprint']:
        raise UserError(
            f'{run.folder / "results.json"} is of other data than {run.folder / "dataset"}; run '
            '--stages=evaluate again'
        )
    ranks = _ranks(run, found['results'])
    more: dict[str, Any] = {'groups': _groups(run, ranks, found['names'])} if ranks else {}
    if not any(map(run.is_trained, TRAINED)):
        return more
    recommender = open_recommender(run)
    more['titles'] = any(recommender.titles)
    rng = np.random.default_rng(run.config.seed)
    user_S = np.sort(rng.permutation(run.data.num_users)[:SAMPLE])
    looked = _look(run, recommender, user_S) if recommender.model.look else {}
    if looked:
        more['heads'] = facts.use(looked['share_UH'], looked.pop('router_UHN'))
        more['heads']['svg'] = charts.svg(
            charts.gates, more['heads']['heads'], more['heads']['edges']
        )
    if ranks:
        rank_U = ranks[found['final']]['masked']
        more['cases'] = _cases(run, recommender, user_S, rank_U, looked)
    return more


def _ranks(run: Run, results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Every user's test rank by stage and protocol; empty where there is no file."""
    path = run.folder / 'ranks.npz'
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            ranks = {
                stage: {p: file[f'{stage}/test/{p}'] for p in ('masked', 'unmasked')}
                for stage in results
            }
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} cannot be read ({error}); run --stages=evaluate again') from error
    return ranks


def _groups(run: Run, ranks: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Test metrics by length of the history and by how often training saw the target."""
    trained, _ = sequences.split_training(run.data)
    _, offsets, target_U = sequences.held_out(run.data, 'test')
    seen_U = np.bincount(trained, minlength=run.data.num_items + 1)[target_U]
    found = []
    for by, parts in (
        ('length of the history', facts.by_quantile(np.diff(offsets))),
        ('how often training saw the target', facts.by_popularity(seen_U)),
    ):
        rows = facts.judge_groups(parts, ranks)
        trained_names = {stage: name for stage, name in names.items() if stage in TRAINED}
        drawn = charts.svg(charts.groups, rows, trained_names)
        found.append({'by': by, 'rows': rows, 'svg': drawn})
    return found


def _look(run: Run, recommender: Recommender, user_S: np.ndarray) -> dict[str, np.ndarray]:
    """Each sampled user's gate, last router, and number of different items in the heads' lists."""
    model = recommender.model
    best = jax.jit(_lists)
    found: dict[str, np.ndarray] = {}
    for held in _rows(run, user_S, recommender.batch):
        out = look(model.look, model.params, tuple(held[:3]))
        real_B = held.target_B > 0
        item_BHK = best(out['head_BHD'], model.item_VD, held.seen_BS)
        item_BX = np.sort(np.asarray(item_BHK).reshape(len(real_B), -1), axis=1)
        gate_BH = np.asarray(out['gate_BH'])
        parts = {
            'share_UH': gate_BH / gate_BH.sum(1, keepdims=True),
            'router_UHN': np.asarray(out['router_BHN']),
            'variety_U': 1 + (np.diff(item_BX, axis=1) > 0).sum(1),
        }
        for name, of_batch in parts.items():
            empty = np.zeros((len(user_S), *of_batch.shape[1:]))
            found.setdefault(name, empty)[held.user_B[real_B]] = of_batch[real_B]
    return found


def _lists(head_BHD: jax.Array, item_VD: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """Each head's own best items, [B, H, TOP_K], without the padding and those of the history."""
    score_BHV = jnp.einsum('BHD,VD->BHV', head_BHD, item_VD)
    row_B1 = jnp.arange(len(seen_BS))[:, None]
    score_BHV = score_BHV.at[row_B1, :, seen_BS].set(-jnp.inf).at[:, :, 0].set(-jnp.inf)
    return jax.lax.top_k(score_BHV, min(TOP_K, len(item_VD) - 1))[1]


def _rows(run: Run, user_S: np.ndarray, rows: int) -> list[pipeline.Held]:
    """The test histories of some users as the judge has them; user_B counts among these."""
    items, offsets, target_U = sequences.held_out(run.data, 'test')
    own = [items[offsets[user] : offsets[user + 1]] for user in user_S]
    offsets_S = np.cumsum([0, *map(len, own)])
    some = np.concatenate(own), offsets_S, target_U[user_S]
    return list(pipeline.held_rows(*some, run.config.max_length, min(rows, len(user_S))))


def _cases(
    run: Run,
    recommender: Recommender,
    user_S: np.ndarray,
    rank_U: np.ndarray,
    looked: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Some users of the sample and why they were recommended what they were."""
    items, offsets, target_U = sequences.held_out(run.data, 'test')
    length_S, ids = np.diff(offsets)[user_S], run.data.item_ids
    chosen = facts.choose(
        rank_U[user_S],
        length_S,
        run.data.num_items,
        looked.get('share_UH'),
        looked.get('variety_U'),
    )
    found = []
    for rule, place in chosen:
        user = user_S[place]
        history = [ids[item] for item in items[offsets[user] : offsets[user + 1]].tolist()]
        told = explain(recommender, history, TOP_K, target=ids[target_U[user]])
        found.append({'rule': rule, 'user': run.data.user_ids[user], 'found': told})
    return found
