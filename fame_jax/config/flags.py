"""Command-line flags made from the records: reading, flag files, the flags.cfg of a run, --help."""

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import fame_jax
from fame_jax.config import FLAGS, SECTIONS, SPELLED, Config, binds, section_of
from fame_jax.config.fields import check_value, merge_pairs, show, suggest
from fame_jax.config.model import COMMON
from fame_jax.config.removed import REMOVED, convert, refusal
from fame_jax.errors import UserError, explain_os_errors

# A flag and its place, as the argument or arguments that give it.
Argument = tuple[str, list[str]]

COMMAND_LINE = 'the command line'


@dataclasses.dataclass(frozen=True)
class Given:
    """The flags of one command, checked one by one; those not given are absent.

    Fields:
      values: by flag name.
      typed: names of the flags that the command line itself gives, and no flag file.
    """

    values: Mapping[str, Any]
    typed: frozenset[str] = frozenset()

    def get(self, name: str) -> Any:
        """The value of a flag, or its default."""
        return self.values.get(name, FLAGS[name].default)

    @property
    def workdir(self) -> str:
        """The run's folder: --workdir, else runs/DATASET_MODEL."""
        source = self.get('prepared') if 'dataset' not in self.values else ''
        data = Path(source or self.get('dataset')).name.split('.')[0]
        return self.get('workdir') or f'runs/{data}_{self.get("model").split(":")[-1]}'


def parse(argv: Sequence[str]) -> Given:
    """Reads a command line and the flag files that it names; a later value wins.

    Pairs of flags such as --synthetic add up, name by name. NAME= without a value takes back a pair
    that was given before, and a flag without any pair takes back all of them. So does an empty
    value of a flag whose default the model decides, such as --width=.

    Args:
      argv: arguments without the program's name.

    Raises:
      UserError: for an unknown or removed flag, or a value of the wrong type, out of range or
        not among the choices, or where there is no pair to take back.
    """
    typed: set[str] = set()
    values = _read_flags(_expand(_split(argv)), typed)
    return Given(values, frozenset(typed & values.keys()))


def complete(
    given: Given,
    stored: Mapping[str, Any],
    recipe: Mapping[str, Any],
    *,
    row_layout: str = 'next',
    options: Iterable[str] | None = None,
) -> Config:
    """The settings of a run: given values, else its flags.cfg, else the recipe, else defaults.

    Where another model is given, the flags.cfg counts only for run, data and text; where another
    reading, its options of the model do not count.

    Args:
      given: the command's flags.
      stored: the run's flags.cfg, as `read` returns it, or {} for a new run.
      recipe: defaults of the model's class by flag name; those of a loss count with that loss only.
      row_layout: `row_layout` of the model's class.
      options: names of the options of the model's class. A flags.cfg of version 0.1 has values of
        others too, which are dropped. None: nothing is dropped.

    Raises:
      UserError: for values that do not fit together.
    """
    kept = _still_valid(given.values, stored)
    if options is not None:
        kept = {name: kept[name] for name in kept if name in options or name not in COMMON}
    recipe = _of_loss({**kept, **given.values}.get('loss'), recipe)
    values: dict[str, Any] = {**recipe, **kept, **given.values, 'workdir': given.workdir}
    if values.get('item_init', 'random') == 'random' and 'item_scale' not in given.values:
        values.pop('item_scale', None)  # versions before 0.3 kept it in flags.cfg without effect
    for name in values:
        if separator := FLAGS[name].metadata.get('separator'):
            layers = (layer.get(name, ()) for layer in (Config().flat(), kept, given.values))
            values[name] = merge_pairs(separator, *layers)
    config = Config.from_flat(**values)
    config.validate(row_layout)
    return config


def _of_loss(loss: str | None, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe, without its flags of the loss where another loss is chosen than its own."""
    if loss in (None, recipe.get('loss')):
        return recipe
    return {name: value for name, value in recipe.items() if section_of(name) != 'loss'}


def _still_valid(given: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored values that bind a run and belong to the given model and reading."""
    dropped = {''}  # the section of flags that do not bind
    if given.get('model', stored.get('model')) != stored.get('model'):
        dropped |= {'model', 'loss', 'training', 'finetune'}
    elif given.get('reading', '') != stored.get('reading', '') and 'reading' in given:
        dropped |= {'model'}
    return {n: v for n, v in stored.items() if n == 'model' or binds(n) not in dropped}


def read(path: Path) -> dict[str, Any]:
    """The values in a run's flags.cfg by flag name.

    Raises:
      UserError: when the file cannot be read, or was written by version 0.1 with flags that this
        version cannot repeat.
    """
    return _read_flags(_read_lines(path, stored=True))


def text(config: Config) -> str:
    """A run's flags.cfg: one flag per line, defaults included, since they may change later.

    It leaves out how the run is used, options that the model decides (see
    `Config.with_model_options`), default values of flags that do not bind a run, and the flags of
    an update where the run is none.
    """
    lines = [f'# Flags of a run of fame_jax {fame_jax.__version__}; --flagfile repeats it.']
    for name, value in config.flat().items():
        if section_of(name) == 'serving' or value is None:
            continue
        if section_of(name) == 'update' and config.update == SECTIONS['update']():
            continue
        if binds(name) or value != FLAGS[name].default:
            lines.append(f'--{SPELLED.get(name, name)}={show(value)}')
    return '\n'.join(lines) + '\n'


def usage() -> str:
    """What the program prints without arguments."""
    return f"""usage: fame_jax [--flagfile=FILE] [--flag=value ...]
       python -m fame_jax.main [--flagfile=FILE] [--flag=value ...]

  fame_jax --flagfile=quickstart.cfg
  fame_jax --dataset=orders.csv --columns=user:customer,item:sku,time:bought_at

  fame_jax compare RUN RUN ...      runs next to each other, in one page and one table
  fame_jax search --space=FILE ...  a search of settings
  fame_jax serve --export=FOLDER    an HTTP server of recommendations

The same command again resumes an interrupted run. A later value of a flag wins.
--help lists all flags, --version prints the version.
Flag files of the program: {', '.join(sorted(packaged_files()))}."""


def help_text() -> str:
    """What --help prints: usage, then each flag by section with default, choices or range."""
    lines = [usage()]
    for record in SECTIONS.values():
        lines += ['', record.__doc__ or '']
        for item in dataclasses.fields(record):
            about = item.metadata
            default = '' if item.default is None else show(item.default)
            allowed = '|'.join(about.get('choices', ()))
            if 'low' in about:
                allowed = f'from {about["low"]}' + f' to {about.get("high")}' * ('high' in about)
            allowed = f'  ({allowed})' if allowed else ''
            wrapped = textwrap.wrap(about['help'], 90, break_long_words=False)
            name = SPELLED.get(item.name, item.name)
            lines += [f'  --{name}={default}{allowed}', *(f'      {one}' for one in wrapped)]
    return '\n'.join(lines)


def packaged_files() -> dict[str, Path]:
    """The flag files that come with the program by name, from the package or the clone."""
    package = Path(fame_jax.__file__).parent
    installed, clone = package / 'experiments', package.parent / 'experiments'
    folder = installed if installed.is_dir() else clone
    return {path.name: path for path in folder.glob('*.cfg')}


def find_file(name: str) -> Path:
    """The flag file of this path, or the program's own flag file of this name.

    Raises:
      UserError: when there is neither.
    """
    path, own = Path(name).expanduser(), packaged_files()
    with explain_os_errors(f'--flagfile={name}'):
        if path.exists():
            return path
    if name in own:
        return own[name]
    hint = f"use the program's --flagfile={path.name}"
    hint = hint if path.name in own else suggest(path.name, sorted(own))
    raise UserError(f'--flagfile={name}: no such file; {hint}')


def _split(argv: Sequence[str]) -> list[Argument]:
    """Each flag of a command line, with the value that may follow it as an argument."""
    split: list[list[str]] = []
    for argument in argv:
        waiting = split and len(split[-1]) == 1 and '=' not in split[-1][0]
        if waiting and (not argument.startswith('-') or re.match(r'-\.?\d', argument)):
            split[-1].append(argument)
        else:
            split.append([argument])
    return [(COMMAND_LINE, arguments) for arguments in split]


def _expand(arguments: Iterable[Argument], inside: tuple[Path, ...] = ()) -> Iterator[Argument]:
    """Puts the lines of flag files in the place of --flagfile; `inside` are the files open now."""
    for where, argument in arguments:
        match = re.fullmatch(r'--?flagfile(?:=(.*))?', argument[0], re.DOTALL)
        if not match:
            yield where, argument
            continue
        name = match[1] or ''.join(argument[1:])
        if not name:
            raise UserError(f'{where}: --flagfile names no file')
        path = find_file(name)
        if path.resolve() in inside:
            raise UserError(f'{where}: --flagfile={name} includes itself')
        yield from _expand(_read_lines(path, stored=False), (*inside, path.resolve()))


def _read_lines(path: Path, stored: bool) -> list[Argument]:
    """The flags of a file, each with its place; comments begin with # or //."""
    with explain_os_errors(f'reading {path}'):
        try:
            lines = path.read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not text in UTF-8; it should hold flags') from error
    places = [(f'{path}:{number}', line.strip()) for number, line in enumerate(lines, 1)]
    places = [(where, line) for where, line in places if not re.match('#|//|$', line)]
    return [(where, [line]) for where, line in convert(places, stored)]


def _read_flags(arguments: Iterable[Argument], typed: set[str] | None = None) -> dict[str, Any]:
    """The values of flags, each checked by itself; adds those of the command line to `typed`."""
    known, values = flags.FlagValues(), {}
    define = {
        **{bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float},
        **{tuple: flags.DEFINE_list, str: flags.DEFINE_string},
    }
    for name, item in FLAGS.items():
        define[item.metadata['kind']](name, None, item.metadata['help'], flag_values=known)
    for where, argument in arguments:
        name, value = _read_flag(known, where, argument)
        if typed is not None and where == COMMAND_LINE:
            typed.add(name)
        if value is None:
            values.pop(name, None)
            continue
        about = FLAGS[name].metadata
        try:
            if separator := about.get('separator'):
                before = _take_back(name, value, values.get(name, ()), separator)
                value = tuple(pair for pair in value if not _is_empty(pair, separator))
            check_value(name, value, about)
        except UserError as error:
            raise UserError(str(error) if where == COMMAND_LINE else f'{where}: {error}') from None
        values[name] = merge_pairs(separator, before, value) if separator else value
    return values


def _take_back(
    name: str, value: tuple[str, ...], before: tuple[str, ...], separator: str
) -> tuple[str, ...]:
    """The pairs given before, without those that `value` takes back; () takes back all."""
    kept = {pair.partition(separator)[0]: pair for pair in before} if value else {}
    for pair in value:
        if _is_empty(pair, separator) and not kept.pop(pair.removesuffix(separator), None):
            raise UserError(
                f'--{name}={pair} takes back a pair that no flag before it gives; write '
                f'NAME{separator}VALUE, or leave it out'
            )
    return tuple(kept.values())


def _is_empty(pair: str, separator: str) -> bool:
    _, found, value = pair.partition(separator)
    return bool(found and not value)


def _read_flag(known: flags.FlagValues, where: str, argument: list[str]) -> tuple[str, Any]:
    head, _, value = argument[0].lstrip('-').partition('=')
    for name, spelled in SPELLED.items():
        if head == spelled and argument[0].startswith('-'):
            argument = [argument[0].replace(spelled, name, 1), *argument[1:]]
            head = name
    for name in (head, head.removeprefix('no')):
        if name in REMOVED and argument[0].startswith('-'):
            raise refusal(name, value or ''.join(argument[1:]), where)
    if argument[0].startswith('-') and head and not {head, head.removeprefix('no')} & FLAGS.keys():
        hint = suggest(head.removeprefix('no'), FLAGS).replace('did you mean ', 'did you mean --')
        hint = hint if hint.startswith('did') else '--help lists them'
        raise UserError(f'{where}: there is no flag --{head[:60]}; {hint}')
    if argument == [f'--{head}='] and head in FLAGS and FLAGS[head].default is None:
        return head, None
    known.unparse_flags()
    try:
        rest = known(['fame_jax', *argument])[1:]
    except flags.Error as error:
        line = ' '.join(str(error).split())
        raise UserError(f'{where}: {line}; --help lists the flags') from error
    name = next((name for name in FLAGS if known[name].present), '')
    if rest or not name:
        what = rest[0] if rest else argument[0]
        raise UserError(f'{where}: "{what}" is not a flag; flags look like --seed=1')
    return name, FLAGS[name].metadata['kind'](known[name].value)
