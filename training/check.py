"""Check the training code: the chunked delta rule and the fused loss against their definitions, the model against
transformers."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from delta_rule import delta_rule_chunked, delta_rule_recurrent
from export import verify_folder, write_folder
from fused import FusedSteps, Steps
from head_loss import head_loss
from models import MODELS, make_model
from tokenizers import Tokenizer
from tokenizers.models import BPE


def worst_difference(results, expected):
    """The largest difference, each tensor in units of its own largest entry."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected, strict=True))


def value_and_gradients(function, inputs, direction):
    value = function(*inputs)
    return value, *torch.autograd.grad((value * direction).sum(), inputs)


def check_delta_rule():
    """Keys that nearly repeat and hardly decay: the case in which a power series for the inverse explodes."""
    batch, heads, num_tokens, size = 2, 4, 256, 64
    q = F.normalize(torch.randn(batch, heads, num_tokens, size), dim=-1)
    k = F.normalize(torch.randn(batch, heads, num_tokens, size) * 0.3 + torch.randn(size), dim=-1)
    g, beta = -0.1 * torch.rand(batch, heads, num_tokens), torch.rand(batch, heads, num_tokens)
    inputs = [x.requires_grad_() for x in (q, k, torch.randn(q.shape), g, beta)]
    direction = torch.randn(q.shape)
    expected = value_and_gradients(delta_rule_recurrent, inputs, direction)
    difference = worst_difference(value_and_gradients(delta_rule_chunked, inputs, direction), expected)
    print(f"delta rule, chunked against recurrent, values and gradients: {difference:.1e}")
    assert difference < 1e-5


def check_head_loss(model):
    hidden = torch.randn(2, 300, model.c.hidden_size, requires_grad=True)
    targets, weights = torch.randint(model.c.vocab_size, (2, 300)), (torch.rand(2, 300) < 0.5).float()
    inputs = [hidden, model.model.embed_tokens.weight]

    def plain(h, _):
        each = F.cross_entropy(model.logits(h).flatten(0, 1), targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()

    expected = value_and_gradients(plain, inputs, torch.ones(()))
    fused = value_and_gradients(lambda h, _: head_loss(model, h, targets, weights), inputs, torch.ones(()))
    print(f"loss, fused against cross_entropy, value and gradients: {worst_difference(fused, expected):.1e}")
    assert worst_difference(fused, expected) < 1e-5


def check_fused():
    """Every fused step against its definition, values and gradients; what is given in bf16 is rounded."""

    def rounded(*shape):
        return torch.randn(*shape).bfloat16().float()

    gate, up, weight = rounded(2, 64, 4, 64), rounded(2, 64, 4, 64), torch.randn(64)
    decay, rate = -0.3 * torch.rand(2, 64, 4), torch.rand(2, 64, 4)
    cases = {
        "conv_silu": ([rounded(2, 64, 512), torch.randn(512, 1, 4)], ()),
        "delta_rule": ([torch.randn(2, 64, 512), decay, rate], (2, 64, 64)),
        "attention": ([torch.randn(2, 128, 4, 64), torch.randn(2, 128, 2, 64), torch.randn(2, 128, 2, 64)], ()),
        "add_norm": ([torch.randn(2, 64, 4, 64), up, weight], (1e-6,)),
        "gated_norm": ([torch.randn(2, 64, 4, 64), gate, weight], (1e-6,)),
        "silu_mul": ([gate, up], ()),
    }
    for name, (inputs, others) in cases.items():
        results = [step_results(getattr(steps, name), inputs, others) for steps in (FusedSteps(), Steps())]
        print(f"{name}, fused against torch, values and gradients: {worst_difference(*results):.1e}")
        # half a unit of bf16, and exact where nothing is rounded
        assert worst_difference(*results) < (1e-5 if name in ("delta_rule", "attention") else 5e-3)


def step_results(step, inputs, others):
    """What a step returns, and its inputs' gradients, all in float32."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = step(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    total = sum((x.float() * torch.randn(x.shape).bfloat16()).sum() for x in outputs)
    return [x.float() for x in (*outputs, *torch.autograd.grad(total, inputs))]


def check_fused_loss():
    logits, weights = 4 * torch.randn(100, 4096).bfloat16(), torch.rand(100)
    arguments = torch.randint(4096, (100,)), weights
    results = [steps.cross_entropy(logits.clone(), *arguments) for steps in (FusedSteps(), Steps())]
    results = [(torch.as_tensor(loss).float(), gradient.float()) for loss, gradient in results]
    print(f"cross_entropy, fused against torch: {worst_difference(*results):.1e}")
    assert worst_difference(*results) < 5e-3


def check_transformers(model):
    """With random norms and gates too: at their initial values a forgotten +1 or a swapped gate could hide."""
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) * (p.ndim == 1)
        p.data *= 1 + (p.ndim == 2)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(BPE(byte_vocab(), [], unk_token="a"))
        tokenizer.save(str(Path(folder) / "bytes.json"))
        write_folder(model, Path(folder) / "bytes.json", Path(folder))
        assert verify_folder(Path(folder)) < 1e-3


def byte_vocab():
    return {chr(i): i for i in range(32, 127)}


def main():
    torch.manual_seed(0)
    check_delta_rule()
    check_fused()
    check_fused_loss()
    check_head_loss(make_model("llama"))
    for name in MODELS:
        check_transformers(make_model(name))


if __name__ == "__main__":
    main()
