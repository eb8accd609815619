"""Section 3.3: content-interest-aware supervised fine-tuning."""
