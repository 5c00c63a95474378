"""A checkpoint is restored bit by bit, or refused in one line; it is never restored in part."""

import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_fixtures import environment_of

from fame_jax.errors import UserError
from fame_jax.training.checkpoint import Checkpoints

OPTIMIZER = optax.adam(1e-3)
PROGRESS = {
    'epoch': 2,
    'step': 5,
    'data': {'next_index': 3},
    'loss_sum': 0.1 + 0.2,
    'best_value': -1.0,
    'finished': False,
    'key': [0, 4294967295],
    'data_sha256': 'é',
}


def make_params(seed=0, rows=7):
    """Parameters with values that any rounding would change."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        'item': jax.random.normal(keys[0], (rows, 3)),
        'block': {
            'w': jax.random.normal(keys[1], (3, 3)) * 1e-30,
            'b': jnp.array([jnp.nan, -0.0, jnp.inf]),
        },
    }


def make_state(seed=0, rows=7):
    """Parameters, Adam's state after two steps, and the best parameters so far."""
    params = make_params(seed, rows)
    optimizer = OPTIMIZER.init(params)
    for i in range(2):
        grads = jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, 0.1 + i), params)
        _, optimizer = OPTIMIZER.update(grads, optimizer)
    return params, optimizer, make_params(seed + 1, rows)


def like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refusal(function, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert message and '\n' not in message
    return message


def save(folder, step, seed=0):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, *make_state(seed), PROGRESS | {'step': step})


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    """A folder that holds one checkpoint, of step 5; to be copied, not changed."""
    folder = tmp_path_factory.mktemp('stored') / 'pretrain'
    save(folder, 5)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    """A folder of its own with the same checkpoint."""
    return Path(shutil.copytree(stored, tmp_path / 'pretrain'))


def test_everything_is_restored_bit_by_bit(folder):
    params, optimizer, best = make_state()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last_step() == 5
        assert checkpoints.progress() == PROGRESS
        found = checkpoints.restore(params=like(params), optimizer=like(optimizer), best=like(best))
    assert_same_bits(found['params'], params)
    assert_same_bits(found['best'], best)
    assert_same_bits(found['optimizer'], optimizer)
    assert type(found['optimizer'][0]) is type(optimizer[0])
    for leaf in jax.tree.leaves(found):
        assert isinstance(leaf, jax.Array)


def test_the_best_parameters_are_restored_alone(folder):
    params, _, best = make_state()
    shapes = jax.eval_shape(lambda: params)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(best=shapes)
        assert list(found) == ['best']
        assert_same_bits(found['best'], best)
        assert_same_bits(checkpoints.restore(params=params)['params'], params)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    folder = tmp_path / 'runs' / 'toys' / 'pretrain'
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last_step() is None
        assert checkpoints.progress() == {}
        message = refusal(checkpoints.restore, params=make_params())
    assert str(folder) in message and 'holds no checkpoint' in message


def test_only_the_newest_is_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (0, 3, 4, 20):
            checkpoints.save(step, *make_state(step), {'step': step})
            assert steps(tmp_path) == [str(step)]
            assert checkpoints.last_step() == step
            assert checkpoints.progress() == {'step': step}
            found = checkpoints.restore(params=make_params())['params']
            assert_same_bits(found, make_params(step))


def test_a_stage_is_saved_again_at_the_same_step_or_before(folder):
    """An epoch's end may fall on the step that was saved last."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(6, *make_state(1), {'step': 6})
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.progress() == {'step': 6}
    assert steps(folder) == ['6']


def test_a_kill_before_the_older_one_is_removed_leaves_the_newer(folder):
    save(folder.parent / 'other', 6, seed=3)
    shutil.move(folder.parent / 'other' / '6', folder / '6')
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last_step() == 6
        assert_same_bits(checkpoints.restore(params=make_params())['params'], make_params(3))
        checkpoints.save(7, *make_state(4), {'step': 7})
    assert steps(folder) == ['7']


@pytest.fixture
def quiet(monkeypatch):
    """Orbax drops the reads that it gave up; their late tracebacks do not matter here."""
    monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
    yield
    gc.collect()


# A kill while Orbax writes: it fills a folder of this name and renames it when it is complete.
@pytest.mark.parametrize('suffix', ['.orbax-checkpoint-tmp', '.orbax-checkpoint-tmp-1720000000'])
@pytest.mark.parametrize('whole', [True, False])
def test_a_temporary_folder_is_ignored(folder, suffix, whole):
    temporary = folder / f'9{suffix}'
    if whole:
        shutil.copytree(folder / '5', temporary)
    else:
        (temporary / 'params.orbax-checkpoint-tmp').mkdir(parents=True)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last_step() == 5
        assert checkpoints.progress() == PROGRESS
        assert_same_bits(checkpoints.restore(params=make_params(1))['params'], make_params())
        checkpoints.save(9, *make_state(2), {'step': 9})
    with Checkpoints(folder) as checkpoints:
        assert_same_bits(checkpoints.restore(params=make_params())['params'], make_params(2))


def test_a_temporary_folder_alone_is_no_checkpoint(folder):
    (folder / '5').rename(folder / '5.orbax-checkpoint-tmp')
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.last_step() is None
        assert checkpoints.progress() == {}


@pytest.mark.parametrize('inside', ['', 'params'])
def test_an_empty_step_is_refused(folder, inside):
    (folder / '9' / inside).mkdir(parents=True)
    with Checkpoints(folder) as checkpoints:
        for message in (
            refusal(checkpoints.progress),
            refusal(checkpoints.restore, best=make_params()),
        ):
            assert str(folder / '9') in message and 'damaged, or of another model' in message


@pytest.mark.usefixtures('quiet')
@pytest.mark.parametrize(
    'harm', ['halve', *(pytest.param(harm, marks=pytest.mark.slow) for harm in ('remove', 'empty'))]
)
def test_a_damaged_step_is_never_read_as_good(stored, tmp_path, harm):
    """Each file in turn; nothing depends on some of them."""
    params, optimizer, best = make_state()
    expected = {'params': params, 'optimizer': optimizer, 'best': best}
    files = [path.relative_to(stored) for path in sorted(stored.rglob('*')) if path.is_file()]
    refused = []
    for i, file in enumerate(files):
        folder = Path(shutil.copytree(stored, tmp_path / str(i)))
        content = (folder / file).read_bytes()
        if harm == 'remove':
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content[: len(content) // 2 if harm == 'halve' else 0])
        with Checkpoints(folder) as checkpoints:
            if checkpoints.last_step() is None:
                continue
            try:
                progress = checkpoints.progress()
                found = checkpoints.restore(**like(expected))
            except UserError as error:
                assert '\n' not in str(error)
                assert str(folder / '5') in str(error) and 'damaged' in str(error)
                refused.append(file.name if file.parts[1] == 'progress' else file.parts[1])
                continue
        assert progress == PROGRESS, file
        assert_same_bits(found, expected)
    # Damage to the arrays' data or to the progress is always noticed.
    assert {'params', 'optimizer', 'best', 'metadata'} <= set(refused)


def other_trees():
    params = make_params()
    return {
        'shape': make_params(rows=8),
        'rank': params | {'item': jnp.zeros(21)},
        'renamed': {'items': params['item'], 'block': params['block']},
        'missing': {'item': params['item']},
        'added': params | {'gate': jnp.zeros(2)},
        'deeper': params | {'item': {'table': params['item']}},
        'empty': {},
        'a list': list(params.values()),
    }


@pytest.mark.usefixtures('quiet')
@pytest.mark.parametrize('name', other_trees())
def test_another_model_is_refused(folder, name):
    with Checkpoints(folder) as checkpoints:
        message = refusal(checkpoints.restore, params=other_trees()[name])
        assert str(folder / '5') in message
        assert 'damaged, or of another model' in message
        assert len(message) < 1000
        # The checkpoint has not changed.
        assert_same_bits(checkpoints.restore(params=make_params(1))['params'], make_params())


def test_another_optimizer_is_refused(folder):
    other = optax.sgd(0.1, momentum=0.9).init(make_params())
    with Checkpoints(folder) as checkpoints:
        assert str(folder / '5') in refusal(checkpoints.restore, optimizer=other)


@pytest.mark.parametrize('rows', [6, 8, 12])
def test_an_item_table_is_restored_with_another_number_of_padding_rows(rows, tmp_path):
    """The number of padding rows depends on the devices; the other rows do not change."""
    table = np.arange(16, dtype=np.float32).reshape(8, 2)
    with Checkpoints(tmp_path / 'pretrain') as checkpoints:
        tree = {'item_table': jnp.asarray(table), 'rest': jnp.ones(3)}
        checkpoints.save(1, tree, tree, tree, PROGRESS)
        wanted = {'item_table': jax.ShapeDtypeStruct((rows, 2), jnp.float32), 'rest': jnp.ones(3)}
        found = checkpoints.restore(best=wanted)['best']
    np.testing.assert_array_equal(found['item_table'][:8], table[:rows])
    assert not np.any(found['item_table'][8:])


@pytest.mark.parametrize('name, shape', [('rest', (4,)), ('item_table', (8, 3))])
def test_nothing_else_is_restored_in_another_shape(name, shape, tmp_path):
    tree = {'item_table': jnp.ones((8, 2)), 'rest': jnp.ones(3)}
    with Checkpoints(tmp_path / 'pretrain') as checkpoints:
        checkpoints.save(1, tree, tree, tree, PROGRESS)
        refusal(checkpoints.restore, best=tree | {name: jnp.ones(shape)})


def test_an_item_that_was_never_saved_is_refused(folder):
    with Checkpoints(folder) as checkpoints:
        assert 'text' in refusal(checkpoints.restore, text=make_params())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'pretrain'):
        assert str(folder) in refusal(Checkpoints, folder)


# A full disk: the program saves, fails, and reads the checkpoint that is left.
FULL = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from fame_jax.training.checkpoint import Checkpoints
from fame_jax.errors import UserError

folder, limit, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def tree(rows):
    return {'item': jnp.asarray(np.random.default_rng(0).normal(size=rows), jnp.float32)}

with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, tree(9), tree(9), tree(9), {'step': 1})
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, tree(rows), tree(rows), tree(rows), {'step': 2})
        print('saved')
    except UserError as error:
        print('refused:', error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = checkpoints.restore(params={'item': jnp.zeros(9)})
    print(checkpoints.progress(), bool((found['params']['item'] == tree(9)['item']).all()))

with Checkpoints(folder) as checkpoints:  # as in the next command
    print(checkpoints.progress())
    checkpoints.save(2, tree(9), tree(9), tree(9), {'step': 2})
    print(checkpoints.progress(), sorted(path.name for path in folder.iterdir()))
"""


@pytest.fixture(scope='module')
def on_a_full_disk(tmp_path_factory):
    """The program's folder, output and errors on a disk of 400 kB."""
    # A long path, as users have: the message must still hold the reason.
    folder = tmp_path_factory.mktemp('disk-of-a-user-with-long-folder-names')
    script = 'mount -t tmpfs -o size=400k tmpfs "$0" && exec "$@"'
    inside = [str(folder), sys.executable, '-c', FULL, str(folder / 'pretrain'), '0', '400000']
    unshare = ['unshare', '--map-root-user', '--mount', 'sh', '-c']
    try:
        probe = subprocess.run([*unshare, script, str(folder), 'true'], capture_output=True)
    except FileNotFoundError:
        pytest.skip('no unshare here')
    if probe.returncode:
        pytest.skip('no small disk may be mounted here')
    done = subprocess.run([*unshare, script, *inside], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / 'pretrain', done.stdout.splitlines(), done.stderr


def check_the_previous_checkpoint(lines, folder):
    refused, before, again, after = lines
    assert refused.startswith('refused: ') and str(folder) in refused
    assert before == "{'step': 1} True"
    assert again == "{'step': 1}"
    assert after == "{'step': 2} ['2']"


def test_a_full_disk_leaves_the_previous_checkpoint(on_a_full_disk):
    folder, lines, _ = on_a_full_disk
    check_the_previous_checkpoint(lines, folder)


def test_the_message_names_the_full_disk(on_a_full_disk):
    _, lines, _ = on_a_full_disk
    assert re.search('no space left', lines[0], re.IGNORECASE)
    assert 'free some space there and run the same command again' in lines[0]


def test_a_full_disk_gives_no_traceback(on_a_full_disk):
    _, _, stderr = on_a_full_disk
    assert 'Traceback' not in stderr


def test_a_file_size_limit_leaves_the_previous_checkpoint(tmp_path):
    folder = tmp_path / 'pretrain'
    command = [sys.executable, '-c', FULL, str(folder), '100000', '100000']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_the_previous_checkpoint(done.stdout.splitlines(), folder)


SAVE_ON_THE_LAST_OF_FOUR = """
import sys, jax
from pathlib import Path
from fame_jax.training.checkpoint import Checkpoints
tree = jax.device_put({'w': jax.numpy.arange(3.0)}, jax.devices()[3])
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, tree, tree, tree, {})
"""


def test_a_checkpoint_of_another_device_is_restored_here(tmp_path):
    command = [sys.executable, '-c', SAVE_ON_THE_LAST_OF_FOUR, str(tmp_path / 'stage')]
    subprocess.run(command, env=environment_of(4), check=True)
    like = jax.eval_shape(lambda: {'w': jnp.zeros(3)})
    with Checkpoints(tmp_path / 'stage') as checkpoints:
        found = checkpoints.restore(best=like)['best']
    np.testing.assert_array_equal(found['w'], [0, 1, 2])


def test_tidy_removes_temporary_folders(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        (tmp_path / '9.orbax-checkpoint-tmp-77').mkdir()
        (tmp_path / 'kept').mkdir()
        checkpoints.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['kept']
