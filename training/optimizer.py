"""Muon for the weight matrices, Adam for everything else; identical on every process of a data-parallel run."""

import torch
import torch.distributed as dist

MOMENTUM = 0.95
BETAS = (0.9, 0.95)
# smaller than this in one direction, a matrix is a table of vectors (decay and write gates): Adam suits it better
MIN_MATRIX_SIDE = 64


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(tensors):
    """Replace every tensor by its sum over the processes, in one message."""
    if num_processes() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def orthogonalise(matrix, steps=5):
    """Push all singular values towards one, by Newton-Schulz (coefficients by Keller Jordan); bf16 is enough for it."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


class Optimizer:
    def __init__(self, model, muon_rate, adam_rate):
        named = list(model.named_parameters())
        self.matrices = [p for name, p in named if is_matrix(name, p)]
        self.others = [p for name, p in named if not is_matrix(name, p)]
        self.muon_rate, self.adam_rate, self.steps = muon_rate, adam_rate, 0
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.mean = [torch.zeros_like(p) for p in self.others]
        self.square = [torch.zeros_like(p) for p in self.others]

    @torch.no_grad()
    def step(self, scale):
        """One update at scale times the peak rates, from the summed gradients of all processes."""
        self.steps += 1
        gradients = [p.grad for p in self.matrices + self.others]
        sum_over_processes(gradients)
        torch._foreach_div_(gradients, num_processes())
        self.step_matrices(scale * self.muon_rate)
        self.step_others(scale * self.adam_rate)

    def step_matrices(self, rate):
        updates = []
        for i, (p, m) in enumerate(zip(self.matrices, self.momentum, strict=True)):
            m.lerp_(p.grad, 1 - MOMENTUM)
            # each process orthogonalises its share
            mine = i % num_processes() == rank()
            update = orthogonalise(p.grad.lerp(m, MOMENTUM)) if mine else torch.zeros_like(p)
            updates.append(update * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        sum_over_processes(updates)
        torch._foreach_add_(self.matrices, updates, alpha=-rate)

    def step_others(self, rate):
        correction = [1 - beta**self.steps for beta in BETAS]
        for p, mean, square in zip(self.others, self.mean, self.square, strict=True):
            mean.lerp_(p.grad, 1 - BETAS[0])
            square.lerp_(p.grad.square(), 1 - BETAS[1])
            p.addcdiv_(mean / correction[0], (square / correction[1]).sqrt() + 1e-10, value=-rate)

    def state_dict(self):
        return {"steps": self.steps, "momentum": self.momentum, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        for name in ("momentum", "mean", "square"):
            torch._foreach_copy_(getattr(self, name), state[name])


def is_matrix(name, p):
    return p.ndim == 2 and "embed_tokens" not in name and min(p.shape) >= MIN_MATRIX_SIDE
