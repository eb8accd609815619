"""Both apps on the Ray that is running, reachable from this machine only: what the demo and the tests use."""

from __future__ import annotations

import logging
import socket

from ray import serve
from ray.serve.schema import LoggingConfig

from mim_ray.config import Scenario
from mim_ray.serving.new_item_app import bind_new_item_encoder
from mim_ray.serving.ranking_app import bind_ranking
from mim_ray.serving.served import Served

REQUEST_TIMEOUT_S = 30.0


def start(scenario: Scenario, served: Served | None = None) -> str:
    """Start Serve with the ranking app and the new-item encoder, wait until both are ready.

    Args:
        served: something else than what is current.

    Returns:
        base URL, such as http://127.0.0.1:8000.

    Raises:
        MimRayError: the run is not finished, versions do not match, or strangers could call.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    targets = [
        serve.RunTarget(application, name=name, route_prefix=prefix, logging_config=quiet)
        for application, name, prefix in (
            (bind_ranking(scenario, served), "ranking", "/"),
            (bind_new_item_encoder(scenario, served), "new_item_encoder", "/v1/items"),
        )
    ]
    host, port = scenario.serving.host, scenario.serving.port or _free_port(scenario.serving.host)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "request_timeout_s": REQUEST_TIMEOUT_S},
        logging_config=quiet,
    )
    serve.run_many(targets)
    return f"http://{host}:{port}"


def stop() -> None:
    """Stop Serve and its apps; Ray goes on."""
    serve.shutdown()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
