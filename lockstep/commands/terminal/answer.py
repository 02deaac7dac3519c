"""One streamed answer in the terminal, and its timing."""

import contextlib
import time
from dataclasses import dataclass

from lockstep.commands.terminal.output import counted
from lockstep.progress import Progress


@dataclass
class Timing:
    """Numbers of tokens and seconds of one answer; the first token ends the prefill. num_cached: tokens of the prompt
    whose KV cache was there already: they were not computed."""

    num_prompt: int
    num_output: int = 0
    first_token: float = 0.0
    total: float = 0.0
    num_drafted: int = 0
    num_accepted: int = 0
    num_cached: int = 0

    @property
    def prefill_rate(self):
        """Computed prompt tokens per second, up to the first token: the last step of the prefill samples it."""
        return (self.num_prompt - self.num_cached) / self.first_token if self.first_token else 0.0

    @property
    def decode_rate(self):
        """Tokens per second after the first token; 0 where there is no other."""
        seconds = self.total - self.first_token
        return (self.num_output - 1) / seconds if self.num_output > 1 and seconds > 0 else 0.0

    def __str__(self) -> str:
        rate = f" at {self.decode_rate:.1f} tok/s" if self.decode_rate else ""
        right = f" ({self.num_accepted} of {counted(self.num_drafted, 'draft')} right)" if self.num_drafted else ""
        decode = f"{counted(self.num_output, 'token')}{rate}{right}"
        cached = f" ({self.num_cached} cached, {self.num_prompt - self.num_cached} computed)" if self.num_cached else ""
        return (
            f"prompt {counted(self.num_prompt, 'token')}{cached} at {self.prefill_rate:.1f} tok/s, decode {decode}, "
            f"first token after {1000 * self.first_token:.0f} ms"
        )


def answer(llm, prompt, params, on_text, stopped=lambda: False, *, receipt: bool = False):
    """Generates an answer, and calls on_text with each new piece of text. Returns (Stream, Timing). While a long prompt
    is computed, standard error shows how far that is.

    stopped: called before every step; where it returns True the request is cancelled, which its finish_reason shows.
    receipt: see `Engine.make`.
    """
    stream = llm.start(prompt, params, receipt=receipt)
    request, started = stream.request, time.perf_counter()
    timing = Timing(len(request.prompt_ids))
    try:
        with contextlib.ExitStack() as prefill:
            progress = prefill.enter_context(Progress())
            report = progress.counter("computing the prompt", "token")
            prefill.enter_context(llm.reports_packing(progress))
            while request.finish_reason is None and not stopped():
                if not request.output_ids:
                    report(request.num_computed, timing.num_prompt)
                if request in llm.engine.step():
                    prefill.close()  # before any text: a line that is drawn anew would be drawn over it
                    _advance(llm, stream, timing, started)
                    if stream.new_text:
                        on_text(stream.new_text)
    finally:
        llm.engine.cancel(request)
    return stream, timing


def _advance(llm, stream, timing, started) -> None:
    timing.total = time.perf_counter() - started
    request = stream.request
    timing.num_output, timing.num_drafted = len(request.output_ids), request.num_drafted
    timing.num_accepted, timing.num_cached = request.num_accepted, request.num_cached
    timing.first_token = timing.first_token or timing.total
    stream.advance()
