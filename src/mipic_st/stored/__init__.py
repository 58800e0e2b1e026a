"""Vectors in files and tables: rotated, cut and coded by NumPy, batch by batch, without torch."""
