"""Folders import only downwards, and some folders never use some libraries.

Imports are read from the source text, so that made-up files can be checked too.
"""

import ast
import re
import subprocess

import pytest
from fixtures import ROOT

PACKAGE = 'fame_jax'

# From the top down: a folder imports only from rows below its own, and from itself.
ROWS = (
    ('main', 'api'),
    ('stages',),
    ('text', 'report'),
    ('serving', 'models'),
    ('losses', 'evaluation', 'training'),
    ('config', 'data', 'parallel', 'run_dir'),
    ('batch', 'errors', 'screen', 'machine'),
)
ROW = {folder: row for row, folders in enumerate(ROWS) for folder in folders}

# What a folder never imports, not even through other folders.
NEVER = {
    'data': {'jax', 'flax', 'optax', 'orbax', 'absl'},
    'report': {'jax', 'flax', 'optax', 'orbax', 'grain', 'absl'},
    'serving': {'flax', 'optax', 'orbax', 'grain', 'absl'},
    'models': {'fame_jax.data', 'fame_jax.training', 'fame_jax.evaluation', 'fame_jax.config'},
    'config': {'jax'},
    'run_dir': {'jax'},
}
USES_FLAGS = {'main', 'config'}
OUTSIDE = {'tests', 'benchmarks', 'experiments'}


def read_sources():
    """Dotted module name -> source text, of the whole package."""
    sources = {}
    for path in (ROOT / PACKAGE).rglob('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        sources['.'.join(parts).removesuffix('.__init__')] = path.read_text()
    return sources


def imports_of(module, source):
    """The dotted names that a source imports, anywhere in it; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{module}: write imports in full'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def folder_of(name):
    """The folder, or the file at the package's root, of a dotted name; '' for anything else."""
    parts = name.split('.')
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROW else ''


def find_faults(sources):
    """One line for each import that breaks a rule."""
    faults, uses = [], {}
    for module, source in sources.items():
        folder = folder_of(module)
        if not folder:
            faults += [f'{module} is in no row of ROWS'] if module != PACKAGE else []
            continue
        names = imports_of(module, source)
        uses[module] = names
        for name in names:
            other = folder_of(name)
            if other and other != folder and ROW[other] <= ROW[folder]:
                faults.append(f'{module} imports {name}, which is not below it')
            if name.split('.')[0] in OUTSIDE:
                faults.append(f'{module} imports {name}, which is outside the package')
            if name.startswith('absl.flags') and folder not in USES_FLAGS:
                faults.append(f'{module} uses absl.flags')
    for module in uses:
        folder = folder_of(module)
        reached = reach(module, uses)
        libraries = {name.split('.')[0] for name in reached}
        folders = {f'{PACKAGE}.{folder_of(name)}' for name in reached if folder_of(name) != folder}
        bad = (libraries | folders) & NEVER.get(folder, set())
        faults += [f'{module} reaches {name}' for name in sorted(bad)]
    return faults


def reach(module, uses):
    """All names that a module imports, itself or through other modules of the package."""
    reached, todo = set(), [module]
    while todo:
        for name in uses.get(todo.pop(), ()):
            if name not in reached:
                reached.add(name)
                todo += [name, name.rpartition('.')[0]]
    return reached


def test_imports_run_downwards():
    assert find_faults(read_sources()) == []


def test_the_package_itself_imports_only_at_first_use():
    tree = ast.parse(read_sources()[PACKAGE])
    imported = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import)}
    assert imported == {'import importlib'}


@pytest.mark.parametrize(
    'module, source, fault',
    [
        ('losses.full', 'from fame_jax.models import layers', 'which is not below it'),
        ('models.fame', 'from fame_jax.serving import topk', 'which is not below it'),
        ('data.prepare', 'def f():\n    import jax', 'data.prepare reaches jax'),
        ('data.prepare', 'from fame_jax.parallel import mesh', 'which is not below it'),
        ('report.html', 'from fame_jax.losses import full', 'report.html reaches jax'),
        (
            'models.fame',
            'from fame_jax.training import loop',
            'models.fame reaches fame_jax.training',
        ),
        ('models.fame', 'from absl.flags import FLAGS', 'uses absl.flags'),
        ('serving.recommender', 'import optax', 'serving.recommender reaches optax'),
        ('stages.train', 'from tests import oracles', 'outside the package'),
        ('stages.train', 'from fame_jax.main import main', 'which is not below it'),
        ('helpers', '', 'in no row'),
    ],
)
def test_a_made_up_import_is_a_fault(module, source, fault):
    sources = {
        'fame_jax.losses.full': 'import jax',
        'fame_jax.parallel.mesh': 'import jax',
        'fame_jax.training.loop': 'import optax',
        f'fame_jax.{module}': source,
    }
    assert any(fault in line for line in find_faults(sources))


def test_clean_made_up_imports_have_no_fault():
    sources = {
        'fame_jax.stages.train': 'from fame_jax.models import fame',
        'fame_jax.models.fame': 'import jax\nfrom fame_jax.losses import full',
        'fame_jax.losses.full': 'import jax\nfrom fame_jax.batch import Batch',
        'fame_jax.data.prepare': 'import numpy\nfrom fame_jax.errors import UserError',
        'fame_jax.data.readers': 'from fame_jax.data import prepare',
    }
    assert find_faults(sources) == []


def test_the_root_of_the_package_is_small():
    assert len(list((ROOT / PACKAGE).glob('*.py'))) <= 10
    assert len(ROWS) <= 8


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no checkout')
def test_names_of_files_are_plain():
    """A quote that the shell reads otherwise than meant leaves a file named by a sentence."""
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = listed.stdout.split('\0')[:-1]
    assert 'README.md' in names
    assert [name for name in names if not re.fullmatch(r'[\w./-]+', name, re.ASCII)] == []
