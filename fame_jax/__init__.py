"""FAME and its rivals for sequential recommendation, on JAX.

    import fame_jax as fj

    data = fj.Dataset.from_frame(frame, user='customer', item='sku', time='bought_at')
    result = fj.fit(data, fj.FAME(num_experts=8), fj.Training(pretrain_epochs=20))
    result.metrics['test']['masked']['ndcg@10']
    result.recommender.recommend(['7', '12'], k=10)
    fj.load('folder')                       # a run's folder or an export
    fj.update('runs/shop', new_actions)     # new days of data

The names below are the public interface; they are imported at their first use, so that importing
this package imports neither jax nor numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fame_jax.api import FitResult, Training, evaluate, fit, load, update
    from fame_jax.data.dataset import Dataset
    from fame_jax.errors import UserError
    from fame_jax.evaluation.ranking import Ranks
    from fame_jax.models.atten_mixer import AttenMixer
    from fame_jax.models.bert4rec import BERT4Rec
    from fame_jax.models.branches import (
        BranchedBSARec,
        BranchedFAME,
        BranchedSASRec,
        BranchedTVRec,
    )
    from fame_jax.models.bsarec import BSARec, CausalBSARec
    from fame_jax.models.cl4srec import CL4SRec
    from fame_jax.models.core import CORE
    from fame_jax.models.duorec import DuoRec
    from fame_jax.models.esasrec import ESASRec
    from fame_jax.models.fame import FAME, FAMEBERT4Rec
    from fame_jax.models.gru4rec import GRU4Rec
    from fame_jax.models.hstu import HSTU
    from fame_jax.models.iclrec import ICLRec
    from fame_jax.models.miasrec import MiaSRec
    from fame_jax.models.msgifsr import MSGIFSR
    from fame_jax.models.pooling import HistoryMean, LastItem
    from fame_jax.models.sasrec import SASRec
    from fame_jax.models.tvrec import CausalTVRec, TVRec
    from fame_jax.serving.explain import Explanation
    from fame_jax.serving.recommender import Recommendation, Recommender

__version__ = '0.2.0'

_MODULE_OF = {
    'Dataset': 'data.dataset',
    'fit': 'api',
    'update': 'api',
    'Training': 'api',
    'FitResult': 'api',
    'evaluate': 'api',
    'load': 'api',
    'Ranks': 'evaluation.ranking',
    'Recommender': 'serving.recommender',
    'Recommendation': 'serving.recommender',
    'Explanation': 'serving.explain',
    'UserError': 'errors',
    'FAME': 'models.fame',
    'FAMEBERT4Rec': 'models.fame',
    'SASRec': 'models.sasrec',
    'GRU4Rec': 'models.gru4rec',
    'BERT4Rec': 'models.bert4rec',
    'CORE': 'models.core',
    'CL4SRec': 'models.cl4srec',
    'DuoRec': 'models.duorec',
    'ICLRec': 'models.iclrec',
    'AttenMixer': 'models.atten_mixer',
    'MSGIFSR': 'models.msgifsr',
    'MiaSRec': 'models.miasrec',
    'HSTU': 'models.hstu',
    'ESASRec': 'models.esasrec',
    'BSARec': 'models.bsarec',
    'CausalBSARec': 'models.bsarec',
    'TVRec': 'models.tvrec',
    'CausalTVRec': 'models.tvrec',
    'BranchedSASRec': 'models.branches',
    'BranchedBSARec': 'models.branches',
    'BranchedTVRec': 'models.branches',
    'BranchedFAME': 'models.branches',
    'LastItem': 'models.pooling',
    'HistoryMean': 'models.pooling',
}

__all__ = ['__version__', *_MODULE_OF]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_MODULE_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
