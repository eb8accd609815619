"""An S3 API server on loopback for the tests: moto in a process of its own. Prints its port, then serves until it is stopped.

Conditional writes are atomic, as S3 promises (moto alone looks first and writes then). `GET /__requests__` gives and clears
the list of requests since the last time; `PUT /__conditional__/off` makes it a store without conditional writes, `/on` ends
it; `PUT /__older__/3600` makes all objects an hour older; `PUT /__lose__/2` answers the next two conditional writes with an
error although they were made.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

moto = DomainDispatcherApplication(create_backend_app)
lock = threading.Lock()
requests: list[str] = []
conditional = True
answers_to_lose = 0


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    global conditional, answers_to_lose
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    if path == "/__requests__":
        with lock:
            answer = json.dumps(requests).encode()
            requests.clear()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]
    if path.startswith("/__conditional__/"):
        conditional = path.endswith("/on")
        start("200 OK", [("Content-Length", "0")])
        return [b""]
    if path.startswith("/__lose__/"):
        answers_to_lose = int(path.rpartition("/")[2])
        start("200 OK", [("Content-Length", "0")])
        return [b""]
    if path.startswith("/__older__/"):
        for account in s3_backends.values():
            for bucket in account["aws"].buckets.values():
                for key in bucket.keys.values():
                    key.last_modified -= timedelta(seconds=int(path.rpartition("/")[2]))
        start("200 OK", [("Content-Length", "0")])
        return [b""]
    requests.append(f"{method} {path}?{environ['QUERY_STRING']}")
    if "HTTP_IF_NONE_MATCH" not in environ or method != "PUT":
        return moto(environ, start)
    if not conditional:
        del environ["HTTP_IF_NONE_MATCH"]
    with lock:
        if not answers_to_lose:
            return moto(environ, start)
        answers_to_lose -= 1
        list(moto(environ, lambda status, headers, *more: lambda content: None))
    start("500 Internal Server Error", [("Content-Length", "0")])
    return [b""]


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()
