"""Stages put together: run one, run all, the demo, the report."""
