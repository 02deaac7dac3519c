"""Counts and times of all answers of a conversation."""

from dataclasses import dataclass

from lockstep.commands.terminal.answer import Timing
from lockstep.commands.terminal.output import counted


@dataclass
class Totals:
    """Sums over answers. Only computed tokens count for a speed, so tokens that the cache had are apart."""

    num_answers: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_decoded: int = 0  # of num_output, those after an answer's first token, which the prefill gives
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, timing: Timing) -> None:
        """Counts one more answer. What was computed before an answer was interrupted, without a token, is not known."""
        self.num_answers += 1
        if not timing.num_output:
            return
        self.num_prompt += timing.num_prompt
        self.num_cached += timing.num_cached
        self.num_output += timing.num_output
        self.num_decoded += max(0, timing.num_output - 1)
        self.prefill_seconds += timing.first_token
        self.decode_seconds += timing.total - timing.first_token

    def __str__(self) -> str:
        computed = self.num_prompt - self.num_cached
        prefill = computed / self.prefill_seconds if self.prefill_seconds else 0.0
        decode = self.num_decoded / self.decode_seconds if self.num_decoded and self.decode_seconds else 0.0
        return (
            f"{counted(self.num_answers, 'answer')}, {counted(self.num_prompt, 'prompt token')}: {self.num_cached} "
            f"cached, {computed} computed at {prefill:.1f} tok/s; {counted(self.num_output, 'token')} generated"
            f"{f' at {decode:.1f} tok/s' if decode else ''}"
        )
