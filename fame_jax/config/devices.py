"""Devices, processes, caches and profiles: nothing here changes what a run computes."""

import dataclasses
import re

from fame_jax.config.fields import check_fields, field
from fame_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices, processes, caches and profiles."""

    data_parallel: int = field(
        1, 'Devices that share the rows of a step and the users of an evaluation.', low=1
    )
    model_parallel: int = field(
        1, 'Devices that share the item table; explain, export and report use one.', low=1
    )
    members: str = field(
        'auto',
        'How the runs of --seeds and --sweep train. vmap: in one program, as far as their settings '
        'differ only in rates, weights and shares of labels. loop: one after the other. auto: vmap '
        'on an accelerator, loop on a CPU.',
        choices=('auto', 'vmap', 'loop'),
    )
    distributed: str = field(
        '',
        'HOST:PORT,RANK/N: this is process RANK (from 0) of N; process 0 listens at HOST:PORT. All '
        'get the same command but for RANK.',
    )
    cache_dir: str = field(
        '',
        'Folder for compiled programs and encoded texts, for later runs. Empty: texts go to the '
        'cache folder, and programs are not kept.',
    )
    profile: str = field(
        '', 'Folder for a trace of some steps of each stage, for XProf or ui.perfetto.dev.'
    )

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check_fields(self)
        _ = self.processes

    @property
    def processes(self) -> tuple[str, int, int]:
        """Address of process 0, this process's number from 0, and the number of processes.

        Raises:
          UserError: when --distributed is not HOST:PORT,RANK/N with RANK below N and N above 1.
        """
        if not self.distributed:
            return '', 0, 1
        match = re.fullmatch(r'(\S+:\d+),(\d+)/(\d+)', self.distributed)
        rank, number = (int(match[2]), int(match[3])) if match else (0, 0)
        if number < 2 or rank >= number:
            raise UserError(
                f'--distributed={self.distributed}: give HOST:PORT,RANK/N with RANK from 0 to N-1 '
                'and N at least 2, such as 10.0.0.1:8476,0/2'
            )
        return match[1], rank, number
