"""The command line: flags to settings, then each stage in order."""

import contextlib
import importlib
import sys
from collections.abc import Sequence

import fame_jax
from fame_jax.config import Devices, flags
from fame_jax.errors import Interrupted, UserError, resend_lost_interrupts
from fame_jax.screen import Screen

STOPS = (UserError, KeyboardInterrupt, Interrupted)  # all else is a fault of the program
# Commands with flags of their own, and the modules whose `main` they are.
COMMANDS = {
    'compare': 'fame_jax.report.compare',
    'search': 'fame_jax.stages.search',
    'serve': 'fame_jax.serving.service.command',
}


def main(argv: Sequence[str]) -> int:
    """Runs the stages of one run, or the command that the first argument names.

    Args:
      argv: arguments without the program's name.

    Returns:
      The exit code: 0; 2 for a user's mistake, which is one line on stderr; 130 after Ctrl-C;
      128 + n after signal n.
    """
    if argv and argv[0] in COMMANDS:
        try:
            return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
        except STOPS as error:
            return _explain(error)
    if any(argument in ('-h', '--help', '--helpfull') for argument in argv):
        print(flags.help_text())
        return 0
    if '--version' in argv:
        print(f'fame_jax {fame_jax.__version__}')
        return 0
    if not argv:
        print(flags.usage())
        return 0
    try:
        given = flags.parse(argv)
        address, rank, number = Devices(distributed=given.get('distributed')).processes
    except UserError as error:
        return _explain(error)
    # Importing jax and the stages takes seconds, so that a wrong flag is reported before it.
    screen = Screen('none' if rank else given.get('progress'))
    if 'jax' not in sys.modules:
        where = ' in '.join(filter(None, (', '.join(given.get('stages')), given.workdir)))
        screen.say(f'fame_jax {fame_jax.__version__}: {where}')
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(resend_lost_interrupts())
            with screen.waiting('starting JAX'):
                from fame_jax import stages
                from fame_jax.parallel import processes

            if number > 1:
                with screen.waiting(f'waiting for the other {number - 1} processes'):
                    processes.connect(address, number, rank)
            if given.get('sweep') or given.get('seeds'):
                stages.run_command(given, stages.STAGES, screen)
                return 0
            context = stack.enter_context(contextlib.closing(stages.open_run(given, screen=screen)))
            for stage in context.config.run.stages:
                with screen.waiting(stage):
                    stages.STAGES[stage](context)
    except STOPS as error:
        return _explain(error)
    return 0


def cli() -> None:
    """The console script fame_jax."""
    sys.exit(main(sys.argv[1:]))


def _explain(error: BaseException) -> int:
    """Says in one line why the command ended; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        line, code = 'stopped; the same command resumes from what is saved', 130
    elif isinstance(error, Interrupted):
        line, code = f'stopped by {error}; the same command resumes from there', 128 + error.number
    else:
        line, code = f'error: {error}', 2
    # Half a character of an argument cannot be printed on every terminal.
    print(line.encode(errors='backslashreplace').decode(), file=sys.stderr)
    return code


if __name__ == '__main__':
    cli()
