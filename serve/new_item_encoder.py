"""The live encoder of new items: POST /v1/items, into the tables of a scenario's run.

serve run serve.new_item_encoder:app config=tiny run.root=runs/tiny
"""

import click
from ray.serve import Application

from mim_ray.errors import MimRayError
from mim_ray.serving.new_item_app import bind_new_item_encoder
from mim_ray.serving.served import AppArgs


def app(args: AppArgs) -> Application:
    """Arguments: config, and section.key for each setting that differs."""
    try:
        return bind_new_item_encoder(args.scenario())
    except MimRayError as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from None
