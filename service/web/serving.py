"""What the public plane needs of whatever answers images: this process's library manager, or another process."""

from typing import Protocol

from model_store.images import Pixels
from model_store.input_spec import InputSpec
from service.scheduling.answers import Probabilities


class ServedLibrary(Protocol):
    """What an answer says of the library that it is from, and what it takes as a picture."""

    @property
    def digest(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def input(self) -> InputSpec: ...


class ImageScheduler(Protocol):
    """Admission and answers; `service/scheduling/scheduler.py` says what they raise."""

    def check(self, size: int, client: str, left_s: float) -> None: ...
    async def submit(self, images: Pixels, *, client: str, deadline: float | None = None) -> Probabilities: ...


class Serving(Protocol):
    """A library that is being served. A request keeps the one it began with."""

    @property
    def library(self) -> ServedLibrary: ...
    @property
    def scheduler(self) -> ImageScheduler: ...


class Manager(Protocol):
    """The state of the service. current: None before the first library is verified and warm."""

    @property
    def current(self) -> Serving | None: ...
    @property
    def ready(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
