import os
import socket
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from mim_ray.config.scenario import Run, Workers
from mim_ray.errors import ConfigError, DataError
from mim_ray.runtime.cluster import cluster, user_error, worker_threads


def _refuse(*_: object) -> None:
    raise DataError("items.parquet has no column item_id")


def _refuse_behind_another(*_: object) -> None:
    try:
        _refuse()
    except DataError as error:
        raise RuntimeError("block 3 failed") from error


class _RefusesToStart:
    def __init__(self) -> None:
        _refuse()

    def __call__(self, batch: dict) -> dict:
        return batch


@pytest.mark.ray
@pytest.mark.parametrize("function", [_refuse, _refuse_behind_another])
def test_the_users_mistake_is_found_below_what_a_task_wraps_around_it(ray_cluster: None, function: Any) -> None:
    with pytest.raises(RayTaskError) as caught:
        ray.get(ray.remote(function).remote())
    assert _is_the_sentence(user_error(caught.value))


@pytest.mark.ray
@pytest.mark.parametrize("function", [_refuse, _RefusesToStart])
def test_the_users_mistake_is_found_below_what_ray_data_wraps_around_it(ray_cluster: None, function: Any) -> None:
    compute = ray.data.ActorPoolStrategy(size=1) if isinstance(function, type) else None
    with pytest.raises(Exception, match="item_id") as caught:
        ray.data.range(4).map_batches(function, compute=compute).materialize()
    assert _is_the_sentence(user_error(caught.value))


def test_other_errors_are_not_the_users() -> None:
    assert user_error(RuntimeError("another")) is None


def _is_the_sentence(error: BaseException | None) -> bool:
    return isinstance(error, DataError) and str(error) == "items.parquet has no column item_id"


def test_threads_are_the_cores_shared_by_the_workers_unless_set() -> None:
    assert worker_threads(Workers(num_workers=10_000)) == 1
    assert worker_threads(Workers()) == os.cpu_count()
    assert worker_threads(Workers(num_workers=2, threads_per_worker=3)) == 3


def test_an_address_where_no_ray_answers_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if ray.is_initialized():
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        with (
            pytest.raises(ConfigError, match=r"No Ray answers at RAY_ADDRESS = 127.*unset RAY_ADDRESS"),
            cluster(Run()),
        ):
            pass
