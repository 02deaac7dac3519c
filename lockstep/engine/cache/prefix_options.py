"""The prefix cache that EngineOptions ask for."""

from collections.abc import Callable

from lockstep.engine.cache.memory import Memory
from lockstep.engine.cache.pages import PagePool
from lockstep.engine.cache.prefix import PrefixCache, model_identity, page_kind
from lockstep.engine.cache.prefix_disk import DiskStore
from lockstep.engine.cache.states import StateStore
from lockstep.engine.model import Model
from lockstep.engine.options import EngineOptions
from lockstep.engine.runner import Runner
from lockstep.engine.selfcheck.check import NUMERICS

LONG_PROMPT = 2048  # tokens of a prompt beside which one more step, to keep a state, costs little


def prefix_cache_maker(
    runner: Runner, model: Model, options: EngineOptions
) -> Callable[[PagePool], PrefixCache] | None:
    """A function that makes the PrefixCache of a PagePool; None where options switch it off, or where the model has
    recurrent state and state_bytes hold not one."""
    memory = Memory(runner.program, runner.caches)
    states = StateStore(options.state_bytes, memory.state_bytes) if memory.state_bytes else None
    if not options.prefix_cache or (states is not None and not states.max_states):
        if options.cache_dir is not None:
            raise ValueError(
                "cache_dir: expected none without a prefix cache (prefix_cache is off, or state_bytes "
                f"{options.state_bytes} is less than one state of {memory.state_bytes})"
            )
        return None
    identity = model_identity(model, NUMERICS)
    sizes = {page_kind(group): num_bytes for group, num_bytes in enumerate(memory.page_bytes)}
    sizes["state"] = memory.state_bytes
    disk = None
    if options.cache_dir is not None:
        disk = DiskStore(options.cache_dir, options.cache_dir_bytes, sizes, model.checkpoint.content)
    long_from = options.prompt_state_from
    if long_from is None:
        long_from = LONG_PROMPT if disk is None else 0
    return lambda pages: PrefixCache(pages, memory, identity, states, disk, options.state_every, long_from)
