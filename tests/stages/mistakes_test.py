"""A mistake of the user gets one clear line and exit code 2, and no file changes."""

import gzip
import os
import shutil
import subprocess
import sys

import pytest
from fixtures import ROOT
from run_fixtures import SMALL_RUN, sequence_text

from fame_jax import stages
from fame_jax.main import main

QUICK = ['--progress=none', '--width=8', '--max_length=10', '--row_length=16']
TINY = '--synthetic=users=50,items=40'


def log_text(time='{t}', rating='5'):
    rows = [f'u{u},i{i},{time.format(t=100 * u + i)},{rating}' for u in range(8) for i in range(6)]
    return 'user,item,timestamp,rating\n' + '\n'.join(rows) + '\n'


def snapshot(folder):
    """Every file below a folder with its bytes, but flags.cfg, which lists further stages."""
    files = (p for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'flags.cfg')
    return {p: p.read_bytes() for p in files}


def refused(capsys, *argv):
    """Runs main, requires exit code 2 and one line on stderr, and returns the line."""
    capsys.readouterr()
    code = main([*QUICK, *argv])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ''
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1, captured.err
    assert len(captured.err) < 700
    return captured.err


# The name and content of a file, further flags, and words of the line.
FILES = {
    'empty': ('x.txt', b'', [], ['x.txt', 'empty']),
    'binary junk': ('x.txt', bytes(range(256)) * 40, [], ['x.txt']),
    'NUL byte': ('x.txt', b'1 2 3 4\n2 3\x004 5\n', [], ['x.txt', 'line 2']),
    'a line without items': ('x.txt', b'1 2 3 4\n2\n', [], ['x.txt', 'line 2']),
    'the same user twice': ('x.txt', b'1 2 3 4\n2 2 3 4\n1 5 6\n', [], ['x.txt', 'line 3', '1']),
    'records, or the same user twice': (
        'x.txt',
        b'1 2 3 4\n2 2 3 4\n1 5 6 7\n',
        [],
        ['x.txt', 'user:1,item:2', 'each user on one line'],
    ),
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
    'UTF-16 text without a mark': ('x.txt', sequence_text().encode('utf-16-le'), [], ['x.txt']),
    'a line of 10 MB': ('x.txt', b'1 2 3 4\n2 ' + b'7 ' * 5_000_000 + b'\n', [], ['line 2']),
    'gzip cut short': (
        'x.txt.gz',
        gzip.compress(sequence_text(2000).encode())[:900],
        [],
        ['x.txt'],
    ),
    'text with the name of gzip': ('x.txt.gz', b'1 2 3 4\n', [], ['x.txt.gz', 'gzip']),
    'CSV without the column': (
        'x.csv',
        log_text().encode(),
        ['--columns=item:article'],
        ['x.csv', 'article', 'item'],
    ),
    'CSV with unknown column names': ('x.csv', b'a,b,c\n1,2,3\n', [], ['x.csv', "'a', 'b', 'c'"]),
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
    'broken JSON': ('x.jsonl', b'{"user": 1, "item"\n', [], ['x.jsonl', 'line 1']),
    'parquet cut short': ('x.parquet', b'PAR1 and no more', [], ['x.parquet']),
    'an unknown suffix': ('x.xlsx', b'PK', [], ['x.xlsx', '.csv']),
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
    'heads that do not divide': (['--width=10', '--num_heads=4'], ['--width=10', 'num_heads=4']),
    'dropout of one': (['--dropout=1'], ['--dropout=1', 'at most 0.99']),
    'a negative epoch': (['--pretrain_epochs=-1'], ['--pretrain_epochs=-1']),
    'no experts': (['--num_experts=0'], ['--num_experts=0', 'at least 1']),
    'temperature of zero': (['--temperature=0'], ['--temperature=0']),
    'NaN for a rate': (['--learning_rate=nan'], ['--learning_rate=nan']),
    'an unknown choice': (['--positions=absolute'], ['--positions=absolute']),
    'rows shorter than histories': (['--row_length=4'], ['--row_length=4', '--max_length=10']),
    'experts that stay alike': (['--model_options=expert_noise=0'], ['expert_noise']),
    'SASRec to fine-tune': (
        ['--model=sasrec', '--stages=finetune'],
        ['--model=sasrec', '--stages=prepare,pretrain,evaluate'],
    ),
    'a word that is no flag': (['experiments/toys.cfg'], ['experiments/toys.cfg', 'not a flag']),
    'a flag file that is not there': (['--flagfile=none.cfg'], ['none.cfg']),
    'a flag file that is a folder': (['--flagfile=.'], ['Is a directory']),
    'an unknown data set': (['--dataset=tois'], ['tois', 'toys']),
    'a data set that is not there': (['--dataset=nowhere/log.csv'], ['nowhere/log.csv']),
    'a folder for a data set': ([f'--dataset={ROOT / "docs"}'], ['docs: ', 'folder']),
    'a backbone that is not there': (
        ['--dataset=synthetic', '--stages=prepare,finetune', '--backbone=nowhere'],
        ['nowhere'],
    ),
    'fine-tuning before pre-training': (
        ['--dataset=synthetic', '--stages=prepare,finetune', TINY],
        ['pretrain'],
    ),
    'training before preparing': (['--stages=pretrain'], ['prepare']),
    'evaluating before preparing': (['--stages=evaluate'], ['prepare']),
}


@pytest.mark.parametrize('case', FLAGS)
def test_a_faulty_flag(case, tmp_path, capsys):
    flags, words = FLAGS[case]
    line = refused(capsys, f'--workdir={tmp_path / "run"}', *flags)
    for word in words:
        assert word in line, line


HALF = os.fsdecode(b'caf\xe9')  # an argument in Latin-1 where UTF-8 is expected


@pytest.mark.parametrize(
    'argument',
    [
        *(f'--{name}={HALF}' for name in ('workdir', 'dataset', 'prepared', 'backbone', 'out')),
        *(f'--{name}={HALF}' for name in ('items', 'histories', 'columns', 'flagfile', 'stages')),
        *(f'--{HALF}=1', HALF, f'--model={HALF}', f'--width={HALF}', f'--distributed={HALF}'),
    ],
)
def test_half_a_character_in_an_argument(argument, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, argument)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_another_run_names_both_values(tmp_path, capsys):
    workdir = tmp_path / 'run'
    common = [f'--workdir={workdir}', '--stages=prepare', TINY]
    assert main([*QUICK, *common, '--synthetic=seed=1']) == 0
    before = snapshot(workdir)
    line = refused(capsys, *common, '--synthetic=seed=2')
    assert '--synthetic=seed=2 (there: 1)' in line and str(workdir) in line
    assert snapshot(workdir) == before


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / 'run').write_text('mine')
    assert str(tmp_path / 'run') in refused(capsys, f'--workdir={tmp_path / "run"}')
    assert (tmp_path / 'run').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / 'closed').mkdir(mode=0o500)
    assert 'ermission denied' in refused(capsys, f'--workdir={tmp_path / "closed" / "run"}')


def test_a_damaged_flags_cfg(tmp_path, capsys):
    (tmp_path / 'flags.cfg').write_bytes(b'--seed=1\n--colour=blue\n')
    line = refused(capsys, f'--workdir={tmp_path}')
    assert 'flags.cfg' in line and '--colour' in line


def test_damaged_prepared_data(tmp_path, capsys):
    assert main([*QUICK, f'--workdir={tmp_path}', '--stages=prepare', TINY]) == 0
    path = tmp_path / 'dataset' / 'items.npy'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'dataset' in refused(capsys, f'--workdir={tmp_path}', '--stages=evaluate')


def test_a_backbone_of_other_data_or_another_model(trained, tmp_path, capsys):
    tune = [*SMALL_RUN, '--stages=prepare,finetune', f'--backbone={trained}']
    line = refused(capsys, *tune, '--synthetic=seed=7', f'--workdir={tmp_path / "a"}')
    assert 'other data' in line
    changes = {'num_blocks=3': 1, 'similarity=dot': 'cosine'}
    changes['model_options=attention_scale=model'] = 'head'
    for flag, stored in changes.items():
        line = refused(capsys, *tune, f'--{flag}', f'--workdir={tmp_path / flag}')
        assert f'--{flag} (there: {stored})' in line and str(trained) in line


def test_checkpoints_moved_from_a_run_on_other_data(trained, tmp_path, capsys):
    flags = [*SMALL_RUN, '--synthetic=seed=7', f'--workdir={tmp_path}']
    assert main([*flags, '--stages=prepare']) == 0
    shutil.copytree(trained / 'checkpoints', tmp_path / 'checkpoints')
    before = snapshot(tmp_path)
    assert 'other data' in refused(capsys, f'--workdir={tmp_path}', '--stages=evaluate')
    assert snapshot(tmp_path) == before


LIMITED = """
import resource, sys
from fame_jax.main import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
cli()
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """Files may not grow past a few KiB in the second run, as if the disk were full."""
    flags = [*QUICK, TINY, '--model=sasrec', f'--workdir={tmp_path / "run"}']
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


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path, capsys):
    flags = [f'--workdir={tmp_path}', TINY, '--model=sasrec', '--stages=prepare,pretrain']
    flags += ['--learning_rate=10', '--weight_decay=10', '--similarity=dot', '--num_blocks=1']
    line = refused(capsys, *flags, '--pretrain_epochs=200', '--patience=200')
    assert 'pretrain: ' in line and 'lower the learning rate' in line


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(context):
        raise ZeroDivisionError('a bug')

    monkeypatch.setitem(stages.STAGES, 'prepare', broken)
    with pytest.raises(ZeroDivisionError):
        main([*QUICK, f'--workdir={tmp_path}', '--stages=prepare'])


# Unusual files that are read.
OK_FILES = {
    'CRLF': ('x.txt', sequence_text().replace('\n', '\r\n').encode()),
    'a byte-order mark': ('x.txt', b'\xef\xbb\xbf' + sequence_text().encode()),
    'blank last lines': ('x.txt', sequence_text().encode() + b'\n\n'),
    'users too short': ('x.txt', sequence_text().encode() + b'99 1 2\n'),
    'ids that are words': ('x.txt', sequence_text().replace(' ', ' näme-').encode()),
    'a plain log': ('x.csv', log_text().encode()),
}


@pytest.mark.parametrize('case', OK_FILES)
def test_an_unusual_file_is_prepared(case, tmp_path):
    name, content = OK_FILES[case]
    (tmp_path / name).write_bytes(content)
    flags = [f'--dataset={tmp_path / name}', f'--workdir={tmp_path / "run"}', '--stages=prepare']
    assert main([*QUICK, *flags]) == 0
    assert (tmp_path / 'run' / 'dataset' / 'dataset.json').is_file()
