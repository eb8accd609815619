"""The ranking endpoint: POST /v1/rank, on the run of a scenario.

serve run serve.ranking:app config=tiny run.root=runs/tiny
"""

import click
from ray.serve import Application

from mim_ray.errors import MimRayError
from mim_ray.serving.ranking_app import bind_ranking
from mim_ray.serving.served import AppArgs


def app(args: AppArgs) -> Application:
    """Arguments: config, and section.key for each setting that differs."""
    try:
        return bind_ranking(args.scenario())
    except MimRayError as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from None
