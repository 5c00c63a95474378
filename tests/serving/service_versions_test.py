"""Which export of a folder is served, and how a newer one replaces it."""

import gc
import json
import os
import shutil
import threading
import time
import weakref

import numpy as np
import pytest
from service_fixtures import IDS, make_exact, serving

from fame_jax.errors import UserError
from fame_jax.serving import export

pytest.importorskip('starlette')
versions = pytest.importorskip('fame_jax.serving.service.versions')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Exports of two models, with the names a and b."""
    folder = tmp_path_factory.mktemp('made')
    for seed, name in enumerate('ab'):
        make_exact(seed).export(folder / name)
    return folder


def put(made, name, folder, at):
    """A copy of an export, written at a given second."""
    shutil.copytree(made / name, folder)
    os.utime(folder / export.SUMS, (at, at))


def digest_of(folder):
    return versions.read_digest(folder)


def open_versions(folder, said=None):
    return versions.Versions(folder, 5, False, [].append if said is None else said.append)


def scan_twice(of):
    """A folder is read once two scans have found the same files."""
    return of.scan() | of.scan()


def test_the_newest_is_the_one_with_the_latest_checksums(made, tmp_path):
    put(made, 'a', tmp_path / 'v10', at=100)
    put(made, 'b', tmp_path / 'v9', at=200)
    (tmp_path / 'v11').mkdir()
    (tmp_path / 'notes.txt').write_text('no export')
    put(made, 'a', tmp_path / '.v12', at=300)
    of = open_versions(tmp_path)
    assert of.current.name == 'v9' and of.current.digest == digest_of(made / 'b')
    os.utime(tmp_path / 'v10' / export.SUMS, (300, 300))  # back to v10
    assert not of.scan() and scan_twice(of) and of.current.name == 'v10'
    assert not scan_twice(of) and of.loaded == 2


def test_an_export_itself_is_served_and_replaced_in_place(made, tmp_path):
    put(made, 'a', tmp_path / 'export', at=100)
    of = open_versions(tmp_path / 'export')
    first = of.current
    assert first.name == 'export' and not scan_twice(of)
    make_exact(1).export(tmp_path / 'export')
    assert scan_twice(of)
    assert of.current.name == 'export' and of.current.digest != first.digest
    assert of.current.recommender.card['seed'] == 1
    shutil.rmtree(tmp_path / 'export')  # as in the moment of a replacement
    assert not scan_twice(of) and not scan_twice(of)


def test_an_export_that_is_only_touched_is_not_loaded_again(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    of = open_versions(tmp_path)
    os.utime(tmp_path / 'v1' / export.SUMS, (200, 200))
    assert not scan_twice(of) and of.loaded == 1


def test_a_slow_copy_is_taken_when_it_is_whole(made, tmp_path):
    """However the files arrive, the checksums among the first."""
    put(made, 'a', tmp_path / 'v1', at=100)
    said = []
    of = open_versions(tmp_path, said)
    (tmp_path / 'v2').mkdir()
    names = sorted(path.name for path in (made / 'b').iterdir())
    names.sort(key=lambda name: name != export.SUMS)
    for name in names:
        content = (made / 'b' / name).read_bytes()
        for part in content[: len(content) // 2], content:
            (tmp_path / 'v2' / name).write_bytes(part)
            assert not of.scan()
    assert of.current.name == 'v1' and of.refused == 0
    assert of.scan() and of.current.name == 'v2'
    assert not any('warning' in line for line in said)


def test_a_damaged_version_is_said_once_and_skipped(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    said = []
    of = open_versions(tmp_path, said)
    put(made, 'b', tmp_path / 'v2', at=200)
    (tmp_path / 'v2' / 'params.npz').write_bytes(b'other')
    for _ in range(4):
        assert not of.scan()
    warnings = [line for line in said if 'warning' in line]
    assert len(warnings) == 1 and 'v2' in warnings[0] and 'params.npz' in warnings[0]
    assert of.current.name == 'v1' and of.refused == 1
    put(made, 'b', tmp_path / 'v3', at=150)  # whole, and newer than the one that is served
    assert scan_twice(of) and of.current.name == 'v3'
    shutil.rmtree(tmp_path / 'v2')
    put(made, 'a', tmp_path / 'v2', at=200)  # repaired
    assert scan_twice(of) and of.current.name == 'v2'


def test_the_start_skips_a_damaged_version_too(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    put(made, 'b', tmp_path / 'v2', at=200)
    (tmp_path / 'v2' / 'ids.json').unlink()
    said = []
    assert open_versions(tmp_path, said).current.name == 'v1'
    assert 'ids.json' in said[0]
    shutil.rmtree(tmp_path / 'v1')
    with pytest.raises(UserError, match=r'ids\.json'):
        open_versions(tmp_path)
    for nothing in tmp_path / 'missing', made / 'a' / 'params.npz':
        with pytest.raises(UserError, match=r'no export|reading'):
            open_versions(nothing)


def test_damage_of_the_version_that_is_served_changes_nothing(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    put(made, 'b', tmp_path / 'v2', at=200)
    of = open_versions(tmp_path)
    (tmp_path / 'v2' / 'items.npy').unlink()
    assert not scan_twice(of) and not scan_twice(of)
    assert of.current.name == 'v2'
    shutil.rmtree(tmp_path / 'v2')  # withdrawn
    assert scan_twice(of) and of.current.name == 'v1'


def test_an_export_that_is_replaced_while_it_is_read_is_never_half_taken(
    made, tmp_path, monkeypatch
):
    put(made, 'a', tmp_path / 'v1', at=100)
    of = open_versions(tmp_path)
    put(made, 'a', tmp_path / 'v2', at=200)
    load = export.load

    def replaced(folder):
        recommender = load(folder)
        shutil.rmtree(folder)
        shutil.copytree(made / 'b', folder)
        monkeypatch.setattr(export, 'load', load)
        return recommender

    monkeypatch.setattr(export, 'load', replaced)
    assert not scan_twice(of) and of.refused == 1 and of.current.name == 'v1'
    assert scan_twice(of) and of.current.name == 'v2'
    assert of.current.recommender.card['seed'] == 1 and of.current.digest == digest_of(made / 'b')


def test_a_model_without_finite_scores_is_not_served(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    said = []
    of = open_versions(tmp_path, said)
    for number, value in enumerate((np.nan, np.inf)):
        broken = make_exact(1)
        item_VD = np.array(broken.model.item_VD)
        item_VD[7] = value
        broken.model = broken.model._replace(item_VD=item_VD)
        broken.export(tmp_path / f'v{2 + number}')
        assert not scan_twice(of)
        assert 'not finite' in said[-1]
    assert of.current.name == 'v1'


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='needs Linux')
def test_a_former_version_and_its_programs_are_freed(made, tmp_path):
    put(made, 'a', tmp_path / 'v1', at=100)
    of = open_versions(tmp_path)
    counts, gone = [], []
    for number in range(4):
        gone.append(weakref.ref(of.current.recommender))
        put(made, 'ba'[number % 2], tmp_path / f'v{2 + number}', at=200 + number)
        assert scan_twice(of)
        gc.collect()
        counts.append(versions.count_mappings())
    assert [reference() for reference in gone] == [None] * 4
    assert max(counts[1:]) <= counts[0] + 20


def test_compiled_programs_of_former_versions_are_dropped_before_they_are_too_many(
    made, tmp_path, monkeypatch
):
    put(made, 'a', tmp_path / 'v1', at=100)
    said, cleared = [], []
    of = open_versions(tmp_path, said)
    monkeypatch.setattr(versions, 'MAX_MAPPINGS', 10)
    monkeypatch.setattr(versions.jax, 'clear_caches', lambda: cleared.append(1))
    put(made, 'b', tmp_path / 'v2', at=200)
    assert scan_twice(of) and len(cleared) == (os.path.exists('/proc/self/maps'))


def test_a_failed_search_does_not_end_the_watch(made, tmp_path, monkeypatch, capsys):
    put(made, 'a', tmp_path / 'v1', at=100)
    said = []
    of, stopped, calls = open_versions(tmp_path, said), threading.Event(), []

    def scan():
        calls.append(1)
        if len(calls) == 3:
            stopped.set()
        raise MemoryError

    monkeypatch.setattr(of, 'scan', scan)
    of.watch(0.001, stopped)
    assert len(calls) == 3 and any('newer export failed' in line for line in said)
    assert 'MemoryError' in capsys.readouterr().err


def test_reload_under_load_gives_every_request_one_whole_version(made, tmp_path):
    """No answer is lost, and each is that of the version that it names."""
    expected = {}
    histories = [[IDS[1 + i], IDS[60 - i]] for i in range(20)]
    for name in 'ab':
        of = export.load(made / name)
        for history in histories:
            answer = of.recommend(history, 5)
            expected[digest_of(made / name), history[0]] = (answer.items, answer.scores)
    put(made, 'a', tmp_path / 'v1', at=100)
    with serving(tmp_path) as server:
        answers, stopped = [], threading.Event()

        def ask(first):
            i = first
            while not stopped.is_set():
                history = histories[i % 20]
                value = server.post('/recommend', {'histories': [history, history], 'k': 5})
                answers.append((history[0], value))
                i += 1

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        watch = threading.Event()
        watcher = threading.Thread(
            target=server.service.versions.watch, args=(0.02, watch), daemon=True
        )
        watcher.start()
        try:
            for number, name in enumerate('bab'):
                put(made, name, tmp_path / f'.new{number}', at=200 + number)
                (tmp_path / f'.new{number}').rename(tmp_path / f'v{2 + number}')
                for _ in range(2000):
                    if server.service.versions.current.name == f'v{2 + number}':
                        break
                    time.sleep(0.01)
                seen = len(answers)
                while len(answers) < seen + 20:
                    time.sleep(0.01)
        finally:
            watch.set()
            stopped.set()
            for thread in [*threads, watcher]:
                thread.join()
        assert [value['version'] for _, value in answers] and server.said
        for first, value in answers:
            for one in value['recommendations']:
                found = (one['items'], one['scores'])
                assert found == expected[value['digest'], first], value['version']
        assert {value['version'] for _, value in answers} == {'v1', 'v2', 'v3', 'v4'}
        assert server.metric('versions_loaded_total') == 4
        assert json.dumps(server.send('/health')[2]).count('v4') == 1
