"""Figures 5 and 6: which runs they are of, what is told of them, and the picture."""

import json
import xml.etree.ElementTree as ET

import pytest
from children_test import begun
from runs_test import MACHINE, values

from benchmarks import runs, series, sweep, sweep_page
from fame_jax.errors import UserError


def options(tmp_path, *flags):
    recipes = tmp_path / 'recipes'
    recipes.mkdir(exist_ok=True)
    for model in ('sasrec', 'fame'):
        (recipes / f'{model}.cfg').write_text(f'--model={model}\n')
    return [f'--folder={tmp_path}', f'--recipes={recipes}', *flags]


def points(tmp_path, *flags):
    return sweep.plan(sweep.parse(options(tmp_path, *flags)))


def finish(run, base):
    """Writes by hand what a finished run leaves; test is `base`, validation a half more."""
    stage = runs.MODELS[run.model].stage
    about = {'best_epoch': 3, 'epochs': 8, 'seconds': 10.0, 'parameters': 12}
    result = {
        split: {'masked': values(base + shift), 'unmasked': values(base + shift - 0.05)}
        for split, shift in (('test', 0), ('validation', 0.5))
    }
    card = {'name': 'Toys', 'users': 3, 'items': 30, 'fingerprint': 'f'}
    told = {
        'card': {'dataset': card, 'stages': {stage: {'machine': MACHINE, **about}}},
        'results': {'popularity': result, stage: {'model': run.model, **result}},
    }
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / 'results.json').write_text(json.dumps(told))


class Fake:
    """A runner without processes: a run is done as soon as it is looked at."""

    def __init__(self):
        self.events = []

    def __call__(self, run, jobs):
        self.events.append(('begin', run.workdir.name))
        return FakeProcess(run)


class FakeProcess:
    def __init__(self, run):
        self.run = run

    def poll(self):
        finish(self.run, 0.1 + self.run.heads / 1000 + (self.run.experts or 0) / 100)
        return 0


def test_each_run_once_and_each_backbone_before_its_fame(tmp_path):
    """At 2 heads the first expert is of both figures."""
    found = points(tmp_path, '--heads=4,1', '--experts=1,8', '--seeds=0,1')
    names = ['sasrec_h1', 'fame_h1_n1', 'sasrec_h2', 'fame_h2_n1', 'sasrec_h4', 'fame_h4_n1']
    names += ['fame_h2_n8']
    assert [run.workdir.name for run in found] == [f'{n}_seed{s}' for s in (0, 1) for n in names]
    for run in found:
        assert f'--num_heads={run.heads}' in run.flags
        assert [f for f in run.flags if 'num_experts' in f] == (
            [f'--num_experts={run.experts}'] if run.model == 'fame' else []
        )
        if run.model == 'fame':
            backbone = tmp_path / 'toys' / f'sasrec_h{run.heads}_seed{run.seed}'
            assert run.needs == backbone and f'--backbone_from={backbone}' in run.flags
            assert '--stages=prepare,finetune,evaluate' in run.flags


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_page, 'draw', lambda *_: None)  # seconds
    fake, flags = Fake(), ('--heads=2', '--experts=2', '--seeds=0')
    assert sweep.main(options(tmp_path, *flags), fake) == 0
    assert begun(fake) == ['sasrec_h2_seed0', 'fame_h2_n1_seed0', 'fame_h2_n2_seed0']
    more = Fake()
    assert sweep.main(options(tmp_path, '--heads=2', '--experts=2,4', '--seeds=0'), more) == 0
    assert begun(more) == ['fame_h2_n4_seed0']


@pytest.mark.parametrize(
    ('flags', 'told'),
    [
        (['--heads=2,3'], '--width=64 does not divide into --num_heads=3 heads'),
        (['--at_heads=5'], '--width=64 does not divide into --num_heads=5 heads'),
        (['--heads=8', '--extra=--width=12'], '--width=12 does not divide into --num_heads=8'),
        (['--heads=a'], 'a should be numbers with commas between'),
        (['--experts=0'], '--num_experts=0 is out of range'),
        (['--extra=--num_experts=4'], 'num_experts is what tells the runs apart'),
        (['--only_table'], 'holds no finished run'),
        (['--at_head=2'], '--at_head=2'),
    ],
)
def test_a_bad_flag_is_one_line_and_nothing_begins(tmp_path, capsys, flags, told):
    fake = Fake()
    assert sweep.main(options(tmp_path, *flags), fake) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and told in error and error.count('\n') == 1
    assert fake.events == []


def test_quick_is_a_preset_that_flags_go_over():
    quick = sweep.parse(['--quick'])
    assert (quick.dataset, quick.heads, quick.experts) == ('synthetic', (1, 2, 4), (1, 2, 4))
    assert quick.extra == list(series.QUICK_FLAGS) and quick.folder == 'runs/sweep_quick'
    other = sweep.parse(['--quick', '--heads=8', '--dataset=toys'])
    assert (other.dataset, other.heads, other.experts) == ('toys', (8,), (1, 2, 4))


def swept(tmp_path, left_out=()):
    """SASRec .1, plain FAME .2, both best at 4 heads; FAME best at 2 experts; seeds .02 apart."""
    flags = ('--heads=1,4', '--experts=1,2,8', '--seeds=0,1')
    of = sweep.parse(options(tmp_path, *flags))
    planned = sweep.plan(of)
    for run in planned:
        base = {None: 0.1, 1: 0.2, 2: 0.4, 8: 0.3}[run.experts] + 0.02 * run.seed
        base += 0.01 if run.heads == 4 else 0
        if run.workdir.name not in left_out:
            finish(run, base)
    done = [run for run in planned if run.done()]
    found = {'command': 'THE COMMAND', **sweep.collect(of, planned, done)}
    return json.loads(json.dumps(found))  # as who reads sweep.json has it


def test_lines_are_of_what_was_asked_and_references_of_the_same_heads(tmp_path):
    found = swept(tmp_path)
    heads = sweep_page.over_heads(found)
    assert {name: [p['heads'] for p in ps] for name, ps in heads.items()} == {
        'SASRec': [1, 4],
        'FAME without MoE': [1, 4],
    }
    (fame,) = sweep_page.over_experts(found).values()
    assert [(p['heads'], p['experts']) for p in fame] == [(2, 1), (2, 2), (2, 8)]
    held = sweep_page.references(found)
    assert {name: (p['heads'], p['experts']) for name, p in held.items()} == {
        'SASRec': (2, None),
        'FAME without MoE': (2, 1),
    }


def test_figures_are_over_seeds(tmp_path):
    """By hand: the mean of .4 and .42, sd .02 / sqrt(2); NDCG@20 is .05 more in `values`."""
    found = swept(tmp_path, left_out=['fame_h2_n8_seed0'])
    of = {(p['model'], p['heads'], p['experts']): p for p in found['points']}
    best = of['fame', 2, 2]['test']['masked']['ndcg@20']
    assert best['mean'] == pytest.approx(0.41 + 0.05)
    assert best['sd'] == pytest.approx(0.02 / 2**0.5)
    assert of['fame', 2, 2]['test']['unmasked']['ndcg@20']['mean'] == pytest.approx(0.41)
    alone = of['fame', 2, 8]
    assert alone['seeds'] == [1] and alone['test']['masked']['hr@20']['sd'] is None
    assert found['missing'] == ['fame_h2_n8_seed0']


def test_the_page_has_both_splits_and_protocols_and_what_was_chosen_on_validation(tmp_path):
    found = swept(tmp_path, left_out=['fame_h2_n8_seed0'])
    for point in found['points']:
        if point['heads'] == 1:  # best on test, and that is not asked
            point['test']['masked']['ndcg@20']['mean'] = 0.9
    page = sweep_page.markdown(found)
    assert 'Chosen on validation: SASRec H 4; FAME without MoE H 4; FAME N 2 at H 2.' in page
    assert page.count('### Masked') == page.count('### Unmasked') == 2
    row = '| **FAME** | **2** | **2** | 2 | .4600 ± .0141 | .4300 ± .0141 | .9600 ± .0141 |'
    assert (
        row in page
        and row.replace('.4600', '.4100').replace('.4300', '.3800').replace('.9600', '.9100')
        in page
    )
    assert page.count('| **SASRec** | **4** |  | 2 |') == 2
    assert 'Not done: fame_h2_n8_seed0.' in page and 'Machine: 1 x cpu, 2 cores' in page


def test_the_picture_has_a_panel_a_metric_a_protocol_and_a_figure(tmp_path):
    found = swept(tmp_path)
    for suffix in ('svg', 'png'):
        sweep_page.draw(found, tmp_path / f'a.{suffix}')
    texts = [
        ''.join(element.itertext())
        for element in ET.parse(tmp_path / 'a.svg').iter('{http://www.w3.org/2000/svg}text')
    ]
    for metric in ('NDCG@20', 'HR@20'):
        assert texts.count(f'test {metric}, masked') == texts.count(f'test {metric}, unmasked') == 1
    assert texts.count('heads H') == texts.count('experts N, H = 2') == 4
    for name in ('SASRec', 'FAME without MoE', 'FAME', 'SASRec, the same H'):
        assert texts.count(name) == 1
    assert texts.count('8') == 4 and texts.count('4') == 4  # ticks are the values
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_a_sweep_that_has_only_begun_is_told_of(tmp_path):
    """And drawn, whatever is missing."""
    flags = options(tmp_path, '--heads=1', '--experts=2', '--seeds=0', '--only_table')
    finish(points(tmp_path, '--heads=1', '--experts=2', '--seeds=0')[0], 0.1)
    assert sweep.main(flags) == 0
    page = (tmp_path / 'toys' / 'sweep.md').read_text()
    assert 'Chosen on validation: SASRec H 1.' in page and 'Not done: fame_h1_n1_seed0' in page


def test_runs_of_other_data_are_refused(tmp_path):
    flags = ('--heads=2', '--experts=2', '--seeds=0')
    one, other, _ = points(tmp_path, *flags)
    finish(one, 0.1)
    finish(other, 0.1)
    path = other.workdir / 'results.json'
    path.write_text(path.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"'))
    with pytest.raises(UserError, match='are of different data'):
        of = sweep.parse(options(tmp_path, *flags))
        sweep.collect(of, [one, other], [one, other])
