"""What a run does, where it writes and from which seed."""

import dataclasses

from fame_jax.config.fields import check_fields, field, no_effect
from fame_jax.errors import UserError

# Stages that make a run, and all: the last five use a trained run.
TRAINING_STAGES = ('prepare', 'text', 'pretrain', 'finetune', 'update', 'evaluate')
STAGES = (*TRAINING_STAGES, 'recommend', 'similar', 'explain', 'export', 'report')


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's stages, folder and seed."""

    stages: tuple[str, ...] = field(
        (),
        'Stages in order; finished ones are skipped. Empty: prepare, pretrain, finetune (if the '
        'model has a backbone), evaluate; with --append: update, evaluate. text, for FAME+, comes '
        'before pretrain. The last five use a trained run.',
        choices=STAGES,
        binds='',
    )
    workdir: str = field('', "The run's folder. Empty: runs/DATASET_MODEL.", binds='')
    seed: int = field(
        0, 'Seed of initialisation, batch order, dropout, negatives.', low=0, high=2**32 - 1
    )
    seeds: tuple[str, ...] = field(
        (),
        'Several seeds in the place of --seed, such as 0,1,2: a run each, in WORKDIR/seed_0 and so '
        'on, and their means and deviations in WORKDIR/seeds.json.',
        binds='',
    )
    sweep: str = field(
        '',
        'Settings to compare on validation, such as learning_rate:1e-3,3e-4;dropout:.3,.5 (all '
        'combinations), or a file with the flags of a setting on each line. The best is evaluated.',
        binds='',
    )
    sweep_halving: int = field(
        0,
        'Successive halving of the settings of --sweep: in the last stage only the best 1/N by '
        'validation go on, repeatedly, and the others end early. 0: all are trained to the end.',
        low=0,
        high=100,
        binds='',
    )
    progress: str = field(
        'auto',
        'A bar, or lines, one an epoch; auto: a bar on a terminal, lines elsewhere.',
        choices=('auto', 'bar', 'lines', 'none'),
        binds='',
    )
    track: tuple[str, ...] = field(
        ('tensorboard',),
        'Where the lines of metrics.jsonl go too; empty: nowhere. mlflow and trackio are packages '
        'of their own.',
        choices=('mlflow', 'tensorboard', 'trackio'),
        binds='',
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range or a flag without effect."""
        check_fields(self)
        if self.sweep_halving == 1:
            raise UserError('--sweep_halving=1 ends no setting early; give 2 or more, or 0')
        if self.sweep_halving and not self.sweep:
            raise no_effect(f'sweep_halving={self.sweep_halving}', 'sweep=', 'add --sweep')
