"""`python -m tests.receipts --honest 10000 --forged 10000`: no honest receipt is refused, and no forged one accepted.

Honest answers come from engines with other threads, chunks, mates, caches and drafts, under preemption, resumed, held
to forms and as several samples; another engine verifies each. Each class of forgeries takes them at random. --flips N:
bits flipped in packed weights; --impostors N: answers in other formats; both under the true model's name; those that
change nothing of an answer are counted. --damaged N: receipts with fields that are replaced at random. --save FILE
keeps the honest receipts, for `lockstep verify FILE` on another machine. --seed repeats a run.
"""

import argparse
import random
import sys
import time
from collections import Counter

from lockstep.receipts.envelope import Envelope
from lockstep.receipts.errors import ReceiptError
from tests.receipts.campaign import Crowd, Judge, flipped_bits, honest_receipts, impostors
from tests.receipts.forgeries import FORGERIES, damaged


def main() -> int:
    """Runs what the command line asks for; returns 1 if anything was judged wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.receipts", description=__doc__)
    parser.add_argument("--honest", type=int, default=10_000, help="receipts, at least (%(default)s)")
    parser.add_argument("--forged", type=int, default=10_000, help="forgeries of each class (%(default)s)")
    parser.add_argument("--flips", type=int, default=200, help="bits to flip (%(default)s)")
    parser.add_argument("--impostors", type=int, default=1000, help="answers in each other format (%(default)s)")
    parser.add_argument("--damaged", type=int, default=5000, help="receipts (%(default)s)")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9, help="of everything (the time)")
    parser.add_argument("--save", help="a file for the honest receipts")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with Judge() as judge:
        honest, refused = judge_honest(judge, given)
        accepted = judge_forged(judge, honest, given)
        accepted += flipped_bits(judge, given.flips, given.seed)
        accepted += impostors(judge, given.impostors, given.seed)
        stalls = judge_damaged(judge, honest, given)
    print(f"{refused} honest receipts refused, {accepted} false ones accepted")
    return int(refused + accepted + stalls > 0)


def judge_honest(judge, given):
    """(The honest receipts, the number of them that are refused)."""
    made, refused, kinds, began = [], 0, Counter(), time.time()
    for number, crowd in enumerate(Crowd.all(given.seed)):
        if len(made) >= given.honest:
            break
        for receipt in honest_receipts(crowd):
            made.append(receipt)
            verdict = judge.verdict(receipt.statement)
            kinds[crowd.name] += 1
            if not verdict.is_true:
                refused += 1
                print(f"refused: crowd {number} ({crowd.name}): {verdict}", flush=True)
        if number % 20 == 19:
            print(f"{len(made)} honest receipts, {refused} refused, {time.time() - began:.0f} s", flush=True)
    tokens = sum(receipt.statement.answer.tokens for receipt in made)
    print(f"{len(made)} honest receipts of {tokens} tokens: {refused} refused; by engine: {dict(kinds)}")
    if given.save:
        with open(given.save, "wb") as file:
            for receipt in made:
                file.write(Envelope(receipt.statement.to_bytes()).to_bytes() + b"\n")
    return made, refused


def judge_forged(judge, honest, given):
    """The number of forged receipts that are accepted."""
    total = 0
    for name, forge in FORGERIES.items():
        draw, found, accepted = random.Random(f"{given.seed} {name}"), Counter(), 0
        while sum(found.values()) < given.forged:
            forged = forge(draw.choice(honest), draw, judge.vocab_size)
            if forged is None:
                continue
            verdict = judge.verdict(forged)
            found[verdict.what or "true"] += 1
            accepted += verdict.is_true
        print(f"{name}: {sum(found.values())} forged, {accepted} accepted; found as {dict(found)}", flush=True)
        total += accepted
    return total


def judge_damaged(judge, honest, given):
    """The number of damaged receipts that take over a second; whatever else than ReceiptError they raise ends the
    run."""
    draw, found, longest = random.Random(f"{given.seed} damaged"), Counter(), [0.0]
    for _ in range(given.damaged):
        payload, began = damaged(draw.choice(honest).statement, draw), time.perf_counter()
        try:
            verdict = judge.verdict_on(payload)
            found["true" if verdict.is_true else verdict.what] += 1
        except ReceiptError:
            found["refused"] += 1
        longest.append(time.perf_counter() - began)
    stalls = sum(seconds > 1 for seconds in longest)
    print(f"{given.damaged} damaged receipts: {stalls} took over 1 s, longest {max(longest):.2f} s; {dict(found)}")
    return stalls


if __name__ == "__main__":
    sys.exit(main())
