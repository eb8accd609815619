import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.errors import ConfigError
from mim_ray.serving import keys as module
from mim_ray.serving.keys import VARIABLE, KeyRing, main, needed_scope, new_key, parse_keys
from mim_ray.serving.limits import check_exposure, guarded

RANK, RANK_LINE = new_key("shop", ["rank"])
WRITE, WRITE_LINE = new_key("feed", ["write"])
ADMIN, ADMIN_LINE = new_key("ops", ["rank", "admin"])


@pytest.fixture(autouse=True)
def _no_keys_of_the_shell(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def keys_file(tmp_path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n{RANK_LINE}\n\n{WRITE_LINE}  # nightly\n{ADMIN_LINE}\n")
    return path


def client_of(serving: Serving, server: str = "http://testserver") -> TestClient:
    app = FastAPI()
    for path in ("/v1/rank", "/v1/items", "/v1/events", "/healthz", "/readyz", "/metrics", "/v1/similar/i7"):
        for method in ("GET", "POST"):
            app.add_api_route(path, lambda: {"ok": True}, methods=[method], operation_id=f"{method}{path}")
    return TestClient(guarded(app, serving), base_url=server)


@pytest.fixture
def client(keys_file) -> TestClient:
    return client_of(Serving(keys_file=str(keys_file)))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_opens_what_its_scopes_name(client):
    assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 200
    assert client.get("/v1/similar/i7", headers={"X-API-Key": RANK}).status_code == 200
    assert client.post("/v1/items", headers=bearer(WRITE)).status_code == 200
    assert client.post("/v1/events", headers={"x-api-key": WRITE}).status_code == 200
    assert client.get("/metrics", headers=bearer(ADMIN)).status_code == 200
    assert client.post("/v1/rank", headers=bearer(ADMIN)).status_code == 200


def test_without_the_scope_it_is_403_and_names_the_scope(client):
    for key, path, scope in ((RANK, "/v1/items", "write"), (WRITE, "/v1/rank", "rank"), (WRITE, "/metrics", "admin")):
        answer = client.post(path, headers=bearer(key))
        assert answer.status_code == 403
        assert f'error="insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]
        assert f"needs {scope}" in answer.json()["error"]
        assert key not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": RANK},
        {"Authorization": f"Basic {RANK}"},
        {"X-API-Key": ""},
        bearer(RANK[:-1]),
        bearer(RANK + "x"),
        bearer(RANK.upper()),
        bearer("x" * 60_000),
        {"X-API-Key": hashlib.sha256(RANK.encode()).hexdigest()},
        {"X-API-Key": RANK_LINE},
        bearer(RANK) | {"X-API-Key": WRITE},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_no_key_and_wrong_keys_are_401_with_a_challenge(client, headers):
    answer = client.post("/v1/rank", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer realm="mim_ray"')
    assert set(answer.json()) == {"error"}
    assert RANK not in answer.text


def test_the_same_key_in_both_headers_is_one_key(client):
    assert client.post("/v1/rank", headers=bearer(RANK) | {"X-API-Key": RANK}).status_code == 200


def test_health_is_open_and_pages_are_open_on_loopback_only(client, keys_file):
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    outside = client_of(Serving(keys_file=str(keys_file), host="0.0.0.0"))
    assert outside.get("/healthz").status_code == outside.get("/readyz").status_code == 200
    assert outside.get("/docs").status_code == outside.get("/openapi.json").status_code == 401
    assert outside.get("/docs", headers=bearer(RANK)).status_code == 403
    assert outside.get("/docs", headers=bearer(ADMIN)).status_code == 200
    elsewhere = client_of(Serving(keys_file=str(keys_file)), "http://10.1.2.3")
    assert elsewhere.get("/docs").status_code == 401


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/rank", "rank"),
        ("/v1/rank/", "admin"),
        ("/V1/rank", "admin"),
        ("/v1/similar/a/b", "rank"),
        ("/v1/similar/", "admin"),
        ("/v1/search/image", "rank"),
        ("/v1/items", "write"),
        ("/v1/items/metrics", "admin"),
        ("/v1/events", "write"),
        ("/healthz/../metrics", "admin"),
        ("//healthz", "admin"),
        ("/healthzz", "admin"),
        ("/metrics", "admin"),
        ("/", "admin"),
        ("", "admin"),
    ],
)
def test_what_is_not_listed_needs_admin(path, scope):
    assert needed_scope(path) == scope


def test_keys_change_without_a_restart(client, keys_file):
    new, new_line = new_key("shop", ["rank"])
    assert client.post("/v1/rank", headers=bearer(new)).status_code == 401
    keys_file.write_text(f"{RANK_LINE}\n{new_line}\n")
    assert client.post("/v1/rank", headers=bearer(new)).status_code == 200, "both, while callers change over"
    assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 200
    replaced = keys_file.with_suffix(".new")
    replaced.write_text(new_line)
    replaced.rename(keys_file)
    assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 401
    assert client.post("/v1/rank", headers=bearer(new)).status_code == 200


@pytest.mark.parametrize("broken", ["shop rank", "", "shop everything sha256:" + "0" * 64, f"shop rank {RANK}", None])
def test_a_broken_new_file_leaves_the_old_keys_and_one_line_in_the_log(client, keys_file, caplog, broken):
    if broken is None:
        keys_file.unlink()
    else:
        keys_file.write_text(broken)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 200
    assert sum("stay as they were" in line for line in caplog.messages) == 1
    assert RANK not in caplog.text
    keys_file.write_text(WRITE_LINE)
    assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 401
    assert client.post("/v1/items", headers=bearer(WRITE)).status_code == 200


def test_the_file_is_looked_at_no_more_than_once_a_second(client, keys_file, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY_S", 3600.0)
    keys_file.write_text(WRITE_LINE)
    assert client.post("/v1/rank", headers=bearer(RANK)).status_code == 200


def test_the_environment_variable_holds_lines_too(monkeypatch, keys_file):
    monkeypatch.setenv(VARIABLE, f"{RANK_LINE};{WRITE_LINE}")
    ring = KeyRing.of(Serving())
    assert ring.find(RANK.encode()).name == "shop"
    assert ring.find(ADMIN.encode()) is None
    both = KeyRing.of(Serving(keys_file=str(keys_file)))
    assert both.find(ADMIN.encode()).scopes == {"rank", "admin"}


def test_all_wrong_lines_are_named_and_no_value_is_shown():
    text = f"good rank sha256:{'0' * 64}\nshop rank {RANK}\nshop read sha256:{'0' * 64}\nbad/name rank sha256:{'0' * 64}\nx"
    with pytest.raises(ConfigError) as error:
        parse_keys(text, "FILE")
    message = str(error.value)
    assert all(f"line {number}" in message for number in (2, 3, 4, 5))
    assert "line 1 " not in message
    assert RANK not in message


def test_a_keys_file_that_is_missing_binary_or_open_to_all_is_refused(tmp_path, keys_file):
    with pytest.raises(ConfigError, match="No such file"):
        check_exposure(Serving(keys_file=str(tmp_path / "none")))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no UTF-8"):
        check_exposure(Serving(keys_file=str(tmp_path / "binary")))
    keys_file.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod o-w"):
        check_exposure(Serving(keys_file=str(keys_file)))


def test_an_exposed_app_starts_with_keys_only(keys_file, monkeypatch):
    with pytest.raises(ConfigError, match=r"serving\.host = 0\.0\.0\.0 .* no API keys"):
        check_exposure(Serving(host="0.0.0.0"))
    assert check_exposure(Serving(host="0.0.0.0", keys_file=str(keys_file))).require_keys
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match=r"HA_PROXY.* no API keys"):
        guarded(FastAPI(), Serving())
    assert check_exposure(Serving(keys_file=str(keys_file))).require_keys


def test_a_replica_that_lacks_the_keys_of_the_driver_does_not_start(monkeypatch):
    monkeypatch.setenv(VARIABLE, RANK_LINE)
    serving = check_exposure(Serving())
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match="where Ray is started"):
        guarded(FastAPI(), serving)


def test_without_keys_only_this_machine_is_answered():
    assert client_of(Serving()).post("/v1/rank").status_code == 200
    assert client_of(Serving(), "http://127.0.0.1").post("/v1/rank").status_code == 200
    answer = client_of(Serving(), "http://10.1.2.3").post("/v1/rank")
    assert answer.status_code == 403
    assert "no API keys" in answer.json()["error"]
    here = client_of(Serving(), "http://127.0.0.1")
    assert here.post("/v1/rank", headers={"Origin": "http://localhost:8000"}).status_code == 200
    for origin in ("https://evil.example", "http://127.0.0.1.evil.example:8000", "null", "http://[::"):
        assert here.post("/v1/rank", headers={"Origin": origin}).status_code == 403, origin
    browser = {"Sec-Fetch-Site": "same-origin"}
    assert here.get("/v1/similar/a", headers=browser | {"Host": "evil.example:8000"}).status_code == 403
    assert here.get("/v1/similar/a", headers=browser | {"Host": "localhost:8000"}).status_code == 404


def test_the_command_prints_a_key_that_its_line_lets_in(capsys):
    main(["new", "--name", "shop", "--scopes", "rank,write"])
    printed = capsys.readouterr().out.split("\n")
    key, line = printed[1].strip(), printed[4].strip()
    assert KeyRing(None, line).find(key.encode()).scopes == {"rank", "write"}
    assert key not in line
    with pytest.raises(SystemExit):
        main(["new", "--name", "no good", "--scopes", "rank"])
    assert "line 1" in capsys.readouterr().err


def test_the_command_runs_as_documented():
    command = [sys.executable, "-m", "mim_ray.serving.keys", "new", "--name", "shop", "--scopes", "rank,write"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "shop rank,write sha256:" in out.stdout


def test_two_keys_never_agree():
    assert len({new_key("a", ["rank"])[0] for _ in range(100)}) == 100
    assert min(len(new_key("a", ["rank"])[0]) for _ in range(100)) >= 43
