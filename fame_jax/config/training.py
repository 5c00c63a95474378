"""Batches, epochs, the optimizer, and where fine-tuning starts."""

import dataclasses

from fame_jax.config.fields import check_fields, field


@dataclasses.dataclass(frozen=True)
class Training:
    """How the stages pretrain and finetune train."""

    row_length: int = field(
        64, 'Positions L of a row; several histories share it.', low=1, high=1_000_000
    )
    rows_per_step: int = field(8, 'Rows B of a step.', low=1, high=1_000_000)
    pretrain_epochs: int = field(
        60,
        'Greatest number of epochs of pretrain; a larger one makes a finished stage go on.',
        low=0,
        high=1_000_000,
    )
    finetune_epochs: int = field(
        60,
        'Greatest number of epochs of finetune, likewise.',
        low=0,
        high=1_000_000,
        binds='finetune',
    )
    patience: int = field(
        5, 'A stage ends after so many epochs without a better validation NDCG@20.', low=1
    )
    select_on: str = field(
        'auto',
        'Ranking by whose validation NDCG@20 the best epoch is selected. auto: unmasked where more '
        'than half of the validation targets stand in the history of their user, else masked.',
        choices=('auto', 'masked', 'unmasked'),
    )
    validation_users: int = field(
        0,
        'Epochs are selected on a fixed sample of so many users, the same for all models and '
        'seeds of a data set; 0: on all. The stage evaluate always ranks all users.',
        low=0,
    )
    backbone: str = field(
        'pretrain',
        "Where finetune starts: pretrain (this run's backbone), scratch (random), or the folder "
        'of another run with a finished backbone.',
    )
    learning_rate: float = field(1e-3, "Adam's rate in pretrain.", low=0, high=10)
    finetune_learning_rate: float = field(
        1e-3, "Adam's rate in finetune.", low=0, high=10, binds='finetune'
    )
    schedule: str = field(
        'constant',
        'Of the rate over the steps of a stage: constant, or cosine, which falls to 0 at the '
        'greatest number of epochs.',
        choices=('constant', 'cosine'),
    )
    warmup_epochs: float = field(
        0.0, 'Epochs in which the rate of a stage grows from 0.', low=0, high=1000
    )
    weight_decay: float = field(0.0, 'Decoupled weight decay.', low=0, high=10)
    ema: float = field(
        0.0,
        'Decay of the average of the weights, such as 0.998, which is then validated, saved and '
        'used; 0: no average. It takes the memory of the weights once more.',
        low=0,
        high=0.999999,
    )
    finetune_dropout: float | None = field(
        None,
        'Rate of dropout in finetune, where it differs from --dropout.',
        kind=float,
        low=0,
        high=0.99,
        binds='finetune',
    )
    dtype: str = field(
        'float32',
        'Of activations. Parameters, softmax and losses are float32.',
        choices=('float32', 'bfloat16'),
    )
    steps_per_dispatch: int = field(
        8,
        'Steps of one compiled program; results are the same bit for bit. Models that train on '
        'prefixes take 1.',
        low=1,
        high=1_000_000,
        binds='',
    )
    checkpoint_seconds: float = field(
        10.0,
        'Least time between checkpoints, and more where saving would take over 5 % of the time; 0: '
        'after every dispatch. The last epoch always has one.',
        low=0,
        binds='',
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check_fields(self)

    def rate(self, stage: str) -> float:
        """The learning rate of a stage."""
        return self.learning_rate if stage == 'pretrain' else self.finetune_learning_rate

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate of a stage changes from step to step."""
        return self.schedule != 'constant' or self.warmup_epochs > 0
