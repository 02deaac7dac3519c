"""Train the model until a given time of day, or on so many tokens: warm-up, constant rates, decay.

Without --decay-from a run warms up and goes on at constant rates: started again with the same --out it resumes from its
last checkpoint, in any session. With --decay-from CHECKPOINT it starts from such a checkpoint and lets the rates fall
to zero at the given end, on text mixed with chat pairs: that is the model to export, and the constant run can go on.
Data parallel over processes when started by torchrun, best with one thread each.
"""

import argparse
import json
import os
import signal
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from export import load_folder
from fused import FusedSteps
from head_loss import head_loss
from models import MODELS, make_model
from optimizer import Optimizer, num_processes, rank

WARMUP_STEPS = 40
MTP_WEIGHT = 0.3
AVERAGE_DECAY = 0.98
SECONDS_BETWEEN_CHECKPOINTS = 300
# what a checkpoint holds beside tensors
KEPT = ("step", "tokens", "places", "began")


class Windows:
    """Every token of a text once per epoch, in windows of a shuffled order that start elsewhere in each epoch."""

    def __init__(self, ids, length):
        self.ids, self.length = ids, length
        self.count = (len(ids) - length) // length - 1

    def row(self, index):
        epoch, place = divmod(index, self.count)
        draw = np.random.default_rng([1, epoch])
        shift, order = draw.integers(self.length), draw.permutation(self.count)
        start = shift + order[place] * self.length
        ids = self.ids[start : start + self.length]
        return ids, np.ones(self.length, np.float32)


class Pairs:
    """Rows of randomly chosen pairs, one after the other; only the answers count."""

    def __init__(self, arrays, length):
        self.ids, self.weights = arrays["ids"], arrays["is_answer"].astype(np.float32)
        self.bounds = np.append(arrays["starts"], len(self.ids))
        self.length = length

    def row(self, index):
        draw, chosen, size = np.random.default_rng([2, index]), [], 0
        while size < self.length:
            i = draw.integers(len(self.bounds) - 1)
            chosen.append(slice(self.bounds[i], self.bounds[i + 1]))
            size += self.bounds[i + 1] - self.bounds[i]
        join = [np.concatenate([x[s] for s in chosen])[: self.length] for x in (self.ids, self.weights)]
        return join[0], join[1]


class Mixture:
    """Rows of several sources in fixed shares. Checkpoints keep places: how many rows each source has given."""

    def __init__(self, sources, shares, places):
        self.sources, self.places = sources, places
        self.shares = {name: share / sum(shares.values()) for name, share in shares.items()}

    def next_rows(self, count):
        """The next rows of the source that is furthest behind its share, one after the other."""
        rows, given = [], dict.fromkeys(self.shares, 0.0)
        for i in range(count):
            name = max(self.shares, key=lambda n: self.shares[n] * (i + 1) - given[n])
            given[name] += 1
            rows.append(self.sources[name].row(self.places.setdefault(name, 0)))
            self.places[name] += 1
        return rows


def make_batch(mixture, num_rows, device):
    """This process's share of the next rows: every process draws all of them, so that all know the places."""
    rows = mixture.next_rows(num_rows * num_processes())[rank() * num_rows :][:num_rows]
    ids = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))
    return ids.to(device), torch.from_numpy(np.stack([row[1] for row in rows])).to(device)


def losses(model, ids, weights, num_mtp_rows):
    """Loss of the next token, and of the one after it from the MTP head on the first rows, where the model has one."""
    hidden = model(ids[:, :-2])
    main = head_loss(model, hidden, ids[:, 1:-1], weights[:, 1:-1])
    if model.mtp is None:
        return [main]
    ids, weights = ids[:num_mtp_rows], weights[:num_mtp_rows]
    ahead = model.mtp_hidden(hidden[:num_mtp_rows], ids[:, 1:-1])
    return [main, head_loss(model, ahead, ids[:, 2:], weights[:, 2:])]


def rate_scale(step, fraction_left):
    """Warm up and hold, or fall in a line to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) if fraction_left is None else fraction_left


@torch.no_grad()
def heldout_loss(model, rows):
    hidden = model(rows[:, :-2])
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), rows[:, 1:-1].flatten())
    if model.mtp is None:
        return [main.item()]
    ahead = model.mtp_hidden(hidden, rows[:, 1:-1])
    return [main.item(), F.cross_entropy(model.logits(ahead).flatten(0, 1), rows[:, 2:].flatten()).item()]


class Run:
    """The state of a training run, and how it is kept on disk."""

    def __init__(self, options, device):
        self.path, self.device, self.name = options.out / "checkpoint.pt", device, options.model
        torch.manual_seed(0)
        self.model = make_model(self.name).to(device)
        if options.weights_from:
            self.model.load_state_dict(load_folder(options.weights_from).state_dict())
        # the average is computed exactly, in float32
        self.model.steps = FusedSteps() if options.fused else self.model.steps
        self.average = make_model(self.name).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = Optimizer(self.model, options.muon_rate, options.adam_rate)
        self.step, self.tokens, self.places = 0, 0, {}
        # where the constant rates or the decay began
        self.began = {"time": time.time(), "tokens": 0}
        if self.path.exists():
            self.load(self.path)
        elif options.decay_from:
            self.load(options.decay_from)
            self.began = {"time": time.time(), "tokens": self.tokens}

    def load(self, path):
        saved = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(saved["last"])
        self.average.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in KEPT:
            setattr(self, name, saved[name])

    def save(self):
        state = {name: getattr(self, name) for name in KEPT}
        state |= {"name": self.name, "config": self.model.c.to_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"last": self.model.state_dict(), "averaged": self.average.state_dict()}
        # written beside and renamed, so that a kill leaves the old checkpoint
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def train_step(self, batch, num_mtp_rows, scale):
        # products of matrices in bf16 (twice as fast where the processor has them), everything else in float32
        with torch.autocast(self.device.type, torch.bfloat16):
            main, *ahead = losses(self.model, *batch, num_mtp_rows)
        (main + sum(MTP_WEIGHT * loss for loss in ahead)).backward()
        self.optimizer.step(scale)
        for p in self.model.parameters():
            p.grad = None
        # a plain mean at first, so that the average forgets the random start
        decay = min(AVERAGE_DECAY, self.step / (self.step + 1))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.tokens += batch[0].numel() * num_processes()
        return [main.item(), *(loss.item() for loss in ahead)]


def seconds_until(clock):
    """The next time the clock shows HH:MM, as seconds since the epoch."""
    end = datetime.combine(datetime.now().date(), datetime.strptime(clock, "%H:%M").time())
    return (end if end > datetime.now() else end + timedelta(days=1)).timestamp()


def agreed(value):
    """The first process's value, so that all take the same step."""
    value = torch.tensor([value], dtype=torch.float64)
    if num_processes() > 1:
        dist.broadcast(value, 0)
    return value.item()


def fraction_left(run, options, end):
    """Of the run or the decay since it began, also where it was interrupted: 1 at first, 0 or less at its end."""
    if options.tokens:
        return 1 - (run.tokens - run.began["tokens"]) / (1e6 * options.tokens)
    return (end - time.time()) / (end - run.began["time"])


def train(run, options, mixture, heldout):
    end = seconds_until(options.until) if options.until else None
    checkpoint_at = time.time() + SECONDS_BETWEEN_CHECKPOINTS
    log, asked_to_stop = (options.out / "log.jsonl").open("a"), threading.Event()
    # a run that is terminated keeps what it has learnt
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    while (left := agreed(0 if asked_to_stop.is_set() else fraction_left(run, options, end))) > 0:
        batch = make_batch(mixture, options.rows, run.device)
        cpu, scale = time.process_time(), rate_scale(run.step, left if options.decay_from else None)
        entry = dict(zip(("loss", "mtp_loss"), run.train_step(batch, options.mtp_rows, scale), strict=False))
        entry |= {"step": run.step, "tokens": run.tokens, "scale": scale, "places": run.places}
        entry |= {"cpu_s": time.process_time() - cpu, "time": time.time()}
        if rank() == 0:
            if time.time() > checkpoint_at:
                entry["heldout"] = heldout_loss(run.average, heldout)
                run.save()
                checkpoint_at = time.time() + SECONDS_BETWEEN_CHECKPOINTS
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
            print(json.dumps(rounded), file=log, flush=True)
    if rank() == 0:
        run.save()


def source(name, data, length):
    """A text of prepare.py and tokenizer.py by the name that --shares gives it."""
    if name == "pairs":
        return Pairs(np.load(data / "train_pairs.npz"), length)
    return Windows(np.load(data / ("train.npy" if name == "library" else f"{name}.npy")), length)


def shares_of(text):
    """library=6,packages=4 as a dictionary."""
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3_5_text")
    parser.add_argument("--data", type=Path, required=True, help="the folder of prepare.py and tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint and the log go")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--until", metavar="HH:MM", help="the time of day at which it ends")
    end.add_argument("--tokens", type=float, metavar="MILLIONS", help="how many tokens it sees in all")
    parser.add_argument("--decay-from", type=Path, metavar="CHECKPOINT", help="let its rates fall to zero")
    parser.add_argument("--weights-from", type=Path, metavar="FOLDER", help="an exported model to begin a run with")
    parser.add_argument("--rows", type=int, default=8, help="sequences per step and process")
    parser.add_argument("--mtp-rows", type=int, default=3, help="of these, how many the MTP head learns from")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence, a multiple of 64")
    parser.add_argument("--shares", type=shares_of, default="library=4,documents=3,packages=3", help="and pairs")
    parser.add_argument("--fused", action="store_true", help="the C++ of fused.py, for one thread a process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-rate", type=float, default=0.012)
    parser.add_argument("--adam-rate", type=float, default=0.002)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    # two more tokens than positions: the targets of the main model and of the MTP head
    length = options.length + 2
    held = Windows(np.load(options.data / "heldout.npy"), length)
    heldout = torch.from_numpy(np.stack([held.row(i)[0] for i in range(16)]).astype(np.int64))
    run = Run(options, device)
    sources = {name: source(name, options.data, length) for name in options.shares}
    mixture = Mixture(sources, options.shares, run.places)
    train(run, options, mixture, heldout.to(device))


if __name__ == "__main__":
    main()
