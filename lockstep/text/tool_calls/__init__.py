"""Tool calls: parsing them from the text of answers, and grammars that enforce them, for each format of calls."""
