"""`lockstep inspect`: a model's config, tensors, recorded program and memory."""

import dataclasses
import json
import math
import sys
from collections import Counter
from typing import Annotated

import typer

from lockstep.commands import cache
from lockstep.commands.list import text_problem
from lockstep.commands.options import KvDtype, ModelName, RopeFactors, Weights, say_unused
from lockstep.commands.terminal.output import shown
from lockstep.commands.terminal.tables import made_table, report_console


def command(
    invoked: typer.Context,
    model: ModelName = None,
    *,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    rope: RopeFactors = "auto",
    context: Annotated[int, typer.Option(min=1, help="Tokens of context that attention is counted for.")] = 1024,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor of the checkpoint.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every layer, equal ones too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all of it.")] = False,
) -> None:
    """Show a model's config, tensors, recorded program and memory. No weights are read; a folder needs none."""
    from lockstep.engine.model import load_model
    from lockstep.models.checkpoint import open_checkpoint, open_config
    from lockstep.weights.hub import resolve_model
    from lockstep.weights.safetensors import has_weights
    from lockstep.weights.store import WeightStore

    path = resolve_model(model)
    checkpoint = open_checkpoint(path) if not path.is_dir() or has_weights(path) else open_config(path)
    loaded = load_model(checkpoint, WeightStore(), weights, kv_dtype, rope=rope)
    if context > loaded.max_context:
        problem = f"--context {context}: this model's context is {loaded.max_context} tokens"
        print(f"lockstep: {problem}; its costs are shown as if it were longer", file=sys.stderr)
    if as_json:
        say_unused(invoked, ["tensors", "everything"], "with --json, which has all of it")
        print(json.dumps(described(checkpoint, loaded, context)))
    else:
        show(checkpoint, loaded, context, tensors, everything)


def described(checkpoint, model, context):
    """All that the tables show, as a JSON object."""
    from lockstep.lab.describe import memory, op_costs, parameters

    return dict(
        path=str(checkpoint.path),
        config=config_numbers(model.config),
        weights=model.weights,
        kv_dtype=model.kv_dtype,
        context=context,
        has_weights=has_files(checkpoint),
        tensors=[dataclasses.asdict(info) for info in checkpoint.tensors.info.values()],
        program=[dataclasses.asdict(cost) for cost in op_costs(model.recorded, context)],
        memory=memory(model.recorded, mtp_program(model)),
        parameters=parameters(model.recorded),
    )


def has_files(checkpoint) -> bool:
    """Whether a checkpoint has weights: one of `open_config` has only the shapes that its config asks for."""
    return bool(checkpoint.files)


def mtp_program(model):
    """The recorded program of a model's MTP head; None where there is no head, or it cannot draft."""
    try:
        return model.recorded_mtp if model.drafts_by_mtp("auto") else None
    except ValueError:  # a part of the head is missing
        return None


def show(checkpoint, model, context, tensors, everything) -> None:
    """Prints the tables."""
    from rich.text import Text

    from lockstep.lab.describe import collapsed, memory, op_costs

    console = report_console()
    costs = op_costs(model.recorded, context)
    groups = [([c.layer] if c.layer is not None else None, [c]) for c in costs] if everything else collapsed(costs)
    if not has_files(checkpoint):
        console.print(Text(shown(missing_in_words(checkpoint, model), sys.stdout)), "")
    for table in (
        config_table(checkpoint, model.config),
        tensor_table(checkpoint, tensors),
        program_table(groups, context),
        memory_table(memory(model.recorded, mtp_program(model)), model),
        short_table(checkpoint, model),
    ):
        console.print(table)


def missing_in_words(checkpoint, model) -> str:
    """What a folder without weights lacks, and what is shown of it nevertheless."""
    return (
        f"{checkpoint.path} has no weights (*.safetensors): it cannot be run. Shown is what its config asks for, as if "
        f"the weights were there, multiplied as {', '.join(model.main_formats)}."
    )


def config_numbers(config):
    """A ModelConfig as a JSON object, with the kind of each layer."""
    layers = [dict(kind=layer.kind, **dataclasses.asdict(layer)) for layer in config.layers]
    return dataclasses.asdict(config) | dict(layers=layers)


def config_table(checkpoint, config):
    """The fields of a config that are set; of layers each different mixer and MLP, with the number of its layers."""
    table = made_table(str(checkpoint.path), "config", "")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "layers":
            table.add_row("layers", str(len(value)))
            sorts = Counter((layer.kind, layer.mixer) for layer in value)
            sorts += Counter((_mlp(layer), layer.mlp) for layer in value)
            sorts += Counter(("experts beside it", layer.experts) for layer in value if layer.experts is not None)
            for (kind, sort), count in sorts.items():
                table.add_row(f"  {count} x {kind}", _plain(sort))
        elif field.name == "mtp_layers":
            table.add_row("mtp layers", str(len(value)))
        elif value not in (None, False):
            table.add_row(field.name, _plain(value))
    return table


def _mlp(layer):
    """The kind of a layer's MLP, in a word."""
    return type(layer.mlp).__name__.lower()


def _plain(value):
    """A value of a config in words; of a layer's part the fields that do not have their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        return ", ".join(f"{name} {_inner(one)}" for name, one in values.items() if one != defaults[name])
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _inner(value):
    if dataclasses.is_dataclass(value):
        return f"({_plain(value)})"
    return f"{value:.6g}" if isinstance(value, float) else _plain(value)


def tensor_table(checkpoint, every):
    """Numbers and bytes of tensors by format; with `every` a row for each tensor."""
    from rich.text import Text

    from lockstep.lab.describe import formats

    infos = checkpoint.tensors.info
    missing = "" if has_files(checkpoint) else ", which are not there"
    if every:
        table = made_table(f"{len(infos)} tensors{missing}", "name", "format", ">shape", ">bytes")
        for info in infos.values():
            name, shape = Text(shown(info.name, sys.stdout)), " x ".join(map(str, info.shape))
            table.add_row(name, info.format, shape, f"{info.num_bytes:,}")
        return table
    table = made_table(f"Tensors{missing} (--tensors lists them)", "format", ">tensors", ">parameters", ">bytes")
    for format, (count, size, stored) in formats(infos.values()).items():
        table.add_row(format, str(count), f"{size:,}", f"{stored:,}")
    return table


def program_table(groups, context):
    """The ops with their costs; equal layers are shown once. groups: of `collapsed`."""
    table = made_table(
        f"Program: rows T tokens, R sampled; attention looks back on {context} tokens",
        "layers",
        "op",
        "output",
        "weights",
        ">weight bytes",
        ">bytes/row",
        ">FLOP/row",
    )
    for layers, ops in groups:
        for i, cost in enumerate(ops):
            table.add_row(
                spans(layers) if layers and not i else "",
                cost.kind,
                f"{short(cost)} [{cost.rows}, {cost.width}]",
                cost.weights,
                f"{cost.weight_bytes:,}",
                f"{cost.row_bytes:,}",
                f"{cost.flops:,}",
            )
        table.add_section()
    total = [(len(layers or (0,)), cost) for layers, ops in groups for cost in ops]
    table.add_row(
        "all",
        "",
        "",
        "",
        *(
            f"{sum(num_layers * getattr(cost, name) for num_layers, cost in total):,}"
            for name in ("weight_bytes", "row_bytes", "flops")
        ),
    )
    return table


def short(cost):
    """An op's label without the path to its layer."""
    return cost.label.rpartition("layers.*.")[2]


def spans(numbers) -> str:
    """[0, 1, 2, 4] as "0-2, 4"."""
    runs = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def memory_table(needed, model):
    """Bytes of memory that the model needs, and that each request adds."""
    from lockstep.engine.speculation.drafts import MOST_BY_ITSELF

    table = made_table("Memory", "for", ">bytes")
    labels = dict(
        packed_weights="packed weights",
        embedding="embedding, mapped from the file",
        table_in_file="second embedding, of which tokens' rows are read from the file",
        constants="norms, biases, rope",
        kv_cache_per_token=f"KV cache ({model.kv_dtype}), per token",
        windows_per_request="the same of layers that see a window, per request at most",
        state_per_request="recurrent state, per request",
        drafts_per_request=f"the same, with --speculate: up to {MOST_BY_ITSELF} drafts beside it",
        mtp_weights="weights of the MTP head, with --speculate mtp",
        mtp_cache_per_token="its KV cache, per token",
    )
    for name, label in labels.items():
        table.add_row(label, f"{needed[name]:,}")
    return table


def short_table(checkpoint, model):
    """What there is to know before a model is run: its size on the disk, packed and in the cache, and its text."""
    from lockstep.lab.describe import memory

    table, packed = made_table(None, "in short", ""), memory(model.recorded)["packed_weights"]
    if has_files(checkpoint):
        table.add_row("weights", weights_in_words(checkpoint, model))
        table.add_row("packed", kept_in_words(packed))
        table.add_row("texts", texts_in_words(checkpoint))
    else:
        table.add_row("weights", f"missing: its config asks for {weights_in_words(checkpoint, model)}")
        table.add_row("packed", f"nothing; {cache.size(packed)} once the weights are there")
        table.add_row("texts", f"none without weights; with them {texts_in_words(checkpoint)}")
    return table


def weights_in_words(checkpoint, model):
    """The numbers of a model's parameters, the bytes of those that are stored, and how they are multiplied."""
    from lockstep.lab.describe import parameters

    count, infos = parameters(model.recorded), checkpoint.tensors.info.values()
    about, total = f"{count:,} parameters", sum(math.prod(info.shape) for info in infos)
    if has_files(checkpoint):
        others = "" if total == count else f" of {total:,} numbers"
        about += f"{others}, {cache.size(sum(info.num_bytes for info in infos))} as stored"
    return f"{about}; multiplied as {', '.join(model.main_formats)}"


def kept_in_words(num_bytes):
    """How much is packed at the first start, and whether later starts find it."""
    from lockstep.user_cache import user_cache
    from lockstep.weights import packed_cache

    root = user_cache() / "packed"
    used = sum(model.num_bytes for model in packed_cache.models(root))
    allowed = packed_cache.allowed_bytes(root, used)
    if num_bytes > allowed:
        return f"{cache.size(num_bytes)} at each start: {packed_cache.limit_words(root, allowed)}"
    return f"{cache.size(num_bytes)} at the first start, kept in {root} (up to {cache.size(allowed)} of all models)"


def texts_in_words(checkpoint):
    """The commands that read a model's texts; or that it has only token ids, and why."""
    from lockstep.text.tokenizer.tokenizer import find_tokenizer

    if (problem := text_problem(checkpoint.path, checkpoint.metadata)) is not None:
        return f"token ids only: {problem}"
    has_template = find_tokenizer(checkpoint.path, checkpoint.metadata).has_chat_template
    return "generate and chat" if has_template else "generate; no chat template"
