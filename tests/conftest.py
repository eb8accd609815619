"""Fixtures: one small shared Ray for the session, and the real data where there is any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray with two CPUs and one pretended GPU, for all tests of the session."""
    from mim_ray.config.scenario import Run
    from mim_ray.runtime.cluster import cluster

    with cluster(Run(num_cpus=2, num_gpus=1, object_store_mb=200)):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped without it."""
    folder = os.environ.get("MIM_RAY_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MIM_RAY_TEST_DATA to the folder that holds movietweetings/, obd_small/ and fuxictr_tiny/")
    return Path(folder)
