"""Section 3.5, MFM's writer: items through encoder actors into the embedding log."""
