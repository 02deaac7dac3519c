"""Train the MTP head alone, on its own guesses, towards what the main model says; everything else stays as it is.

On texts of own_text.py. The head runs as it does when it drafts: the pair at position t is token t and the main model's
hidden state at t - 1, and it says what comes at t + 1; then its own hidden state takes the main model's place in the
next pair, which sees the true pairs up to where it began, and those of its own chain. What it should say is the main
model's distribution, in part (all of it in sampled texts) as it is, and in part its greatest token alone. Loss of a
depth counts as far as the depths before it would have been accepted.

Data parallel over processes when started by torchrun. Shapes: B rows, T tokens, S starts of chains, V vocabulary.
"""

import argparse
import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from export import load_folder, write_folder
from fused import FusedSteps, Steps
from optimizer import Optimizer, num_processes, rank
from train import agreed, seconds_until

WARMUP_STEPS = 10
# the share of the greatest token alone in the target of greedy rows
GREEDY_SHARE = 0.5
# what a token of a prompt counts, where one of an answer is 1
PROMPT_WEIGHT = 0.25
ROWS_AT_ONCE = 256
HELD_ROWS, STEPS_BETWEEN_CHECKS = 32, 50


class ChainSteps:
    """The steps of the model, but for attention: the first call computes all true pairs, as ever; those after it the
    next pairs of chains, of which number i began at the true pair `first + i`."""

    def __init__(self, steps, first):
        self._steps, self.first = steps, first
        self.keys, self.values = [], []

    def __getattr__(self, name):
        return getattr(self._steps, name)

    def attention(self, q_BTHD, k_BTGD, v_BTGD):
        self.keys.append(k_BTGD)
        self.values.append(v_BTGD)
        if len(self.keys) == 1:
            return self._steps.attention(q_BTHD, k_BTGD, v_BTGD)
        return self.attend(q_BTHD)

    def attend(self, q_BSHD):
        """Each query sees the true pairs up to its start, and one pair of each depth up to its own."""
        (true_k, *own_k), (true_v, *own_v) = (by_head(x) for x in (self.keys, self.values))
        num_starts, num_true, groups = q_BSHD.shape[1], true_k.shape[-2], true_k.shape[1]
        q = q_BSHD.transpose(1, 2).unflatten(1, (groups, -1)) * q_BSHD.shape[-1] ** -0.5
        scores = (q @ true_k[:, :, None].transpose(-1, -2)).float()
        starts = self.first + torch.arange(num_starts, device=q.device)
        unseen = torch.arange(num_true, device=q.device) > starts[:, None]
        own = [(q * k[:, :, None]).sum(-1, dtype=torch.float32) for k in own_k]
        shares = torch.cat([scores.masked_fill(unseen, -torch.inf), torch.stack(own, -1)], dim=-1).softmax(-1)
        out = shares[..., :num_true].to(true_v.dtype) @ true_v[:, :, None]
        out = out + sum(shares[..., num_true + i, None] * v[:, :, None] for i, v in enumerate(own_v))
        return out.flatten(1, 2).transpose(1, 2).contiguous()


def by_head(tensors):
    return [x.transpose(1, 2) for x in tensors]


class Distillation(torch.autograd.Function):
    """sum over rows of weight * cross entropy between the target's distribution and that of the head's hidden state;
    whether the token that came is the most likely one; its probability. The output layer has no gradient."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_NV, weights_N, came_N):
        grad_hidden, total = torch.empty_like(hidden_ND), torch.zeros(())
        is_guess, probabilities = torch.empty(came_N.shape, dtype=torch.bool), torch.empty(len(came_N))
        for start in range(0, len(hidden_ND), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits = hidden_ND[rows] @ head_VD.T
            log_q, target, weights = logits.float().log_softmax(-1), targets_NV[rows].float(), weights_N[rows, None]
            total -= (torch.linalg.vecdot(target, log_q) * weights[:, 0]).sum()
            of_came = log_q.gather(1, came_N[rows, None])[:, 0]
            is_guess[rows], probabilities[rows] = of_came == log_q.amax(-1), of_came.exp()
            gradient = log_q.exp_().sub_(target).mul_(weights).to(hidden_ND.dtype)
            torch.mm(gradient, head_VD, out=grad_hidden[rows])
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(is_guess, probabilities)
        return total, is_guess, probabilities

    @staticmethod
    def backward(ctx, grad, *_):
        return grad * ctx.saved_tensors[0], None, None, None, None


class Texts:
    """Rows of own_text.py in a shuffled order that differs in each epoch; the first ones are held back."""

    def __init__(self, path):
        saved = np.load(path)
        self.ids, self.prompt = saved["ids"].astype(np.int64), int(saved["prompt"])

    def held(self):
        return self.batch(np.arange(HELD_ROWS))

    def next_batch(self, step, num_rows):
        """This process's rows of a step."""
        count = len(self.ids) - HELD_ROWS
        at = (step * num_processes() + rank()) * num_rows + np.arange(num_rows)
        return self.batch([HELD_ROWS + self.order(i // count, count)[i % count] for i in at])

    def order(self, epoch, count):
        return np.random.default_rng([3, epoch]).permutation(count)

    def batch(self, rows):
        """Token ids, and which rows are greedy."""
        return torch.from_numpy(self.ids[rows]), torch.from_numpy(np.asarray(rows) % 2 == 0)


@torch.no_grad()
def main_model(model, ids_BT, is_greedy_B, prompt):
    """Its hidden states before each token, zeros before the first; the targets [B, T, V]; and the probability that it
    gives the token that comes next [B, T] (at the end of a row, the row's first token)."""
    hidden = model(ids_BT).float()
    head, targets, chances = model.model.embed_tokens.weight, [], []
    for h, ids, is_greedy in zip(hidden, ids_BT, is_greedy_B, strict=True):
        with torch.autocast("cpu", enabled=False):
            p = (h @ head.T).softmax(-1)
        chances.append(p.gather(1, ids.roll(-1)[:, None])[:, 0])
        if is_greedy:
            best = p.argmax(-1)
            # in a greedy answer it is what came, computed more exactly
            best[prompt - 1 : -1] = ids[prompt:]
            p.mul_(1 - GREEDY_SHARE).scatter_add_(1, best[:, None], torch.full_like(p[:, :1], GREEDY_SHARE))
        targets.append(p.bfloat16())
    before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
    return before, torch.stack(targets), torch.stack(chances)


def chain_losses(model, ids_BT, is_greedy_B, prompt, depths):
    """The loss of each depth; and how often its guesses in greedy answers are right, and tried: [depths, 2]."""
    hidden, targets, chances = main_model(model, ids_BT, is_greedy_B, prompt)
    head, embedded = model.model.embed_tokens.weight, model.model.embed_tokens(ids_BT)
    head = head.bfloat16() if torch.is_autocast_enabled("cpu") else head
    came, weights = ids_BT.roll(-1, dims=1), torch.full(ids_BT.shape, PROMPT_WEIGHT)
    weights[:, prompt - 1 :], weights[:, -1] = 1, 0
    # a chain begins with the guess of each token of the answer, as far as it can be checked to its end
    first, count = prompt - 1, ids_BT.shape[1] - depths - prompt + 1
    here, steps, losses, found = slice(0, ids_BT.shape[1]), ChainSteps(model.steps, first), [], torch.zeros(depths, 2)
    accepted, right = torch.ones(len(ids_BT), count), is_greedy_B[:, None].expand(-1, count)
    for depth in range(depths):
        hidden = model.mtp(hidden, embedded[:, here], steps, here.start)
        arguments = targets[:, here].flatten(0, 1), weights.flatten() / accepted.numel(), came[:, here].flatten()
        loss, *of_came = Distillation.apply(hidden.flatten(0, 1).to(head.dtype), head, *arguments)
        losses.append(loss)
        is_guess, chance = (x.view(len(ids_BT), -1) for x in of_came)
        chance = (chance / chances[:, here].clamp_min(1e-6)).clamp_max(1)
        if not depth:
            hidden, is_guess, chance = (x[:, first : first + count] for x in (hidden, is_guess, chance))
        found[depth] = torch.stack([(right & is_guess).sum(), right.sum()])
        right, accepted = right & is_guess, accepted * chance
        here, weights = slice(first + depth + 1, first + depth + 1 + count), accepted
    return losses, found


def shares(found):
    return [round(right / max(1, tried), 4) for right, tried in found.tolist()]


def train(model, optimizer, texts, options):
    end, began, step = seconds_until(options.until), time.time(), 0
    log, asked_to_stop = (options.out / "log.jsonl").open("a"), threading.Event()
    # a run that is terminated keeps what it has learnt
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    while (left := agreed(0 if asked_to_stop.is_set() else (end - time.time()) / (end - began))) > 0:
        cpu, entry = time.process_time(), {"step": step}
        with torch.autocast("cpu", torch.bfloat16):
            if step % STEPS_BETWEEN_CHECKS == 0 and rank() == 0:
                with torch.no_grad():
                    losses, found = chain_losses(model, *texts.held(), texts.prompt, options.depths)
                entry |= {"held": [round(x.item(), 4) for x in losses], "held_right": shares(found)}
            batch = texts.next_batch(step, options.rows)
            losses, found = chain_losses(model, *batch, texts.prompt, options.depths)
        sum(losses).backward()
        optimizer.step(min(left, (step + 1) / WARMUP_STEPS))
        for p in model.mtp.parameters():
            p.grad = None
        step += 1
        entry |= {"losses": [round(x.item(), 4) for x in losses], "right": shares(found), "left": round(left, 3)}
        entry |= {"cpu_s": round(time.process_time() - cpu, 2), "time": round(time.time())}
        if rank() == 0:
            print(json.dumps(entry), file=log, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="an exported folder, with its tokenizer")
    parser.add_argument("--texts", type=Path, required=True, help="what own_text.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the model with the new head, and a log")
    parser.add_argument("--until", metavar="HH:MM", required=True, help="the time of day at which it ends")
    parser.add_argument("--depths", type=int, default=3, help="guesses of a chain")
    parser.add_argument("--rows", type=int, default=8, help="rows per step and process")
    parser.add_argument("--fused", action="store_true", help="the C++ of fused.py, for one thread a process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-rate", type=float, default=0.006)
    parser.add_argument("--adam-rate", type=float, default=0.001)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    model = load_folder(options.model).requires_grad_(False)
    model.mtp.requires_grad_(True)
    model.steps = FusedSteps() if options.fused else Steps()
    train(model, Optimizer(model.mtp, options.muon_rate, options.adam_rate), Texts(options.texts), options)
    if rank() == 0:
        write_folder(model, options.model / "tokenizer.json", options.out)


if __name__ == "__main__":
    main()
