"""Ray Train plumbing. Knows no model."""
