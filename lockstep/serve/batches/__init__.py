"""Batches: lines of a file that are answered as if each had been sent to the server."""
