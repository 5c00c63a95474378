"""Models that FAME is compared with, which are not for use: a control, and another backbone.

    python -m fame_jax.main --model=benchmarks.controls:ContinuedSASRec --dataset=toys ...

FAME is compared with the backbone that it starts from. Between the two lie the new block and a
second stage of training, with its own rate, dropout and labels, which would help the backbone too.
`ContinuedSASRec` has the second stage alone. What FAME gains over it is due to the block.
`FAMEBSARec` is FAME with BSARec's blocks before its own.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from fame_jax.models import surgery
from fame_jax.models.bsarec import CausalBSARec
from fame_jax.models.fame import FAME
from fame_jax.models.item_model import ItemModel
from fame_jax.models.sasrec import SASRec

Array = jax.Array


class ContinuedSASRec(SASRec):
    """SASRec whose stage finetune goes on from the best epoch of its stage pretrain.

    It has the options of SASRec and no others. Fine-tuning starts with a new optimizer, with the
    settings of that stage (`finetune_learning_rate`, `finetune_dropout`,
    `finetune_future_targets`) and with exactly the parameters that were selected in pre-training.
    """

    title: ClassVar[str] = 'SASRec, continued'
    backbone: ClassVar[type[ItemModel]] = SASRec

    @nn.nowrap
    def backbone_module(self) -> SASRec:
        """SASRec with the same values in all fields."""
        names = {field.name for field in dataclasses.fields(SASRec)} - {'parent', 'name'}
        return SASRec(**{name: getattr(self, name) for name in names})

    @nn.nowrap
    def surgery_plan(self, key: Array) -> surgery.Plan:
        """The plan that copies every parameter to its own place; a leaf left over is an error.

        Args:
          key: not used, since nothing is drawn.
        """
        del key
        return surgery.Plan()


class FAMEBSARec(FAME, CausalBSARec):
    """BSARec, in its packed form, whose last block is FAME's.

    The attention of BSARec's last block becomes that of the experts; its filter is dropped. Heads
    and similarity are FAME's, of the backbone too.
    """

    title: ClassVar[str] = 'FAME over BSARec'
    backbone: ClassVar[type[ItemModel]] = CausalBSARec
