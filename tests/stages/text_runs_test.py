"""Runs with item texts: training from vectors of the stage text, and the map of --text_path."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax import api, stages
from fame_jax.config import flags
from fame_jax.main import main
from fame_jax.models import registry, surgery
from fame_jax.run_dir import read_json
from fame_jax.serving import export
from fame_jax.stages import initialize, open_recommender, settings, train
from fame_jax.stages.context import abstract_params
from fame_jax.stages.facet_names import head_names
from fame_jax.text import item_init

SMALL = [
    *('--progress=none', '--synthetic=users=120,items=150,values=3', '--width=8'),
    *('--num_blocks=1', '--max_length=10', '--row_length=16', '--rows_per_step=4'),
    *('--pretrain_epochs=1', '--finetune_epochs=1', '--item_init=text'),
]
TEXT = ['--text_options=epochs=1,inner_width=16,labels_per_step=3']
FAME = ['--num_experts=2', '--unseen_items=kept']


def open_run(folder, *more):
    argv = [f'--workdir={folder}', '--progress=none', '--stages=recommend', *more]
    return stages.open_run(flags.parse(argv))


def last_params(run, stage):
    with run.checkpoints(stage) as checkpoints:
        return checkpoints.restore(params=abstract_params(run.module(stage)))['params']


@pytest.fixture(scope='module')
def with_vectors(tmp_path_factory):
    """A FAME+ with the vectors of the stage text, before training."""
    folder = tmp_path_factory.mktemp('text') / 'run'
    assert main([*SMALL, *TEXT, *FAME, '--stages=prepare,text', f'--workdir={folder}']) == 0
    return folder


@pytest.fixture(scope='module')
def with_branches(tmp_path_factory):
    """The same with a FAME of three branches."""
    folder = tmp_path_factory.mktemp('branches') / 'run'
    argv = [*SMALL, '--width=12', *TEXT, *FAME, '--model=branched_fame', f'--workdir={folder}']
    assert main([*argv, '--stages=prepare,text']) == 0
    return folder


@pytest.fixture(scope='module')
def plus(with_vectors, tmp_path_factory):
    """The same FAME+, with a trained backbone."""
    folder = tmp_path_factory.mktemp('plus') / 'run'
    shutil.copytree(with_vectors, folder)
    argv = ['--stages=text,pretrain', f'--workdir={folder}', '--progress=none']
    assert main(argv) == 0
    return folder


def test_vectors_of_heads_are_those_of_their_facets_after_surgery(with_vectors):
    """W_f selects a block of coordinates, so x_v W_f^h is facet h's vector, times the scale."""
    run = open_run(with_vectors)
    block_VHK, head_VHK = blocks_and_heads(run, heads=2)
    # Root mean square 0.02 over 8 coordinates; each of the two blocks has half of the square.
    expected_VHK = block_VHK * 0.02 * np.sqrt(8 / 2)
    np.testing.assert_allclose(head_VHK[1:], expected_VHK[1:], rtol=1e-5)
    assert head_names(run, run.module('finetune')) == ['facet_1', 'facet_2']


def test_heads_of_every_branch_begin_as_all_facets(with_branches):
    run = open_run(with_branches)
    block_VHK, head_VHK = blocks_and_heads(run, heads=6)
    np.testing.assert_allclose(head_VHK[1:], block_VHK[1:] * 0.02 * np.sqrt(12 / 6), rtol=1e-5)
    # Heads of one facet are trained apart: their similarities of items differ.
    for a in range(2):
        near_VV, other_VV = (block_VHK[:, h] @ block_VHK[:, h].T for h in (a, a + 2))
        assert np.abs(near_VV - other_VV).max() > 0.1
    names = read_json(with_branches / 'text' / 'text.json')['heads']
    assert names == ['facet_1', 'facet_2'] * 3
    assert head_names(run, run.module('finetune')) == [
        f'{name} (head {h})' for h, name in enumerate(names, 1)
    ]


def blocks_and_heads(run, heads):
    """Item vectors of the stage text by facet, and after surgery as each head sees them."""
    items_VD = np.load(run.folder / 'text' / 'items.npy')
    block_VHK = items_VD.reshape(len(items_VD), heads, -1)
    np.testing.assert_allclose(np.linalg.norm(block_VHK[1:], axis=-1), 1, rtol=1e-5)
    key, fame = jax.random.key(0), run.module('finetune')
    pretrained = registry.init_params(run.module('pretrain'), key)
    pretrained = item_init.fill(pretrained, items_VD, 0.02)
    plan = fame.surgery_plan(key)
    params = surgery.transplant(pretrained, registry.init_params(fame, key), plan)
    facet_HDK = fame.facet_projections(params)
    assert len(facet_HDK) == heads
    return block_VHK, jnp.einsum('VD,HDK->VHK', params['item_table'], facet_HDK)


def test_training_starts_from_the_vectors_and_moves_the_items_in_histories_only(plus):
    run = open_run(plus)
    setup = train.make_setup(run, 'pretrain')
    random = registry.init_params(setup.module, jax.random.fold_in(setup.key, 0))
    start = initialize.initialize(run, 'pretrain', random, setup.key)
    items_VD = np.load(plus / 'text' / 'items.npy')
    scale = run.config.text.item_scale * np.sqrt(8)
    unit_VD = items_VD[1:] / np.linalg.norm(items_VD[1:], axis=1, keepdims=True)
    np.testing.assert_allclose(start['item_table'][1:], unit_VD * scale, rtol=1e-5)
    moved_V = np.any(
        np.asarray(last_params(run, 'pretrain')['item_table'] != start['item_table']), axis=1
    )
    trained = {*run.data.training_histories()[0].tolist()}
    assert {*np.flatnonzero(moved_V).tolist()} == trained
    assert len(trained) < run.data.num_items


@pytest.mark.slow
def test_evaluation_compares_heads_with_facets_and_draws_them(plus, tmp_path, capsys):
    folder = tmp_path / 'run'
    shutil.copytree(plus, folder)
    assert main([f'--workdir={folder}', '--stages=finetune,evaluate', '--progress=none']) == 0
    printed = capsys.readouterr().out
    assert 'FAME+ (H 2, N 2' in printed and 'unseen items kept' in printed
    result = json.loads((folder / 'results.json').read_text())['results']['finetune']
    assert result['facets']['facets'] == ['facet_1', 'facet_2']
    assert np.shape(result['facets']['probe']) == (2, 2)
    for name in ('heads.svg', 'items.svg'):
        assert (folder / name).read_text().rstrip().endswith('</svg>')


def test_evaluation_compares_the_heads_of_all_branches_with_facets(with_branches, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(with_branches, folder)
    argv = [f'--workdir={folder}', '--stages=pretrain,finetune,evaluate,report', '--progress=none']
    assert main(argv) == 0
    result = json.loads((folder / 'results.json').read_text())['results']
    names = ['facet_1', 'facet_2']
    assert result['finetune']['facets']['facets'] == names and 'facets' not in result['pretrain']
    assert result['finetune']['model'].startswith('FAME+, branched (H 2, N 2')
    assert np.shape(result['finetune']['facets']['probe']) == (6, 2)
    probes = read_json(folder / 'text' / 'text.json')['probes']
    for facets in (result['finetune']['facets'], probes['before'], probes['after']):
        matched = facets['matching']
        assert [h for h, _ in matched] == [*range(6)]
        assert all({m for _, m in matched[n : n + 2]} == {0, 1} for n in (0, 2, 4))
    drawn = (folder / 'heads.svg').read_text()
    assert all(f'>{names[h % 2]} (head {h + 1})<' in drawn for h in range(6))


@pytest.mark.slow
def test_the_stage_text_is_training_from_a_file_of_its_vectors(with_vectors, tmp_path):
    """The backbones are equal bit for bit."""
    shutil.copytree(with_vectors, tmp_path / 'text')
    small = [flag for flag in SMALL if flag != '--item_init=text']
    file = f'--item_init={with_vectors}/text/items.npy'
    runs = [
        [f'--workdir={tmp_path}/text', '--stages=pretrain', '--progress=none'],
        [*small, *FAME, file, f'--workdir={tmp_path}/file', '--stages=prepare,pretrain'],
    ]
    params = []
    for argv, name in zip(runs, ('text', 'file')):
        assert main(argv) == 0
        params.append(jax.tree.leaves(last_params(open_run(tmp_path / name), 'pretrain')))
    assert all(map(np.array_equal, *params))


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([*argv, '--progress=none']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def test_vectors_of_other_data_are_refused(with_vectors, tmp_path, capsys):
    argv = [*SMALL, *TEXT, '--synthetic=seed=1', f'--workdir={tmp_path}']
    assert main([*argv, '--stages=prepare']) == 0
    shutil.copytree(with_vectors / 'text', tmp_path / 'text')
    for stage in ('text', 'pretrain'):
        error = refused(capsys, f'--workdir={tmp_path}', f'--stages={stage}')
        assert "was made from data other than the run's" in error


def test_training_without_the_stage_text_is_refused(tmp_path, capsys):
    argv = [*SMALL, '--stages=prepare,pretrain', f'--workdir={tmp_path}/run']
    assert refused(capsys, *argv) == (
        'error: --item_init=text needs the item vectors of the stage text, and '
        f'{tmp_path}/run/text has none; add text before pretrain: --stages=prepare,text,pretrain\n'
    )
    argv[-2] = '--stages=prepare,pretrain,text'  # too late
    assert 'add text before pretrain: --stages=prepare,text,pretrain\n' in refused(capsys, *argv)
    argv[-2] = '--backbone=scratch'  # and no stages: their default has no text
    assert 'before finetune: --stages=prepare,text,finetune,evaluate' in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_vectors_for_another_number_of_heads_are_refused(with_vectors, tmp_path, capsys):
    shutil.copytree(with_vectors, tmp_path / 'run')
    argv = [f'--workdir={tmp_path}/run', '--stages=pretrain', '--num_heads=4']
    assert 'was made for 2 heads, and the model has 4' in refused(capsys, *argv)


def test_vectors_for_another_number_of_branches_are_refused(with_branches, tmp_path, capsys):
    shutil.copytree(with_branches, tmp_path / 'run')
    # Of as many heads together, too: their facets lie in other columns.
    for branches, heads in ((2, 2), (2, 3), (1, 6)):
        argv = [f'--workdir={tmp_path}/run', '--stages=pretrain', f'--num_heads={heads}']
        error = refused(capsys, *argv, f'--model_options=branches={branches}')
        assert (
            'was made for 2 heads in each of 3 branches, and the model has '
            f'{heads} in each of {branches}; change --num_heads or' in error
        )


def test_a_backbone_with_other_facets_is_refused(plus, tmp_path, capsys):
    argv = [*SMALL, *TEXT, *FAME, '--facets=facet_2,facet_1', '--stages=prepare,finetune']
    error = refused(capsys, *argv, f'--backbone={plus}', f'--workdir={tmp_path}/run')
    assert '--facets=facet_2,facet_1 (there: )' in error


SHAPES = ['--width=8', '--num_blocks=1', '--max_length=10', '--row_length=16', '--rows_per_step=4']
PATH = ['--model=sasrec', '--item_init=random', '--text_path=.5', '--text_path_below=3']


@pytest.fixture(scope='module')
def with_path(tmp_path_factory):
    """A SASRec with the map of --text_path, trained and evaluated."""
    folder = tmp_path_factory.mktemp('path') / 'run'
    chosen = [flag for flag in SMALL if not flag.startswith(('--item_init', '--finetune'))]
    argv = [*chosen, *PATH, '--stages=prepare,text,pretrain,evaluate', f'--workdir={folder}']
    assert main(argv) == 0
    return folder


def folded_loop(run, params):
    """The item table with the map of each item that has fewer than three training actions."""
    items = run.data.training_histories()[0].tolist()
    text_VE = np.load(run.folder / 'text' / 'vectors.npy')
    table, path = np.array(params['item_table']), params['text_path']
    for v in range(1, run.data.num_items + 1):
        if items.count(v) < 3 and text_VE[v].any():
            unit_E = text_VE[v] / np.linalg.norm(text_VE[v])
            table[v] = unit_E @ np.asarray(path['kernel']) + np.asarray(path['bias'])
    return table


def test_a_run_with_a_text_path_ranks_and_serves_the_folded_table(with_path, tmp_path):
    """Validation of the best epoch, evaluation, recommendations and an export read one table."""
    run = open_run(with_path)
    with run.checkpoints('pretrain') as checkpoints:
        module = run.trained_module('pretrain')
        best = checkpoints.restore(best=abstract_params(module))['best']
    table = folded_loop(run, best)
    assert np.abs(table - best['item_table']).max() > 0.01
    served = run.best_params('pretrain', run.module('pretrain'))
    assert 'text_path' not in served
    np.testing.assert_allclose(served['item_table'], table, atol=1e-6)
    results = json.loads((with_path / 'results.json').read_text())['results']['pretrain']
    found = results['validation']['masked']['ndcg@20']
    assert found == pytest.approx(run.progress('pretrain')['best_value'])
    assert 'text_path 0.5 below 3' in results['model']
    expected = run.module('pretrain').apply({'params': served}, method='item_vectors')
    recommender = api.load(with_path)
    np.testing.assert_allclose(recommender.model.item_VD, expected, atol=1e-6)
    recommender.export(tmp_path / 'export')
    history = [run.data.item_ids[3], run.data.item_ids[5]]
    items = [
        one.recommend(history, 5).items for one in (recommender, export.load(tmp_path / 'export'))
    ]
    assert items[0] == items[1]


def test_the_map_is_trained_and_kept_by_surgery(with_path, tmp_path):
    run = open_run(with_path)
    setup = train.make_setup(run, 'pretrain')
    start = registry.init_params(setup.module, jax.random.fold_in(setup.key, 0))['text_path']
    with run.checkpoints('pretrain') as checkpoints:
        trained = checkpoints.restore(params=abstract_params(setup.module))['params']['text_path']
    for name in ('kernel', 'bias'):
        assert np.any(trained[name] != start[name])
    with run.checkpoints('pretrain') as checkpoints:
        best = checkpoints.restore(best=abstract_params(setup.module))['best']['text_path']
    given = [*SHAPES, *PATH[1:], f'--prepared={with_path}', f'--backbone={with_path}']
    fame = open_run(tmp_path / 'fame', '--model=fame', '--num_experts=2', *given)
    grown = train.make_setup(fame, 'finetune').module
    params = registry.init_params(grown, jax.random.key(0))
    params = initialize.from_backbone(fame, params, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params['text_path'], best)


def test_the_program_has_the_text_vectors_as_arguments(with_path):
    """Not as constants, which XLA would copy into each program."""
    run = open_run(with_path)
    setup = train.make_setup(run, 'pretrain')
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(setup.step)}
    assert run.text_path['text_vectors'].shape in shapes


def test_a_text_path_without_the_stage_text_is_refused(tmp_path, capsys):
    argv = [*SMALL[:-1], *PATH, '--stages=prepare,pretrain', f'--workdir={tmp_path}/run']
    argv = [flag for flag in argv if not flag.startswith('--finetune')]
    line = refused(capsys, *argv)
    assert '--text_path=0.5 needs the text vectors of the stage text' in line
    assert line.endswith('add text before pretrain: --stages=prepare,text,pretrain\n')
    assert list(tmp_path.iterdir()) == []


# Item files of a user's log.

HEAD = 'Order No,Client-Ref,Product SKU,When bought\n'
LOG = HEAD + ''.join(
    f'{10 * user + day},c{user},P{(user + 3 * day) % 20},2026-01-0{day + 1}\n'
    for user in range(40)
    for day in range(6)
)
READ = '--columns=user:Client-Ref,item:Product_SKU,time:whenbought'
FACETS = ['--item_init=text', '--text_path=0']


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The folder of orders.csv, which is the current one; `write_items` writes there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'orders.csv').write_text(LOG)
    return tmp_path


def write_items(name, field, **more):
    rows = [
        {field: f'P{n}', 'title': f'Title {n}', 'brand': f'b{n % 4}', **more} for n in range(20)
    ]
    Path(name).write_text(''.join(json.dumps(row) + '\n' for row in rows))


def orders(*more, stages='prepare,text', workdir='run'):
    """Flags of a run on the log, with text vectors and no facets, which train nothing."""
    small = [f for f in SMALL if not f.startswith(('--synthetic', '--item_init', '--finetune'))]
    columns = [READ] if not any('--prepared' in flag for flag in more) else []
    own = ['--dataset=orders.csv', '--k_core=0', *columns] if columns else []
    argv = [*small, '--model=sasrec', '--text_path=.5', *own, *more]
    return [*argv, f'--stages={stages}', f'--workdir={workdir}']


def id_field(workdir='run'):
    return read_json(Path(workdir) / 'text' / 'text.json')['card']['id_field']


def test_the_advice_for_the_id_of_an_item_file_is_accepted_in_the_same_folder(log, capsys):
    write_items('meta.jsonl', 'Ref No.')
    line = refused(capsys, *orders('--items=meta.jsonl'))
    assert "no field 'Product SKU', as in the log, and none with a known name" in line
    assert line.endswith("'Ref No.', 'title', 'brand'; name one with --columns=item_file_id:NAME\n")
    argv = orders('--items=meta.jsonl')
    assert 'none of the data set' in refused(capsys, *argv, '--columns=item_file_id:title')
    assert main([*argv, '--columns=item_file_id:ref_no']) == 0
    assert id_field() == 'Ref No.'
    # Another spelling names the same field, another field does not.
    assert main([*argv, '--columns=item_file_id:Ref-No']) == 0
    line = refused(capsys, *argv, '--columns=item_file_id:title')
    assert 'run holds another run: --columns=item_file_id:title (there: Ref-No); ' in line


def test_the_field_that_was_found_may_be_named_later(log, capsys):
    write_items('meta.jsonl', 'Product SKU')
    argv = orders('--items=meta.jsonl')
    assert main(argv) == 0 and id_field() == 'Product SKU'
    assert main([*argv, '--columns=item_file_id:product_sku']) == 0
    assert 'holds another run' in refused(capsys, *argv, '--columns=item_file_id:brand')


def test_a_run_on_prepared_data_has_an_item_file_of_its_own(log, capsys):
    write_items('first.jsonl', 'sku')
    write_items('second.jsonl', 'Ref')
    first = orders('--items=first.jsonl', '--columns=item_file_id:SKU', workdir='first')
    assert main(first) == 0
    argv = orders('--prepared=first', '--items=second.jsonl')
    # Of the other run, whose data are used, comes the default.
    assert "there is no field 'SKU'" in refused(capsys, *argv)
    assert main([*argv, '--columns=item_file_id:ref']) == 0
    # A later command need not repeat it, and the log is still read as in the first run.
    assert main(['--workdir=run', '--stages=text', '--progress=none']) == 0
    columns = flags.read(Path('run/flags.cfg'))['columns']
    assert columns == (*READ.removeprefix('--columns=').split(','), 'item_file_id:ref')
    assert (id_field('first'), id_field()) == ('sku', 'Ref')
    line = refused(capsys, *argv, '--columns=item:title')
    assert '--columns=item:title (there: Product_SKU)' in line


def test_an_update_may_name_another_item_file_and_its_id(log, capsys):
    write_items('meta.jsonl', 'sku')
    argv = orders('--items=meta.jsonl', '--columns=item_file_id:sku', *FACETS, '--facets=brand')
    Path('run/checkpoints/pretrain/1').mkdir(parents=True)
    Path('run/flags.cfg').write_text(flags.text(settings.complete(flags.parse(argv))[0]))
    new = ['--append=new.csv', '--from=run', '--workdir=next', '--items=meta.jsonl']
    config, _ = settings.complete(flags.parse([*new, '--columns=item_file_id:code']))
    assert config.data.column_names['item_file_id'] == 'code'
    line = refused(capsys, *new, '--columns=item:code')
    assert 'leave out --columns=item:code (there: Product_SKU)\n' in line


@pytest.mark.parametrize('field', ['Product SKU', 'product-sku', 'sku', 'Artikelnummer'])
def test_texts_and_titles_come_from_one_field(field, log):
    write_items('meta.jsonl', field)
    assert main(orders('--items=meta.jsonl')) == 0
    assert id_field() == field
    run = open_run(log / 'run')
    titles = dict(zip(run.data.item_ids[1:], open_recommender.read_titles(run)[1:]))
    assert titles == {f'P{n}': f'Title {n}' for n in range(20)}


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--items=no.jsonl'], '--items=no.jsonl: No such file or directory; check the path'),
        (['--items=no-*.csv'], '--items=no-*.csv: No such file or directory; check the path'),
        (['--items=x.pdf'], 'x.pdf: the format is unknown; the name must end in one of .jsonl, '),
        ([], 'orders.csv: no item file; put one at orders_items.jsonl.gz, or give one by --items'),
        (['--items=meta.jsonl', *FACETS], '--facets is empty; name a facet for each head, such as'),
        (
            ['--items=meta.jsonl', *FACETS, '--facets=instance,brand,title', '--num_heads=2'],
            '--facets=instance,brand,title are more than --num_heads=2',
        ),
        (
            ['--items=meta.jsonl', *FACETS, '--facets=brand', '--text_options=epochs=few'],
            '--text_options=epochs=few: write a whole number',
        ),
        (
            ['--items=meta.jsonl', '--text_encoder=bert'],
            '--text_encoder=bert: there is no such encoder; give tfidf, a folder with',
        ),
        (
            ['--items=meta.jsonl', '--text_encoder=v.npy'],
            '--text_encoder=v.npy: No such file or directory; check the path',
        ),
        (
            ['--item_init=rows.npy', '--text_path=0', '--stages=prepare,pretrain'],
            '--item_init=rows.npy: No such file or directory; check the path, or give random or',
        ),
        (
            ['--stages=prepare', '--items=no.csv'],
            '--items=no.csv: No such file or directory; check the path',
        ),
    ],
)
def test_a_mistake_in_item_texts_is_refused_before_the_data_are_prepared(
    more, message, log, capsys
):
    write_items('meta.jsonl', 'sku')
    Path('x.pdf').write_text('')
    assert refused(capsys, *orders(), *more).startswith(f'error: {message}')
    assert not (log / 'run').exists()


def test_a_stored_path_of_items_is_needed_by_the_stage_text_alone(log, capsys):
    write_items('meta.jsonl', 'sku')
    assert main(orders('--items=meta.jsonl', stages='prepare')) == 0
    Path('meta.jsonl').rename('moved.jsonl')
    use = ['--workdir=run', '--progress=none']
    assert main([*use, '--stages=prepare']) == 0
    line = refused(capsys, '--workdir=run', '--stages=text')
    assert '--items=meta.jsonl: No such file or directory' in line
    assert main([*use, '--stages=text', '--items=moved.jsonl']) == 0
    Path('moved.jsonl').unlink()
    assert main([*use, '--stages=text']) == 0  # complete
