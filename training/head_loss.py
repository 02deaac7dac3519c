"""Cross entropy through the tied head, with its gradients made in the same pass so that the logits never leave the
cache."""

import torch

# on a CPU as many as its cache holds
ROWS_AT_ONCE = {"cpu": 256, "cuda": 16384}


class HeadLoss(torch.autograd.Function):
    """sum over tokens of weight * -log softmax(hidden @ head^T)[target]."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, weights_N, steps):
        grad_hidden, grad_head = torch.empty_like(hidden_ND), torch.zeros(head_VD.shape, device=head_VD.device)
        total = torch.zeros((), device=hidden_ND.device)
        at_once = ROWS_AT_ONCE[hidden_ND.device.type]
        for start in range(0, len(hidden_ND), at_once):
            rows = slice(start, start + at_once)
            logits = hidden_ND[rows] @ head_VD.T
            loss, gradient = steps.cross_entropy(logits, targets_N[rows], weights_N[rows])
            total += loss
            torch.mm(gradient, head_VD, out=grad_hidden[rows])
            grad_head += gradient.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None, None


def head_loss(model, hidden_BTD, targets_BT, weights_BT):
    """Weighted mean over the tokens; a batch whose weights are all zero costs nothing."""
    weights = weights_BT.flatten() / weights_BT.sum().clamp_min(1)
    hidden, head = hidden_BTD.flatten(0, 1), model.model.embed_tokens.weight
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, head = hidden.bfloat16(), head.bfloat16()
    return HeadLoss.apply(hidden, head, targets_BT.flatten(), weights, model.steps)
