"""benchmarks/similar_items.py with tiny sizes: the index is compared with an exact search on both catalogues."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_recall_and_times_of_both_catalogues_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = __import__("similar_items")
    found = module.measure(module.Plan(num_items=2_000, width=8, num_queries=20, recall=0.9), tmp_path)
    for name in ("styles", "noise"):
        assert 0.7 <= found[name]["recall_at_10"] <= 1
        assert found[name]["recall_at_build"] >= 0.9
        assert 8 <= found[name]["index_bytes_per_item"] < 8 + 8 + 30
        assert min(found[name]["search_ms"], found[name]["exact_ms"]) > 0
