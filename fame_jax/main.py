"""The door: flags to Config, then each stage that --stages names, in order."""

import contextlib
import sys
from collections.abc import Sequence

from fame_jax import config as config_lib
from fame_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs the stages of one run and returns the exit code; argv leaves the program's name out."""
    if any(argument in ('-h', '--help', '--helpfull') for argument in argv):
        print(config_lib.help_text())
        return 0
    try:
        config = config_lib.parse(argv)
        # jax and the stages are slow to import, so only now that the flags are known to be good.
        from fame_jax import run as run_lib
        from fame_jax import sharding, stages
        from fame_jax.train import Interrupted
    except UserError as error:
        return _refuse(error)
    try:
        if config.num_processes > 1:
            sharding.connect(config.coordinator, config.num_processes, config.process)
        with contextlib.closing(run_lib.open_run(config)) as run:
            for stage in config.stages:
                stages.STAGES[stage](run)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print('stopped; the same command goes on from what is saved', file=sys.stderr)
        return 130
    except Interrupted as interrupted:
        print(f'stopped by {interrupted}; the same command goes on from there', file=sys.stderr)
        return 128 + interrupted.number
    return 0


def cli() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def _refuse(error: UserError) -> int:
    print(f'error: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    cli()
