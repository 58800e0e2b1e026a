"""Matryoshka embeddings for sentence-transformers: rotations, MIPICLoss, layer cuts, evaluation, export, serving.

The public names are those of ``__init__.pyi``, which type checkers and editors read. They are imported when they are
first used, so that ``import mipic_st`` and ``mipic-st --version`` are instant.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
