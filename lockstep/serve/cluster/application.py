"""The application for Ray Serve: fronts that Serve starts, behind its proxies, each with replicas of its own.

In a config file of `serve deploy`: import_path `lockstep.serve.cluster.application:build`, and args, which are the
fields of Settings.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp

from lockstep.replicas.front import FrontModel
from lockstep.replicas.ray_carrier import RayCarrier
from lockstep.serve.app import make_app
from lockstep.serve.service import Service

OPEN_REQUESTS = 10_000  # that Serve lets through to a front, which has limits of its own


class Settings(BaseModel):
    """What the application is to be. model: as on the command line; replicas, threads: how many replicas each front
    has, and threads each replica; fronts: how many processes answer HTTP; allowed_hosts: see `serve --allowed-host`.
    options: further arguments of LLM, such as weights, max_requests or cache_dir. check: see `serve --check`. The API
    key is that of the environment variable LOCKSTEP_API_KEY on each machine, if there is one."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    name: str | None = None
    replicas: int = 1
    threads: int = 1
    fronts: int = 1
    check: float = 0.0
    allowed_hosts: list[str] = []
    options: dict[str, Any] = {}


def build(args: dict[str, Any]) -> Any:
    """The Ray Serve Application of Settings. ValidationError, which names the field, for others."""
    settings, serve = Settings(**args), importlib.import_module("ray.serve")
    of_front = dict(name="front", num_replicas=settings.fronts, max_ongoing_requests=OPEN_REQUESTS)
    return serve.deployment(serve.ingress(front_maker(settings))(), **of_front).bind()


def front_maker(settings: Settings) -> Callable[[], ASGIApp]:
    """A function that makes the ASGI application of a front, in its own process."""

    def make_front() -> ASGIApp:
        keys = [key for key in [os.environ.get("LOCKSTEP_API_KEY")] if key]
        service = Service(settings.name or settings.model or "lockstep", api_keys=keys)
        sizes = dict(threads=settings.threads, check_share=settings.check, progress=False)
        of_replicas = dict(num_replicas=settings.replicas, carrier=RayCarrier("auto"))
        service.open(FrontModel(settings.model, **of_replicas, **sizes, **settings.options))
        return make_app(service, allowed_hosts=settings.allowed_hosts)

    return make_front
