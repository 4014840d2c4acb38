"""The quantity: p_i(x'), the chance over theta that image i is classified rightly. Each ticket runs once, then algebra.

An attacker chooses x' knowing the library and the law of theta, before theta is drawn. x' is chosen on one set of
draws and scored on another, on the uint8 grid, unless the law has few enough states to be counted through.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from model_store.ensemble import combine, predictions
from model_store.library import Library
from model_store.policy import Policy, Theta, draw_matrix, group_sizes, inclusion_probabilities, matrix, states
from model_store.structures import fold
from model_store.ticket import Ticket
from service.audit.errors import AuditRejected

SCORING_DRAWS: Final = 10_000
ATTACK_DRAWS: Final = 2_000
COUNTED: Final = 4_096  # laws of at most so many states are enumerated instead of sampled
CERTAIN: Final = 1 - 1e-9  # a risk above which nothing can be gained
COUNTED_AT_LAST: Final = 20_000_000  # laws of at most so many are counted through for the figures reported
MAX_PAIRS: Final = 2**18  # states whose sums are held at once
MAX_CHUNK: Final = 2**22  # floats of ensemble logits held at once
PASS_IMAGES: Final = 64  # images of one forward
BISECTIONS: Final = 12
GRAPH_BYTES: Final = 5e8  # of all members' activations, held for a backward pass


@dataclass(frozen=True, eq=False)
class Member:
    """One ticket or baseline on a device. images [N, 3, 32, 32] in [0, 1] -> calibrated logits [N, classes]."""

    name: str
    network: nn.Module
    temperature: float
    known: dict[torch.Size, int] = field(default_factory=dict, repr=False)  # what held has measured

    def __call__(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.network(images)) / self.temperature

    def held(self, image: Tensor) -> int:
        """Bytes that one image's forward pass keeps for the backward pass, weights apart. image: [1, 3, 32, 32]."""
        if image.shape not in self.known:
            self.known[image.shape] = graph_bytes(self, image)
        return self.known[image.shape]


def graph_bytes(member: Member, image: Tensor) -> int:
    weights = {weight.data_ptr() for weight in member.network.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alone = image.detach().clone().requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = member(alone)  # held until all is counted: what takes the place of freed memory would not be counted
    del logits
    return sum(kept.values())


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The tickets, in the library's order, behind them its baselines, and last `outside` networks that only an attacker
    holds: attacks made on them are tried on ours."""

    members: tuple[Member, ...]
    tickets: int
    structures: tuple[str, ...]
    policy: Policy
    device: torch.device
    outside: int = 0

    @property
    def own(self) -> int:
        """Tickets and baselines: the members of the library itself."""
        return len(self.members) - self.outside

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)


@dataclass(frozen=True)
class DrawSet:
    """rows: float32 [R, M], one theta a row.  weights: float64 [R], their probabilities, summing to 1.
    counted: whether the rows are all the states there are, so that the figures are exact."""

    rows: Tensor
    weights: Tensor
    counted: bool

    @property
    def sizes(self) -> Tensor:
        """[R]: n, the members of each draw."""
        return self.rows.sum(dim=1)

    def to(self, device: torch.device) -> "DrawSet":
        return DrawSet(self.rows.to(device), self.weights.to(device), self.counted)


@dataclass(frozen=True)
class Defense:
    """A randomised (or fixed) classifier over a bench: its law, and why it is here."""

    name: str
    about: str
    policy: Policy

    @property
    def used(self) -> tuple[int, ...]:
        """The members that can be drawn at all."""
        return tuple(index for index, p in enumerate(inclusion_probabilities(self.policy)) if p > 0)


@dataclass(frozen=True, eq=False)
class AttackTarget:
    """What an attack sees: the members that a system can draw, and the attacker's own draws over them."""

    members: tuple[Member, ...]
    draws: DrawSet

    def batch(self, images: Tensor) -> int:
        """How many of these images' graphs through all members fit into memory together."""
        held = sum(member.held(images[:1]) for member in self.members)
        return max(4, min(PASS_IMAGES, int(GRAPH_BYTES / max(1, held))))

    def parts(self, images: Tensor, *along: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The images, with what belongs to them, as many at once as fit into memory."""
        return zip(*(torch.split(each, self.batch(images)) for each in (images, *along)), strict=True)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[M, N, classes] of any number of images, without a graph."""
        return torch.cat([self(part) for (part,) in self.parts(images)], dim=1)

    def __call__(self, images: Tensor) -> Tensor:
        """[M, N, classes], differentiable."""
        if len(self.members) == 1 or images.device.type != "cpu":
            return torch.stack([member(images) for member in self.members])
        if torch.is_grad_enabled() and images.requires_grad:
            return cast("Tensor", ParallelForward.apply(images, self.members))
        return torch.stack(list(workers().map(lambda member: forward_no_grad(member, images), self.members)))


# All cores. Members are too small to be split over threads one at a time, but they are many: each thread runs whole
# ones, and torch splits nothing, so that results do not depend on the cores and a busy machine is no trap.

cores_used: Final = [1]


def use_cores(count: int) -> None:
    cores_used[0] = count
    torch.set_num_threads(1)


def workers() -> ThreadPoolExecutor:
    return pool_of(cores_used[0])


@lru_cache(maxsize=1)
def pool_of(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="audit", initializer=torch.set_num_threads, initargs=(1,))


@torch.no_grad()
def forward_no_grad(member: Member, images: Tensor) -> Tensor:
    return member(images)


class ParallelForward(torch.autograd.Function):
    """All members' logits, [M, N, classes], forwards and backwards in threads; summed in the members' order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, members: Sequence[Member]) -> Tensor:
        def run(member: Member) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                own = images.detach().requires_grad_(True)
                return own, member(own)

        ctx.graphs = list(workers().map(run, members))
        return torch.stack([logits.detach() for _, logits in ctx.graphs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        def run(graph: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
            own, logits = graph
            return torch.autograd.grad(logits, own, gradient)[0]

        found = workers().map(run, ctx.graphs, gradients[0])
        return torch.stack(list(found)).sum(dim=0), None


def member_of(ticket: Ticket, name: str, device: torch.device) -> Member:
    network = fold(ticket.network()).eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Member(name, network, ticket.temperature)


def candidates_of(
    library: Library,
    device: torch.device | str = "cpu",
    outside: Library | None = None,
    made: Callable[[Ticket, str, torch.device], Member] = member_of,
) -> CandidateSet:
    """outside: a library of the attacker's own.  made: makes a member of a ticket. Raises AuditRejected if the two
    libraries have not the same classes."""
    if outside is not None and outside.classes != library.classes:
        raise AuditRejected(f"outside library of {len(outside.classes)} other classes; expected the library's own")
    where = torch.device(device)
    rows = all_members(library, outside)
    members = tuple(made(ticket, name, where) for name, ticket in rows)
    structures = tuple(ticket.structure.name for _, ticket in rows)
    theirs = len(rows) - len(all_members(library))
    return CandidateSet(members, len(library.tickets), structures, library.policy, where, theirs)


def all_members(library: Library, outside: Library | None = None) -> list[tuple[str, Ticket]]:
    """The bench's members by name; those from outside begin with their library's digest, as names may be the same."""
    entries = (*library.entries, *library.baseline_entries)
    rows = list(zip((entry.name for entry in entries), (*library.tickets, *library.baselines), strict=True))
    if outside is not None:
        rows += [(f"{outside.digest[:6]}/{name}", ticket) for name, ticket in all_members(outside)]
    return rows


def widened(policy: Policy, members: int) -> Policy:
    """The same law over a matrix of more columns."""
    return Policy(policy.groups, members, policy.sizes, policy.every, policy.replacement)


# Draws


def draws_of(policy: Policy, count: int, rng: random.Random) -> DrawSet:
    """All the states of a small law, with their probabilities; `count` draws of a large one."""
    if not policy.replacement and states(policy) <= COUNTED:
        return enumerated(policy)
    rows = draw_matrix(policy, count, rng)
    return DrawSet(rows, torch.full((count,), 1 / count, dtype=torch.float64), counted=False)


def enumerated(policy: Policy) -> DrawSet:
    found = list(every_state(policy))
    rows = matrix([theta for theta, _ in found], policy.tickets)
    weights = torch.tensor([p for _, p in found], dtype=torch.float64)
    return DrawSet(rows, weights / weights.sum(), counted=True)


def every_state(policy: Policy) -> Iterator[tuple[Theta, float]]:
    """Each theta of a law without replacement, with a number proportional to its probability."""
    for members, p in states_over(options_of(policy)):
        if members:
            yield Theta(members), p


Option = tuple[tuple[int, ...], float]
"""Members that one group or several give, and a number proportional to its probability."""


def options_of(policy: Policy) -> list[list[Option]]:
    """For each group what it can give, nothing included where alpha may leave it out."""
    options: list[list[Option]] = []
    for group, law in zip(policy.groups, group_sizes(policy), strict=True):
        chosen = [
            (members, p / math.comb(len(group), n))
            for n, p in enumerate(law, start=1)
            if p > 0
            for members in itertools.combinations(group, n)
        ]
        options.append(chosen if policy.every else [((), 1.0), *chosen])
    return options


def states_over(options: Sequence[Sequence[Option]]) -> Iterator[Option]:
    for state in itertools.product(*options):
        members = tuple(sorted(itertools.chain.from_iterable(part for part, _ in state)))
        yield members, math.prod(p for _, p in state)


def target_of(bench: CandidateSet, system: Defense, seed: str) -> AttackTarget:
    """seed: of the attacker's own draws (set A). Scoring never sees them."""
    used = system.used
    draws = draws_of(system.policy, ATTACK_DRAWS, random.Random(seed)).to(bench.device)
    return AttackTarget(
        tuple(bench.members[index] for index in used), DrawSet(draws.rows[:, list(used)], draws.weights, draws.counted)
    )


def scoring_draws(system: Defense, seed: int) -> DrawSet:
    """Set B: the defender's draws, which depend on nothing of the attacker's."""
    return draws_of(system.policy, SCORING_DRAWS, random.Random(f"defender {seed} {system.name}"))


# Logits and scores


@torch.no_grad()
def logits_of(members: Sequence[Member], pixels: Tensor, device: torch.device) -> Tensor:
    """Of images on the uint8 grid: uint8 [N, 3, 32, 32] -> float32 [M, N, classes] on the CPU."""
    parts = [as_floats(part, device) for part in torch.split(pixels, PASS_IMAGES)]

    def run(member: Member) -> Tensor:
        return torch.cat([forward_no_grad(member, part).cpu() for part in parts])

    if device.type != "cpu":
        return torch.stack([run(member) for member in members])
    return torch.stack(list(workers().map(run, members)))


def as_floats(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]."""
    floats = pixels.to(device=device, dtype=torch.float32) / 255
    return floats.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def wrong(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """bool [R, N]: under which draws which images are misclassified.

    logits: [M, N, classes]. Raises ValueError on a logit that is not finite: its argmax would mean nothing.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("a member's logits are not finite: nothing can be scored with them")
    at_once = max(1, MAX_CHUNK // max(1, logits[0].numel()))
    parts = [predictions(combine(logits, some)) != labels for some in torch.split(draws.rows, at_once)]
    return torch.cat(parts)


def failure(logits: Tensor, labels: Tensor, draws: DrawSet) -> Tensor:
    """float64 [N]: 1 - p_i, the chance over theta that the image is misclassified."""
    return draws.weights @ wrong(logits, labels, draws).to(torch.float64)


@dataclass(frozen=True)
class Scores:
    """What one system does on the images of one attack. right: float64 [N], p_i.

    any_wrong: bool [N], whether any draw of the scoring set fails.  by_size: n -> float64 [N], p_i given n members.
    """

    right: Tensor
    any_wrong: Tensor
    by_size: dict[int, Tensor]

    def pick(self, index: Tensor) -> "Scores":
        sizes = {n: right[index] for n, right in self.by_size.items()}
        return Scores(self.right[index], self.any_wrong[index], sizes)


def scores(logits: Tensor, labels: Tensor, draws: DrawSet) -> Scores:
    failed = wrong(logits, labels, draws)
    by_size = {}
    for n in sorted({int(size) for size in draws.sizes.tolist()}):
        rows = draws.sizes == n
        share = draws.weights[rows]
        by_size[n] = (share @ (~failed[rows]).to(torch.float64)) / share.sum()
    right = (draws.weights @ (~failed).to(torch.float64)).clamp(0, 1)  # what is never right is 0, not a rounding of it
    return Scores(right, failed.any(dim=0), by_size)


def countable(policy: Policy) -> bool:
    """Whether all states of a law can be counted through for a few hundred images."""
    return not policy.replacement and states(policy) <= COUNTED_AT_LAST


@torch.no_grad()
def score_exactly(found: Scores, logits: Tensor, labels: Tensor, policy: Policy) -> Scores:
    """The same images under every state of a large law: what was chosen on draws is scored on all there is.

    logits: [M, N, classes]. The groups are taken in two halves: a state is a pair of their sums.
    """
    options = options_of(policy)
    halves = []
    for part in (options[: len(options) // 2], options[len(options) // 2 :]):
        listed = list(states_over(part))
        rows = matrix([Theta(members) for members, _ in listed], policy.tickets)
        halves.append((combine(logits, rows), torch.tensor([p for _, p in listed], dtype=torch.float64)))
    (first, p), (second, q) = halves
    empty = 0.0 if policy.every else float(p[0] * q[0])  # both halves begin with nothing

    def run(image: int) -> tuple[float, bool]:
        right = ~pairs_wrong(first[:, image], second[:, image], int(labels[image]))
        states = right.numel()
        if not policy.every:
            right[0, 0], states = False, states - 1
        share = float(p @ (right.to(torch.float32) @ q.to(torch.float32)).double())
        return share / (float(p.sum() * q.sum()) - empty), int(right.sum()) < states

    right, any_wrong = zip(*workers().map(run, range(len(labels))), strict=True)
    return Scores(torch.tensor(right, dtype=torch.float64).clamp(0, 1), torch.tensor(any_wrong), found.by_size)


def pairs_wrong(first: Tensor, second: Tensor, label: int) -> Tensor:
    """bool [K, L]: whether the sum of a row of `first` [K, classes] and one of `second` has another argmax."""
    ahead, behind = (half - half[:, label : label + 1] for half in (first, second))
    failed = torch.zeros(len(first), len(second), dtype=torch.bool)
    for some in torch.split(torch.arange(len(first)), max(1, MAX_PAIRS // len(second))):
        for other in range(first.shape[1]):
            lead = ahead[some, other, None] + behind[None, :, other]
            if other != label:
                failed[some] |= lead >= 0 if other < label else lead > 0  # the lowest index among equals
    return failed


def pointwise_worst(several: Sequence[Scores]) -> Scores:
    """For each image the attack that leaves it the least chance: the mean of minima, not the minimum of means."""
    rights = torch.stack([one.right for one in several])
    pick = rights.argmin(dim=0)
    sizes = {n: torch.stack([one.by_size[n] for one in several]).gather(0, pick[None])[0] for n in several[0].by_size}
    any_wrong = torch.stack([one.any_wrong for one in several]).any(dim=0)
    return Scores(rights.amin(dim=0), any_wrong, sizes)


# The grid that an image file can carry


def quantize_to_uint8(images: Tensor, clean: Tensor, norm: str, epsilon: float) -> Tensor:
    """uint8 [N, 3, 32, 32]: the nearest images an 8-bit file can hold that are still inside the threat model.

    images: floats in [0, 1].  clean: uint8.
    """
    offset = images.detach().cpu() * 255 - clean
    rounded = offset.round()
    if norm == "linf":
        most = math.floor(epsilon * 255 + 1e-6)
        rounded = rounded.clamp(-most, most)
    else:
        rounded = longest_rounding(offset, epsilon * 255)
    return (clean + rounded).clamp(0, 255).to(torch.uint8)


def longest_rounding(offset: Tensor, most: float) -> Tensor:
    """offset: [N, 3, 32, 32] in 255ths. Rounded, once it is scaled down by no more than its l2 length needs."""
    low, high = torch.zeros(len(offset)), torch.ones(len(offset))
    for scale in (high, *[None] * BISECTIONS):
        tried = (low + high) / 2 if scale is None else scale.clone()
        inside = (offset * tried[:, None, None, None]).round().flatten(1).double().square().sum(dim=1) <= most**2 + 1e-9
        low, high = torch.where(inside, tried, low), torch.where(inside, high, tried)
    return (offset * low[:, None, None, None]).round()


def distance(pixels: Tensor, clean: Tensor, norm: str) -> Tensor:
    """float64 [N], in pixel units of [0, 1]."""
    offset = (pixels.to(torch.float64) - clean.to(torch.float64)).flatten(1) / 255
    return offset.abs().amax(dim=1) if norm == "linf" else offset.norm(dim=1)
