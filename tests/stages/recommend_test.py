"""The stages that use a trained run, through the command line."""

import json
from pathlib import Path

import numpy as np
from run_fixtures import SMALL_RUN

from fame_jax.api import load
from fame_jax.data.dataset import Dataset
from fame_jax.main import main
from fame_jax.serving import export


def use(folder, stage, *more):
    return main(['--progress=none', f'--workdir={folder}', f'--stages={stage}', *more])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]


def test_every_user_of_the_data_set(trained, tmp_path):
    path = tmp_path / 'out.jsonl'
    assert use(trained, 'recommend', f'--out={path}', '--top_k=5') == 0
    data, answers = Dataset.load(trained / 'dataset'), lines(path)
    assert [answer['user'] for answer in answers] == data.user_ids
    for answer, start, end in zip(answers, data.offsets[:-1], data.offsets[1:]):
        history = {data.item_ids[item] for item in data.items[start:end]}
        assert len(answer['items']) == len(answer['scores']) == min(5, 40 - len(history))
        assert not history & set(answer['items'])
        assert answer['scores'] == sorted(answer['scores'], reverse=True)


def test_histories_of_a_file_keep_their_order(trained, tmp_path, capsys):
    ids = Dataset.load(trained / 'dataset').item_ids
    rows = [{'user': f'u{n}', 'items': ids[1 + n % 9 : 1 + n % 9 + n % 4]} for n in range(50)]
    rows[3] = [ids[1], 'who?', ids[2]]
    rows[4] = ['who?']
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = [f'--histories={tmp_path}/in.jsonl', f'--out={tmp_path}/o.jsonl']
    assert use(trained, 'recommend', *flags, '--top_k=3') == 0
    answers = lines(tmp_path / 'o.jsonl')
    assert [answer.get('user') for answer in answers[5:]] == [f'u{n}' for n in range(5, 50)]
    assert [*answers[3]] == ['items', 'scores', 'unknown', 'score_kind']
    assert answers[3]['unknown'] == ['who?']
    assert answers[4]['fallback'] == answers[0]['fallback'] == 'popularity'
    assert [*answers[2]] == ['user', 'items', 'scores', 'score_kind']
    assert [*answers[4]] == ['items', 'counts', 'unknown', 'fallback']
    assert 'Warning' not in capsys.readouterr().err


def test_allowed_and_denied_items(trained, tmp_path):
    ids = Dataset.load(trained / 'dataset').item_ids
    (tmp_path / 'allow').write_text('\n'.join([*ids[1:5], 'who?']))
    (tmp_path / 'deny').write_text(ids[2])
    (tmp_path / 'in.jsonl').write_text(json.dumps([ids[3], ids[3]]) + '\n')
    flags = [f'--histories={tmp_path}/in.jsonl', f'--out={tmp_path}/o.jsonl']
    flags += [f'--allow_items={tmp_path}/allow', f'--deny_items={tmp_path}/deny']
    assert use(trained, 'recommend', *flags) == 0
    assert set(lines(tmp_path / 'o.jsonl')[0]['items']) == {ids[1], ids[4]}
    assert use(trained, 'recommend', *flags, '--nofilter_seen') == 0
    assert set(lines(tmp_path / 'o.jsonl')[0]['items']) == {ids[1], ids[3], ids[4]}


def test_an_export_recommends_the_same_as_the_stage(trained, tmp_path):
    assert use(trained, 'export,recommend', f'--out={tmp_path}/both', '--top_k=4') == 0
    recommender = export.load(tmp_path / 'both' / 'export')
    assert recommender.card['model'].startswith('FAME (H 2, N 2')
    results = json.loads((trained / 'results.json').read_text())['results']
    assert recommender.card['test'] == results['finetune']['test']
    data = Dataset.load(trained / 'dataset')
    histories = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    answers = recommender.recommend_many(histories, 4)
    for line, answer in zip(
        lines(tmp_path / 'both' / 'recommendations.jsonl'), answers, strict=True
    ):
        assert (line['items'], line['scores']) == (answer.items, answer.scores)


def test_an_explanation_on_screen_and_in_files(trained, tmp_path, capsys):
    data = Dataset.load(trained / 'dataset')
    name, rank = data.user_ids[7], np.load(trained / 'ranks.npz')['finetune/test/masked'][7]
    flags = [f'--out={tmp_path}/why.json', '--top_k=3', f'--items={tmp_path}/titles.csv']
    titles = ''.join(f'{token},Title of {token}\n' for token in data.item_ids[1:])
    (tmp_path / 'titles.csv').write_text('item_id,title\n' + titles)
    assert use(trained, 'explain', f'--user={name}', *flags) == 0
    screen = capsys.readouterr().out
    assert 'Title of' in screen and 'equal gates' in screen and f'rank {rank}' in screen
    found = json.loads((tmp_path / 'why.json').read_text())
    assert found['user'] == name and found['target']['rank'] == rank
    assert found['recommended'][0]['title'] == f'Title of {found["recommended"][0]["item"]}'
    assert (tmp_path / 'why.svg').stat().st_size > 1000
    (tmp_path / 'in.jsonl').write_text('["who?"]\n')
    assert use(trained, 'explain', f'--histories={tmp_path}/in.jsonl', *flags) == 0
    assert 'most popular' in capsys.readouterr().out


def test_out_is_a_file_of_one_stage_or_a_folder(trained, tmp_path):
    """A folder that exists takes the stage's default name; parent folders are made."""
    (tmp_path / 'here').mkdir()
    assert use(trained, 'recommend', f'--out={tmp_path}/here') == 0
    assert use(trained, 'recommend', f'--out={tmp_path}/new/lists.jsonl') == 0
    assert use(trained, 'report', f'--out={tmp_path}/new/page.html') == 0
    assert use(trained, 'recommend,explain', f'--out={tmp_path}/two') == 0
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file()}
    assert found == {
        *('here/recommendations.jsonl', 'new/lists.jsonl', 'new/page.html'),
        *('two/recommendations.jsonl', 'two/explanation.json', 'two/explanation.svg'),
    }


def test_stages_that_use_a_run_leave_its_flags_unchanged(trained, tmp_path):
    before = (trained / 'flags.cfg').read_text()
    (tmp_path / 'titles.csv').write_text('item_id,title\nitem-1,One\n')
    flags = ['--top_k=3', f'--out={tmp_path}/few.jsonl', f'--items={tmp_path}/titles.csv']
    assert use(trained, 'recommend', *flags) == 0
    load(trained)
    assert (trained / 'flags.cfg').read_text() == before
    assert '--stages=prepare,pretrain,finetune,evaluate\n' in (trained / 'flags.cfg').read_text()


def refused(capsys, folder, stage, *more):
    capsys.readouterr()
    assert use(folder, stage, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1, captured.err
    return captured.err


def test_mistakes_get_one_line_and_replace_no_file(trained, tmp_path, capsys):
    out = tmp_path / 'o.jsonl'
    out.write_text('precious')
    (tmp_path / 'bad.jsonl').write_text('["1"]\n' * 9000 + 'junk\n')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'strangers').write_text('who?')
    (tmp_path / 'one').write_text(' item-1 \n')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'thesis').write_text('years')
    cases = [
        ('recommend', [f'--histories={tmp_path}/bad.jsonl'], 'line 9001'),
        ('recommend', [f'--histories={tmp_path}/folder'], 'folder'),
        ('recommend', [f'--out={tmp_path}/o.txt'], '.parquet'),
        ('recommend', [f'--out={out}/o.jsonl'], 'o.jsonl: making'),
        (
            'recommend',
            [f'--allow_items={tmp_path}/strangers'],
            "none of ['who?'] is in the catalogue",
        ),
        (
            'recommend',
            [f'--allow_items={tmp_path}/one', f'--deny_items={tmp_path}/one'],
            'nothing to recommend',
        ),
        ('recommend', ['--top_k=0'], '--top_k'),
        ('explain', ['--user=stranger'], '--user=stranger'),
        ('explain', [f'--histories={tmp_path}/empty'], 'holds no history'),
        ('explain', [f'--out={tmp_path}/why.txt'], 'why.txt'),
        ('recommend', [f'--out={tmp_path}/x.xlsx'], 'files end in .json, .jsonl, .parquet'),
        ('recommend', [f'--out={tmp_path}/x.csv.gz'], 'make a folder of that name first'),
        ('recommend', [f'--out={out}', f'--histories={out}'], 'is the file of --histories'),
        ('similar', [f'--out={out}', f'--items={out}'], 'is the file of --items'),
        ('report', [f'--out={out}'], 'a report is written to .html'),
        ('export', [f'--out={tmp_path}/folder'], 'not an export'),
        ('export', [f'--out={out}'], 'o.jsonl'),
        ('export', [f'--items={tmp_path}/empty'], 'empty'),
    ]
    for stage, flags, words in cases:
        if stage == 'recommend' and not any('--out' in flag for flag in flags):
            flags = [*flags, f'--out={out}']
        assert words in refused(capsys, trained, stage, *flags), (stage, flags)
    assert out.read_text() == 'precious'


def test_a_run_that_was_not_trained(tmp_path, capsys):
    folder = tmp_path / 'run'
    assert main([*SMALL_RUN, f'--workdir={folder}', '--stages=prepare']) == 0
    for stage in ('recommend', 'explain', 'export'):
        assert 'no trained model' in refused(capsys, folder, stage)
        assert 'prepare first' in refused(capsys, tmp_path / 'empty', stage)
