"""Write a training checkpoint as a Hugging Face folder in bf16, and check that transformers computes the same logits
from it."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from models import MODELS, make_model
from safetensors.torch import load_file, save_file
from tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, START_OF_TURN

MAX_POSITIONS = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def token_id(token):
    # the trainer gives the special tokens the first ids, in order
    return SPECIAL_TOKENS.index(token)


def config_json(c):
    """The configuration as transformers and other engines read it."""
    return {
        **c.hugging_face(),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": token_id(END_OF_TURN),
        "pad_token_id": token_id(END_OF_TEXT),
        "dtype": "bfloat16",
    }


def tokenizer_config_json():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [START_OF_TURN],
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config_json():
    return {
        "do_sample": False,
        "eos_token_id": [token_id(END_OF_TURN), token_id(END_OF_TEXT)],
        "pad_token_id": token_id(END_OF_TEXT),
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_model(path, weights):
    """A checkpoint of train.py as a float32 model; weights is 'averaged' or 'last'."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    model = make_model(checkpoint["name"], checkpoint["config"])
    model.load_state_dict(checkpoint[weights])
    return model.eval()


def load_folder(folder):
    """The exported folder as a float32 model."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values |= values["rope_parameters"]
    name = values["model_type"]
    model = make_model(name, {key: values[key] for key in MODELS[name][1]().to_dict()})
    model.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
    return model.eval()


def write_folder(model, tokenizer_file, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    write_json(folder / "config.json", config_json(model.c))
    write_json(folder / "tokenizer_config.json", tokenizer_config_json())
    write_json(folder / "generation_config.json", generation_config_json())


@torch.no_grad()
def verify_folder(folder):
    """The largest difference of the logits between this model and transformers, both in float32 from the exported
    weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))[:640]])
    model = load_folder(folder)
    ours = model.logits(model(ids))
    expected = theirs(ids).logits
    agreement = (ours.argmax(-1) == expected.argmax(-1)).float().mean()
    print(
        f"transformers: max |difference| {(ours - expected).abs().max():.2e} at logit std {expected.std():.2f}, ",
        end="",
    )
    print(f"argmax agreement {agreement:.4f} over {ids.shape[1]} tokens")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello."}], tokenize=False, add_generation_prompt=True
    )
    print("chat template:", repr(chat), "eos:", tokenizer.eos_token_id)
    return (ours - expected).abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="of train.py; without it, random weights of the default shape")
    parser.add_argument("--model", choices=MODELS, default="qwen3_5_text", help="the architecture of random weights")
    parser.add_argument("--weights", choices=("averaged", "last"), default="averaged")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json that tokenizer.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load_model(options.checkpoint, options.weights) if options.checkpoint else make_model(options.model)
    write_folder(model, options.tokenizer, options.out)
    total = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {total / 1e6:.2f} MB in {options.out.name}")
    verify_folder(options.out)


if __name__ == "__main__":
    main()
