"""What a run does, where it writes and from which seed."""

import dataclasses

from fame_jax.config.fields import check_fields, field

# Stages that make a run, and all: the last four use a trained run.
TRAINING_STAGES = ('prepare', 'text', 'pretrain', 'finetune', 'evaluate')
STAGES = (*TRAINING_STAGES, 'recommend', 'explain', 'export', 'report')


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's stages, folder and seed."""

    stages: tuple[str, ...] = field(
        (),
        'Stages in order; finished ones are skipped. Empty: prepare, pretrain, finetune (if the '
        'model has a backbone), evaluate. text, for FAME+, comes before pretrain. The last four '
        'use a trained run.',
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
        """Raises UserError for a value out of range."""
        check_fields(self)
