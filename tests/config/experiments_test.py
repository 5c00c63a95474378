"""The flag files in experiments/: they load, say only what differs, and come with a wheel."""

import tomllib
from pathlib import Path

import pytest

from fame_jax.config import FLAGS, Config, flags

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'experiments').glob('*.cfg'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_flag_file_makes_settings_that_fit(path):
    config = flags.complete(flags.parse([f'--flagfile={path}']), {}, {})
    assert config.run.workdir == f'runs/{path.stem}'
    assert (config.text.item_init == 'text') == ('_plus' in path.stem)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_flag_file_says_only_what_differs_from_the_defaults(path):
    values = flags.parse([f'--flagfile={path}']).values
    default = Config().flat()
    assert [n for n in values if n != 'dataset' and values[n] == default[n]] == []
    lines = [line for line in path.read_text().splitlines() if line.startswith('--')]
    assert len(lines) == len(values)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_flag_file_begins_with_a_lab_note_and_its_command(path):
    text = path.read_text()
    assert text.startswith('# FAME') or text.startswith('# Quickstart')
    assert f'python -m fame_jax.main --flagfile=experiments/{path.name}' in text


def test_the_program_finds_its_own_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.parse(['--flagfile=toys.cfg']).get('dataset') == 'toys'
    assert set(flags.packaged_files()) == {path.name for path in FILES}
    # A file in the current folder comes first.
    Path('toys.cfg').write_text('--dataset=beauty\n')
    assert flags.parse(['--flagfile=toys.cfg']).get('dataset') == 'beauty'


def test_the_readings_of_toys_differ_in_what_the_paper_says():
    ours, papers = (
        flags.parse([f'--flagfile=experiments/{name}.cfg']).values
        for name in ('toys', 'toys_paper')
    )
    assert {n for n in FLAGS if ours.get(n) != papers.get(n)} == {
        *('workdir', 'reading', 'positions', 'similarity')
    }


def test_requirements_are_those_of_the_package_and_its_tests():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    tested = ('dev', 'text', 'faiss', 'onnx', 'serve', 'search')
    wanted = {*project['dependencies'], *(line for name in tested for line in extras[name])}
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    assert {line for line in lines if line and not line.startswith('#')} == wanted
    assert {*extras} == {
        *('cuda', 'text', 'faiss', 'onnx', 'serve', 'search', 'dev', 'mlflow', 'trackio')
    }
