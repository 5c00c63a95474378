"""What others printed for the models of Table 2: never measured here, each with its protocol.

A row stands beside ours only to be compared by eye. Whether the items of a user's history were
masked decides a third of NDCG and is told, or said not to be. Most figures are tuned otherwise than
ours, and selected otherwise: SSLRec, MSGIFSR and Atten-Mixer choose their epoch on the test users.
"""

import math
from typing import Any, NamedTuple

from fame_jax import published
from fame_jax.published import read

PAPER = published.NAME
S3REC = 'CIKM2020-S3Rec, all_rank.PNG'
ICSREC = 'README of ICSRec'
RECBOARD = 'RecBoard'
ESASREC_REPORTED = "README of eSASRec's benchmark, column Reported"

UNTOLD = 'masking not told'
ZERO = 'masked (seen items score 0)'  # above an unseen item whose score is negative


class Source(NamedTuple):
    """A model's figures in one place, by data set."""

    model: str  # ours
    place: str
    protocol: str  # begins with masked, unmasked or masking
    about: str  # what else was done: loss, seeds
    figures: dict[str, str]


SOURCES = (
    *(Source(model, PAPER, UNTOLD, '', figures) for model, figures in published.TABLE2.items()),
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
        *('sasrec_bce', ICSREC, UNTOLD, 'loss not told'),
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
        *('sasrec_sampled', "eSASRec's benchmark", 'masked', 'softmax over 256 negatives'),
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
        *('bert4rec', ICSREC, UNTOLD, ''),
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
        *('cl4srec', ICSREC, UNTOLD, ''),
        {
            'beauty': '.0401 - .0974 .0268 - .0428',
            'sports': '.0231 - .0557 .0146 - .0238',
            'toys': '.0503 - .0990 .0264 - .0404',
        },
    ),
    Source(
        *('cl4srec', ESASREC_REPORTED, UNTOLD, ''),
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
        *('duorec', ESASREC_REPORTED, UNTOLD, ''),
        {'beauty': '- .0845 - - .0443 -', 'sports': '- .0498 - - .0262 -'},
    ),
)

TOLERANCE = 1.2e-4  # four printed decimals, four times


def rows(model: str, dataset: str, protocol: str) -> list[dict[str, Any]]:
    """The rows that stand under a model's own in the table of one protocol.

    What does not tell whether it masks stands in both tables.

    Args:
      model: as in `runs.MODELS`.
      dataset: as --dataset names it.
      protocol: 'masked' or 'unmasked'.

    Returns:
      Dicts of place, protocol, about, values (metric -> float) and remarks (sentences).
    """
    return [
        {
            'place': source.place,
            'protocol': source.protocol,
            'about': source.about,
            'values': read(source.figures[dataset]),
            'remarks': _remarks(source, dataset),
        }
        for source in SOURCES
        if source.model == model
        and dataset in source.figures
        and (source.protocol == UNTOLD or source.protocol.split()[0] == protocol)
    ]


def impossible(values: dict[str, float]) -> list[str]:
    """Where NDCG and HR of a row contradict each other, whatever the ranks were.

    A user whose item stands between the cut-offs a and b adds 1 to HR@b - HR@a, and to NDCG@b -
    NDCG@a at least 1/log2(b + 1) and at most 1/log2(a + 2).

    Args:
      values: metric -> mean over users; cut-offs without both metrics are passed over.
    """
    found, below, at = [], 0, (0.0, 0.0)
    for cut in (int(m[3:]) for m in values if m.startswith('hr@') and f'ndcg@{m[3:]}' in values):
        hr, ndcg = values[f'hr@{cut}'], values[f'ndcg@{cut}']
        hits, gain = hr - at[0], ndcg - at[1]
        low, high = hits / math.log2(cut + 1), hits / math.log2(below + 2)
        if not low - TOLERANCE <= gain <= high + TOLERANCE:
            rest = f' - NDCG@{below}' if below else ''
            found.append(
                f'impossible: NDCG@{cut}{rest} is {short(gain)}, its HR allow '
                f'{short(low)} to {short(high)}'
            )
        below, at = cut, (hr, ndcg)
    return found


def _remarks(source: Source, dataset: str) -> list[str]:
    of_row = published.remarks(source.model, dataset) if source.place == PAPER else []
    return [*of_row, *impossible(read(source.figures[dataset]))]


def short(value: float) -> str:
    """A figure with four decimals and no leading 0."""
    return f'{value:.4f}'.replace('0.', '.', 1)
