"""How large the parts of a receipt may be: bounds that are checked before any work, far above what requests have."""

MAX_TOKENS = 1 << 22  # of a prompt, and of an answer
MAX_TOKEN_IDS = 1 << 18  # in a list of a parameter: no vocabulary is larger
MAX_STOPS = 64
MAX_STOP_CHARS = 4096
MAX_GRAMMAR_CHARS = 1 << 20
MAX_NAME_CHARS = 256
MAX_NONCE_CHARS = 128
MAX_FORMS = 3  # masks around a grammar's mask
MAX_BANNED = 4096  # sequences of tokens
