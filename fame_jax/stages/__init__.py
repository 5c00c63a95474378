"""The stages of a run, one file for each value of --stages.

Read context.py first (what every stage takes), then settings.py (flags to settings; with
text_settings.py, which checks those of item texts), then the stages in their order: prepare, text,
train (pretrain and finetune, with initialize.py), update (with updated_run.py and update_start.py),
evaluate; those that use a trained run: recommend, similar, explain, export, report, with
open_recommender.py and facet_names.py; and members.py and sweep.py (with sweep_settings.py), which
run the stages for several seeds and settings. search.py is a command of its own.
"""

from fame_jax.stages.context import RunContext, open_run
from fame_jax.stages.evaluate import evaluate
from fame_jax.stages.explain import explain
from fame_jax.stages.export import export
from fame_jax.stages.prepare import prepare
from fame_jax.stages.recommend import recommend
from fame_jax.stages.report import report
from fame_jax.stages.similar import similar
from fame_jax.stages.sweep import run_command
from fame_jax.stages.text import text
from fame_jax.stages.train import finetune, pretrain
from fame_jax.stages.update import update
from fame_jax.stages.update_start import read_data

__all__ = ('STAGES', 'RunContext', 'open_run', 'read_data', 'run_command')

STAGES = {
    'prepare': prepare,
    'text': text,
    'pretrain': pretrain,
    'finetune': finetune,
    'update': update,
    'evaluate': evaluate,
    'recommend': recommend,
    'similar': similar,
    'explain': explain,
    'export': export,
    'report': report,
}
