"""TICO's side of bench_tico.py: runs in an environment that has torch, transformers and tico 0.3.0.

Makes a random Llama model, writes it to a folder, calibrates both of TICO's profiles on random windows, and then reads
its standard input: for each line, the name of a run, it does this run once and prints its seconds.
"""

import copy
import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from options import Parser, folder, threads, whole_number

ACTIVATIONS = ("i16", "u8")
COUNTS = ("hidden", "ffn", "layers", "heads", "kv-heads", "head-dim", "vocab")


def made_model(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab,
        max_position_embeddings=args.tokens,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def quantized(model, args, profile, windows):
    """The model with calibrated wrappers, and the seconds that a calibration window took."""
    from tico.quantization import convert, prepare
    from tico.quantization.config.builders import build_llm_ptq_config
    from tico.quantization.config.specs import affine
    from tico.quantization.wrapq.dtypes import DType

    activations = {"i16": DType.int(16), "u8": DType.uint(8)}
    config = build_llm_ptq_config(
        model_type="llama",
        num_hidden_layers=args.layers,
        activation=affine(activations[args.act]),
        linear_weight=affine(DType.uint(args.bits)),
        embedding_weight=affine(DType.uint(8)),
        lm_head_weight=affine(DType.uint(8)),
        profile=profile,
    )
    made = prepare(copy.deepcopy(model), config)
    started = time.perf_counter()
    for ids in windows:
        made(ids, use_cache=False)
    return convert(made).eval(), (time.perf_counter() - started) / len(windows)


def arguments():
    """The options' values."""
    parser = Parser(__doc__)
    kinds = dict.fromkeys(COUNTS, whole_number()) | dict(
        tokens=whole_number(2), threads=threads, bits=whole_number(2, 8), folder=folder
    )
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--act", choices=ACTIVATIONS, required=True)
    args = parser.parse_args()
    parser.need("torch", "transformers", "tico")
    return args


def main():
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    model = made_model(args)
    model.save_pretrained(args.folder)
    torch.manual_seed(1)
    windows = [torch.randint(0, args.vocab, (1, args.tokens)) for _ in range(2)]
    with torch.no_grad():
        runs = {name: quantized(model, args, name, windows) for name in ("reference_eval", "npu_export")}
        print(json.dumps({"windows": [w[0].tolist() for w in windows], "calibration": runs["reference_eval"][1]}))
        sys.stdout.flush()
        for line in sys.stdin:
            started = time.perf_counter()
            runs[line.strip()][0](windows[0], use_cache=False)
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
