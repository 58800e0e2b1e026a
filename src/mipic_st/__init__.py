"""MIPIC losses and per-dimension evaluation for sentence-transformers."""

from mipic_st.loss import MIPICLoss

__version__ = "0.1.0"

__all__ = ["MIPICLoss", "__version__"]
