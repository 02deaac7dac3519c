"""Studies: many ways to round one model, measured on the same text."""
