"""Section 3.5: stores and serves embeddings, knows no encoder."""
