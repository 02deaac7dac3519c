"""Logits and hidden states by transformers for a checkpoint folder, in float32 or another dtype."""

import contextlib

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

OTHER_PARTS = (
    ".visual.",
    "vision_tower.",
    "multi_modal_projector.",
    ".vision_model.",
    ".connector.",
)  # of vision-language models


def load(folder, dtype=torch.float32):
    """The folder's model; a missing tensor, an extra one or a wrong shape is an error."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    plain = dict(attn_implementation="eager", experts_implementation="eager")  # other implementations have no float64
    model, report = kind.from_pretrained(folder, dtype=dtype, **plain, output_loading_info=True)
    missing = [k for k in report["missing_keys"] if not any(part in k for part in OTHER_PARTS)]
    unexpected = [k for k in report["unexpected_keys"] if not k.startswith("mtp.")]
    assert not (missing or unexpected or report["mismatched_keys"]), report
    return model.eval()


class InDouble(TorchFunctionMode):
    """Casts to float32 go to float64: a model in float64 would compute norms, rope's angles and softmax in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        wider = lambda value: torch.float64 if value is torch.float32 else value
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def logits(folder, ids, dtype=torch.float32):
    """Logits of every position, float32 [tokens, V]."""
    torch.set_num_threads(1)
    with torch.no_grad(), InDouble() if dtype == torch.float64 else contextlib.nullcontext():
        return load(folder, dtype)(torch.tensor([ids])).logits[0].float().numpy().astype(np.float32)


def hidden_states(folder, ids):
    """The input of the head at every position, float32 [tokens, D]."""
    torch.set_num_threads(1)
    model, found = load(folder), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found[0][0].numpy()
