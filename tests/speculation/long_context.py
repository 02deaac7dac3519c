"""Answers a long prompt with drafts and without: `python -m tests.speculation.long_context`.

The model has the shape of Qwen3.5-0.8B and random weights. Every width has an engine of its own, on which both
temperatures run; the second finds its prompt in the prefix cache. The engine without drafts and the engine with the
largest width compute the prompt; all other engines find it on disk.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.engine.model import load_model
from lockstep.engine.request import Request, SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.new_files import scratch_folder
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.weights.store import WeightStore
from tests.models import published, tiny
from tests.speculation.proof import differences, opened
from tests.speculation.sources import BUILT_IN, KNOWING, plant
from tests.speculation.subjects import Subject
from tests.speculation.watch import Seen, Watch

WIDTHS, TEMPERATURES = (2, 4, 6, 8), (0.0, 0.8)  # widths count rows: the certain token and its drafts
EMBEDDING_SCALE = 0.05


@dataclass
class Answer:
    """The result of one run. digests: of the token ids, their log-probabilities, the logits, the keys and values, and
    the last state. differing: differences from the run without drafts."""

    width: int
    temperature: float
    request: Request
    seen: Seen
    num_steps: int
    seconds: float
    digests: list[str]
    differing: list[str]


def digests(request: Request, seen: Seen) -> list[str]:
    """The digests of an Answer, shortened."""
    ids, logprobs = np.array(request.output_ids, np.int64), np.array(request.logprobs)
    pages = b"".join(np.ascontiguousarray(rows).tobytes() for _, rows in seen.pages[-1].values())
    state = seen.states.get(max(seen.states, default=0), b"")
    parts = ids.tobytes(), logprobs.tobytes(), b"".join(seen.logits), pages, state
    return [hashlib.sha256(data).hexdigest()[:8] for data in parts]


def answers(
    subject: Subject, prompt_ids: list[int], num_tokens: int, source: str, widths: tuple[int, ...], folder: Path
) -> Iterator[Answer]:
    """Answers without drafts (width 1), then with drafts of a source, for each width."""
    without: dict[float, Answer] = {}
    for width in (1, *widths):
        num_pages = 2 * -(-(len(prompt_ids) + num_tokens + width) // PAGE_TOKENS)
        options = dict(max_requests=1, kv_tokens=PAGE_TOKENS * num_pages, prompt_state_from=0, cache_dir=folder)
        if width > 1:
            options |= dict(speculate=source if source in BUILT_IN else BUILT_IN[0], draft=width - 1)
        with opened(subject, options) as engine:
            if width > 1 and source in KNOWING:
                knows = lambda request: without[request.params.temperature].request.output_ids
                plant(engine, KNOWING[source](knows, np.random.default_rng(width), subject.vocab_size), width - 1)
            watch = Watch(engine)
            for temperature in TEMPERATURES:
                params = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=7, ignore_eos=True)
                salt = "cold" if width == max(widths) else ""  # it finds no prefix of other engines
                made = run(watch, prompt_ids, params, salt, width)
                off = without.setdefault(temperature, made)
                made.differing = [*watch.faults, *differences(off.request, made.request, off.seen, made.seen)]
                if made is not off:
                    made.seen.pages.clear()
                yield made


def run(watch: Watch, prompt_ids: list[int], params: SamplingParams, salt: str, width: int) -> Answer:
    """Runs one request alone."""
    started, num_steps = time.perf_counter(), 0
    request = watch.engine.add(prompt_ids, params, cache_salt=salt)
    while watch.engine.has_work:
        watch.step()
        num_steps += bool(request.output_ids)
    spent = time.perf_counter() - started
    seen = watch.seen[request.id]
    return Answer(width, params.temperature, request, seen, num_steps, spent, digests(request, seen), [])


def random_model(folder: Path, weights: str, max_context: int) -> Subject:
    """Random weights in the shape of Qwen3.5-0.8B. Embeddings, which are also the head, are small beside what the
    layers add to them: so the model does not just repeat its last token, and its probabilities are flat enough for the
    temperature to matter."""
    config = published.QWEN3_5_0_8B["text_config"] | dict(tie_word_embeddings=True)
    arrays = tiny.tensors(config, 11)
    arrays["model.embed_tokens.weight"] *= np.float32(EMBEDDING_SCALE)
    checkpoint = open_checkpoint(tiny.write(folder, config, arrays, "BF16"))
    model = load_model(checkpoint, WeightStore(), weights, "bf16", max_context)
    checkpoint.content.wait()  # without it nothing is found on disk
    return Subject(model, model, frozenset(), [], [])


def main() -> int:
    """Prints a line for each run; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.speculation.long_context", description=__doc__)
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="of the answer (%(default)s)")
    parser.add_argument("--weights", default="q8_0", help="their format (%(default)s)")
    parser.add_argument("--source", choices=[*BUILT_IN, *KNOWING], default="mostly right", help="(%(default)s)")
    given, num_different = parser.parse_args(), 0
    with scratch_folder() as folder:
        subject = random_model(folder / "model", given.weights, given.prompt + given.tokens)
        prompt_ids = np.random.default_rng(0).integers(0, subject.vocab_size, given.prompt).tolist()
        kept = folder / "kept"
        for answer in answers(subject, prompt_ids, given.tokens, given.source, WIDTHS, kept):
            tell(answer)
            num_different += bool(answer.differing)
    return int(num_different > 0)


def tell(answer: Answer) -> None:
    """Prints a line for a run, and its differences."""
    r = answer.request
    print(
        f"width {answer.width}  T {answer.temperature:g}  {len(r.output_ids)} tokens, {len({*r.output_ids})} of them "
        f"different, in {answer.num_steps} steps, "
        f"{r.num_accepted} of {r.num_drafted} drafts right, {r.num_cached} tokens cached, {answer.seconds:.0f} s; "
        f"ids, logprobs, logits, keys and values, state: {' '.join(answer.digests)}  "
        f"{'DIFFERS' if answer.differing else 'equal'}",
        flush=True,
    )
    for difference in answer.differing:
        print("   ", difference[:1000], flush=True)


if __name__ == "__main__":
    sys.exit(main())
