"""Check the training code: the chunked delta rule, the fused losses and the MTP head's chains against their
definitions, the model against transformers."""

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
from train_mtp import ChainSteps, Distillation


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


@torch.no_grad()
def check_chains(model, num_tokens=96, first=60, depths=3):
    """Chains from every position from `first` on at once, against each alone, one pair after the other."""
    given, ids, worst = torch.randn(2, num_tokens, model.c.hidden_size), torch.randint(4096, (2, num_tokens)), 0.0
    embedded, steps, count = model.model.embed_tokens(ids), ChainSteps(Steps(), first), num_tokens - depths - first
    alone = [given[:, : first + i + 1] for i in range(count)]
    hidden = model.mtp(given, embedded, steps)[:, first : first + count]
    for depth in range(depths):
        here = slice(first + depth, first + depth + count)
        hidden = model.mtp(hidden, embedded[:, here], steps, here.start) if depth else hidden
        for i in range(count):
            expected = model.mtp(alone[i], embedded[:, : alone[i].shape[1]], Steps())[:, -1:]
            worst = max(worst, worst_difference([hidden[:, i : i + 1]], [expected]))
            alone[i] = torch.cat([alone[i], expected], dim=1)
    print(f"chains of the MTP head, together against alone: {worst:.1e}")
    assert worst < 1e-4


def check_distillation():
    hidden, head = torch.randn(300, 256), torch.randn(4096, 256) / 16
    targets, weights, came = torch.randn(300, 4096).softmax(-1), torch.rand(300), torch.randint(4096, (300,))

    def plain(h):
        return (F.cross_entropy(h @ head.T, targets, reduction="none") * weights).sum()

    def fused(h):
        return Distillation.apply(h, head, targets, weights, came)[0]

    inputs, direction = [hidden.requires_grad_()], torch.ones(())
    difference = worst_difference(*[value_and_gradients(loss, inputs, direction) for loss in (fused, plain)])
    print(f"distillation, fused against cross_entropy, value and gradient: {difference:.1e}")
    assert difference < 1e-5


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
    check_distillation()
    check_chains(make_model("qwen3_5_text"))
    for name in MODELS:
        check_transformers(make_model(name))


if __name__ == "__main__":
    main()
