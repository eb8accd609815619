"""Joining or starting Ray, progress, summaries. Knows no data and no model."""
