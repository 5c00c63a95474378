"""The settings of a sweep: read from --sweep, and found in the folders that hold their runs."""

import contextlib
import dataclasses
import hashlib
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fame_jax import run_dir
from fame_jax.config import FLAGS, SECTIONS, binds, differences
from fame_jax.config import flags as config_flags
from fame_jax.config.fields import canonical, show, suggest
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.models.item_model import ItemModel
from fame_jax.report import figures_of_runs
from fame_jax.stages import settings
from fame_jax.stages.members import of_seed

# Flags of a setting belong to the model, the losses or the training.
SWEPT = ('model', 'loss', 'training', 'finetune')
# Flags that change the metric or the users by which settings are compared.
COMPARES = ('select_on', 'validation_users')
MOST = 1000  # settings
LONGEST = 160  # bytes in the name of a folder before a digest takes the place of the rest
# Flags of the command that the runs of a setting do not have.
OF_ALL = ('sweep', 'sweep_halving', 'seeds', 'members')
ADVICE = 'give FLAG:VALUE,VALUE or a file with the flags of a setting on each line'


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags of a sweep's command.

    Fields:
      given: all of them.
      folder: WORKDIR.
      seeds: of --seeds; () for one run a setting.
    """

    given: config_flags.Given
    folder: Path
    seeds: Sequence[int] = ()

    @property
    def of_all(self) -> config_flags.Given:
        """The flags that all settings have."""
        values = {n: value for n, value in self.given.values.items() if n not in OF_ALL}
        return dataclasses.replace(self.given, values=values)

    def of_setting(self, name: str, flags: Mapping[str, Any], **more: Any) -> config_flags.Given:
        """The flags of a setting's run; `more` come last."""
        own = {'workdir': str(self.folder / name), **flags, **more}
        return dataclasses.replace(self.given, values={**self.of_all.values, **own})

    def of_runs(self, name: str, flags: Mapping[str, Any], **more: Any) -> list[config_flags.Given]:
        """The flags of each run of a setting, one a seed."""
        setting = self.of_setting(name, flags, **more)
        return [of_seed(setting, seed) for seed in self.seeds] or [setting]


def parse_sweep(given: config_flags.Given) -> dict[str, dict[str, Any]]:
    """The settings of --sweep by the names of their folders: flag -> value.

    Raises:
      UserError: for a text or file that names no settings or one twice, a flag that cannot be
        swept, or one on the command line that each setting replaces.
    """
    text = given.get('sweep')
    for name in ('distributed', 'out'):
        if name in given.values:
            raise UserError(f'--{name} does not go with --sweep; leave one of them out')
    found: dict[str, dict[str, Any]] = {}
    places: dict[Any, str] = {}
    for where, argv in _read_file(text) if _is_file(text) else _combine(text):
        flags = _parse_flags(argv, where)
        if not flags:
            raise UserError(f'{where}: a setting without values; give FLAG=VALUE, or leave it out')
        name, key = _name(flags), _key(flags)
        if places.get(key) == where:
            raise UserError(f'{where} has {name} twice; give each value once')
        if key in places:
            raise UserError(f'{where}: {name} is in {places[key]} too; give each setting once')
        if name in found:
            name += f'_{_digest(key)}'
        found[name], places[key] = flags, where
    if not found or len(found) > MOST:
        raise UserError(f'--sweep={text} has {len(found)} settings; give 1 to {MOST}')
    for name in sorted(given.typed):
        if all(name in flags for flags in found.values()):
            raise UserError(
                f'--{name}={show(given.get(name))} has no effect, since each setting of --sweep '
                'has its own value; leave it out, or add it to --sweep'
            )
    return found


def refuse_idle(flags: Mapping[str, Any], model: ItemModel) -> None:
    """Refuses flags of fine-tuning in a setting whose model has none: its runs would be equal.

    Raises:
      UserError: naming the flags.
    """
    idle = [f'--{name}' for name in flags if binds(name) == 'finetune']
    if idle and not model.backbone:
        raise UserError(
            f'{", ".join(idle)} cannot be swept for {model.title}, which has no stage finetune; '
            'leave it out, or sweep another model'
        )


def _is_file(text: str) -> bool:
    if ':' not in text:
        return True
    with contextlib.suppress(OSError):  # combinations may be longer than the name of a file
        return Path(text).is_file()
    return False


def _read_file(text: str) -> Iterator[tuple[str, list[str]]]:
    """The place and the arguments of each setting of a file."""
    with explain_os_errors(f'--sweep={text}', ADVICE):
        try:
            lines = Path(text).read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'--sweep={text} is not text in UTF-8; {ADVICE}') from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith('#'):
            try:
                yield f'{text}:{number}', shlex.split(line)
            except ValueError as error:
                raise UserError(f'{text}:{number}: {error}; close the quotation') from error


def _combine(text: str) -> Iterator[tuple[str, list[str]]]:
    """The arguments of all combinations of values."""
    parts = [part.partition(':') for part in text.split(';')]
    names = [name.strip() for name, _, _ in parts]
    if len(set(names)) < len(names):
        raise UserError(f'--sweep={text} has a flag twice; give all its values in one place')
    for values in itertools.product(*(values.split(',') for _, _, values in parts)):
        yield f'--sweep={text}', [f'--{name}={value.strip()}' for name, value in zip(names, values)]


def _parse_flags(argv: list[str], where: str) -> dict[str, Any]:
    """The values of a setting's flags; `where` begins the error for a flag that is none."""
    try:
        values = dict(config_flags.parse(argv).values)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    able = [name for name in FLAGS if binds(name) in SWEPT and name not in COMPARES]
    for name in values:
        if name not in able:
            raise UserError(f'{where}: --{name} cannot be swept; {suggest(name, able)}')
    return values


def _name(flags: Mapping[str, Any]) -> str:
    """The name of a setting's folder: its flags, cut where that is too long for a file system."""
    texts = {
        name: show(tuple(map(canonical, value)) if isinstance(value, tuple) else value)
        for name, value in flags.items()
    }
    name = ','.join(f'{name}={text}' for name, text in texts.items()).replace('/', '_')
    if len(name.encode()) <= LONGEST:
        return name
    return f'{name.encode()[:LONGEST].decode(errors="ignore")}_{_digest(_key(flags))}'


def _digest(key: frozenset[tuple[str, tuple[str, ...]]]) -> str:
    return hashlib.sha256(repr(sorted(key)).encode()).hexdigest()[:8]


def _key(flags: Mapping[str, Any]) -> frozenset[tuple[str, tuple[str, ...]]]:
    """What is equal for equal settings, however their flags are ordered and spelled."""
    found = set()
    for name, value in flags.items():
        texts = [canonical(one) for one in (value if isinstance(value, tuple) else (value,))]
        is_pairs = 'separator' in FLAGS[name].metadata
        found.add((name, tuple(sorted(texts) if is_pairs else texts)))
    return frozenset(found)


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings in the sweep.json of a folder that are still there, by name: flag -> value.

    Raises:
      UserError: when the file is damaged.
    """
    path = folder / run_dir.SWEEP
    if not path.is_file():
        return {}
    record = run_dir.read_json(path)
    try:
        figures_of_runs.read_settings(record)
        texts = {
            setting['name']: [f'--{flag}={text}' for flag, text in setting['flags'].items()]
            for setting in record['settings']
            if (folder / setting['name']).is_dir()
        }
        return {name: _parse_flags(argv, str(path)) for name, argv in texts.items()}
    except UserError as error:
        raise UserError(f'{path} is damaged; remove it and run the same command again') from error


def find_folders(
    chosen: Mapping[str, dict[str, Any]], before: Mapping[str, dict[str, Any]], command: Command
) -> dict[str, dict[str, Any]]:
    """The settings of a command, by the names of the folders that hold them already or will.

    A folder with another name is found by its flags in sweep.json or, after an interrupted command,
    by its flags.cfg: flags may be given in another order, and a folder is setting_2 where an
    earlier version numbered the lines of a file.

    Args:
      chosen: the settings by the names that new folders have: flag -> value.
      before: those of sweep.json, likewise.
      command: the flags of the command.
    """
    known = {_key(flags): name for name, flags in before.items()}
    others = [path for path in run_dir.setting_folders(command.folder) if path.name not in before]
    found: dict[str, dict[str, Any]] = {}
    for name, flags in chosen.items():
        place = known.get(_key(flags), name)
        if not (command.folder / place).is_dir():
            free = [path for path in others if path.name not in (*chosen, *found)]
            same = (path.name for path in free if _is_setting(path, name, flags, command))
            place = next(same, name)
        found[place] = flags
    return found


def _is_setting(folder: Path, name: str, flags: Mapping[str, Any], command: Command) -> bool:
    """Whether a folder holds the runs of a setting, by its flags.cfg."""
    run = next(iter(run_dir.seed_folders(folder)), folder)
    if not (run / 'flags.cfg').is_file():
        return False
    stored = config_flags.read(run / 'flags.cfg')
    single = [n for n in flags if n in stored and 'separator' not in FLAGS[n].metadata]
    if _key({n: stored[n] for n in single}) != _key({n: flags[n] for n in single}):
        return False
    config = settings.complete(command.of_runs(name, flags)[0])[0]
    other = config.replace(**{n: value for n, value in stored.items() if binds(n)})
    # All settings use the same data.
    sections = {*SECTIONS, 'finetune'} - {'data'}
    free = tuple(f'--{n}=' for n in ('seed', 'backbone') if n not in flags)
    return all(one.startswith(free) for one in differences(config, other, sections))
