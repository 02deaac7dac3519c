"""Many requests in a file, one on each line: their lines, what has been answered already, and the file of answers."""
