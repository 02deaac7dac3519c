"""Time that TICO 0.3.0 takes for each plan of a sweep, calibration included: for studies/recipes/sixteen-bits.toml.

    PYTHON bench/tico_sweep.py [--threads 1] [--plans 2] [--act u8|i16] [--bits 8]

PYTHON: an interpreter of an environment that has torch==2.13.0, transformers and tico==0.3.0. The study model on 16
calibration and 12 evaluation windows of 512 tokens of the same texts. For each plan and profile: wrap the model,
calibrate, convert, and the mean negative log-likelihood of the evaluation windows. Loading is not counted.
"""

import statistics
import sys
import time
from pathlib import Path

from options import Parser, threads, whole_number

STUDIES = Path(__file__).parents[1] / "studies"
PEERS = Path(__file__).with_name("peers")
LENGTH, CALIBRATION, EVALUATION = 512, 16, 12
PROFILES = ("npu_export", "reference_eval")


def windows_of(text, count):
    """Windows of a text, evenly spread: [1, LENGTH] each."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(STUDIES / "llama-6x256" / "tokenizer.json"))
    ids = tokenizer.encode((STUDIES / "texts" / text).read_text("utf-8"), add_special_tokens=False).ids
    every = len(ids) // LENGTH
    starts = [i * every // count * LENGTH for i in range(count)]
    return [torch.tensor([ids[start : start + LENGTH]]) for start in starts]


def nll(model, ids):
    """The mean negative log-likelihood of a window's tokens but the first."""
    import torch

    logits = model(ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def main():
    sys.path.insert(0, str(PEERS))
    from tico_worker import ACTIVATIONS, quantized

    parser = Parser(__doc__)
    parser.add_argument("--threads", type=threads, default=1)
    parser.add_counts(plans=2)
    parser.add_argument("--bits", type=whole_number(2, 8), default=8, help="of weights of linear layers")
    parser.add_argument("--act", choices=ACTIVATIONS, default="u8")
    args = parser.parse_args()
    parser.need("torch", "transformers", "tico")
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(
        STUDIES / "llama-6x256", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    args.layers = model.config.num_hidden_layers
    calibration, evaluation = windows_of("calibration.txt", CALIBRATION), windows_of("evaluation.txt", EVALUATION)
    with torch.no_grad():
        print(f"float: {statistics.mean(nll(model, ids) for ids in evaluation):.4f} nats a token")
        for profile in PROFILES:
            seconds = []
            for _ in range(args.plans):
                started = time.perf_counter()
                made, _ = quantized(model, args, profile, calibration)
                loss = statistics.mean(nll(made, ids) for ids in evaluation)
                seconds.append(time.perf_counter() - started)
            print(f"{profile}: {loss:.4f} nats a token, {statistics.mean(seconds):.2f} s a plan", flush=True)


if __name__ == "__main__":
    main()
