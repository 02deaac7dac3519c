"""A model whose engines run in other processes: what LoadedModel is, but for its engine."""

import os
from typing import Any

from lockstep.engine.cache.prefix import model_identity, name_blocks
from lockstep.engine.cache.size import num_pages, page_groups, request_bytes
from lockstep.engine.making import RequestMaker
from lockstep.engine.model import Model
from lockstep.engine.options import DEFAULTS as DEFAULT_SIZES
from lockstep.engine.options import EngineOptions
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.loading import LoadedModel
from lockstep.native.host import num_cores
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.progress import OnProgress, reporting
from lockstep.replicas.carrier import Carrier, LocalCarrier
from lockstep.replicas.fleet import Fleet
from lockstep.replicas.limits import DEFAULTS, FleetLimits

MAX_REPLICAS = 256


class FrontEngine(RequestMaker):
    """The front's part of an engine: it makes requests, checks them and names their blocks, and runs none.

    limits: of each replica. fleet: runs the requests.
    """

    def __init__(self, model: Model, options: EngineOptions, limits: Limits, *rest: Any) -> None:
        super().__init__(model, *rest)
        self.options, self.limits = options, limits
        self._identity = model_identity(model, NUMERICS) if options.prefix_cache else None
        self.fleet: Fleet

    @property
    def reads_predictions(self) -> bool:
        """Whether a prediction is of use: for the replicas' drafts."""
        return self.options.speculate != "off"

    def check_size(self, request: Request) -> None:
        """ValueError for a request that no replica's KV cache could hold."""
        if any(group.needed(request.max_num_tokens) > group.num_pages for group in self.limits.groups):
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} tokens and max_tokens {request.params.max_tokens}: "
                f"the KV cache of a replica holds {self.limits.num_pages * PAGE_TOKENS} tokens in all"
            )

    def name_blocks(self, request: Request) -> list[bytes]:
        """The names of a request's whole blocks of prompt tokens; none without a prefix cache."""
        if self._identity is None:
            return []
        return name_blocks(self._identity, request, len(request.prompt_ids) // PAGE_TOKENS)

    def counts(self) -> dict[str, int]:
        """The replicas' counts together, see Engine."""
        return self.fleet.counts()

    def draft_counts(self) -> dict[str, DraftCounts]:
        """The replicas' counts of drafts together, see Engine."""
        return self.fleet.draft_counts()

    def close(self) -> None:
        """Ends all replicas."""
        self.fleet.close()


class FrontModel(LoadedModel):
    """A model with its tokenizer, whose engine is in several replicas. For a server: `fleet` runs its requests.

    num_replicas: each has as many threads as its share of this machine's cores, or `threads`, and max_requests and
    kv_tokens of its own. carrier: starts the replicas; None: as processes of this machine. fleet_limits: when a replica
    counts as lost. check_share: see Fleet. All else: see LLM. ValueError where a replica cannot start.
    """

    engine: FrontEngine

    def __init__(
        self,
        model: str | None = None,
        *,
        num_replicas: int,
        carrier: Carrier | None = None,
        fleet_limits: FleetLimits = DEFAULTS,
        check_share: float = 0.0,
        progress: bool | OnProgress | None = True,
        **options: Any,
    ) -> None:
        if not 1 <= num_replicas <= MAX_REPLICAS:
            raise ValueError(f"replicas: expected 1 to {MAX_REPLICAS}, got {num_replicas}")
        self._num_replicas = num_replicas
        options["threads"] = options.get("threads") or max(1, num_cores() // num_replicas)
        if num_replicas > 1:  # places for the streams of one that is lost
            own = options.get("max_requests", DEFAULT_SIZES.max_requests)
            options["spare_requests"] = -(-own // (num_replicas - 1))
        super().__init__(model, progress=progress, num_engines=num_replicas, **options)
        settings = self._settings(model, options)
        has_states = request_bytes(self.model.recorded, 0) > 0
        self.fleet = self.engine.fleet = Fleet(
            self.engine,
            lambda: self.model_part,
            LocalCarrier() if carrier is None else carrier,
            settings,
            num_replicas,
            has_states=has_states,
            limits=fleet_limits,
            check_share=check_share,
        )
        with reporting(progress) as report:
            self.fleet.start(report)

    @property
    def max_requests(self) -> int:
        """The most sequences that are computed at once, by all replicas together."""
        return self._num_replicas * super().max_requests

    def stream_engine(self) -> Fleet:
        """The replicas, which run requests."""
        return self.fleet

    def _settings(self, model: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of each replica's LoadedModel: sizes are as the front has worked them out."""
        limits = self.engine.limits
        sizes = dict(kv_tokens=limits.num_pages * PAGE_TOKENS, max_context=self.max_context)
        sizes["claims_kv"] = options.get("kv_tokens") is not None
        if options.get("cache_dir") is not None:
            sizes["cache_dir"] = os.path.abspath(options["cache_dir"])
        skipped = ("on_tokenizer", "needs_text", "needs_chat", "generation_config", "verify_weights")
        return dict(model=model, **{k: v for k, v in options.items() if k not in skipped} | sizes)

    def _new_engine(self, options: EngineOptions, *_: Any) -> FrontEngine:
        pages = num_pages(self.model, options, self._draft)
        groups = page_groups(self.model.recorded, pages, options)
        slots = options.num_slots
        limits = Limits(options.max_step_tokens, slots, pages, slots, groups, options.spare_requests)
        return FrontEngine(self.model, options, limits, self._eos_ids(), self._detokenizers())
