"""Tombola: image classification by a fresh random ensemble of adversarially robust lottery tickets.

A name is imported from its module when it is first used, so that `import tombola` takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from model_store.attacks import ThreatModel, fgsm, pgd
    from model_store.ensemble import calibrated, ensemble_logits, failure_probability, probabilities
    from model_store.errors import (
        ImageRejected,
        LibraryRejected,
        PolicyRejected,
        StoreError,
        TicketRejected,
        TombolaError,
    )
    from model_store.input_spec import InputSpec
    from model_store.library import Library, open_library, write_library
    from model_store.policy import Policy, Theta, draw_matrix, draw_theta, expected_size
    from model_store.structures import Structure
    from model_store.ticket import Ticket, load_ticket, save_ticket
    from service.audit.api import audit
    from service.audit.target import Target
    from service.settings import Settings, read_settings
    from tombola.client import (
        AsyncClient,
        Client,
        ClientError,
        DeadlineExpired,
        ImageUnreadable,
        Prediction,
        RequestRefused,
        ServiceUnreachable,
        StablePrediction,
    )

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "DeadlineExpired",
    "ImageRejected",
    "ImageUnreadable",
    "InputSpec",
    "Library",
    "LibraryRejected",
    "Policy",
    "PolicyRejected",
    "Prediction",
    "RequestRefused",
    "ServiceUnreachable",
    "Settings",
    "StablePrediction",
    "StoreError",
    "Structure",
    "Target",
    "Theta",
    "ThreatModel",
    "Ticket",
    "TicketRejected",
    "TombolaError",
    "audit",
    "calibrated",
    "draw_matrix",
    "draw_theta",
    "ensemble_logits",
    "expected_size",
    "failure_probability",
    "fgsm",
    "load_ticket",
    "open_library",
    "pgd",
    "probabilities",
    "read_settings",
    "save_ticket",
    "write_library",
]

MODULES: Final = {
    "model_store.attacks": ("ThreatModel", "fgsm", "pgd"),
    "model_store.ensemble": ("calibrated", "ensemble_logits", "failure_probability", "probabilities"),
    "model_store.errors": (
        "ImageRejected",
        "LibraryRejected",
        "PolicyRejected",
        "StoreError",
        "TicketRejected",
        "TombolaError",
    ),
    "model_store.input_spec": ("InputSpec",),
    "model_store.library": ("Library", "open_library", "write_library"),
    "model_store.policy": ("Policy", "Theta", "draw_matrix", "draw_theta", "expected_size"),
    "model_store.structures": ("Structure",),
    "model_store.ticket": ("Ticket", "load_ticket", "save_ticket"),
    "service.audit.api": ("audit",),
    "service.audit.target": ("Target",),
    "service.settings": ("Settings", "read_settings"),
    "tombola.client": (
        "AsyncClient",
        "Client",
        "ClientError",
        "DeadlineExpired",
        "ImageUnreadable",
        "Prediction",
        "RequestRefused",
        "ServiceUnreachable",
        "StablePrediction",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'tombola' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
