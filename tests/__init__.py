"""The tests. Each process that imports them, also one that compiles kernels for another target, looks for garbage
rarely: see garbage.py."""

import gc

OBJECTS = 50_000  # that are made between two collections, in place of 700: it costs 20 MB
gc.set_threshold(OBJECTS)
