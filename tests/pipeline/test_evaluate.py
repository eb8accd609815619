"""The command line of jobs/evaluate_ctr.py."""

from __future__ import annotations

from typing import Any

import pytest

from mim_ray.pipeline import evaluate


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--predictions", "mine"], "not of the form NAME=URI"),
        (["--predictions", "../mine=x"], "a name has letters"),
        (["--predictions", "popularity=x"], "the name popularity is taken"),
        (["--predictions", "a=x", "--predictions", "a=y"], "a is named twice"),
        (["--only-predictions"], "--only-predictions needs tables"),
    ],
)
def test_a_wrong_option_is_a_sentence(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main("doc", options)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_named_tables_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(evaluate, "compare", lambda scenario, given, with_models: seen.append((given, with_models)))
    evaluate.main("doc", ["--predictions", "a=/x=1", "--only-predictions", "--predictions", "b=s3://bucket/b"])
    assert seen == [({"a": "/x=1", "b": "s3://bucket/b"}, False)]
