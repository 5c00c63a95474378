"""The examples of README and docs: they are read by the flag parser, and run page by page."""

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from fixtures import ROOT

from fame_jax.config import flags
from fame_jax.main import COMMANDS
from fame_jax.stages import settings

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
RUN = [page for page in PAGES if re.search(r'^```(bash|python)$', page.read_text(), re.MULTILINE)]
# Flags of commands that need the folder of an earlier command of their page.
OF_ANOTHER_RUN = {'prepared', 'backbone', 'append', 'from_run'}
LINK = re.compile(r'\]\((?!https?:|#)([^)#]+)(?:#([^)]*))?\)')


def blocks(page, *languages):
    """(language, whether a test runs it, text) of each fenced block of a page."""
    for language, note, text in re.findall(
        r'^```(\w+)( no-test)?\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL
    ):
        if language in languages:
            yield language, not note, text


def commands(text):
    """The command lines of a shell block, as lists of words, without comments."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_have_flags_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder without runs
    for _, _, text in blocks(page, 'bash'):
        for words in commands(text):
            main = words[:3] == ['python', '-m', 'fame_jax.main']
            if main or words[0] == 'fame_jax':
                arguments = words[3:] if main else words[1:]
                if arguments[:1] and arguments[0] in COMMANDS:
                    continue  # it has flags of its own
                arguments = [word for word in arguments if word not in ('--version', '--help')]
                given = flags.parse([word.replace('experiments/', '') for word in arguments])
                if not OF_ANOTHER_RUN & given.values.keys() and ':' not in given.get('model'):
                    settings.complete(given)  # also that the model has the options


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_compiles(page):
    for _, _, text in blocks(page, 'python'):
        compile(textwrap.dedent(text), str(page), 'exec')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve()
        assert path.exists(), f'{page.name} links to {target}'
        if anchor and path.suffix == '.md':
            heads = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
            slugs = [re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads]
            assert anchor in slugs, f'{page.name} links to {target}#{anchor}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_no_sign_of_a_number_begins_a_line(page):
    """Markdown would make '+ .002' at the start of a line an item of a list."""
    assert re.findall(r'^ *(?:[+] |- [.0-9]).*', page.read_text(), re.MULTILINE) == []


def test_the_readme_is_short():
    lines = (ROOT / 'README.md').read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('```'))
    assert len(lines) <= 150 and len(' '.join(lines[:first]).split()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize('page', RUN, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path):
    """All blocks of a page in order, in one folder and, of Python, in one process."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'Agg'}

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr

    python, is_new = '', False
    for language, is_run, text in [*blocks(page, 'bash', 'python'), ('bash', True, '')]:
        if is_run and language == 'python':
            python, is_new = python + text, True
        elif is_run:
            if is_new:  # with the blocks before it, whose names it uses
                run(sys.executable, '-c', python)
                is_new = False
            for words in commands(text):
                assert words[0] == 'python', f'{page.name}: {words[0]} is not run by this test'
                run(sys.executable, *words[1:])
