"""A batch: images that are answered together, each with a theta of its own, grouped by the tickets they drew."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from model_store.policy import Policy, Theta, draw_theta
from service.engine.base import Engine, Heartbeat, Images, Logits
from service.engine.errors import EngineDied
from service.errors import ServiceError
from service.observability.metrics import Metrics
from service.scheduling.answers import Probabilities

log = logging.getLogger(__name__)


SYSTEM_RNG: Final = secrets.SystemRandom()  # the operating system's entropy: no state to learn, or to copy by a fork


@dataclass(frozen=True)
class ServedModel:
    """What images are answered with: a library's tickets on an engine, and the sampling policy over them."""

    engine: Engine
    policy: Policy
    classes: int


@dataclass(eq=False)
class PendingRequest:
    """The images of one call of submit. Batches fill in its answer, on the event loop's thread alone."""

    images: Images
    client: str
    answer: asyncio.Future[Probabilities]
    admitted_at: float
    started_at: float | None = None  # of its first image's batch; known once that image is answered
    next_index: int = 0  # of its first image that no batch has taken
    active: bool = True  # whether a client still waits for it; engine threads read it to skip images
    probabilities: Probabilities | None = None
    answered: int = 0

    @property
    def size(self) -> int:
        return len(self.images)

    def fill(self, index: int, probabilities: Probabilities) -> None:
        if self.probabilities is None:
            self.probabilities = np.empty((self.size, len(probabilities)), np.float32)
        self.probabilities[index] = probabilities
        self.answered += 1
        if self.answered == self.size and not self.answer.done():
            self.answer.set_result(self.probabilities)

    def fail(self, error: ServiceError) -> None:
        self.active = False
        if not self.answer.done():
            self.answer.set_exception(error)


Slot = tuple[PendingRequest, int]
"""One image of a batch: its request, and its index there."""


@dataclass(eq=False)
class MemberTask:
    """One drawn ticket, and the images of a batch that drew it."""

    batch: "Batch"
    member: int
    indices: list[int] = field(default_factory=list)  # of the images in the batch
    counts: list[int] = field(default_factory=list)  # how often each drew the ticket: 1 without replacement
    logits: Logits | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class Batch:
    """Images that are answered together, each with its own theta."""

    model: ServedModel
    slots: list[Slot]
    images: Images
    thetas: list[Theta]
    started_at: float
    tasks: list[MemberTask] = field(default_factory=list)
    unfinished: int = 0  # shards that are not done
    failed: set[int] = field(default_factory=set)  # indices of images

    def active(self, index: int) -> bool:
        return self.slots[index][0].active


@dataclass(eq=False)
class Shard:
    """Some of a batch's tasks, which one thread runs."""

    batch: Batch
    tasks: list[MemberTask] = field(default_factory=list)
    macs: int = 0

    def add(self, task: MemberTask) -> None:
        self.tasks.append(task)
        self.macs += macs_of(task)


def form_batch(model: ServedModel, slots: list[Slot]) -> Batch:
    """Draws a theta for every image and groups the images by ticket; the costliest task comes first."""
    started_at = time.perf_counter()
    thetas = [draw_theta(model.policy, SYSTEM_RNG) for _ in slots]
    images = np.stack([request.images[index] for request, index in slots])
    batch = Batch(model, slots, images, thetas, started_at)
    tasks: dict[int, MemberTask] = {}
    for index, theta in enumerate(thetas):
        for member, count in Counter(theta.members).items():
            task = tasks.setdefault(member, MemberTask(batch, member))
            task.indices.append(index)
            task.counts.append(count)
    batch.tasks = sorted(tasks.values(), key=macs_of, reverse=True)
    return batch


def macs_of(task: MemberTask) -> int:
    """Multiply-adds."""
    return task.batch.model.engine.macs[task.member] * len(task.indices)


def partition(batch: Batch, threads: int) -> list[Shard]:
    """The tasks in as many shards as there are threads, or tasks, by the rule "longest processing time first"."""
    shards = [Shard(batch) for _ in range(min(threads, len(batch.tasks)))]
    for task in batch.tasks:
        min(shards, key=lambda shard: shard.macs).add(task)
    batch.unfinished = len(shards)
    return shards


def run_shard(shard: Shard, metrics: Metrics, heartbeat: Heartbeat = lambda: None) -> None:
    """One forward pass of each of its tickets. If that fails, each ticket again by itself."""
    tasks = [task for task in shard.tasks if drop_cancelled(task)]
    if not tasks:
        return
    jobs = [(task.member, task.indices) for task in tasks]
    try:
        results = shard.batch.model.engine.run(shard.batch.images, jobs, heartbeat)
        for task, (logits, seconds) in zip(tasks, results, strict=True):
            task.logits, task.seconds = check_finite(logits), seconds
    except Exception:  # noqa: BLE001 -- whatever a backend raises concerns these images only
        for task in tasks:
            run_again(task, metrics)
            heartbeat()
        if all(shard.batch.failed.issuperset(task.indices) for task in tasks):
            check_alive(shard.batch.model.engine)


def check_alive(engine: Engine) -> None:
    """Raises EngineDied if a harmless image fails, too.

    A CUDA error such as an illegal access is sticky: every later call of the process fails as well. Without this check
    the service would stay ready and fail every image.
    """
    try:
        check_finite(engine.forward(0, np.zeros((1, *engine.input_shape), np.uint8)))
    except Exception as error:  # noqa: BLE001 -- whatever a backend raises
        raise EngineDied(f"every image fails ({type(error).__name__})") from None


def run_again(task: MemberTask, metrics: Metrics) -> None:
    """One ticket. If it fails, each image alone, so that a bad image fails only itself."""
    started_at = time.perf_counter()
    try:
        task.logits = forward(task, task.indices)
    except Exception as error:  # noqa: BLE001 -- as above
        log.warning("ticket failed on %d images (%s), each is run again alone", len(task.indices), type(error).__name__)
        metrics.inc("engine_retries_total", len(task.indices))
        task.logits = np.concatenate([run_single(task, index) for index in task.indices])
    task.seconds = time.perf_counter() - started_at


def drop_cancelled(task: MemberTask) -> bool:
    """Removes images whose request was cancelled or came too late. False: none is left, so nothing is computed."""
    pairs = [pair for pair in zip(task.indices, task.counts, strict=True) if task.batch.active(pair[0])]
    task.indices, task.counts = [index for index, _ in pairs], [count for _, count in pairs]
    return bool(pairs)


def forward(task: MemberTask, indices: list[int]) -> Logits:
    return check_finite(task.batch.model.engine.forward(task.member, task.batch.images[indices]))


def check_finite(logits: Logits) -> Logits:
    if not np.isfinite(logits).all():
        raise ArithmeticError("a logit is not finite")
    return logits


def run_single(task: MemberTask, index: int) -> Logits:
    try:
        return forward(task, [index])
    except Exception:  # noqa: BLE001 -- as above
        task.batch.failed.add(index)
        return np.zeros((1, task.batch.model.classes), np.float32)


def combine_members(batch: Batch) -> Probabilities:
    """Eq. 1 for every image, then the softmax of its members' mean. Images of requests that have ended are zero.

    In the order of the tickets, so that the answer does not depend on which thread was faster.
    """
    done = sorted(
        ((task, task.logits) for task in batch.tasks if task.logits is not None), key=lambda pair: pair[0].member
    )
    sums = np.zeros((len(batch.slots), batch.model.classes), np.float32)
    if done:
        indices = [index for task, _ in done for index in task.indices]
        counts = np.array([count for task, _ in done for count in task.counts], np.float32)
        np.add.at(sums, indices, np.concatenate([logits for _, logits in done]) * counts[:, None])
    sizes = np.array([len(theta.members) for theta in batch.thetas], np.float32)
    return softmax(sums / sizes[:, None])


def softmax(logits: Probabilities) -> Probabilities:
    """By image, as `model_store.ensemble.probabilities`. torch would take a third of a millisecond to begin."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Probabilities = powers / powers.sum(axis=1, keepdims=True)
    return probabilities
