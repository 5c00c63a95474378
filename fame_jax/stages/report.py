"""The stage report: one HTML page about an evaluated run."""

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax import run_dir
from fame_jax.data.dataset import Dataset
from fame_jax.data.eval_batches import EvalBatches
from fame_jax.errors import UserError
from fame_jax.evaluation import groups
from fame_jax.report import collect, html, published
from fame_jax.screen import duration
from fame_jax.serving.recommender import Recommender
from fame_jax.stages import settings
from fame_jax.stages.context import TRAINED, RunContext
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.output import output_path

SAMPLE = 2000  # test users whose gates and routers are read
TOP_K = 10


def report(context: RunContext) -> None:
    """Writes the page to --out, or report.html in the run's folder.

    Raises:
      UserError: when the run has no results, or the page cannot be written.
    """
    start = time.monotonic()
    path = output_path(context, 'report.html')
    if path.suffix != '.html':
        raise UserError(f'--out={path}: a report is written to .html; rename it')
    data = context.data if context.is_prepared else None
    run = collect.collect(context.folder, data, _paper_rows(context))
    if context.is_prepared and any(map(context.is_trained, TRAINED)):
        run = _with_users(context, run)
    page = html.page(run)
    run_dir.write_text(path, page)
    size, seconds = len(page.encode()) / 2**20, duration(time.monotonic() - start)
    context.screen.say(f'report: {size:.1f} MiB in {seconds}, in {path}')


def _paper_rows(context: RunContext) -> dict[str, collect.PaperRow]:
    """The paper's results for the models of the stages, where it printed any; by leave one out."""
    if context.config.data.split != 'leave_one_out':
        return {}
    model = type(context.model)
    rows = {}
    for stage, kind in (('pretrain', model.backbone or model), ('finetune', model)):
        name = settings.name_of(kind)
        metrics, remarks = published.paper_row(name, context.config.data.dataset)
        if metrics:
            rows[stage] = collect.PaperRow(kind.title, metrics, remarks)
    return rows


def _with_users(context: RunContext, run: collect.RunReport) -> collect.RunReport:
    """Adds the use of heads in a sample of test users, and explanations of a few of them."""
    recommender = open_recommender(context)
    rng = np.random.default_rng(context.config.run.seed)
    target_S = np.sort(rng.permutation(context.num_targets('test'))[:SAMPLE])
    use, cases = {}, []
    if recommender.model.intermediates is not None:
        with context.screen.waiting('report: reading the heads of a sample of users'):
            use = read_heads(recommender, context.data, target_S, context.config.data.max_length)
    if run.ranks:
        rank_U = run.ranks[run.stage]['masked']
        with context.screen.waiting('report: explaining a few lists'):
            cases = explain_cases(recommender, context.data, target_S, rank_U, use)
    heads = groups.usage(use['share_UH'], use['router_UHN']) if use else None
    for h, head in enumerate(heads['heads'] if heads else ()):
        head['name'] = recommender.head_name(h)
    has_titles = any(recommender.titles)
    return dataclasses.replace(run, heads=heads, cases=cases, has_titles=has_titles)


def read_heads(
    recommender: Recommender, data: Dataset, target_S: np.ndarray, max_length: int
) -> dict[str, np.ndarray]:
    """Gate, router and lists of FAME's heads at the end of some test histories.

    Args:
      recommender: of a FAME.
      data: its data set.
      target_S: int [S], indices of test targets; in leave one out user u has target u.
      max_length: items of a history that the model uses.

    Returns:
      'share_UH', the gate's weights scaled to sum 1; 'router_UHN', each head's router weights;
      'variety_U', the number of different items in all heads' lists of TOP_K; U indexes target_S.
    """
    model = recommender.model
    intermediates, top_items = jax.jit(model.intermediates), jax.jit(_top_items)
    starts_S, ends_S = (bounds[target_S] for bounds in data.history_bounds('test'))
    rows = min(recommender.batch_size, len(target_S))
    result: dict[str, np.ndarray] = {}
    for batch in EvalBatches(data.items, starts_S, ends_S, data.items[ends_S], max_length, rows):
        out = intermediates(model.params, batch.tokens_BL, batch.positions_BL, batch.segments_BL)
        item_BHK = top_items(out['head_BHD'], model.item_VD, batch.seen_BS)
        item_BX = np.sort(np.asarray(item_BHK).reshape(len(item_BHK), -1), axis=1)
        gate_BH = np.asarray(out['gate_BH'])
        for name, value_B in {
            'share_UH': gate_BH / gate_BH.sum(1, keepdims=True),
            'router_UHN': np.asarray(out['router_BHN']),
            'variety_U': 1 + (np.diff(item_BX, axis=1) > 0).sum(1),
        }.items():
            zeros = np.zeros((len(target_S), *value_B.shape[1:]))
            result.setdefault(name, zeros)[batch.user_B[batch.is_user_B]] = value_B[batch.is_user_B]
    return result


def _top_items(head_BHD: jax.Array, item_VD: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """Each head's TOP_K items, int [B, H, K], without padding and the items of the history."""
    score_BHV = jnp.einsum('BHD,VD->BHV', head_BHD, item_VD)
    row_B1 = jnp.arange(len(seen_BS))[:, None]
    score_BHV = score_BHV.at[row_B1, :, seen_BS].set(-jnp.inf).at[:, :, 0].set(-jnp.inf)
    return jax.lax.top_k(score_BHV, min(TOP_K, len(item_VD) - 1))[1]


def explain_cases(
    recommender: Recommender,
    data: Dataset,
    target_S: np.ndarray,
    rank_U: np.ndarray,
    use: Mapping[str, np.ndarray],
) -> list[collect.Case]:
    """Explanations of the users that `groups.example_users` selects from the sample.

    Args:
      recommender: the run's model.
      data: its data set.
      target_S: int [S], the sample, as indices of test targets.
      rank_U: int [R], the masked rank of every test target.
      use: as `read_heads` returns it; empty for a model without heads.
    """
    starts, ends = data.history_bounds('test')
    user_R = data.split.parts['test'].users
    cases = []
    for rule, place in groups.example_users(
        rank_U[target_S],
        (ends - starts)[target_S],
        data.num_items,
        use.get('share_UH'),
        use.get('variety_U'),
    ):
        row = target_S[place]
        history = [data.item_ids[n] for n in data.items[starts[row] : ends[row]].tolist()]
        target = data.item_ids[data.items[ends[row]]]
        explanation = recommender.explain(history, TOP_K, target=target)
        cases.append(collect.Case(rule, data.user_ids[user_R[row]], explanation.to_dict()))
    return cases
