"""The walls of the house: who may import whom, read from the sources and not by importing.

The checker takes sources as text, so that it can be fed made-up ones and be seen to fail.
"""

import ast
import textwrap
from pathlib import Path

import pytest

PACKAGE = 'fame_jax'
FOLDER = Path(__file__).resolve().parent.parent / PACKAGE

# From the top down. A room imports only from rooms below it, or from files within itself.
LEVELS = (
    ('main', 'demo'),
    ('stages',),
    ('report',),
    ('text', 'serving'),
    ('results',),
    ('explain', 'export', 'facts', 'catalogue'),
    ('run', 'train', 'serve', 'item_table', 'contrast'),
    ('encoder', 'charts', 'page'),
    ('text_model', 'insides'),
    (
        *('models', 'data', 'evaluate', 'probe', 'plots', 'screen', 'recommendations', 'markup'),
        'programs',
    ),
    ('losses', 'batch', 'config', 'checkpoint', 'surgery', 'records', 'profile'),
    ('sharding',),
    ('errors', 'recipes', 'letters', 'published'),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# The only rooms that a room may import, where that is less than everything below it.
ONLY = {
    'evaluate': {'batch', 'sharding'},
    'losses': {'sharding'},
    'batch': set(),
    'errors': set(),
    'recipes': set(),
    'probe': {'batch', 'errors'},
    'surgery': {'errors'},
    'records': {'errors'},
}
# Rooms and libraries that a room must not reach, not even through what it imports.
FORBIDDEN = {
    'data': {'jax', 'flax', 'optax', 'fame_jax.models'},
    'models': {
        'fame_jax.data',
        'fame_jax.train',
        'fame_jax.programs',
        'fame_jax.evaluate',
        'fame_jax.checkpoint',
        'fame_jax.stages',
        'fame_jax.run',
        'fame_jax.results',
    },
    **{
        room: {'fame_jax.train', 'fame_jax.programs', 'optax', 'grain', 'orbax', 'absl', 'flax'}
        for room in ('serve', 'explain', 'export', 'demo')
    },
    'plots': {'jax'},
}
OUTSIDE = {'tests', 'benchmarks', 'experiments'}
READS_FLAGS = {'fame_jax.main', 'fame_jax.config'}
# Files of models/ that every paper's model may use; a paper's file is none of them.
SHARED_MODELS = {
    *('items', 'layers', 'sasrec', 'bert4rec', 'objective', 'views', 'kmeans', 'session_graph'),
    *('projection', 'bert', 'facet_block', 'experts'),
}


def imports(module: str, source: str, package: bool = False) -> list[str]:
    """Dotted names of all that a source imports, wherever in it, `from a import b` as a.b."""
    found = []
    for node in ast.walk(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split('.')
            base = parts[: len(parts) - node.level + package] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            found += [f'{base}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split('.')[-1]
            if called in ('import_module', '__import__') and isinstance(node.args[0].value, str):
                found.append(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == PACKAGE:
            found += [] if node.attr.startswith('__') else [f'{PACKAGE}.{node.attr}']
    return found


def room_of(name: str) -> str:
    """The room that a dotted name lies in; '' for other people's and for the package itself."""
    parts = name.split('.')
    inside = parts[0] == PACKAGE and len(parts) > 1 and not parts[1].startswith('__')
    return parts[1] if inside else ''


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(place + '.')


def file_faults(module: str, names: list[str]) -> list[str]:
    """What one file imports and should not."""
    room, file = room_of(module), module.split('.')[-1]
    if not room:
        return [f'{module} imports {name}' for name in names if room_of(name)]
    if room not in LEVEL:
        return [f'{module} has no level yet: name it in LEVELS']
    found = []
    for name in names:
        other = room_of(name)
        if name.split('.')[0] in OUTSIDE:
            found.append(f'{module} imports {name}, which is no part of the package')
        if (name == 'absl' or within(name, 'absl.flags')) and module not in READS_FLAGS:
            found.append(f'{module} touches absl.flags')
        if not other:
            continue
        if other != room:
            if other not in LEVEL:
                found.append(f'{module} imports {name}, which has no level')
            elif LEVEL[other] <= LEVEL[room]:
                found.append(f'{module} imports {name}: not downwards')
            if room in ONLY and other not in ONLY[room]:
                found.append(f'{module} imports {name}, and may only {sorted(ONLY[room])}')
        if room == 'models' and file != 'build':
            if other == 'config':
                found.append(f'{module} imports {name}: only build knows Config')
            of_models = [*name.split('.'), ''][2]
            if other == 'models' and of_models not in SHARED_MODELS:
                found.append(f'{module} imports {name}: papers do not know one another')
    return found


def faults(sources: dict[str, str]) -> list[str]:
    """Every wall that is broken in sources by module; a package's own file is named PACKAGE."""
    packages = {m.rpartition('.')[0] for m in sources}
    names = {m: imports(m, s, package=m in packages) for m, s in sources.items()}
    graph = {m: {file_of(n, sources) for n in names[m]} - {''} for m in sources}
    found = [fault for m in sources for fault in file_faults(m, names[m])]
    for module in sources:
        reached = reach(graph, module)
        if module in reached:
            found.append(f'{module} imports itself in a circle')
        for place in FORBIDDEN.get(room_of(module), ()):
            for via in sorted({module} | reached):
                if any(within(name, place) for name in names[via]):
                    found.append(f'{module} reaches {place} by {via}')
    return found


def file_of(name: str, sources: dict[str, str]) -> str:
    """The file that a dotted name lies in; '' for other people's and for the package itself."""
    while name and name not in sources:
        name = name.rpartition('.')[0]
    return '' if name == PACKAGE else name


def reach(graph: dict[str, set[str]], module: str) -> set[str]:
    """All files that are imported in the end."""
    found, waiting = set(), [module]
    while waiting:
        for file in graph[waiting.pop()] - found:
            found.add(file)
            waiting.append(file)
    return found


def house() -> dict[str, str]:
    """The sources of the package by module."""
    sources = {}
    for path in sorted(FOLDER.rglob('*.py')):
        parts = [PACKAGE, *path.relative_to(FOLDER).with_suffix('').parts]
        parts = parts[:-1] if parts[-1] == '__init__' else parts
        sources['.'.join(parts)] = path.read_text(encoding='utf-8')
    return sources


def test_the_house_keeps_its_walls():
    sources = house()
    assert {'fame_jax', 'fame_jax.main', 'fame_jax.models.fame'} <= set(sources)
    assert faults(sources) == []


def test_the_checker_finds_the_imports_that_are_there():
    """What stands in main and in train is known, so a checker that sees nothing is seen."""
    sources = house()
    assert 'fame_jax.stages' in imports('fame_jax.main', sources['fame_jax.main'])  # a late one
    assert 'fame_jax.checkpoint.Checkpoints' in imports('fame_jax.train', sources['fame_jax.train'])


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('import a.b, c as d', ['a.b', 'c']),
        ('from a import b, c as d', ['a.b', 'a.c']),
        ('def f():\n    if x:\n        from a.b import c', ['a.b.c']),
        ('from . import layers', ['fame_jax.models.layers']),
        ('from .layers import dense', ['fame_jax.models.layers.dense']),
        ('from .. import config', ['fame_jax.config']),
        ('from ..data.pipeline import epoch', ['fame_jax.data.pipeline.epoch']),
        ("importlib.import_module('fame_jax.train')", ['fame_jax.train']),
        ("__import__('jax')", ['jax']),
        ('import fame_jax\nfame_jax.train.fit()', ['fame_jax', 'fame_jax.train']),
        ('import fame_jax\nprint(fame_jax.__version__)', ['fame_jax']),
        ("'import jax'  # import jax", []),
    ],
)
def test_imports_of_a_source(source, expected):
    assert imports('fame_jax.models.fame', source) == expected


def test_relative_imports_of_a_package():
    assert imports('fame_jax.models', 'from . import fame', True) == ['fame_jax.models.fame']
    assert imports('fame_jax.models', 'from .. import data', True) == ['fame_jax.data']


@pytest.mark.parametrize(
    ('module', 'source', 'fault'),
    [
        ('stages', 'from fame_jax.main import main', 'not downwards'),
        ('errors', 'def f():\n    import fame_jax.main', 'not downwards'),
        ('train', 'from absl import flags', 'touches absl.flags'),
        ('train', 'import absl', 'touches absl.flags'),
        ('data.pipeline', 'import jax.numpy as jnp', 'reaches jax by'),
        ('data.pipeline', 'def f():\n    import flax', 'reaches flax by'),
        ('data.pipeline', 'from optax import adam', 'reaches optax by'),
        ('data.pipeline', 'from fame_jax.models import layers', 'not downwards'),
        ('models.fame', 'from fame_jax.data import pipeline', 'reaches fame_jax.data'),
        ('models.build', 'from fame_jax.evaluate import rank', 'reaches fame_jax.evaluate'),
        ('models.build', 'from fame_jax.train import fit', 'reaches fame_jax.train'),
        ('models.build', 'from fame_jax.checkpoint import Checkpoints', 'reaches fame_jax.check'),
        ('models.build', 'from fame_jax import stages', 'reaches fame_jax.stages'),
        ('models.fame', 'from fame_jax.config import Config', 'only build knows Config'),
        ('models.fame', 'from fame_jax.models.build import build', 'papers do not know'),
        ('models.fame', 'from fame_jax.models.other import Other', 'papers do not know'),
        ('models.other', 'from . import fame', 'papers do not know'),
        ('models.layers', 'from fame_jax.models.fame import FAME', 'papers do not know'),
        ('evaluate', 'from fame_jax.losses import cross_entropy', "may only ['batch', 'sharding']"),
        ('evaluate', 'from fame_jax.errors import UserError', "may only ['batch', 'sharding']"),
        ('serve', 'from fame_jax.train import State', 'reaches fame_jax.train'),
        ('serve', 'import optax', 'reaches optax'),
        ('serve', 'from fame_jax.data import pipeline', 'reaches grain by fame_jax.data.pipeline'),
        ('plots', 'from fame_jax import checkpoint', 'reaches jax by fame_jax.checkpoint'),
        ('losses', 'from fame_jax.batch import Batch', 'not downwards'),
        ('batch', 'from fame_jax.errors import UserError', 'may only []'),
        ('surgery', 'from fame_jax.records import write_json', 'not downwards'),
        ('records', 'import fame_jax.config', 'not downwards'),
        ('screen', 'from fame_jax.evaluate import CUTOFFS', 'not downwards'),
        ('train', 'from tests.conftest import key', 'no part of the package'),
        ('train', 'def f():\n    import benchmarks.speed', 'no part of the package'),
        ('shed', 'import os', 'has no level yet'),
        ('train', 'from fame_jax.shed import tool', 'has no level'),
        ('', 'from fame_jax.config import Config', 'imports fame_jax.config'),
    ],
)
def test_the_checker_can_fail(module, source, fault):
    sources = {
        'fame_jax.data': '',
        'fame_jax.models': '',
        'fame_jax.data.pipeline': 'import grain',
        'fame_jax.models.fame': 'import jax',
        'fame_jax.checkpoint': 'import jax',
    }
    assert faults(sources) == []
    sources[f'fame_jax.{module}'.rstrip('.')] = textwrap.dedent(source)
    found = faults(sources)
    assert any(fault in one for one in found), found


def test_the_checker_finds_a_circle_inside_a_room():
    sources = {
        'fame_jax.data.a': 'from fame_jax.data import b',
        'fame_jax.data.b': 'def f():\n    from fame_jax.data.c import g',
        'fame_jax.data.c': 'from .a import h',
    }
    assert sum('in a circle' in fault for fault in faults(sources)) == 3
    sources['fame_jax.data.c'] = ''
    assert faults(sources) == []


def test_what_is_allowed_is_allowed():
    assert not faults(
        {
            'fame_jax': "__version__ = '1'",
            'fame_jax.config': 'from absl import flags\nfrom fame_jax.errors import UserError',
            'fame_jax.errors': '',
            'fame_jax.stages': 'import fame_jax\nprint(fame_jax.__version__)\n'
            'from absl import logging\nfrom fame_jax import train',
            'fame_jax.train': 'from fame_jax.models.build import build',
            'fame_jax.models.build': 'from fame_jax.config import Config\n'
            'from fame_jax.models import fame, objective',
            'fame_jax.models.objective': '',
            'fame_jax.models.fame': 'from fame_jax.models.sasrec import SASRec',
            'fame_jax.models.sasrec': 'from . import layers',
            'fame_jax.models.layers': 'import jax',
        }
    )
