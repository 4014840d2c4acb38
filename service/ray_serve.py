"""The public plane as a Ray Serve deployment: replicas of one app on a Ray cluster, each with its library and entropy.

    serve run service.ray_serve:application replicas=4 cores=2 library=/data/library

Words beside replicas and cores are settings. It is for those who run Ray anyway:

- Ray's proxy costs a hop per request;
- there is no admin plane: audits, metrics and swaps belong to `tombola serve`;
- API keys alone tell clients apart, since all come from the proxy.

A replica that dies, or whose engine does, is replaced; the others go on.
"""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment

from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.settings import Settings, read_settings
from service.web.auth import ApiKeyStore
from service.web.public_app import create_public_app

HEALTH_S: Final = 2.0  # between looks at a replica: a dead one is missed within so long


class Replica:
    """One process: a verified library, a warm engine, and the app over them."""

    def __init__(self, flags: Mapping[str, Any]) -> None:
        self.settings: Settings = read_settings(flags)
        self.metrics = Metrics()
        self.manager = LibraryManager(self.settings, self.metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray calls it once the constructor is through. Raises SettingsRejected."""
        app = create_public_app(
            self.manager, self.settings, self.metrics, ApiKeyStore(self.settings.api_keys_file, self.metrics)
        )
        app.router.add_event_handler("startup", self.manager.start)
        return app

    def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        if not self.manager.ready:
            raise RuntimeError(self.manager.reason)


def application(words: Mapping[str, Any], kind: type = Replica) -> Application:
    """words: `replicas` (1), `cores` of each (1), and settings by name."""
    flags = dict(words)
    replicas, cores = int(flags.pop("replicas", 1)), float(flags.pop("cores", 1))
    settings = read_settings(flags)
    deployed: Deployment = serve.deployment(
        name="tombola",
        num_replicas=replicas,
        max_ongoing_requests=settings.max_requests,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ray_actor_options={"num_cpus": cores},
    )(serve.ingress()(kind))
    return deployed.bind({"threads": max(1, int(cores)), **flags})
