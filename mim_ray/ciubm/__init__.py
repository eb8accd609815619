"""Section 3.4: the content-interest-aware CTR model."""
