"""Encode once, score at every dim, layer and precision."""
