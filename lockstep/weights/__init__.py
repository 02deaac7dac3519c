"""Weights: bytes on disk to arrays a kernel likes."""
