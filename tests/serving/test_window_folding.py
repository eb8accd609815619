"""mim_ray/serving/window_folding.py: what cannot be folded holds up nothing else, and does not fill the log."""

from __future__ import annotations

import threading

from mim_ray.serving import window_folding
from mim_ray.serving.window_folding import WindowFolding


def test_what_fails_the_same_way_each_time_is_told_once_and_tried_again(tmp_path, monkeypatch, caplog):
    problems = ["a is damaged", "a is damaged", "away", None, "away"]
    tried = threading.Event()

    def fold(*_) -> None:
        problem = problems.pop(0) if problems else None
        if not problems:
            tried.set()
        if problem is not None:
            raise OSError(problem)

    monkeypatch.setattr(window_folding, "fold", fold)
    folding = WindowFolding(str(tmp_path), 0.01)
    assert tried.wait(60)
    folding.stop()
    told = [record.exc_info[1].args[0] for record in caplog.records if record.exc_info]
    assert told == ["a is damaged", "away", "away"]
