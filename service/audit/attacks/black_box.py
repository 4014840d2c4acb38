"""Black-box attacks: images in, the service's own answers out, and a ledger of every query.

An answer drawn anew for each call fools naive black-box attacks, and a naive attack flatters the defence. So the
attacker averages q answers to each probe, never stops at a lucky miss, and what it found is scored exactly.
"""

import base64
import io
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model_store.attacks import ThreatModel
from model_store.policy import Policy, draw_matrix
from model_store.quiet_imports import import_hop_skip_jump
from service.audit.attacks.autoattack import isolated_rng
from service.audit.errors import AuditRejected, OracleFailed
from service.audit.evaluation.members import Member, as_floats, forward_no_grad
from service.audit.evaluation.threads import WorkerThreads
from service.outbound import http_client

BATCH_PROBES: Final = 200  # the most that HopSkipJump asks about at once
REQUEST_IMAGES: Final = 128
TIMEOUT_S: Final = 60.0
PATIENCE: Final = 60  # times the service may be busy before the attack gives up
P_INIT: Final = 0.8  # Square's first share of changed pixels, as AutoAttack sets it
REASKED: Final = 8  # every so many probes Square asks again about what it holds, lest a lucky answer keep it there
STARTS: Final = 5  # images that HopSkipJump asks about to start from
SCHEDULE: Final = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 iterations: where the share is halved


@dataclass(frozen=True)
class QueryAttackConfig:
    """method: Square on the shown probabilities, or HopSkipJump on labels alone.  averages: q, answers to each probe.
    probes: different images tried for each attacked image, so that it costs probes times averages queries."""

    method: Literal["square", "hopskipjump"] = "square"
    averages: int = 1
    probes: int = 500


class Oracle(Protocol):
    """uint8 [N, 3, H, W] -> probabilities as shown, float64 [N, classes]. `queries` counts images answered."""

    queries: int

    def __call__(self, pixels: Tensor) -> NDArray[np.float64]: ...


@dataclass
class HttpOracle:
    """The public plane of a running service. Where it asks for patience it gets some."""

    url: str
    classes: int
    key: str | None = None
    queries: int = 0
    client: Any = field(default_factory=lambda: http_client(timeout_s=TIMEOUT_S))

    def __enter__(self) -> "HttpOracle":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def __call__(self, pixels: Tensor) -> NDArray[np.float64]:
        return np.concatenate([self.ask(part) for part in torch.split(pixels, REQUEST_IMAGES)])

    def ask(self, pixels: Tensor) -> NDArray[np.float64]:
        answer = self.post({"images": [base64.b64encode(as_png(image)).decode() for image in pixels]})
        try:
            shown = np.stack([as_row(prediction, self.classes) for prediction in answer.json()["predictions"]])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise OracleFailed(f"{self.url}: an answer that cannot be read ({error!r:.200})") from None
        if len(shown) != len(pixels):
            raise OracleFailed(f"{self.url}: {len(shown)} answers to {len(pixels)} images")
        self.queries += len(pixels)
        return shown

    def post(self, body: dict[str, Any]) -> Any:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        for _ in range(PATIENCE):
            answer = self.send(body, headers)
            if answer.status_code not in (429, 503):
                break
            time.sleep(float(answer.headers.get("retry-after", "1")))
        if answer.status_code != 200:
            raise OracleFailed(f"{self.url}: {answer.status_code} while it was attacked: {answer.text:.200}")
        return answer

    def send(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        import httpx

        try:
            return self.client.post(f"{self.url.rstrip('/')}/v1/classify", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise OracleFailed(f"{self.url}: {type(error).__name__} while it was attacked: {error!s:.200}") from None


def as_png(pixels: Tensor) -> bytes:
    """uint8 [3, H, W] -> an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def as_row(prediction: dict[str, Any], classes: int) -> NDArray[np.float64]:
    row = np.zeros(classes)
    row[prediction["index"]] = prediction.get("probability", 1.0)
    for item in prediction.get("top", ()):
        row[item["index"]] = item["probability"]
    return row


@dataclass
class LocalOracle:
    """The service's answer without the service: rounded, theta fresh for each image from the oracle's own generator."""

    members: Sequence[Member]
    policy: Policy
    device: torch.device
    rng: random.Random
    digits: int = 2
    queries: int = 0
    threads: WorkerThreads = field(default_factory=WorkerThreads)

    def __enter__(self) -> "LocalOracle":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is current."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> NDArray[np.float64]:
        rows = draw_matrix(self.policy, len(pixels), self.rng)
        distinct, place = torch.unique(
            pixels.flatten(1), dim=0, return_inverse=True
        )  # a repeat costs no second forward
        images = as_floats(distinct.view(-1, *pixels.shape[1:]), self.device)

        def run(index: int) -> tuple[Tensor, Tensor]:
            drawn = rows[:, index].nonzero().flatten()
            distinct_rows, back = place[drawn].unique(return_inverse=True)
            return drawn, forward_no_grad(self.members[index], images[distinct_rows]).cpu()[back] * rows[drawn, index][
                :, None
            ]

        total = torch.zeros(0)
        used = rows.any(dim=0).nonzero().flatten().tolist()
        for drawn, logits in self.threads.map(run, used):
            total = total if len(total) else torch.zeros(len(pixels), logits.shape[1])
            total.index_add_(0, drawn, logits)
        self.queries += len(pixels)
        shares = torch.softmax(total / rows.sum(dim=1, keepdim=True), dim=1)
        return np.asarray(np.round(shares.numpy().astype(np.float64), self.digits), dtype=np.float64)


@dataclass(frozen=True)
class Snapshot:
    """The state at one point of the attack.

    queries: of each image so far.
    unclipped: the images before they were put into the ball, from an attack that looks for the nearest image.
    """

    queries: int
    pixels: Tensor
    unclipped: Tensor | None = None


def attack(
    oracle: Oracle, pixels: Tensor, labels: Tensor, threat: ThreatModel, settings: QueryAttackConfig, seed: int
) -> list[Snapshot]:
    """uint8 images in the ball, at growing numbers of queries; the last is the attack's result."""
    if threat.norm != "linf":
        raise AuditRejected("black-box attacks are l-infinity here; leave them out of an audit in l2")
    if settings.method == "square":
        return square(oracle, pixels, labels, threat, settings, np.random.default_rng(seed))
    return hop_skip_jump(oracle, pixels, labels, threat, settings, seed)


def average_answers(oracle: Oracle, pixels: Tensor, averages: int) -> NDArray[np.float64]:
    answers = oracle(pixels.repeat(averages, 1, 1, 1))
    return np.asarray(answers.reshape(averages, len(pixels), -1).mean(axis=0))


def margins(shares: NDArray[np.float64], labels: Tensor) -> NDArray[np.float64]:
    """The best wrong class less the right one; above 0 is misclassified."""
    rows, right = np.arange(len(labels)), labels.numpy()
    others = shares.copy()
    others[rows, right] = -1
    return np.asarray(others.max(axis=1) - shares[rows, right])


# Square (Andriushchenko et al., 2020)


def square(
    oracle: Oracle,
    pixels: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    settings: QueryAttackConfig,
    rng: np.random.Generator,
) -> list[Snapshot]:
    epsilon = int(threat.epsilon * 255 + 1e-6)
    clean = pixels.numpy().astype(np.int16)
    stripes = rng.choice([-epsilon, epsilon], (len(clean), 3, 1, clean.shape[3]))
    current = np.clip(clean + stripes, 0, 255)
    best = margins(average_answers(oracle, as_bytes(current), settings.averages), labels)
    answers, stops = np.ones(len(clean)), []  # how often q answers were added up in `best`
    for probe in range(1, settings.probes):
        if probe % REASKED == 0:
            again = margins(average_answers(oracle, as_bytes(current), settings.averages), labels)
            best, answers = (best * answers + again) / (answers + 1), answers + 1
        else:
            side = side_of(probe, settings.probes, clean.shape[2:])
            tried = np.stack(
                [place_square(image, at, epsilon, side, rng) for image, at in zip(current, clean, strict=True)]
            )
            now = margins(average_answers(oracle, as_bytes(tried), settings.averages), labels)
            better = now > best
            current[better], best[better], answers[better] = tried[better], now[better], 1
        if probe + 1 in snapshot_points(settings.probes):
            stops.append(Snapshot((probe + 1) * settings.averages, as_bytes(current)))
    return stops


def as_bytes(images: NDArray[np.int16]) -> Tensor:
    return torch.from_numpy(images.astype(np.uint8))


def side_of(probe: int, probes: int, size: tuple[int, ...]) -> int:
    """Of the square that changes its share of a picture. size: (height, width)."""
    halvings = sum(probe * 10_000 / probes > mark for mark in SCHEDULE)
    return max(1, min(round(math.sqrt(P_INIT / 2**halvings) * math.sqrt(math.prod(size))), min(size) - 1))


def place_square(
    image: NDArray[np.int16], clean: NDArray[np.int16], epsilon: int, side: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """One square window set to a corner of the ball."""
    top, left = (rng.integers(0, length - side) for length in image.shape[1:])
    region = np.s_[:, top : top + side, left : left + side]
    tried = image.copy()
    tried[region] = np.clip(clean[region] + rng.choice([-epsilon, epsilon], (3, 1, 1)), 0, 255)
    return tried


def snapshot_points(probes: int) -> set[int]:
    """Where the attack is scored: eight points, evenly in the logarithm, and the end."""
    return {max(2, round(probes ** (k / 8))) for k in range(1, 9)} | {probes}


# HopSkipJump (Chen et al., 2020), in the Adversarial Robustness Toolbox


class QueryBudgetExceeded(Exception):
    """The queries of one image are used up. ART's attack knows no budget of its own."""


@dataclass
class Votes:
    """What ART sees: the label of a majority of q answers. Keeps the nearest probe that a second majority confirms.

    current: what was kept, from which query on.
    """

    oracle: Oracle
    clean: Tensor
    label: int
    classes: int
    averages: int
    limit: int
    best: Tensor
    spent: int = 0
    history: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self, image: Tensor) -> None:
        self.best = image
        self.history.append((self.spent, image))

    def after(self, queries: int) -> Tensor:
        """What was current once so many queries were spent."""
        return next((image for spent, image in reversed(self.history) if spent <= queries), self.clean)

    def start(self, candidates: Sequence[Tensor]) -> None:
        """From the first that a majority does not take for the label; the clean image itself may be one."""
        with suppress(QueryBudgetExceeded, StopIteration):
            self.keep(next(image for image in candidates if self.majority(image[None])[0] != self.label))

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        probes = torch.from_numpy(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
        labels = self.majority(probes)
        for image in probes[torch.from_numpy(labels != self.label)]:
            if self.away(image) < self.away(self.best) and self.majority(image[None])[0] != self.label:
                self.keep(image)
        return np.eye(self.classes)[labels]

    def away(self, image: Tensor) -> int:
        return int((image.int() - self.clean.int()).abs().max())

    def majority(self, probes: Tensor) -> NDArray[np.int64]:
        if self.spent >= self.limit:
            raise QueryBudgetExceeded
        self.spent += self.averages * len(probes)
        votes = self.oracle(probes.repeat(self.averages, 1, 1, 1)).argmax(axis=1).reshape(self.averages, -1)
        counts = np.stack([(votes == label).sum(axis=0) for label in range(self.classes)], axis=1)
        return np.asarray(counts.argmax(axis=1))


def hop_skip_jump(
    oracle: Oracle, pixels: Tensor, labels: Tensor, threat: ThreatModel, settings: QueryAttackConfig, seed: int
) -> list[Snapshot]:
    """Minimises the distance from an image of another class; what it holds is clipped into the ball and handed on."""
    classes, limit = oracle(pixels[:1]).shape[1], settings.probes * settings.averages
    each = []
    with isolated_rng(seed):
        for place, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            candidates = [image, *other_classes(pixels, labels, place)[:STARTS]]
            votes = Votes(oracle, image, label, classes, settings.averages, limit, candidates[1])
            votes.start(candidates)
            hop(votes, classes)
            each.append(votes)
    epsilon, clean = int(threat.epsilon * 255 + 1e-6), pixels.numpy().astype(np.int16)
    stops = []
    for queries in sorted(mark * settings.averages for mark in snapshot_points(settings.probes)):
        nearest = torch.stack([votes.after(queries) for votes in each])
        away = np.clip(nearest.numpy().astype(np.int16) - clean, -epsilon, epsilon)
        stops.append(Snapshot(queries, as_bytes(clean + away), nearest))
    return stops


def hop(votes: Votes, classes: int) -> None:
    if torch.equal(votes.best, votes.clean):
        return  # misread as it is
    attack_type, classifier_type = import_hop_skip_jump()
    clean, start = ((image.numpy() / 255).astype(np.float32)[None] for image in (votes.clean, votes.best))
    classifier = classifier_type(votes, tuple(votes.clean.shape), classes, clip_values=(0.0, 1.0))
    attack = attack_type(classifier, norm=np.inf, max_iter=1000, max_eval=BATCH_PROBES, init_eval=20, verbose=False)
    with suppress(QueryBudgetExceeded), seeded_random_states():
        attack.generate(clean, np.array([votes.label]), x_adv_init=start)


@contextmanager
def seeded_random_states() -> Iterator[None]:
    """Where its first probe fails, ART draws from a RandomState without a seed: inside, the global one seeds it."""
    original = np.random.RandomState

    def seeded(seed: int | None = None) -> np.random.RandomState:
        return original(np.random.randint(2**31) if seed is None else seed)  # noqa: NPY002 -- what ART uses

    np.random.RandomState = seeded  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        np.random.RandomState = original  # type: ignore[misc]


def other_classes(pixels: Tensor, labels: Tensor, place: int) -> list[Tensor]:
    """The attacked images of other classes, the nearest first: starts that need no luck."""
    others = (labels != labels[place]).nonzero().flatten()
    if not len(others):
        raise AuditRejected("HopSkipJump needs images of at least two classes to start from")
    away = (pixels[others].float() - pixels[place].float()).flatten(1).norm(dim=1)
    return [pixels[index] for index in others[away.argsort()].tolist()]
