"""Published figures are complete, in the right tables, and possible."""

import numpy as np

from fame_jax.evaluation import metrics
from fame_jax.models.registry import MODELS
from fame_jax.report import published

OURS = {*MODELS, 'sasrec_bce', 'sasrec_sampled'}


def test_published_figures_are_complete_and_of_models_in_the_table():
    for source in published.SOURCES:
        assert source.model in OURS
        for figures in source.figures.values():
            values = published.parse_figures(figures)
            assert values and all(0 < value < 1 for value in values.values())
    assert {s.model for s in published.SOURCES if s.place == published.PAPER} == OURS - {
        *('sasrec', 'sasrec_sampled', 'fame_bert4rec', 'hstu', 'esasrec', 'last_item'),
        *('bsarec', 'causal_bsarec', 'tvrec', 'causal_tvrec', 'history_mean'),
        *('branched_sasrec', 'branched_bsarec', 'branched_tvrec', 'branched_fame'),
    }


def test_a_published_row_stands_in_the_table_of_its_protocol():
    places = {
        protocol: [row.place for row in published.rows('duorec', 'beauty', protocol)]
        for protocol in metrics.PROTOCOLS
    }
    unstated = [published.PAPER, published.ESASREC_REPORTED]
    assert places == {
        'masked': unstated,
        'unmasked': [unstated[0], 'RecBole, README of ICSRec', unstated[1]],
    }
    (row,) = published.rows('sasrec_sampled', 'toys', 'masked')
    assert row.values == {'hr@10': 0.097, 'ndcg@10': 0.058}
    assert published.rows('sasrec_sampled', 'synthetic', 'masked') == []
    (row,) = published.rows('esasrec', 'toys', 'masked')
    assert row.values == {'hr@10': 0.0939, 'ndcg@10': 0.0538}


def test_impossible_figures_are_detected_in_the_papers_table():
    """Atten-Mixer on all four data sets and MSGIFSR on ML-20m, and nowhere else."""
    counts = {
        (source.model, dataset): len(published.impossible(published.parse_figures(figures)))
        for source in published.SOURCES
        for dataset, figures in source.figures.items()
    }
    assert {key: n for key, n in counts.items() if n} == {
        ('atten_mixer', 'beauty'): 1,
        ('atten_mixer', 'sports'): 2,
        ('atten_mixer', 'toys'): 1,
        ('atten_mixer', 'ml-20m'): 1,
        ('msgifsr', 'ml-20m'): 1,
    }


def test_figures_of_ranks_are_never_called_impossible():
    rng = np.random.default_rng(0)
    for top in (3, 8, 15, 40):
        values = metrics.metrics(rng.integers(1, top, 200))
        assert published.impossible(values) == []
        assert published.impossible({m: v for m, v in values.items() if '@20' not in m}) == []
    assert published.impossible(published.parse_figures('.1 .1 .1 .05 .05 .06')) == [
        'impossible: NDCG@20 - NDCG@10 is .0100, its HR allow .0000 to .0000'
    ]


def test_the_papers_row_for_a_model_of_ours():
    figures, remarks = published.paper_row('sasrec', 'toys')
    assert (figures['hr@10'], figures['ndcg@10']) == (0.0676, 0.0389)
    assert remarks == ["by SASRec's own code, and so trained with BCE"]
    assert published.paper_row('fame', 'ml-20m') == (
        published.parse_figures('.1538 .2246 .3230 .1046 .1276 .1513'),
        [published.OTHER_DATA],
    )
    for model, dataset in (('fame', 'synthetic'), ('fame_bert4rec', 'toys'), ('fame', 'toys.txt')):
        assert published.paper_row(model, dataset) == ({}, [])
