"""Records, explanations and folders of runs, made by hand, that the tests of reports share."""

import json
import xml.etree.ElementTree as ET

import numpy as np

from fame_jax.data.dataset import Dataset
from fame_jax.evaluation import groups, lists
from fame_jax.evaluation.metrics import PROTOCOLS, metrics
from fame_jax.report.collect import Case, Curves, Grouping, PaperRow, RunReport
from fame_jax.report.figures import AGREEMENT

ODD_NAMES = [
    '<script>alert(1)</script>',
    '</title></style><img src=x onerror=alert(1)>',
    '"quoted\' & <b>bold</b>',
    '$x_1$ $\\frac{',
    'שלום עולם',
    '電子玩具',
    '%s {0} \\n #',
    'a\nline\x00 \u202ebreak',
    '\ud800 half a letter',
    'a name that is much longer than any figure has room for',
]


def make_agreement(heads=3, facets=('brand', 'category'), seed=0):
    """What facet_probe.compare returns, with values that are all different."""
    rng = np.random.default_rng(seed)
    return {
        'facets': list(facets),
        **{key: rng.uniform(-0.1, 1, (heads, len(facets))).tolist() for key in AGREEMENT},
        'whole': {key: rng.uniform(0, 1, len(facets)).tolist() for key in AGREEMENT},
        'matching': [[m, m] for m in range(min(heads, len(facets)))],
    }


def make_explanation(heads=2, experts=3, length=4, names=('one', 'two', 'three', 'four', 'five')):
    """An explanation in its JSON form: `length` items h0, h1, ... and a list of items 0 to 4.

    Each head's own list is the reverse; the target is item 2. Titles are the names in turn.
    """
    rng = np.random.default_rng(0)
    title = (list(names) * 25).__getitem__
    items = [{'item': str(n), 'title': title(n), 'score': 9.0 - n} for n in range(5)]
    change_KL = rng.normal(size=(5, length)).tolist() if length > 1 else [None] * 5
    explained = {
        'model': 'FAME <1>',
        'history': [{'item': f'h{n}', 'title': title(n)} for n in range(length)],
        'unknown': [],
        'too_old': 0,
        'fallback': '',
        'recommended': [item | {'without': change_KL[n]} for n, item in enumerate(items)],
        'target': items[2] | {'rank': 3},
    }
    if heads:
        explained['heads'] = [
            {
                'gate': 1.0,
                'share': 1 / heads,
                'top': items[::-1],
                'router': rng.dirichlet(np.ones(experts)).tolist(),
                'attention': rng.dirichlet(np.ones(length), experts).tolist(),
                'positions': rng.dirichlet(np.ones(experts), length).tolist(),
            }
            for _ in range(heads)
        ]
        carried_L = rng.dirichlet(np.ones(length)).tolist()
        explained |= {'equal_gates': items, 'carried': carried_L, 'identity': 1e-7}
    return explained


def make_results(**ndcg):
    """Results of stages by name, in which every metric has the given value, unmasked half."""
    names = [f'{name}@{k}' for name in ('hr', 'ndcg') for k in (5, 10, 20)]
    return {
        stage: {
            'model': stage.upper(),
            'test': {
                'masked': dict.fromkeys([*names, 'mrr'], value),
                'unmasked': dict.fromkeys([*names, 'mrr'], value / 2),
            },
        }
        for stage, value in ndcg.items()
    }


CARD = {
    'dataset': {'name': 'toys', 'users': 1234, 'items': 56, 'fingerprint': 'abc'},
    'ties': 'count against the target',
    'config': {'secret': 'in flags.cfg'},
    'machine': {'code': '1.2.3', 'cores': 2},
    'stages': {'pretrain': {'best_epoch': 2}},
}


def smallest_report(**changes):
    """A baseline without anything but its results."""
    fields = {'stage': 'pretrain', 'card': CARD}
    fields['results'] = make_results(popularity=0.01, pretrain=0.0567)
    return RunReport(**fields | changes)


def full_report(name='FAME'):
    """A FAME+ with every section; the name stands everywhere where data has a name."""
    results = make_results(popularity=0.01, pretrain=0.0567, finetune=0.07)
    for of_stage in results.values():
        of_stage['model'] = name
    lines = {f'loss {name}': [(1, 3.0), (2, 2.0)], 'validation NDCG@20': [(0, 0.01), (2, 0.05)]}
    rank_U = np.array([1, 20, 3])
    ranks = {stage: {'masked': rank_U, 'unmasked': rank_U + 1} for stage in results}
    rows = groups.group_metrics(groups.by_quantile(np.array([3, 4, 5])), ranks)
    return RunReport(
        stage='finetune',
        card=CARD | {'dataset': CARD['dataset'] | {'name': name}},
        results=results,
        ranks=ranks,
        paper={'finetune': PaperRow(name, {'hr@10': 0.1065}, [name])},
        curves=[Curves('pretrain', lines, 2), Curves('finetune', lines, None)],
        groupings=[Grouping('length', rows), Grouping('popularity', rows)],
        facets={'fine-tuned': make_agreement(facets=(name,))},
        item_map='<svg onload="alert(2)"/>',
        flags=f'--dataset={name}\n',
        heads=groups.usage(np.array([[0.4, 0.6], [0.7, 0.3]]), np.full((2, 2, 3), 1 / 3)),
        cases=[Case('the rule', name, make_explanation(names=[name]))],
        has_titles=True,
    )


def svg_texts(path):
    """All texts of an SVG file, which must be XML."""
    elements = ET.parse(path).iter('{http://www.w3.org/2000/svg}text')
    return [''.join(element.itertext()) for element in elements]


def make_run_folder(folder):
    """Writes a run of 40 users, evaluated and without a model; returns its data set and ranks."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 21, rng.integers(4, 12)) for _ in range(40)]
    data = Dataset(
        np.concatenate(histories).astype(np.int32),
        np.cumsum([0, *map(len, histories)]).astype(np.int64),
        [f'user {u}' for u in range(40)],
        ['', *(f'item {v}' for v in range(1, 21))],
        {'name': 'toys', 'users': 40, 'items': 20, 'fingerprint': 'abc'},
    )
    results = make_results(popularity=0.01, pretrain=0.0567, finetune=0.07)
    (folder / 'results.json').write_text(json.dumps({'card': CARD, 'results': results}))
    ranks = {
        f'{stage}/{split}/{protocol}': rng.integers(1, 21, 40)
        for stage in results
        for split in ('validation', 'test')
        for protocol in ('masked', 'unmasked')
    }
    np.savez(folder / 'ranks.npz', **ranks)
    return data, ranks


COMPARED_USERS = 40


def make_compared_run(
    folder, seed=0, *, stages=('pretrain',), better=0, card=None, config=None, split_at=None
):
    """Writes an evaluated run of 40 users with all files that a comparison reads.

    Args:
      folder: of the run; its prepared data are the same for all runs.
      seed: of the ranks, and of the run.
      stages: that are trained.
      better: how many users have their test target at rank 1; of the others it is random.
      card: facts of the protocol card in the place of the usual ones.
      config: flags, likewise.
      split_at: the moment of a split by time; None: leave one out.
    """
    folder.mkdir(parents=True)
    histories = [np.arange(1, 5 + u % 5) + u % 7 for u in range(COMPARED_USERS)]
    data = Dataset(
        np.concatenate(histories).astype(np.int32),
        np.cumsum([0, *map(len, histories)]).astype(np.int64),
        [f'user {u}' for u in range(COMPARED_USERS)],
        ['', *(f'item {v}' for v in range(1, 21))],
        {'name': 'toys'},
        times=np.concatenate([u + np.arange(len(h)) for u, h in enumerate(histories)]) * 10**6,
    )
    data.save(folder / 'dataset')
    facts = json.loads((folder / 'dataset' / 'dataset.json').read_text())
    split, targets = {'split': 'leave one out'}, COMPARED_USERS
    if split_at is not None:
        by_time = Dataset.load(folder / 'dataset').split_by_time(split_at)
        split = {'split': by_time.split.describe(), 'time_split': by_time.split.card}
        facts, targets = by_time.card, by_time.split.card['test']['targets']
    rng = np.random.default_rng(seed)
    results, ranks, log = {}, {}, []
    for stage in ('popularity', *stages):
        rank_R = rng.integers(1, 21, targets)
        rank_R[: better if stage == stages[-1] else 0] = 1
        of_stage = {'masked': rank_R, 'unmasked': rank_R + 1}
        ranks |= {f'{stage}/test/{protocol}': of_stage[protocol] for protocol in PROTOCOLS}
        found = {protocol: metrics(of_stage[protocol]) for protocol in PROTOCOLS}
        of_lists = {'masked': dict.fromkeys(lists.COLUMNS, 0.5)}
        results[stage] = {'model': stage.upper(), 'test': found, 'lists': of_lists}
        results[stage]['validation'] = {p: {'ndcg@20': 0.1 + 0.01 * seed} for p in PROTOCOLS}
        line = {'stage': stage, 'step': 1, 'split': 'validation'}
        log += [{**line, 'epoch': n, 'ndcg@20': 0.1 * n} for n in range(3) if stage in stages]
    machine = {'device': {'kind': 'cpu', 'count': 1}, 'code': '1.2.3'}
    of_training = {'best_epoch': 2, 'epochs': 2, 'seconds': 1.5, 'parameters': 10}
    settings = {'model': 'sasrec', 'learning_rate': 0.001, 'patience': 5, 'workdir': str(folder)}
    written = {
        'dataset': facts,
        **split,
        'ties': 'count against the target',
        'select_on': 'masked',
        'selection': 'best epoch by validation ndcg@20',
        'seed': seed,
        'config': settings | {'seed': seed} | (config or {}),
        'stages': {stage: of_training | {'machine': machine} for stage in stages},
    }
    results = {'card': written | (card or {}), 'results': results}
    (folder / 'results.json').write_text(json.dumps(results))
    np.savez(folder / 'ranks.npz', **ranks)
    (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in log))
    return folder


def edit_results(folder, change):
    """Applies `change(card, results)` to a run's results.json."""
    stored = json.loads((folder / 'results.json').read_text())
    change(stored['card'], stored['results'])
    (folder / 'results.json').write_text(json.dumps(stored))
