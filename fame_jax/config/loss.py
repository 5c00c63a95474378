"""The loss over the items of the catalogue."""

import dataclasses

from fame_jax.config.fields import check_fields, field, no_effect
from fame_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss, its negatives and the size of its blocks."""

    loss: str = field(
        'ce',
        'ce: softmax over all items (eq. 18); bce: binary, with uniform negatives; sampled: '
        'softmax over the target and sampled negatives.',
        choices=('ce', 'bce', 'sampled'),
    )
    num_negatives: int = field(
        1, 'Per position for bce; per step for sampled.', low=1, high=10_000_000
    )
    negatives: str = field(
        'uniform',
        'For sampled; popularity is training interactions plus one, and logits are corrected by '
        'the sampling probability so that the loss estimates ce.',
        choices=('uniform', 'popularity'),
    )
    future_targets: tuple[str, ...] = field(
        ('1',),
        'Shares of the next item, the one after it, and so on, in the label of a position, such as '
        '1,.3,.1; 1: the next item alone.',
    )
    finetune_future_targets: tuple[str, ...] = field(
        (), 'The same in finetune; empty: as in pretrain.', binds='finetune'
    )
    seen_weight: float = field(
        1.0,
        'How often an item of the history counts among the negatives of ce, such as 3.',
        low=1,
        high=1000,
    )
    loss_chunk: tuple[str, ...] = field(
        ('-1', '0'),
        'TOKENS,ITEMS of a block of ce; smaller blocks take less memory. TOKENS -1: 128 on a CPU, '
        '1 GiB of logits elsewhere; 0: all. ITEMS 0: all. For a million items, 512,1024 on a CPU '
        'and 4096,16384 on a GPU.',
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range or a flag without effect."""
        check_fields(self)
        negatives, chunk = self.num_negatives, ','.join(self.loss_chunk)
        try:
            tokens, items = map(int, self.loss_chunk)
        except ValueError:
            tokens, items = -2, -2
        if tokens < -1 or items < 0:
            raise UserError(f'--loss_chunk={chunk}: give TOKENS,ITEMS, from -1 and from 0')
        if self.loss == 'sampled' and negatives < 16:
            raise UserError(
                f'--num_negatives={negatives}: all positions of a step share the negatives of '
                '--loss=sampled; give some hundreds, such as 256'
            )
        for name in ('future_targets', 'finetune_future_targets'):
            _check_shares(name, getattr(self, name))
        here = f'loss={self.loss}'
        if self.loss == 'ce' and negatives != 1:
            raise no_effect(f'num_negatives={negatives}', here, 'add --loss=bce or sampled')
        if self.loss != 'ce' and chunk != '-1,0':
            raise no_effect(f'loss_chunk={chunk}', here, 'use --loss=ce')
        if self.loss != 'ce' and self.seen_weight != 1:
            raise no_effect(f'seen_weight={self.seen_weight}', here, 'use --loss=ce')
        if self.loss != 'sampled' and self.negatives != 'uniform':
            raise no_effect(f'negatives={self.negatives}', here, 'add --loss=sampled')

    def shares(self, stage: str) -> tuple[float, ...]:
        """The shares of the next items in the labels of a stage."""
        own = self.finetune_future_targets if stage == 'finetune' else ()
        shares = [float(share) for share in own or self.future_targets]
        while len(shares) > 1 and shares[-1] == 0:
            shares.pop()
        # Labels depend on the ratios of the shares alone.
        return (1.0,) if len(shares) == 1 else tuple(shares)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a block; -1: by device, 0: all."""
        return int(self.loss_chunk[0])

    @property
    def chunk_items(self) -> int:
        """Items of a block; 0: all."""
        return int(self.loss_chunk[1])


MOST_FUTURE_TARGETS = 16


def _check_shares(name: str, texts: tuple[str, ...]) -> None:
    """Raises UserError unless the texts are shares: finite, not negative, the first positive."""
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = [-1.0]
    if not shares and name == 'finetune_future_targets':
        return
    usable = 0 < len(shares) <= MOST_FUTURE_TARGETS and shares[0] > 0
    if not (usable and all(0 <= share <= 1e6 for share in shares)):
        raise UserError(
            f'--{name}={",".join(texts)}: give up to {MOST_FUTURE_TARGETS} shares such as 1,.3,.1, '
            'the first larger than 0, none negative'
        )
