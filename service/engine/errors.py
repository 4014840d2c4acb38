"""How an engine fails. Importing this imports no torch."""

from model_store.errors import TombolaError


class EngineRejected(TombolaError):
    """A backend that is missing, or whose logits are not those of the tickets."""


class EngineDied(BaseException):
    """The engine, or a process of it, has died or hung. The thread that waited for it ends, and the watchdog acts.

    A BaseException, so that no `except Exception` takes it for a failed image and runs the ticket again.
    """
