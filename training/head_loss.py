"""Cross entropy through the tied head, with its gradients made in the same pass so that the logits never leave the
cache."""

import torch

ROWS_AT_ONCE = 256


class HeadLoss(torch.autograd.Function):
    """sum over tokens of weight * -log softmax(hidden @ head^T)[target]."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, weights_N):
        grad_hidden, grad_head = torch.empty_like(hidden_ND), torch.zeros_like(head_VD)
        total = hidden_ND.new_zeros(())
        for rows in torch.arange(len(hidden_ND), device=hidden_ND.device).split(ROWS_AT_ONCE):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            targets, weights = targets_N[rows, None], weights_N[rows, None]
            p = (hidden_ND[rows] @ head_VD.T).softmax(-1)
            # the floor keeps the logarithm finite for a target that a wild early step ruled out
            total -= (p.gather(1, targets).clamp_min(1e-30).log() * weights).sum()
            # softmax - onehot, times the weight, is the gradient of the logits
            p.scatter_add_(1, targets, torch.full_like(weights, -1.0)).mul_(weights)
            torch.mm(p, head_VD, out=grad_hidden[rows])
            grad_head.addmm_(p.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_head, None, None


def head_loss(model, hidden_BTD, targets_BT, weights_BT):
    """Weighted mean over the tokens; a batch whose weights are all zero costs nothing."""
    weights = weights_BT.flatten() / weights_BT.sum().clamp_min(1)
    return HeadLoss.apply(hidden_BTD.flatten(0, 1), model.model.embed_tokens.weight, targets_BT.flatten(), weights)
