"""Table 2 as a picture names what it shows."""

import json
import xml.etree.ElementTree as ET

from runs_test import finish, runs_of

from benchmarks import table_picture, verdict


def test_the_picture_names_every_model_and_protocol(tmp_path):
    for model in ('sasrec', 'gru4rec', 'fame'):
        for seed in (0, 1):
            finish(tmp_path, model, seed, base=0.1 + seed / 100)
    datasets = verdict.collect(runs_of(tmp_path, '--models=all', '--seeds=0,1'))
    table = json.loads(json.dumps({'datasets': datasets}))
    for suffix in ('svg', 'png'):
        table_picture.draw(table, tmp_path / f'a.{suffix}')
    texts = [
        ''.join(element.itertext())
        for element in ET.parse(tmp_path / 'a.svg').iter('{http://www.w3.org/2000/svg}text')
    ]
    for word in ('GRU4Rec', 'SASRec (CE)', 'FAME', 'toys, masked', 'toys, unmasked', 'popularity'):
        assert texts.count(word) == 1
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
