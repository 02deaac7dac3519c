"""Servers that Ray Serve deploys on the machines of a cluster."""
