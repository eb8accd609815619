"""What command lines have in common."""

from __future__ import annotations

import pytest

from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import pairs


def test_pairs_are_read() -> None:
    assert pairs(["a/b=/c=d", "e=f"], "--text", "MODEL=FOLDER", "m=/m") == {"a/b": "/c=d", "e": "f"}


@pytest.mark.parametrize("value", ["resnet50", "=/x", "resnet50="])
def test_what_is_no_pair_is_refused_with_an_example(value: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form MODEL=FOLDER, for example --vision m=/m"):
        pairs([value], "--vision", "MODEL=FOLDER", "m=/m")


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="a is named twice"):
        pairs(["a=1", "a=2"], "--predictions", "NAME=URI", "x=y")
