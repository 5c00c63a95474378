"""The settings of a run: records of fields, and the command-line flags made from them.

Each field of a record is one flag of the same name. Read in this order: fields.py (how a field
describes its flag); the records run.py, data.py, text.py, model.py, loss.py, training.py,
update.py, serving.py and devices.py; this file (Config, all records together); flags.py (command
line, flag files, the flags.cfg of a run); removed.py (flags of the former version).
"""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from fame_jax.config.data import Data
from fame_jax.config.devices import Devices
from fame_jax.config.fields import no_effect, parse_pairs, show
from fame_jax.config.loss import Loss
from fame_jax.config.model import Model
from fame_jax.config.run import TRAINING_STAGES, Run
from fame_jax.config.serving import Serving
from fame_jax.config.text import Text
from fame_jax.config.training import Training
from fame_jax.config.update import Update
from fame_jax.errors import UserError

# Flags whose value may be a path, which has several spellings.
PATHS = ('dataset', 'prepared', 'items', 'text_encoder', 'item_init', 'backbone', 'append', 'from')

# Flags whose name is a word of Python, which no field can have.
SPELLED = {'from_run': 'from'}

# Stages that several processes can run together.
DISTRIBUTED = ('prepare', 'pretrain', 'finetune', 'evaluate')


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run, nested by section and frozen."""

    run: Run = dataclasses.field(default_factory=Run)
    data: Data = dataclasses.field(default_factory=Data)
    text: Text = dataclasses.field(default_factory=Text)
    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    training: Training = dataclasses.field(default_factory=Training)
    update: Update = dataclasses.field(default_factory=Update)
    serving: Serving = dataclasses.field(default_factory=Serving)
    devices: Devices = dataclasses.field(default_factory=Devices)

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """A Config from values by flag name; others have their defaults.

        Raises:
          TypeError: for a name that no flag has.
        """
        return cls().replace(**values)

    def flat(self) -> dict[str, Any]:
        """All values by flag name, in the order of the sections."""
        return {
            name: value
            for section in SECTIONS
            for name, value in vars(getattr(self, section)).items()
        }

    def replace(self, **values: Any) -> Self:
        """The same settings with other values, by flag name.

        Raises:
          TypeError: for a name that no flag has.
        """
        unknown = [name for name in values if name not in FLAGS]
        if unknown:
            raise TypeError(f'Config has no field {unknown[0]!r}')
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            changed.setdefault(section_of(name), {})[name] = value
        records = {s: dataclasses.replace(getattr(self, s), **v) for s, v in changed.items()}
        return dataclasses.replace(self, **records)

    def with_model_options(self, options: Mapping[str, Any]) -> Self:
        """The same settings with all options of the model written out.

        A flags.cfg made from it repeats the run even where a later version has other defaults.
        """
        return dataclasses.replace(self, model=self.model.with_options(options))

    def validate(self, row_layout: str = 'next') -> None:
        """Checks every section, and what must fit between sections.

        Args:
          row_layout: how the model's training rows are made, `row_layout` of its class.

        Raises:
          UserError: naming the flag, its value and what to do.
        """
        for section in SECTIONS:
            getattr(self, section).validate()
        self._check_rows(row_layout)
        stages, backbone = self.run.stages, self.training.backbone
        if 'text' in stages and not self.text.uses_texts:
            raise UserError(
                f'--stages=text makes vectors that --item_init={self.text.item_init} does not '
                'use; add --item_init=text'
            )
        if 'pretrain' in stages and backbone != 'pretrain':
            raise UserError(
                f'--backbone={backbone} does not use the stage pretrain; leave it out of --stages'
            )
        self._check_update()
        self.serving.check_stages(stages)
        if self.devices.members != 'auto' and not (self.run.seeds or self.run.sweep):
            raise no_effect(f'members={self.devices.members}', 'seeds=', 'add --seeds=0,1,2')
        single = [stage for stage in stages if stage not in DISTRIBUTED]
        if self.devices.distributed and single:
            raise UserError(f'the stage {single[0]} runs in one process; leave --distributed out')

    def _check_update(self) -> None:
        append, stages = self.update.append, self.run.stages
        if not append:
            if 'update' in stages:
                raise UserError(
                    '--stages=update needs new actions and the run that they update; add '
                    '--append=FILE --from=RUN'
                )
            if self.update.replay != Update().replay:
                raise no_effect(f'replay={self.update.replay}', 'append=', 'add --append=FILE')
            return
        wrong = [stage for stage in stages if stage in TRAINING_STAGES[:-2]]
        if wrong:
            raise UserError(
                f'--stages={wrong[0]} is not for a run that --append={append} makes; its stages '
                'are update and evaluate'
            )

    def _check_rows(self, row_layout: str) -> None:
        rows, parts = self.training.rows_per_step, self.devices.data_parallel
        if rows % parts:
            raise UserError(
                f'--rows_per_step={rows} is not a multiple of --data_parallel={parts}; make it one'
            )
        length, longest = self.training.row_length, self.data.max_length
        longest += row_layout == 'masked'  # the masked item to predict follows the history
        if row_layout != 'prefixes' and length < longest:
            raise UserError(
                f'--row_length={length} is too short for histories of --max_length='
                f'{self.data.max_length}; make it at least {longest}'
            )


# The record of each section, and the section and field of each flag.
SECTIONS = {item.name: item.default_factory for item in dataclasses.fields(Config)}
FLAGS = {item.name: item for record in SECTIONS.values() for item in dataclasses.fields(record)}


def section_of(name: str) -> str:
    """The section whose record has this flag."""
    return next(s for s, record in SECTIONS.items() if name in record.__dataclass_fields__)


def binds(name: str) -> str:
    """The section whose work fixes the flag's value in a workdir; '' where none does."""
    section = section_of(name)
    unbound = section in ('serving', 'devices')
    return FLAGS[name].metadata.get('binds', '' if unbound else section)


def differences(config: Config, stored: Config, sections: Collection[str]) -> list[str]:
    """Flags in which a command differs from the run that its workdir holds.

    Args:
      config: the command's settings, options of the model written out.
      stored: the run's settings, likewise.
      sections: those that the run has used already: ('data',) after prepare, all but serving and
        devices after training, and 'finetune' where that stage has begun. Flags of the others may
        still change.

    Returns:
      One text per flag, or per pair of a flag of pairs, with both values.
    """
    here, there = _spelled(config, sections), _spelled(stored, sections)
    names = dict.fromkeys([*here, *there])
    if not (config.text.uses_texts or stored.text.uses_texts):
        # A model without texts takes only titles from the file of items, when it is used.
        names = [name for name in names if name not in ('--items=', '--columns=item_file_id:')]
    return [
        f'{name}{here.get(name, "")} (there: {there.get(name, "")})'
        for name in names
        if not _is_same(name, here.get(name, ''), there.get(name, ''))
    ]


def _is_same(name: str, here: str, there: str) -> bool:
    """Whether two values are equal, or two spellings of one path."""
    if here == there or name.strip('-=') not in PATHS:
        return here == there
    with contextlib.suppress(OSError):
        return bool(here and there) and Path(here).samefile(there)
    return False


def _spelled(config: Config, sections: Collection[str]) -> dict[str, str]:
    """The bound values by the text before them: --seed= of a flag, --synthetic=users= of a pair."""
    values = {}
    for name, value in config.flat().items():
        about = FLAGS[name].metadata
        if separator := about.get('separator'):
            pairs, of_pairs = parse_pairs(name, value, about), about.get('pair_binds', {})
            for key, one in pairs.items():
                if of_pairs.get(key, binds(name)) in sections:
                    values[f'--{name}={key}{separator}'] = one
        elif binds(name) in sections and value is not None:
            values[f'--{SPELLED.get(name, name)}='] = show(value)
    return values
