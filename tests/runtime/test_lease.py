"""mim_ray/runtime/lease.py: one holder at a time, freed when it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mim_ray.runtime import lease
from mim_ray.runtime.lease import Lease, LeaseTakenError

HOLDER = """
import sys, time
from mim_ray.runtime.lease import Lease
with Lease(sys.argv[1], what="refresh"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_told_who_has_it_and_gets_it_afterwards(tmp_path: Path) -> None:
    with Lease(f"{tmp_path}/lease", what="refresh") as first:
        first.check()
        with pytest.raises(LeaseTakenError, match=rf"Another refresh is running: process {os.getpid()} on "):
            Lease(f"{tmp_path}/lease", what="refresh").__enter__()
    with Lease(f"{tmp_path}/lease", what="refresh"):
        pass
    assert not list((tmp_path / "lease").iterdir())


def test_of_many_that_come_at_once_at_most_one_holds_it(tmp_path: Path) -> None:
    holding = []

    def contend(number: int) -> bool:
        try:
            with Lease(f"{tmp_path}/lease", what="refresh"):
                holding.append(number)
                assert len(holding) == 1
                time.sleep(0.05)
                holding.remove(number)
        except LeaseTakenError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert any(pool.map(contend, range(8)))


def test_a_killed_holder_on_this_machine_frees_it_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, f"{tmp_path}/lease"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LeaseTakenError):
        Lease(f"{tmp_path}/lease", what="refresh").__enter__()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with Lease(f"{tmp_path}/lease", what="refresh"):
        pass


def test_a_holder_elsewhere_that_does_not_renew_loses_it_and_notices(tmp_path: Path) -> None:
    with Lease(f"{tmp_path}/lease", what="refresh") as first:
        (file,) = (tmp_path / "lease").glob("*.json")
        claim = json.loads(file.read_text()) | {"host": "another machine"}
        file.write_text(json.dumps(claim))
        with pytest.raises(LeaseTakenError, match="another machine"):
            Lease(f"{tmp_path}/lease", what="refresh").__enter__()
        file.write_text(json.dumps(claim | {"renewed_at": time.time() - lease.FREE_AFTER_S - 1}))
        with Lease(f"{tmp_path}/lease", what="refresh"), pytest.raises(LeaseTakenError, match="lost its lease"):
            first.check()
