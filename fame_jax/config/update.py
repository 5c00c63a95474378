"""New days of data: which log is appended to which run, and how much of the old one is replayed."""

import dataclasses

from fame_jax.config.fields import check_fields, field
from fame_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Update:
    """A run that goes on from another one, with new actions."""

    append: str = field(
        '',
        'A log of new actions, in the form of the log of the run in --from. It is appended to the '
        "run's data, and training goes on from its best epoch, in --workdir.",
    )
    from_run: str = field('', 'Folder of the trained run that --append updates; it stays as it is.')
    replay: float = field(
        1.0,
        'Share of the windows without new actions that an epoch of an update trains on too.',
        low=0,
        high=1,
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range or one flag without the other."""
        check_fields(self)
        if bool(self.append) != bool(self.from_run):
            one, other = ('append', 'from=RUN') if self.append else ('from', 'append=FILE')
            value = self.append or self.from_run
            raise UserError(f'--{one}={value} updates a run only together with --{other}; add it')
