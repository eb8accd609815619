"""Rows: schemas, sources, samples, rejects, the synthetic shop. Knows Ray Data, knows no model."""
