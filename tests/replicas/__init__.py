"""Replicas: streams that survive the death of the process that computes them."""
