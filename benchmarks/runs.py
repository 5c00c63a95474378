"""The runs that Table 2 is made of: which models there are, and one run of one of them."""

import dataclasses
import sys
import zipfile
from pathlib import Path

import numpy as np

from fame_jax import config as config_lib
from fame_jax import records
from fame_jax.errors import UserError, explain_os_errors


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table; its recipe is the flag file of the same name."""

    title: str
    backbone: str = ''  # another row, whose pre-training it starts from

    @property
    def stage(self) -> str:
        """The stage whose result is meant."""
        return 'finetune' if self.backbone else 'pretrain'


MODELS = {
    'gru4rec': Model('GRU4Rec'),
    'sasrec': Model('SASRec (CE)'),
    'sasrec_bce': Model('SASRec (BCE)'),
    'sasrec_sampled': Model('SASRec (sampled softmax)'),
    'bert4rec': Model('BERT4Rec'),
    'core': Model('CORE'),
    'cl4srec': Model('CL4SRec'),
    'iclrec': Model('ICLRec'),
    'duorec': Model('DuoRec'),
    'atten_mixer': Model('Atten-Mixer'),
    'msgifsr': Model('MSGIFSR, order 1'),
    'miasrec': Model('MiaSRec'),
    'fame': Model('FAME', backbone='sasrec'),
    'fame_bert4rec': Model('FAME over BERT4Rec', backbone='bert4rec'),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One model on one data set with one seed, and how it is run."""

    dataset: str
    model: str
    seed: int
    workdir: Path
    flags: tuple[str, ...]
    needs: Path | None = None  # workdir of its backbone

    @property
    def name(self) -> str:
        return f'{self.workdir.parent.name}/{self.workdir.name}'

    @property
    def log(self) -> Path:
        return self.workdir.with_name(f'{self.workdir.name}.log')

    @property
    def command(self) -> list[str]:
        """The child's command line."""
        return [sys.executable, '-m', 'fame_jax.main', *self.flags]

    def done(self) -> bool:
        """Whether its verdict is there."""
        path = self.workdir / 'results.json'
        return path.is_file() and MODELS[self.model].stage in records.read_json(path)['results']

    def ranks(self, protocol: str) -> np.ndarray:
        """Rank of each user's test item, int [U].

        Raises:
          UserError: when they are not there.
        """
        path = self.workdir / 'ranks.npz'
        advice = 'remove results.json there and run it again'
        with explain_os_errors(f'reading {path}', advice):
            try:
                with np.load(path) as ranks:
                    return ranks[f'{MODELS[self.model].stage}/test/{protocol}']
            except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f'{path} is not what evaluate writes; {advice}') from error


def check(run: Run, recipe: Path) -> None:
    """Refuses, before hours are spent, what the child would refuse, and any run of other flags.

    A child takes over flags of its workdir that it is not given, as is right for a person who goes
    on with a run; here such a run would stand in the table for what it is not.

    Raises:
      UserError: on a bad recipe or flag, or when the workdir holds a run with other flags.
    """
    if not recipe.is_file():
        raise UserError(f'there is no recipe {recipe}; --recipes names their folder')
    try:
        # Later flags win, and this folder has no flags of its own to be taken over.
        wanted = config_lib.parse([*run.flags, f'--workdir={run.workdir / "dataset"}'])
    except UserError as error:
        raise UserError(f'{run.name}: {error}'.replace('--workdir', '--folder')) from error
    path = run.workdir / 'flags.cfg'
    if path.is_file():
        there = config_lib.read(path)
        if run.done():  # its folder may have been moved since
            there = dataclasses.replace(there, backbone_from=wanted.backbone_from)
        if differ := config_lib.differences(wanted, there):
            raise UserError(
                f'{run.workdir} was run with other flags: {", ".join(differ)}; give the same, or '
                'choose another --folder'
            )
