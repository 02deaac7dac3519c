"""The bounds of a server. All that a client sends is checked against one of them."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. ValueError for one that is not a positive number.

    A sequence is one sample of one prompt. max_queued: sequences that may wait besides those that the engine runs;
    max_queued_tokens: prompt tokens of sequences without a first token of their answer. These two and
    max_pending_logprobs do not apply to a request that is alone, so that it may use all that the model can do.
    """

    max_header_bytes: int = 32 << 10
    max_body_bytes: int = 8 << 20
    max_pending_bytes: int = 256 << 20  # of bodies that are being read or answered, in all
    max_depth: int = 64  # of nested arrays and objects in a body
    max_containers: int = 1 << 15  # arrays and objects in a body
    max_fields: int = 1 << 17  # of all objects in a body
    max_object_fields: int = 1 << 14
    max_values: int = 1 << 20  # in a body, such as token ids
    max_connections: int = 1024
    max_address_connections: int = 512  # of them from one address
    spare_connections: int = 16  # beyond both, for /health and /ready alone
    max_prompts: int = 256  # of one request
    max_samples: int = 64  # of one prompt: n
    max_sequences: int = 256  # of one request: prompts times samples
    max_answer_values: int = 3 << 19  # of one answer: tokens and log-probabilities, about 140 bytes each
    max_pending_logprobs: int = 3 << 19  # of all running answers
    max_logprobs: int = 20
    max_stop: int = 16
    max_stop_chars: int = 256
    max_logit_bias: int = 1024
    max_file_bytes: int = 256 << 20  # of one file of /v1/files
    max_files_bytes: int = 4 << 30  # of all files of a tenant
    max_files: int = 1000  # of a tenant
    max_batches: int = 1000  # of a tenant; the oldest that has ended is forgotten
    max_uploads: int = 8  # files that are being sent
    max_queued: int = 256
    max_queued_tokens: int = 1 << 18
    max_counted_tokens: int = 1 << 18  # of a text that is counted or truncated; more where the context is longer
    max_offloaded: int = 64  # calls that may wait for a worker thread; beyond, /tokenize and the like are refused
    offload_seconds: float = 20.0
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    keep_alive_seconds: float = 10.0  # a stream is silent so long at most: then a comment keeps it open
    drain_seconds: float = 30.0
    stuck_seconds: float = 120.0  # a step that takes longer makes /health red
    max_faults: int = 3  # requests in a row whose logits were not finite make /health red

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 40:
                raise ValueError(f"{field.name}: expected a positive number, got {value!r}")
