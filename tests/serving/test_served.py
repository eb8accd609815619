"""The arguments of the Serve apps."""

from __future__ import annotations

import click
import pytest

from mim_ray.serving.served import AppArgs
from serve import new_item_encoder, ranking


@pytest.mark.parametrize("app", [ranking.app, new_item_encoder.app])
def test_a_misspelt_argument_is_a_sentence_of_the_command_line(app):
    with pytest.raises(click.ClickException, match="ConfigError: confg is not a setting"):
        app(AppArgs(confg="tiny"))
