"""The paper's tables and figures on one's own data, beside the paper's numbers."""
