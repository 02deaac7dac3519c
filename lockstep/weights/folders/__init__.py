"""Folders whose linear weights are quantized: the names and layouts of each form, read as weights of our formats."""
