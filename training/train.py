"""Train the model until a given time of day: first on text, then on text mixed with chat pairs.

The rates and the stage follow the fraction of the time that has passed, so the run ends well whatever the machine's
load was.
Run it again with the same --out to resume. Data parallel over processes when started by torchrun, best with one
thread each.
"""

import argparse
import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_loss import head_loss
from models import MODELS, make_model
from optimizer import Optimizer, num_processes, rank

WARMUP, DECAY_FROM = 0.02, 0.3
MTP_WEIGHT = 0.3
AVERAGE_DECAY = 0.98
SECONDS_BETWEEN_CHECKPOINTS = 300


class Windows:
    """Every token of the text once per epoch, in windows of a shuffled order that start elsewhere in each epoch."""

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


def make_batch(windows, pairs, first, num_rows, in_chat_stage, device):
    """This process's share of the rows numbered from first: all text, or every second row pairs."""
    rows = []
    for i in range(num_rows):
        index = first + i * num_processes() + rank()
        rows.append((pairs if in_chat_stage and i % 2 else windows).row(index))
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


def rate_scale(fraction):
    """Warm up, hold, then fall in a line to zero."""
    return max(0.0, min(1.0, fraction / WARMUP, (1 - fraction) / (1 - DECAY_FROM)))


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
        self.average = make_model(self.name).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = Optimizer(self.model, options.muon_rate, options.adam_rate)
        self.step, self.tokens, self.started = 0, 0, time.time()
        if self.path.exists():
            self.load()

    def load(self):
        saved = torch.load(self.path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(saved["last"])
        self.average.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.tokens, self.started = saved["step"], saved["tokens"], saved["started"]

    def save(self):
        state = {name: getattr(self, name) for name in ("step", "tokens", "started")}
        state |= {"name": self.name, "config": self.model.c.to_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"last": self.model.state_dict(), "averaged": self.average.state_dict()}
        # written beside and renamed, so that a kill leaves the old checkpoint
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def train_step(self, batch, num_mtp_rows, scale):
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


def agreed_fraction(run, end):
    """The first process's clock, so that all take the same step."""
    fraction = torch.tensor([(time.time() - run.started) / (end - run.started)], dtype=torch.float64)
    if num_processes() > 1:
        dist.broadcast(fraction, 0)
    return fraction.item()


def train(run, options, windows, pairs, heldout):
    end, checkpoint_at = seconds_until(options.until), time.time() + SECONDS_BETWEEN_CHECKPOINTS
    log = (options.out / "log.jsonl").open("a")
    while (fraction := agreed_fraction(run, end)) < 1:
        # counted in tokens, so that a resumed run may use other batch sizes
        first = run.tokens // windows.length
        batch = make_batch(windows, pairs, first, options.rows, fraction >= options.chat_from, run.device)
        # the MTP head gets a third of the rows, and more once the trunk is good enough to learn from
        num_mtp_rows = max(1, options.rows // (3 if fraction < 0.6 else 2))
        cpu, scale = time.process_time(), rate_scale(fraction)
        entry = dict(zip(("loss", "mtp_loss"), run.train_step(batch, num_mtp_rows, scale), strict=False))
        entry |= {"step": run.step, "tokens": run.tokens, "fraction": fraction}
        entry |= {"scale": scale, "cpu_s": time.process_time() - cpu, "time": time.time() - run.started}
        if rank() == 0:
            if time.time() > checkpoint_at:
                entry["heldout"] = heldout_loss(run.average, heldout)
                run.save()
                checkpoint_at = time.time() + SECONDS_BETWEEN_CHECKPOINTS
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}),
                file=log,
                flush=True,
            )
    if rank() == 0:
        run.save()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3_5_text")
    parser.add_argument("--data", type=Path, required=True, help="the folder of prepare.py and tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint and the log go")
    parser.add_argument("--until", required=True, metavar="HH:MM")
    parser.add_argument("--rows", type=int, default=6, help="sequences per step and process")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence, a multiple of 64")
    parser.add_argument("--chat-from", type=float, default=0.76, help="fraction of the time after which pairs mix in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    # two more tokens than positions: the targets of the main model and of the MTP head
    windows = Windows(np.load(options.data / "train.npy"), options.length + 2)
    pairs = Pairs(np.load(options.data / "train_pairs.npz"), options.length + 2)
    held = Windows(np.load(options.data / "heldout.npy"), options.length + 2)
    heldout = np.stack([held.row(i)[0] for i in range(16)]).astype(np.int64)
    train(Run(options, device), options, windows, pairs, torch.from_numpy(heldout).to(device))


if __name__ == "__main__":
    main()
