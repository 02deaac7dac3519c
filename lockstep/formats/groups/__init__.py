"""Formats of weights d * q + m with float32 d and m, and which of them has room for given groups."""
