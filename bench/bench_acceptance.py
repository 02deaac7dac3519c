"""How often a model's MTP head guesses right, by depth, along the model's own continuations.

    python bench/bench_acceptance.py [--model FOLDER] [--prompts 60] [--tokens 64]

Without --model it is the bundled one. Prompts are 192 tokens of files of this Python's library that the bundled model
was not trained on. Each answer is computed without drafts; from every position in it the head guesses up to seven
tokens. Printed is how often the guess at each depth is right if the guesses before it are: with the noise with which
the model samples, and with another seed's.
"""

import hashlib
import pathlib
import sysconfig

import numpy as np
from options import Parser

from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation.mtp import MtpDrafts
from lockstep.llm import LLM

DEPTHS, PROMPT = 7, 192
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "_bundled", "msilib", "dist-packages"}


def held_out_files() -> list[pathlib.Path]:
    """Files of Python's library that training held out, by the hash of their names (training/prepare.py)."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ((path, path.relative_to(library)) for path in sorted(library.rglob("*.py")))
    kept = [(path, name) for path, name in names if not SKIPPED.intersection(name.parts)]
    return [path for path, name in kept if _hash(f"Lib/{name.as_posix()}") % 1000 < 40]


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def prompts_of(llm: LLM, count: int) -> list[list[int]]:
    found = []
    for path in held_out_files():
        ids = llm.encode(path.read_text(errors="ignore").expandtabs(8))
        found += [ids[at : at + PROMPT] for at in range(0, len(ids) - PROMPT, 500)]
    np.random.default_rng(1).shuffle(found)
    return [[int(token) for token in ids] for ids in found[:count]]


def acceptance(llm: LLM, prompts: list[list[int]], tokens: int, temperature: float, other_seed: int) -> np.ndarray:
    """int [DEPTHS, 2]: guesses that were right, and all guesses."""
    engine, seen, found = llm.engine, [], np.zeros((DEPTHS, 2), int)
    draft, head = engine.drafter.draft, engine.drafter.head
    assert isinstance(head, MtpDrafts)
    run = head.runner.run

    def without(plan):
        seen.extend((request, request.num_tokens, list(made.tokens)) for request, made in draft(plan).items())
        return {}

    def shifted(chases):
        for chase in chases:
            if chase.sampling:
                chase.sampling["seed"] += other_seed
        return run(chases)

    engine.drafter.draft, head.runner.run = without, shifted
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=tokens, temperature=temperature, seed=100 + i, ignore_eos=True))
    while engine.has_work:
        engine.step()
    engine.drafter.draft, head.runner.run = draft, run
    for request, at, drafts in seen:
        for depth, (guess, token) in enumerate(zip(drafts, request.token_ids(at, request.num_tokens), strict=False)):
            found[depth] += guess == token, 1
            if guess != token:
                break
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model")
    parser.add_counts(prompts=60, tokens=64)
    args = parser.parse_args()
    with parser.refusing():
        llm = LLM(args.model, speculate="mtp", draft=DEPTHS, needs_text=True)
    if PROMPT + args.tokens > llm.max_context:
        parser.error(f"--tokens {args.tokens}: expected at most {llm.max_context - PROMPT} after prompts of {PROMPT}")
    prompts = prompts_of(llm, args.prompts)
    for temperature in (0.0, 0.8, 1.0):
        for noise, other_seed in (("the model's noise", 0), ("other noise", 7919)):
            found = acceptance(llm, prompts, args.tokens, temperature, other_seed)
            rates = " ".join(f"{right / max(1, tried):.3f}" for right, tried in found)
            print(f"temperature {temperature}  {noise:17s}  {rates}  ({found[0, 1]} starts)")


if __name__ == "__main__":
    main()
