import pytest

from mim_ray.runtime.progress import Progress, format_seconds
from mim_ray.runtime.summary import format_summary


def test_progress_tells_count_rate_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", total=200, unit="items", every_s=0.0) as progress:
        progress.add(50, note="loss 2.31")
        progress.add(150)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encode: 50/200 items, ")
    assert " left, loss 2.31" in lines[0]
    assert lines[-1].startswith("encode: 200/200 items, ")


def test_seconds_are_told_as_people_say_them() -> None:
    assert [format_seconds(s) for s in (0.4, 59, 200, 7_500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_a_summary_lists_rows_and_rejects() -> None:
    text = format_summary("C-SFT", [("loss", "2.31")], {"image corrupt": 1_200})
    assert "C-SFT" in text
    assert "loss" in text
    assert "rejected: image corrupt" in text
    assert "1,200 rows" in text
