"""MIM, Multi-modal Content Interest Modeling (arXiv 2502.00321), on Ray. Importing this starts nothing."""

__version__ = "0.1.0"
