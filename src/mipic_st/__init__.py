"""MIPIC losses and per-dimension evaluation for sentence-transformers."""

from mipic_st.loss import MIPICLoss
from mipic_st.training import MIPICCallback, set_matryoshka_config

__version__ = "0.1.0"

__all__ = ["MIPICCallback", "MIPICLoss", "__version__", "set_matryoshka_config"]
