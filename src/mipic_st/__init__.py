"""MIPIC losses and per-dimension evaluation for sentence-transformers."""

__version__ = "0.1.0"
