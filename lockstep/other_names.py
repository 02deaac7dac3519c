"""Options that Lockstep does not have: what other programs' options are called here, and which names are near."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, ParamSpec

# {name of an option here: names that llama.cpp, Ollama, transformers and vLLM give it}, all without hyphens
OTHER_NAMES = dict(
    max_tokens=("n_predict", "predict", "num_predict", "max_new_tokens", "max_completion_tokens", "max_length"),
    max_context=("ctx_size", "c", "n_ctx", "num_ctx", "max_model_len", "context_length", "max_seq_len"),
    max_requests=("parallel", "np", "n_parallel", "max_num_seqs"),
    threads=("t", "n_threads", "num_thread", "num_threads"),
    kv_dtype=("cache_type_k", "cache_type_v", "ctk", "ctv", "kv_cache_dtype"),
    weights=("dtype", "torch_dtype", "quantization", "load_in_8bit", "load_in_4bit"),
    model=("m", "model_path", "hf_repo", "pretrained_model_name_or_path"),
)
HERE = {other: name for name, others in OTHER_NAMES.items() for other in others}
OF_GPUS = frozenset(
    "n_gpu_layers gpu_layers ngl gpu gpus n_gpu num_gpu main_gpu tensor_split device device_map tensor_parallel_size "
    "gpu_memory_utilization".split()
)
ONLY_CPUS = "Lockstep computes on CPUs, and has no option for GPUs"
SHORTEST_START = 3  # letters that are enough to tell options by how they begin
NEAR = 0.75  # the part of two names that has to be alike, as difflib counts it: "prot" is near "port", "gpu" not "op"
P = ParamSpec("P")


def called_here(name: str, names: Collection[str]) -> str | None:
    """What another program's option is called here, if it is one of `names`; None otherwise."""
    here = HERE.get(name)
    return here if here in names else None


def near(name: str, names: Collection[str]) -> list[str]:
    """Those of `names` that begin as a name does; where none does, those that are hardly different; often none."""
    begun = [other for other in names if len(name) >= SHORTEST_START and other.startswith(name)]
    return sorted(begun) or difflib.get_close_matches(name, names, cutoff=NEAR)


def names_options(elsewhere: type) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorates the __init__ of a class whose options have names: for an option that there is not, the TypeError names
    the class that was called, and what is meant or allowed. elsewhere: a dataclass whose fields may be meant."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        options = [*inspect.signature(init).parameters][1:]

        @functools.wraps(init)
        def checked(*args: P.args, **given: P.kwargs) -> None:
            check_options(args, given, options, elsewhere)
            init(*args, **given)

        return checked

    return decorate


def check_options(args: Collection[Any], given: Collection[str], options: list[str], elsewhere: type) -> None:
    """TypeError for arguments of an __init__, `self` among them, that it does not have. options: the names that it has,
    of which the first may also be given without its name."""
    of, *unnamed = args
    name = type(of).__name__
    if len(unnamed) > 1:
        expected = f"{options[0]} alone without a name, and options by name, such as {options[1]}=..."
        raise TypeError(f"{name}: expected {expected}; got {len(unnamed)} arguments without a name")
    for option in given:
        if option not in options:
            raise TypeError(f"{name} has no option {option}: {_hint(option, options, elsewhere)}")


def _hint(option: str, options: list[str], elsewhere: type) -> str:
    """What may be meant by an option that there is not."""
    own = [field.name for field in fields(elsewhere)]
    if option in OF_GPUS:
        return ONLY_CPUS
    if here := called_here(option, options):
        return f"it is called {here} here"
    if option in own or HERE.get(option) in own:
        return f"{HERE.get(option, option)} is a field of {elsewhere.__name__}, which the calls that generate take"
    if like := near(option, options):
        return f"did you mean {' or '.join(like)}?"
    return f"expected some of {', '.join(options)}"
