"""The control for fine-tuned models: SASRec that is trained in two stages and stays SASRec.

    python -m fame_jax.main --model=benchmarks.controls:ContinuedSASRec --dataset=toys ...

FAME is compared with the backbone that it starts from. Between the two lie the new block and a
second stage of training, with its own rate, dropout and labels, which would help the backbone too.
This model has the second stage alone. What FAME gains over it is due to the block.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from fame_jax.models import surgery
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
