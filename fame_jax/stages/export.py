"""The stage export: a folder that serves without the run."""

from fame_jax.serving.export import save
from fame_jax.stages.context import RunContext
from fame_jax.stages.open_recommender import open_recommender
from fame_jax.stages.output import output_path


def export(context: RunContext) -> None:
    """Writes the export folder."""
    folder = output_path(context, 'export')
    # On one device, whatever the mesh: the files hold a table of V + 1 rows.
    recommender = open_recommender(context)
    with context.screen.waiting(f'export: tracing the programs, writing {folder}'):
        missing = save(recommender, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    context.screen.say(f'export: {recommender.card["model"]}, {size / 2**20:.1f} MiB, in {folder}')
    if missing:
        context.screen.say(f'export: {missing}')
