"""Makes the Drafter that EngineOptions ask for: drafts from texts, from the model's MTP head, from a draft model."""

from lockstep.engine.cache.size import page_groups
from lockstep.engine.model import Model
from lockstep.engine.options import EngineOptions
from lockstep.engine.runner import Runner
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.selfcheck import check as selfcheck
from lockstep.engine.speculation.draft_head import Head
from lockstep.engine.speculation.draft_model import DraftModel
from lockstep.engine.speculation.drafts import SOURCES, Drafter
from lockstep.engine.speculation.mtp import MtpDrafts
from lockstep.engine.speculation.mtp_runner import MtpRunner
from lockstep.ops.rewrite import fuse, lower


def made_drafter(
    options: EngineOptions,
    runner: Runner,
    scheduler: Scheduler,
    model: Model,
    eos_ids: frozenset[int],
    draft_model: Model | None,
) -> Drafter | None:
    """The Drafter that options ask for, on the threads and with the op table of the model's Runner; None without
    speculative decoding.

    draft_model: for speculate "model". ValueError for "mtp" where the model's MTP head is missing or incomplete, and
    for a draft model with another vocabulary.
    """
    if not options.num_drafts:
        return None
    head: Head | None = None
    if draft_model is not None:
        groups = page_groups(draft_model.recorded, runner.limits.num_pages, options)
        head = DraftModel(draft_model, model, runner.team, runner.limits, groups, eos_ids)
        selfcheck.check(head.runner.program, head.runner.executor.backend)
        caches = head.runner.caches
    elif model.drafts_by_mtp(options.speculate):
        backend = runner.executor.backend
        program = fuse(lower(model.recorded_mtp), backend)
        selfcheck.check(program, backend)
        mtp = MtpRunner(model, program, backend, runner.team, runner.limits, options.num_drafts)
        group = _whole_group(scheduler)
        head, caches = MtpDrafts(mtp, group, scheduler.prefix, eos_ids, model.config.vocab_size), mtp.caches
    else:
        caches = {}
    if options.kv_tokens is not None:
        for array in caches.values():
            array.fill(0)  # claims the memory now, as Engine does for the model's own caches
    return Drafter(scheduler, SOURCES.get(options.speculate), options.draft, eos_ids, head)


def _whole_group(scheduler: Scheduler) -> int:
    """The group of pages without a window, on whose pages the MTP head lies. ValueError where there is none."""
    windows = [group.window for group in scheduler.pages.groups]
    if 0 not in windows:
        raise ValueError(f"speculate: mtp needs a layer that sees all keys, this model has windows {windows}")
    return windows.index(0)
