"""benchmarks/prepare.py on a small log."""

import json

import numpy as np
import pytest

from benchmarks import prepare


@pytest.mark.parametrize('ids', ['int', 'text'])
def test_polars_and_the_package_make_the_same_data(ids, tmp_path):
    log = tmp_path / 'log.parquet'
    prepare.write_log(log, 20_000, ids)
    for way in ('polars', 'package'):
        (tmp_path / way).mkdir()
        used = prepare.run(way, log, tmp_path / way)
        assert used['seconds'] > 0 and used['bytes'] > 2**20
    bare, ours = tmp_path / 'polars', tmp_path / 'package' / 'dataset'
    items, offsets = (np.load(ours / f'{name}.npy') for name in ('items', 'offsets'))
    bare_items, bare_offsets = (np.load(bare / f'{name}.npy') for name in ('items', 'offsets'))
    assert 15_000 < len(items) < 20_000
    if ids == 'int':
        np.testing.assert_array_equal(items, bare_items + 1)
        np.testing.assert_array_equal(offsets, bare_offsets)
    names = json.loads((ours / 'ids.json').read_text())
    bare_names = [
        [next(iter(json.loads(line).values())) for line in (bare / name).open()]
        for name in ('users.json', 'items.json')
    ]
    for name, found in zip(('users', 'items'), bare_names, strict=True):
        assert sorted(names[name][name == 'items' :]) == sorted(map(str, found))


def test_figures_are_printed_and_written(tmp_path, capsys):
    out = tmp_path / 'figures.json'
    prepare.main(['--rows=2000', '--ids=int', '--ways=polars,package', '--turns=1', f'--out={out}'])
    polars, package = json.loads(out.read_text())['records']
    assert (polars['seconds_ratio'], polars['bytes_ratio']) == (1, 1)
    assert package['seconds_ratio'] == package['seconds'] / polars['seconds'] > 0
    assert capsys.readouterr().out.count(' 2,000 rows, int  ids,') == 2
