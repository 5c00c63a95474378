"""Figures that other authors printed for the models of this package; none was measured here.

FAME's Table 2 (arXiv 2411.01457), and rows of other papers and repositories, each with the protocol
that it states. They are shown next to ours and can only be compared roughly: whether the items of a
user's history were masked decides a third of NDCG, most models were tuned and selected differently,
and SSLRec, MSGIFSR and Atten-Mixer choose their epoch on the test users.
"""

import math
from typing import NamedTuple

PAPER = "FAME's Table 2 (arXiv 2411.01457)"
S3REC = 'CIKM2020-S3Rec, all_rank.PNG'
ICSREC = 'README of ICSRec'
RECBOARD = 'RecBoard'
ESASREC = "eSASRec's benchmark"
ESASREC_REPORTED = "README of eSASRec's benchmark, column Reported"

UNSTATED = 'masking not stated'
ZERO = 'masked (seen items score 0)'  # above an unseen item whose score is negative

# The order of the figures in a line of this file; - where nothing is printed.
COLUMNS = ('hr@5', 'hr@10', 'hr@20', 'ndcg@5', 'ndcg@10', 'ndcg@20')
DATASETS = ('beauty', 'sports', 'toys', 'ml-20m')


def _row(*figures: str) -> dict[str, str]:
    return dict(zip(DATASETS, figures, strict=True))


TABLE2 = {
    'gru4rec': _row(
        '.0408 .0623 .0895 .0273 .0342 .0410',
        '.0210 .0339 .0527 .0136 .0178 .0225',
        '.0369 .0524 .0760 .0247 .0296 .0356',
        '.1365 .2052 .2981 .0927 .1148 .1382',
    ),
    'sasrec_bce': _row(
        '.0508 .0761 .1057 .0318 .0400 .0474',
        '.0266 .0412 .0618 .0158 .0205 .0256',
        '.0489 .0676 .0908 .0329 .0389 .0448',
        '.1305 .2016 .2996 .0858 .1086 .1333',
    ),
    'bert4rec': _row(
        '.0510 .0745 .1075 .0343 .0419 .0502',
        '.0252 .0395 .0607 .0166 .0212 .0265',
        '.0464 .0677 .0968 .0322 .0391 .0464',
        '.1446 .2172 .3132 .0964 .1197 .1438',
    ),
    'core': _row(
        '.0331 .0664 .1071 .0164 .0271 .0373',
        '.0150 .0342 .0609 .0072 .0134 .0201',
        '.0338 .0699 .1114 .0158 .0274 .0378',
        '.0655 .1312 .2251 .0347 .0558 .0794',
    ),
    'cl4srec': _row(
        '.0623 .0877 .1195 .0440 .0521 .0601',
        '.0338 .0498 .0723 .0235 .0287 .0344',
        '.0658 .0912 .1209 .0470 .0552 .0627',
        '.1205 .1853 .2760 .0804 .1012 .1240',
    ),
    'iclrec': _row(
        '.0664 .0918 .1252 .0480 .0562 .0646',
        '.0384 .0543 .0753 .0266 .0317 .0370',
        '.0792 .1043 .1382 .0579 .0660 .0745',
        '.1380 .2070 .2997 .0927 .1149 .1382',
    ),
    'duorec': _row(
        '.0504 .0691 .0912 .0363 .0424 .0479',
        '.0225 .0327 .0476 .0161 .0193 .0231',
        '.0481 .0666 .0879 .0356 .0415 .0469',
        '.1458 .2164 .3108 .0986 .1212 .1450',
    ),
    'atten_mixer': _row(
        '.0507 .0752 .1033 .0350 .0421 .0504',
        '.0217 .0321 .0469 .0165 .0188 .0235',
        '.0565 .0819 .1099 .0403 .0481 .0574',
        '.1325 .2022 .2994 .0899 .1121 .1334',
    ),
    'msgifsr': _row(
        '.0518 .0771 .1105 .0344 .0429 .0508',
        '.0268 .0425 .0634 .0171 .0221 .0279',
        '.0576 .0831 .1150 .0407 .0492 .0577',
        '.1303 .2013 .2978 .0844 .1119 .1357',
    ),
    'miasrec': _row(
        '.0524 .0795 .1125 .0362 .0449 .0532',
        '.0270 .0435 .0651 .0180 .0233 .0288',
        '.0581 .0828 .1143 .0408 .0488 .0567',
        '.1367 .2071 .3021 .0918 .1144 .1383',
    ),
    'fame': _row(
        '.0710 .0978 .1345 .0508 .0593 .0687',
        '.0400 .0580 .0820 .0277 .0337 .0402',
        '.0820 .1065 .1409 .0603 .0681 .0759',
        '.1538 .2246 .3230 .1046 .1276 .1513',
    ),
}


class Source(NamedTuple):
    """A model's figures in one place, by data set."""

    model: str  # as --model names it; sasrec_bce and sasrec_sampled are SASRec with another loss
    place: str
    protocol: str  # begins with masked, unmasked or masking
    about: str  # loss, seeds
    figures: dict[str, str]


SOURCES = (
    *(Source(model, PAPER, UNSTATED, '', figures) for model, figures in TABLE2.items()),
    Source(
        *('gru4rec', S3REC, ZERO, ''),
        {
            'beauty': '.0164 .0283 .0479 .0099 .0137 .0187',
            'sports': '.0129 .0204 .0333 .0086 .0110 .0142',
            'toys': '.0097 .0176 .0301 .0059 .0084 .0116',
        },
    ),
    Source(
        *('gru4rec', RECBOARD, 'masked', 'BCE, 5 seeds'),
        {
            'beauty': '- .0402 - - .0204 -',
            'sports': '- .0187 - - .0094 -',
            'toys': '- .0410 - - .0224 -',
        },
    ),
    Source(
        *('sasrec', "RecBole's defaults, its issue 1290", 'unmasked', 'CE'),
        {'beauty': '- .083 - - .0416 -', 'sports': '- .048 - - .0227 -'},
    ),
    Source(
        *('sasrec', 'RecBole, issue 20 of LETTER', 'unmasked', 'CE'),
        {'beauty': '.0543 .0821 - .0315 .0405 -'},
    ),
    Source(
        *('sasrec_bce', S3REC, ZERO, 'BCE'),
        {
            'beauty': '.0387 .0605 .0902 .0249 .0318 .0394',
            'sports': '.0233 .0350 .0507 .0154 .0192 .0231',
            'toys': '.0463 .0675 .0941 .0306 .0374 .0441',
        },
    ),
    Source(
        *('sasrec_bce', ICSREC, UNSTATED, 'loss not stated'),
        {
            'beauty': '.0377 - .0894 .0241 - .0386',
            'sports': '.0214 - .0500 .0144 - .0224',
            'toys': '.0429 - .0957 .0245 - .0397',
        },
    ),
    Source(
        *('sasrec_bce', RECBOARD, 'masked', 'BCE, tuned, 5 seeds'),
        {
            'beauty': '- .0668 - - .0354 -',
            'sports': '- .0373 - - .0200 -',
            'toys': '- .0766 - - .0432 -',
        },
    ),
    Source(
        *('sasrec_sampled', ESASREC, 'masked', 'softmax over 256 negatives'),
        {
            'beauty': '- .0921 - - .0531 -',
            'sports': '- .0569 - - .0314 -',
            'toys': '- .0970 - - .0580 -',
        },
    ),
    Source(
        *('bert4rec', S3REC, ZERO, ''),
        {
            'beauty': '.0203 .0347 .0599 .0124 .0170 .0233',
            'sports': '.0115 .0191 .0315 .0075 .0099 .0130',
            'toys': '.0116 .0203 .0358 .0071 .0099 .0138',
        },
    ),
    Source(
        *('bert4rec', ICSREC, UNSTATED, ''),
        {
            'beauty': '.0360 - .0984 .0216 - .0391',
            'sports': '.0217 - .0604 .0143 - .0251',
            'toys': '.0371 - .0760 .0259 - .0368',
        },
    ),
    Source(
        *('bert4rec', RECBOARD, 'masked', 'CE, 5 seeds'),
        {
            'beauty': '- .0730 - - .0406 -',
            'sports': '- .0397 - - .0214 -',
            'toys': '- .0693 - - .0404 -',
        },
    ),
    Source(
        *('cl4srec', ICSREC, UNSTATED, ''),
        {
            'beauty': '.0401 - .0974 .0268 - .0428',
            'sports': '.0231 - .0557 .0146 - .0238',
            'toys': '.0503 - .0990 .0264 - .0404',
        },
    ),
    Source(
        *('cl4srec', ESASREC_REPORTED, UNSTATED, ''),
        {'beauty': '- .0681 - - .0299 -', 'sports': '- .0387 - - .0171 -'},
    ),
    Source(
        *('iclrec', 'its own README', ZERO, 'BCE'),
        {
            'beauty': '.0500 .0744 .1058 .0326 .0403 .0483',
            'sports': '.0290 .0437 .0646 .0191 .0238 .0291',
            'toys': '.0598 .0834 .1138 .0404 .0480 .0557',
        },
    ),
    Source(
        *('duorec', f'RecBole, {ICSREC}', 'unmasked', 'CE'),
        {
            'beauty': '.0561 - .1228 .0348 - .0536',
            'sports': '.0312 - .0696 .0195 - .0302',
            'toys': '.0655 - .1293 .0392 - .0574',
        },
    ),
    Source(
        *('duorec', ESASREC_REPORTED, UNSTATED, ''),
        {'beauty': '- .0845 - - .0443 -', 'sports': '- .0498 - - .0262 -'},
    ),
    Source(
        *('hstu', ESASREC, UNSTATED, 'with times; run by the authors of eSASRec'),
        {
            'beauty': '- .0788 - - .0439 -',
            'sports': '- .0437 - - .0243 -',
            'toys': '- .0778 - - .0450 -',
        },
    ),
    Source(
        *('hstu', RECBOARD, 'masked', 'softmax over 512 negatives, 5 seeds'),
        {
            'beauty': '- .0945 - - .0543 .0638',
            'sports': '- .0587 - - .0332 .0398',
            'toys': '- .0997 - - .0598 .0684',
        },
    ),
    Source(
        *('esasrec', ESASREC, 'masked', 'softmax over 256 negatives'),
        {
            'beauty': '- .0928 - - .0523 -',
            'sports': '- .0560 - - .0323 -',
            'toys': '- .0939 - - .0538 -',
        },
    ),
    Source(
        *('bsarec', RECBOARD, 'masked', 'CE, 5 seeds'),
        {
            'beauty': '- .1002 - - .0610 .0699',
            'sports': '- .0603 - - .0348 .0412',
            'toys': '- .1078 - - .0663 .0751',
        },
    ),
    Source(
        *('bsarec', "its authors' log", ZERO, 'CE, 1 seed'),
        {'beauty': '.0736 .1008 .1373 .0523 .0611 .0703'},
    ),
    Source(
        *('tvrec', "its authors' logs", ZERO, 'CE, 1 seed'),
        {
            'beauty': '.0721 .1017 .1403 .0513 .0608 .0705',
            'sports': '.0431 .0635 .0880 .0298 .0363 .0425',
        },
    ),
)

# Remarks on rows of the paper, by model and data set; '' is every data set.
REMARKS = {
    ('atten_mixer', 'toys'): 'the paper prints NDCG .403 .481 .574, ten times too much',
    ('sasrec_bce', ''): "by SASRec's own code, and so trained with BCE",
    **{
        ('iclrec', dataset): "far above the figures of ICLRec's own README for its scripts"
        for dataset in ('beauty', 'sports', 'toys')
    },
}
OTHER_DATA = "the paper's selection of ML-20M is not this one: not to be compared"

TOLERANCE = 1.2e-4  # four printed decimals, four times


class PublishedRow(NamedTuple):
    """One source's figures for a model on a data set."""

    place: str
    protocol: str
    about: str
    values: dict[str, float]  # by metric
    remarks: list[str]


def parse_figures(figures: str) -> dict[str, float]:
    """'.1 - .2 .05 - .07' as a dict of the metrics that are printed."""
    pairs = zip(COLUMNS, figures.split(), strict=True)
    return {metric: float(figure) for metric, figure in pairs if figure != '-'}


def rows(model: str, dataset: str, protocol: str) -> list[PublishedRow]:
    """The published rows for a model, in the table of one protocol.

    A source that does not state whether it masks is in both tables.

    Args:
      model: as in `Source`.
      dataset: as --dataset names it.
      protocol: 'masked' or 'unmasked'.
    """
    return [
        PublishedRow(
            source.place,
            source.protocol,
            source.about,
            parse_figures(source.figures[dataset]),
            _remarks(source, dataset),
        )
        for source in SOURCES
        if source.model == model
        and dataset in source.figures
        and (source.protocol == UNSTATED or source.protocol.split()[0] == protocol)
    ]


def paper_row(model: str, dataset: str) -> tuple[dict[str, float], list[str]]:
    """The paper's figures for a model, and remarks on them; ({}, []) where it has none.

    Args:
      model: as --model names it; sasrec is the paper's SASRec, whose loss is BCE.
      dataset: as --dataset names it.
    """
    model = {'sasrec': 'sasrec_bce'}.get(model, model)
    printed = TABLE2.get(model, {}).get(dataset)
    return (parse_figures(printed), paper_remarks(model, dataset)) if printed else ({}, [])


def paper_remarks(model: str, dataset: str) -> list[str]:
    """Remarks on a row of the paper."""
    of_row = [REMARKS.get((model, about)) for about in ('', dataset)]
    return [*filter(None, of_row), *([OTHER_DATA] if dataset == 'ml-20m' else [])]


def _remarks(source: Source, dataset: str) -> list[str]:
    of_row = paper_remarks(source.model, dataset) if source.place == PAPER else []
    return [*of_row, *impossible(parse_figures(source.figures[dataset]))]


def impossible(values: dict[str, float]) -> list[str]:
    """Where NDCG and HR of a row contradict each other, whatever the ranks were.

    A user whose item has a rank between the cut-offs a and b adds 1 to HR@b - HR@a, and to NDCG@b -
    NDCG@a at least 1/log2(b + 1) and at most 1/log2(a + 2).

    Args:
      values: metric -> mean over users; cut-offs without both metrics are skipped.
    """
    contradictions, below, at = [], 0, (0.0, 0.0)
    for cut in (int(m[3:]) for m in values if m.startswith('hr@') and f'ndcg@{m[3:]}' in values):
        hr, ndcg = values[f'hr@{cut}'], values[f'ndcg@{cut}']
        hits, gain = hr - at[0], ndcg - at[1]
        low, high = hits / math.log2(cut + 1), hits / math.log2(below + 2)
        if not low - TOLERANCE <= gain <= high + TOLERANCE:
            rest = f' - NDCG@{below}' if below else ''
            contradictions.append(
                f'impossible: NDCG@{cut}{rest} is {short(gain)}, its HR allow '
                f'{short(low)} to {short(high)}'
            )
        below, at = cut, (hr, ndcg)
    return contradictions


def short(value: float) -> str:
    """A figure with four decimals and no leading 0."""
    return f'{value:.4f}'.replace('0.', '.', 1)
