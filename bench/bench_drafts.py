"""Speed with drafts against without: one request at a time, all settings in turns, and whether answers are equal.

    python bench/bench_drafts.py [MODEL] [--text FILE] [--speculate lookup,mtp,auto] [--draft 2,4,7] [--rounds 5]

Each round takes another 3000 characters of the text as its prompt. Printed are the median milliseconds of 200 tokens
after the first, the median ratio to the same round without drafts, and how many drafts were right.
"""

import itertools
import pathlib
import statistics
import time

from options import Parser, file, several, whole_number

from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation.drafts import MAX_DRAFTS
from lockstep.llm import LLM

TEXT = pathlib.Path(__file__).resolve().parents[1] / "lockstep" / "engine" / "cache" / "prefix.py"


def run(llm, ids, params):
    """(seconds after the first token, the Request) of one answer."""
    request, first = llm.engine.add(ids, params), None
    while llm.engine.has_work:
        llm.engine.step()
        if first is None and request.output_ids:
            first = time.perf_counter()
    return time.perf_counter() - first, request


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=file, default=TEXT, help="a file of which prompts are parts")
    sources = dict(default="lookup,mtp,auto", help="sources, comma-separated (%(default)s)")
    parser.add_argument("--speculate", type=several(str), **sources)
    drafts = dict(default="2,4,7", help="numbers of drafts, beside none given (%(default)s)")
    parser.add_argument("--draft", type=several(whole_number(1, MAX_DRAFTS)), **drafts)
    parser.add_counts(rounds=5)
    parser.add_argument("--weights", default="auto")
    args = parser.parse_args()
    if not (text := args.text.read_text(errors="replace")):
        parser.error(f"--text {args.text}: expected a text, this file is empty")
    settings = {"off": {}}
    for source, draft in itertools.product(args.speculate, [None, *args.draft]):
        settings[f"{source} {draft or ''}"] = dict(speculate=source, draft=draft)
    with parser.refusing():
        llms = {
            name: LLM(args.model, weights=args.weights, needs_text=True, **options)
            for name, options in settings.items()
        }
    for temperature in (0.0, 0.8):
        found = {name: [] for name in settings}
        for i in range(args.rounds + 1):
            start = 1500 * i % max(1, len(text) - 3000)
            ids = llms["off"].encode(text[start : start + 3000])
            params = SamplingParams(max_tokens=200, temperature=temperature, seed=i, ignore_eos=True)
            for name, llm in llms.items():
                found[name].append(run(llm, ids, params))
        report(temperature, {name: answers[1:] for name, answers in found.items()})  # the first round warms up


def report(temperature, found):
    for name, answers in found.items():
        ratios = [off / own for (off, _), (own, _) in zip(found["off"], answers, strict=True)]
        same = all(a.output_ids == b.output_ids for (_, a), (_, b) in zip(found["off"], answers, strict=True))
        right, drafted = (sum(getattr(r, n) for _, r in answers) for n in ("num_accepted", "num_drafted"))
        print(
            f"temperature {temperature}  {name:10s}  {1000 * statistics.median(s for s, _ in answers):6.0f} ms  "
            f"{statistics.median(ratios):.2f} times as fast  {right} of {drafted} drafts right  "
            f"{'same answers' if same else 'OTHER ANSWERS'}"
        )


if __name__ == "__main__":
    main()
