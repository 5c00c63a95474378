"""A user's mistake gets one clear line and exit code 2, and costs nothing that was there."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fame_jax.main import main

ROOT = Path(__file__).parent.parent
QUICK = ['--progress=none', '--width=8', '--num_experts=2', '--max_length=10', '--row_length=16']


def sequence_text(users=30, items=6):
    """A clean sequence file: user, then all items in an order of his own."""
    draw = np.random.default_rng(0)
    return ''.join(
        f'{u} {" ".join(str(i + 1) for i in draw.permutation(items))}\n'
        for u in range(1, users + 1)
    )


def log_text(time='{t}', rating='5'):
    rows = [f'u{u},i{i},{time.format(t=100 * u + i)},{rating}' for u in range(8) for i in range(6)]
    return 'user,item,timestamp,rating\n' + '\n'.join(rows) + '\n'


def snapshot(folder):
    """Every file below a folder, with its bytes; but the flags, which learn of further stages."""
    files = (p for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'flags.cfg')
    return {p: p.read_bytes() for p in files}


def refused(capsys, *argv):
    """Runs main, holds it to one line and exit code 2, and returns the line."""
    capsys.readouterr()
    code = main([*QUICK, *argv])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ''
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1, captured.err
    assert len(captured.err) < 700
    return captured.err


# What a file holds, its name, further flags, and what the line must say.
FILES = {
    'empty': ('x.txt', b'', [], ['x.txt', 'empty']),
    'binary junk': ('x.txt', bytes(range(256)) * 40, [], ['x.txt']),
    'NUL byte': ('x.txt', b'1 2 3 4\n2 3\x004 5\n', [], ['x.txt', 'line 2']),
    'a line without items': ('x.txt', b'1 2 3 4\n2\n', [], ['x.txt', 'line 2']),
    'the same user twice': ('x.txt', b'1 2 3 4\n2 2 3 4\n1 5 6 7\n', [], ['x.txt', 'line 3', '1']),
    'no user with three items': (
        'x.txt',
        b'1 2 3\n2 3 2\n',
        ['--k_core=0'],
        ['x.txt', '3'],
    ),
    'nothing left by the k-core': (
        'x.txt',
        sequence_text().encode(),
        ['--k_core=500'],
        ['x.txt', '500'],
    ),
    'Latin-1 text': ('x.txt', 'u1 café thé lait\n'.encode('latin-1'), [], ['x.txt', 'line 1']),
    'UTF-16 text': ('x.txt', sequence_text().encode('utf-16'), [], ['x.txt']),
    'a line of 10 MB': ('x.txt', b'1 2 3 4\n2 ' + b'7 ' * 5_000_000 + b'\n', [], ['line 2']),
    'gzip cut short': (
        'x.txt.gz',
        gzip.compress(sequence_text(2000).encode())[:900],
        [],
        ['x.txt'],
    ),
    'not gzip at all': ('x.txt.gz', b'1 2 3 4\n', [], ['x.txt.gz', 'gzip']),
    'CSV without the column': (
        'x.csv',
        log_text().encode(),
        ['--item_column=article'],
        ['x.csv', 'article', 'item'],
    ),
    'CSV with names nobody guesses': ('x.csv', b'a,b,c\n1,2,3\n', [], ['x.csv', "'a', 'b', 'c'"]),
    'text for a time': ('x.csv', log_text(time='soon').encode(), [], ['x.csv', 'soon']),
    'NaN for a time': ('x.csv', log_text(time='NaN').encode(), [], ['x.csv', 'line 2']),
    'a missing time': ('x.csv', log_text(time='').encode(), [], ['x.csv', 'line 2']),
    'text for a rating': (
        'x.csv',
        log_text(rating='good').encode(),
        ['--min_rating=3'],
        ['x.csv', 'good'],
    ),
    'a header alone': ('x.csv', b'user,item,timestamp\n', [], ['x.csv']),
    'a row too long': ('x.csv', b'user,item,timestamp\nu,i,1,2,3\n', [], ['x.csv', 'line 2']),
    'JSON that is none': ('x.jsonl', b'{"user": 1, "item"\n', [], ['x.jsonl', 'line 1']),
    'parquet cut short': ('x.parquet', b'PAR1 and no more', [], ['x.parquet']),
    'a suffix nobody knows': ('x.xlsx', b'PK', [], ['x.xlsx', '.csv']),
}


@pytest.mark.parametrize('case', FILES)
def test_a_faulty_file(case, tmp_path, capsys):
    name, content, flags, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    before = snapshot(tmp_path)
    workdir = tmp_path / 'run'
    line = refused(capsys, f'--dataset={tmp_path / name}', f'--workdir={workdir}', *flags)
    for word in words:
        assert word in line, line
    after = snapshot(tmp_path)
    assert {p: after[p] for p in before} == before
    assert not (workdir / 'dataset').exists()


FLAGS = {
    'unknown flag': (['--hedas=2'], ['--hedas']),
    'a flag close to one': (['--num_head=2'], ['did you mean --num_heads']),
    'text for a number': (['--width=wide'], ['--width', 'wide']),
    'an unknown stage': (['--stages=prepare,pretrian'], ['pretrian', 'did you mean pretrain']),
    'no stage': (['--stages='], ['--stages']),
    'heads that do not divide': (['--width=10', '--num_heads=4'], ['--width=10', '--num_heads=4']),
    'dropout of one': (['--dropout=1'], ['--dropout=1', 'at most 0.99']),
    'a negative epoch': (['--pretrain_epochs=-1'], ['--pretrain_epochs=-1']),
    'no experts': (['--num_experts=0'], ['--num_experts=0', 'at least 1']),
    'temperature of zero': (['--temperature=0'], ['--temperature=0']),
    'NaN for a rate': (['--learning_rate=nan'], ['--learning_rate=nan']),
    'an unknown choice': (['--positions=absolute'], ['--positions=absolute']),
    'rows shorter than histories': (['--row_length=4'], ['--row_length=4', '--max_length=10']),
    'experts that stay alike': (['--expert_noise=0'], ['--expert_noise']),
    'SASRec to fine-tune': (
        ['--model=sasrec', '--stages=finetune'],
        ['--model=sasrec', '--stages='],
    ),
    'a word that is no flag': (['experiments/toys.cfg'], ['experiments/toys.cfg', 'not a flag']),
    'a flag file that is not there': (['--flagfile=none.cfg'], ['none.cfg']),
    'a flag file that is a folder': (['--flagfile=.'], ['Is a directory']),
    'an unknown data set': (['--dataset=tois'], ['tois', 'toys']),
    'a data set that is not there': (['--dataset=nowhere/log.csv'], ['nowhere/log.csv']),
    'a folder for a data set': (['--dataset=.'], ['folder']),
    'a backbone that is not there': (
        ['--dataset=synthetic', '--stages=prepare,finetune', '--backbone_from=nowhere'],
        ['nowhere'],
    ),
    'fine-tuning before pre-training': (
        ['--dataset=synthetic', '--stages=prepare,finetune', '--synthetic_users=50'],
        ['pretrain'],
    ),
    'training before preparing': (['--stages=pretrain'], ['prepare']),
    'judging what is not there': (['--stages=evaluate'], ['prepare']),
}


@pytest.mark.parametrize('case', FLAGS)
def test_a_faulty_flag(case, tmp_path, capsys):
    flags, words = FLAGS[case]
    line = refused(capsys, f'--workdir={tmp_path / "run"}', *flags)
    for word in words:
        assert word in line, line


def test_a_workdir_of_another_run_names_both_values(tmp_path, capsys):
    workdir = tmp_path / 'run'
    common = [f'--workdir={workdir}', '--stages=prepare', '--synthetic_users=50']
    assert main([*QUICK, *common, '--seed=1']) == 0
    before = snapshot(workdir)
    line = refused(capsys, *common, '--seed=2')
    assert '--seed=2 (there: 1)' in line and str(workdir) in line
    assert snapshot(workdir) == before


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / 'run').write_text('mine')
    assert str(tmp_path / 'run') in refused(capsys, f'--workdir={tmp_path / "run"}')
    assert (tmp_path / 'run').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / 'closed').mkdir(mode=0o500)
    assert 'ermission denied' in refused(capsys, f'--workdir={tmp_path / "closed" / "run"}')


def test_flags_of_a_run_that_were_damaged(tmp_path, capsys):
    (tmp_path / 'flags.cfg').write_bytes(b'--seed=1\n--colour=blue\n')
    line = refused(capsys, f'--workdir={tmp_path}')
    assert 'flags.cfg' in line and '--colour' in line


def test_prepared_data_that_were_damaged(tmp_path, capsys):
    assert main([*QUICK, f'--workdir={tmp_path}', '--stages=prepare', '--synthetic_users=50']) == 0
    path = tmp_path / 'dataset' / 'sequences.npz'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'dataset' in refused(capsys, f'--workdir={tmp_path}', '--stages=evaluate')


def test_a_checkpoint_of_other_data_or_another_model(tmp_path, capsys):
    small = ['--synthetic_users=50', '--synthetic_items=40', '--pretrain_epochs=1']
    stages = '--stages=prepare,pretrain'
    one, other = tmp_path / 'one', tmp_path / 'other'
    assert main([*QUICK, *small, f'--workdir={one}', stages]) == 0
    assert main([*QUICK, *small, f'--workdir={other}', '--synthetic_seed=7', stages]) == 0
    tune = [*small, '--stages=prepare,finetune', f'--backbone_from={one}']
    line = refused(capsys, *tune, '--synthetic_seed=7', f'--workdir={tmp_path / "a"}')
    assert 'other data' in line
    line = refused(capsys, *tune, '--num_blocks=3', f'--workdir={tmp_path / "b"}')
    assert '--num_blocks=3 (there: 2)' in line and str(one) in line
    line = refused(capsys, *tune, '--similarity=dot', f'--workdir={tmp_path / "c"}')
    assert '--similarity=dot (there: cosine)' in line
    # The other run's checkpoints put in this run's place.
    (other / 'checkpoints').rename(tmp_path / 'moved')
    (one / 'checkpoints').rename(other / 'checkpoints')
    before = snapshot(other)
    line = refused(capsys, f'--workdir={other}', '--stages=evaluate')
    assert 'other data' in line
    assert snapshot(other) == before


LIMITED = """
import resource, sys
from fame_jax.main import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
cli()
"""


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path):
    """Files may not grow past a few KiB in the second run, as if the disk were full."""
    flags = [
        *QUICK,
        '--synthetic_users=50',
        '--synthetic_items=40',
        f'--workdir={tmp_path / "run"}',
    ]
    command = [sys.executable, '-m', 'fame_jax.main', *flags, '--stages=prepare,pretrain']
    process = subprocess.Popen(
        [*command, '--progress=lines', '--pretrain_epochs=500', '--patience=500'],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if 'pretrain 2/' in line:
            process.terminate()
    process.wait()
    saved = [p for p in (tmp_path / 'run/checkpoints/pretrain').iterdir() if p.name.isdigit()]
    before = snapshot(saved[0])
    arguments = [f'--workdir={tmp_path / "run"}', '--stages=pretrain', '--progress=none']
    done = subprocess.run(
        [sys.executable, '-c', LIMITED, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    assert snapshot(saved[0]) == before


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path, capsys):
    line = refused(
        capsys,
        f'--workdir={tmp_path}',
        '--synthetic_users=50',
        '--learning_rate=10',
        '--weight_decay=10',
        '--similarity=dot',
        '--pretrain_epochs=200',
        '--patience=200',
        '--stages=prepare,pretrain',
    )
    assert 'learning rate' in line


def test_a_programs_fault_keeps_its_traceback(tmp_path, monkeypatch):
    from fame_jax import stages

    def broken(run):
        raise ZeroDivisionError('a bug')

    monkeypatch.setitem(stages.STAGES, 'prepare', broken)
    with pytest.raises(ZeroDivisionError):
        main([*QUICK, f'--workdir={tmp_path}', '--stages=prepare'])


# Not mistakes.
OK_FILES = {
    'CRLF': ('x.txt', sequence_text().replace('\n', '\r\n').encode()),
    'a byte-order mark': ('x.txt', b'\xef\xbb\xbf' + sequence_text().encode()),
    'blank last lines': ('x.txt', sequence_text().encode() + b'\n\n'),
    'users too short': ('x.txt', sequence_text().encode() + b'99 1 2\n'),
    'ids that are words': ('x.txt', sequence_text().replace(' ', ' näme-').encode()),
    'a plain log': ('x.csv', log_text().encode()),
}


@pytest.mark.parametrize('case', OK_FILES)
def test_what_is_no_mistake(case, tmp_path):
    name, content = OK_FILES[case]
    (tmp_path / name).write_bytes(content)
    flags = [f'--dataset={tmp_path / name}', f'--workdir={tmp_path / "run"}', '--stages=prepare']
    assert main([*QUICK, *flags]) == 0
    assert (tmp_path / 'run' / 'dataset' / 'dataset.json').is_file()
