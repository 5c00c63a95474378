"""What others printed is whole, stands where it belongs, and can be."""

import numpy as np

from benchmarks import published
from benchmarks.runs import MODELS
from fame_jax import evaluate
from fame_jax import published as paper


def test_published_figures_are_whole_and_of_models_in_the_table():
    for source in published.SOURCES:
        assert source.model in MODELS
        for figures in source.figures.values():
            found = published.read(figures)
            assert found and all(0 < value < 1 for value in found.values())
    assert {s.model for s in published.SOURCES if s.place == published.PAPER} == {*MODELS} - {
        'sasrec',
        'sasrec_sampled',
        'fame_bert4rec',
    }


def test_a_published_row_stands_in_the_table_of_its_protocol():
    places = {
        protocol: [row['place'] for row in published.rows('duorec', 'beauty', protocol)]
        for protocol in evaluate.PROTOCOLS
    }
    untold = [published.PAPER, published.ESASREC_REPORTED]
    assert places == {
        'masked': untold,
        'unmasked': [untold[0], 'RecBole, README of ICSRec', untold[1]],
    }
    (row,) = published.rows('sasrec_sampled', 'toys', 'masked')
    assert row['values'] == {'hr@10': 0.097, 'ndcg@10': 0.058}
    assert published.rows('sasrec_sampled', 'synthetic', 'masked') == []


def test_what_no_ranks_can_give_is_found_in_the_papers_table():
    """Atten-Mixer on all four data sets and MSGIFSR on ML-20m, and nowhere else."""
    found = {
        (source.model, dataset): len(published.impossible(published.read(figures)))
        for source in published.SOURCES
        for dataset, figures in source.figures.items()
    }
    assert {key: n for key, n in found.items() if n} == {
        ('atten_mixer', 'beauty'): 1,
        ('atten_mixer', 'sports'): 2,
        ('atten_mixer', 'toys'): 1,
        ('atten_mixer', 'ml-20m'): 1,
        ('msgifsr', 'ml-20m'): 1,
    }


def test_what_ranks_give_is_never_called_impossible():
    rng = np.random.default_rng(0)
    for top in (3, 8, 15, 40):
        found = evaluate.metrics(rng.integers(1, top, 200))
        assert published.impossible(found) == []
        assert published.impossible({m: v for m, v in found.items() if '@20' not in m}) == []
    assert published.impossible(published.read('.1 .1 .1 .05 .05 .06')) == [
        'impossible: NDCG@20 - NDCG@10 is .0100, its HR allow .0000 to .0000'
    ]


def test_the_papers_row_beside_a_model_of_ours():
    figures, remarks = paper.beside('sasrec', 'toys')
    assert (figures['hr@10'], figures['ndcg@10']) == (0.0676, 0.0389)
    assert remarks == ["by SASRec's own code, and so trained with BCE"]
    assert paper.beside('fame', 'ml-20m') == (
        published.read('.1538 .2246 .3230 .1046 .1276 .1513'),
        [paper.OTHER_DATA],
    )
    for model, dataset in (('fame', 'synthetic'), ('fame_bert4rec', 'toys'), ('fame', 'toys.txt')):
        assert paper.beside(model, dataset) == ({}, [])
