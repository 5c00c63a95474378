"""The stages that make use of a run, through the door."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fame_jax import recommendations, serve
from fame_jax.data import sequences
from fame_jax.main import main

WORLD = [
    *('--progress=none', '--width=8', '--num_experts=2', '--max_length=10', '--row_length=16'),
    *('--synthetic_users=60', '--synthetic_items=40', '--synthetic_facets=1'),
    *('--pretrain_epochs=1', '--finetune_epochs=1'),
]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A trained FAME, small and poor."""
    folder = tmp_path_factory.mktemp('run')
    assert main([*WORLD, f'--workdir={folder}']) == 0
    return folder


def use(workdir, stage, *more):
    return main(['--progress=none', f'--workdir={workdir}', f'--stages={stage}', *more])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]


def test_every_user_of_the_data_set(workdir, tmp_path):
    path = tmp_path / 'out.jsonl'
    assert use(workdir, 'recommend', f'--recommendations={path}', '--top_k=5') == 0
    data, found = sequences.load(workdir / 'dataset'), lines(path)
    assert [answer['user'] for answer in found] == data.user_ids
    for answer, start, end in zip(found, data.offsets[:-1], data.offsets[1:]):
        history = {data.item_ids[item] for item in data.items[start:end]}
        assert len(answer['items']) == len(answer['scores']) == min(5, 40 - len(history))
        assert not history & set(answer['items'])
        assert answer['scores'] == sorted(answer['scores'], reverse=True)


def test_histories_of_a_file_in_their_order_and_as_parquet(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(recommendations, 'PART', 7)
    ids = sequences.load(workdir / 'dataset').item_ids
    asked = tmp_path / 'in.jsonl'
    rows = [{'user': f'u{n}', 'items': ids[1 + n % 9 : 1 + n % 9 + n % 4]} for n in range(50)]
    rows[3] = [ids[1], 'who?', ids[2]]
    rows[4] = ['who?']
    asked.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = [f'--histories={asked}', '--top_k=3']
    assert use(workdir, 'recommend', *flags, f'--recommendations={tmp_path}/o.jsonl') == 0
    found = lines(tmp_path / 'o.jsonl')
    assert len(found) == 50
    assert [answer.get('user') for answer in found[5:]] == [f'u{n}' for n in range(5, 50)]
    assert found[3]['unknown'] == ['who?'] and 'fallback' not in found[3] and 'user' in found[2]
    assert found[4]['unknown'] == ['who?'] and found[4]['fallback'] == 'popularity'
    assert found[0]['fallback'] == 'popularity' and 'unknown' not in found[0]

    assert use(workdir, 'recommend', *flags, f'--recommendations={tmp_path}/o.parquet') == 0
    table = pl.read_parquet(tmp_path / 'o.parquet')
    assert table.columns == ['history', 'user', 'rank', 'item', 'score']
    flat = [
        (n, answer.get('user', ''), k + 1, item)
        for n, answer in enumerate(found)
        for k, item in enumerate(answer['items'])
    ]
    assert table.drop('score').rows() == flat
    scores = np.concatenate([answer['scores'] for answer in found])
    assert np.array_equal(table['score'].to_numpy(), scores.astype(np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.jsonl', 'o.jsonl', 'o.parquet']


def test_nobody_asks_and_nothing_is_told(workdir, tmp_path):
    (tmp_path / 'in.jsonl').write_text('\n')
    for name in ('o.jsonl', 'o.parquet'):
        flags = f'--histories={tmp_path}/in.jsonl', f'--recommendations={tmp_path / name}'
        assert use(workdir, 'recommend', *flags) == 0
    assert (tmp_path / 'o.jsonl').read_bytes() == b''
    assert pl.read_parquet(tmp_path / 'o.parquet').height == 0


def test_lists_of_items_and_repeats(workdir, tmp_path):
    ids = sequences.load(workdir / 'dataset').item_ids
    (tmp_path / 'allow').write_text('\n'.join([*ids[1:5], 'who?']))
    (tmp_path / 'deny').write_text(ids[2])
    (tmp_path / 'in.jsonl').write_text(json.dumps([ids[3], ids[3]]) + '\n')
    flags = [f'--histories={tmp_path}/in.jsonl', f'--recommendations={tmp_path}/o.jsonl']
    flags += [f'--allow_items={tmp_path}/allow', f'--deny_items={tmp_path}/deny']
    assert use(workdir, 'recommend', *flags) == 0
    assert set(lines(tmp_path / 'o.jsonl')[0]['items']) == {ids[1], ids[4]}
    assert use(workdir, 'recommend', *flags, '--nofilter_seen') == 0
    assert set(lines(tmp_path / 'o.jsonl')[0]['items']) == {ids[1], ids[3], ids[4]}


def test_an_export_answers_as_the_stage(workdir, tmp_path):
    assert use(workdir, 'export,recommend', f'--export={tmp_path}/e', '--top_k=4') == 0
    recommender = serve.load_export(tmp_path / 'e')
    assert recommender.card['model'].startswith('FAME (H 2, N 2')
    assert recommender.card['test'] == _results(workdir)['results']['finetune']['test']
    data = sequences.load(workdir / 'dataset')
    whole = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    for told, answer in zip(
        lines(workdir / 'recommendations.jsonl'), recommender.recommend_all(whole, 4)
    ):
        assert (told['items'], told['scores']) == (answer.items, answer.scores)


def _results(workdir):
    return json.loads((workdir / 'results.json').read_text())


def test_an_explanation_on_screen_and_in_files(workdir, tmp_path, capsys):
    data = sequences.load(workdir / 'dataset')
    name, rank = data.user_ids[7], np.load(workdir / 'ranks.npz')['finetune/test/masked'][7]
    flags = [f'--explanation={tmp_path}/why', '--top_k=3', f'--titles={tmp_path}/titles.csv']
    titles = ''.join(f'{token},Title of {token}\n' for token in data.item_ids[1:])
    (tmp_path / 'titles.csv').write_text('item_id,title\n' + titles)
    assert use(workdir, 'explain', f'--user={name}', *flags) == 0
    screen = capsys.readouterr().out
    assert 'Title of' in screen and 'equal gates' in screen and f'rank {rank}' in screen
    told = json.loads((tmp_path / 'why.json').read_text())
    assert told['user'] == name and told['target']['rank'] == rank
    assert told['recommended'][0]['title'] == f'Title of {told["recommended"][0]["item"]}'
    assert (tmp_path / 'why.svg').stat().st_size > 1000
    (tmp_path / 'in.jsonl').write_text('["who?"]\n')
    assert use(workdir, 'explain', f'--histories={tmp_path}/in.jsonl', *flags) == 0
    assert 'most popular' in capsys.readouterr().out


def test_the_stages_that_use_a_run_are_not_remembered_as_making_it(workdir):
    before = (workdir / 'flags.cfg').read_text()
    assert use(workdir, 'recommend', '--top_k=3', f'--recommendations={workdir}/few.jsonl') == 0
    assert (workdir / 'flags.cfg').read_text() == before
    assert '--stages=prepare,pretrain,finetune,evaluate\n' in (workdir / 'flags.cfg').read_text()


def refused(capsys, workdir, stage, *more):
    capsys.readouterr()
    assert use(workdir, stage, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1, captured.err
    return captured.err


def test_mistakes_get_a_line_and_cost_nothing(workdir, tmp_path, capsys):
    out = tmp_path / 'o.jsonl'
    out.write_text('precious')
    (tmp_path / 'bad.jsonl').write_text('["1"]\n' * 9000 + 'junk\n')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'strangers').write_text('who?')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'thesis').write_text('years')
    cases = [
        ('recommend', [f'--histories={tmp_path}/nowhere'], 'No such file'),
        ('recommend', [f'--histories={tmp_path}/bad.jsonl'], 'line 9001'),
        ('recommend', [f'--histories={tmp_path}/folder'], 'folder'),
        ('recommend', [f'--recommendations={tmp_path}/o.csv'], '.parquet'),
        ('recommend', [f'--recommendations={tmp_path}/no/o.jsonl'], 'No such file'),
        ('recommend', [f'--recommendations={tmp_path}/no/o.parquet'], 'No such file'),
        ('recommend', [f'--allow_items={tmp_path}/empty'], 'names no item'),
        ('recommend', [f'--allow_items={tmp_path}/strangers'], 'nothing to recommend'),
        ('recommend', ['--top_k=0'], '--top_k'),
        ('explain', ['--user=nobody'], '--user=nobody'),
        ('explain', [f'--histories={tmp_path}/empty'], 'holds no history'),
        ('explain', [f'--explanation={tmp_path}/no/why'], 'No such file'),
        ('export', [f'--export={tmp_path}/folder'], 'holds something else'),
        ('export', [f'--export={out}'], 'o.jsonl'),
        ('export', [f'--titles={tmp_path}/empty'], 'empty'),
    ]
    for stage, flags, told in cases:
        if stage == 'recommend' and not any('--recommendations' in flag for flag in flags):
            flags = [*flags, f'--recommendations={out}']
        assert told in refused(capsys, workdir, stage, *flags), (stage, flags)
    assert out.read_text() == 'precious'
    left = ['bad.jsonl', 'empty', 'folder', 'o.jsonl', 'strangers']
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_run_that_was_not_trained(tmp_path, capsys):
    folder = tmp_path / 'run'
    assert main([*WORLD, f'--workdir={folder}', '--stages=prepare']) == 0
    for stage in ('recommend', 'explain', 'export'):
        assert 'no trained model' in refused(capsys, folder, stage)
        assert 'prepare first' in refused(capsys, tmp_path / 'empty', stage)
