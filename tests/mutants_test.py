"""The table of mutants is current; `python tests/mutants.py` runs them."""

from fixtures import ROOT
from mutants import MUTANTS, apply, pytest_arguments

# Every folder and every file at the root of the package that computes something.
ROOMS = {
    *('api.py', 'config', 'data', 'losses', 'models', 'evaluation', 'training', 'serving'),
    *('stages', 'text', 'report', 'parallel', 'run_dir.py', 'screen.py'),
}


def test_there_are_many_of_every_folder():
    assert len(MUTANTS) >= 240
    assert {mutant.file.partition('/')[0] for mutant in MUTANTS} == ROOMS
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_text_of_each_occurs_once_and_changes():
    faults = []
    for mutant in MUTANTS:
        source = (ROOT / 'fame_jax' / mutant.file).read_text()
        if source.count(mutant.old) != 1 or mutant.old == mutant.new:
            faults.append((mutant.name, source.count(mutant.old)))
    assert faults == []


def test_each_is_still_python():
    for mutant in MUTANTS:
        source = (ROOT / 'fame_jax' / mutant.file).read_text()
        compile(apply(mutant, source), mutant.file, 'exec')


def test_the_tests_of_each_exist():
    for mutant in MUTANTS:
        arguments = pytest_arguments(mutant.tests)
        # Pytest takes only the word after -k as its expression.
        assert '-k' not in arguments[:-2] + arguments[-1:], mutant.name
        for argument in arguments:
            if argument.startswith('tests/'):
                assert (ROOT / argument.partition('::')[0]).exists(), mutant.name
