"""Members: networks on a device, the sets they form, and what an attack sees of them."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from model_store.library import Library
from model_store.policy import Policy
from model_store.structures import fold
from model_store.ticket import Ticket
from service.audit.errors import AuditRejected
from service.audit.evaluation.draws import ATTACK_DRAWS, Defense, DrawSet, draws_of
from service.audit.evaluation.threads import WorkerThreads
from service.cpu import free_memory_bytes

CraftingPrecision = Literal["bfloat16", "float32"]
PASS_IMAGES: Final = 64  # images of one forward pass on a CPU
GRAPH_IMAGES: Final = 128  # images of one forward and backward pass on a CPU: more are no faster
FREE_SHARE: Final = 0.25  # of free memory, for the activations of all members that a backward pass needs
CUDA_PASS_IMAGES: Final = 512  # launches, not arithmetic, set the pace of small members on a GPU


@dataclass(frozen=True, eq=False)
class Member:
    """One ticket or baseline on a device. images [N, 3, H, W] in [0, 1] -> calibrated logits [N, classes].

    bfloat16: computes in it, and gives float32. Attacks may be crafted so; nothing is scored so.
    """

    name: str
    network: nn.Module
    temperature: float
    bfloat16: bool = False
    measured: dict[torch.Size, int] = field(default_factory=dict, repr=False)  # what graph_bytes has measured

    def __call__(self, images: Tensor) -> Tensor:
        if not self.bfloat16:
            return cast("Tensor", self.network(images)) / self.temperature
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = cast("Tensor", self.network(images))
        return logits.float() / self.temperature

    def graph_bytes(self, image: Tensor) -> int:
        """Bytes that one image's forward pass keeps for the backward pass, weights apart. image: [1, 3, H, W]."""
        if image.shape not in self.measured:
            self.measured[image.shape] = measure_graph(self, image)
        return self.measured[image.shape]


def measure_graph(member: Member, image: Tensor) -> int:
    weights = {weight.data_ptr() for weight in member.network.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = image.detach().clone().requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = member(leaf)  # kept alive until the count is complete: freed addresses would be reused
    del logits
    return sum(kept.values())


class PassLimits(NamedTuple):
    """What one forward and backward pass may take."""

    images: int
    graph_bytes: float


def pass_limits(device: torch.device) -> PassLimits:
    if device.type != "cuda":
        return PassLimits(GRAPH_IMAGES, FREE_SHARE * free_memory_bytes())
    free, _ = torch.cuda.mem_get_info(device)
    return PassLimits(CUDA_PASS_IMAGES, FREE_SHARE * free)


def power_of_two_below(number: float) -> int:
    return 1 << int(math.log2(max(1.0, number)))


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The tickets in the library's order, then its baselines, then `outside` surrogate networks of the attacker's own.

    threads: run the members.
    rounded_on: digest of the images that 8 bits are calibrated on, if the service runs in them; the tickets' networks
        are rounded then, with straight-through gradients.
    answer: uint8 [N, 3, H, W] -> float32 [tickets, N, classes], by the engine, where the networks only follow it.
    """

    members: tuple[Member, ...]
    tickets: int
    structures: tuple[str, ...]
    policy: Policy
    device: torch.device
    outside: int = 0
    threads: WorkerThreads = field(default_factory=WorkerThreads)
    rounded_on: str | None = None
    answer: Callable[[Tensor], Tensor] | None = None

    @property
    def own(self) -> int:
        """Tickets and baselines: the members of the library itself."""
        return len(self.members) - self.outside

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def precision(self) -> CraftingPrecision:
        """What the networks compute in."""
        return "bfloat16" if any(member.bfloat16 for member in self.members) else "float32"

    def in_bfloat16(self) -> "CandidateSet":
        """The same networks, computing in bfloat16, for attacks to be crafted with."""
        return replace(self, members=tuple(replace(m, bfloat16=True, measured={}) for m in self.members))

    def logits(self, pixels: Tensor) -> Tensor:
        """Of images on the uint8 grid: uint8 [N, 3, H, W] -> float32 [M, N, classes] on the CPU."""
        if self.answer is None:
            return logits_of(self.members, pixels, self.device, self.threads)
        served, rest = self.answer(pixels), self.members[self.tickets :]
        return torch.cat([served, logits_of(rest, pixels, self.device, self.threads)]) if rest else served


@dataclass(frozen=True, eq=False)
class AttackTarget:
    """What an attack sees: the members that a system can draw, and the attacker's own draws over them."""

    members: tuple[Member, ...]
    draws: DrawSet
    threads: WorkerThreads = field(default_factory=WorkerThreads)

    def batch(self, images: Tensor) -> int:
        """How many of these images' graphs through all members fit into memory together: a power of two, at least 4.

        Free memory varies from one moment to the next; the last bits of a result should not.
        """
        limits = pass_limits(images.device)
        each = sum(member.graph_bytes(images[:1]) for member in self.members)
        return max(4, power_of_two_below(min(limits.images, limits.graph_bytes / max(1, each))))

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
            return cast("Tensor", ParallelForward.apply(images, self.members, self.threads))
        return torch.stack(list(self.threads.map(lambda member: forward_no_grad(member, images), self.members)))


@torch.no_grad()
def forward_no_grad(member: Member, images: Tensor) -> Tensor:
    return member(images)


class ParallelForward(torch.autograd.Function):
    """All members' logits, [M, N, classes], forwards and backwards in threads; summed in the members' order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, members: Sequence[Member], threads: WorkerThreads) -> Tensor:
        def run(member: Member) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                own = images.detach().requires_grad_(True)
                return own, member(own)

        ctx.graphs, ctx.threads = list(threads.map(run, members)), threads
        return torch.stack([logits.detach() for _, logits in ctx.graphs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        def run(graph: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
            own, logits = graph
            return torch.autograd.grad(logits, own, gradient)[0]

        parts = ctx.threads.map(run, ctx.graphs, gradients[0])
        return torch.stack(list(parts)).sum(dim=0), None, None


def member_of(ticket: Ticket, name: str, device: torch.device) -> Member:
    network = fold(ticket.network()).eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Member(name, network, ticket.temperature)


def candidates_of(
    library: Library,
    device: torch.device | str = "cpu",
    outside: Library | None = None,
    build: Callable[[Ticket, str, torch.device], Member] = member_of,
    threads: int = 1,
) -> CandidateSet:
    """The library's networks on a device.

    Args:
      outside: a surrogate library of the attacker's own.
      build: makes a member of a ticket.
      threads: cores to use on a CPU.

    Raises:
      AuditRejected: the two libraries do not have the same classes.
    """
    if outside is not None and outside.classes != library.classes:
        raise AuditRejected(f"outside library of {len(outside.classes)} other classes; expected the library's own")
    where = torch.device(device)
    rows = all_members(library, outside)
    members = tuple(build(ticket, name, where) for name, ticket in rows)
    structures = tuple(ticket.structure.name for _, ticket in rows)
    surrogates = len(rows) - len(all_members(library))
    return CandidateSet(
        members, len(library.tickets), structures, library.policy, where, surrogates, WorkerThreads(threads)
    )


def all_members(library: Library, outside: Library | None = None) -> list[tuple[str, Ticket]]:
    """Tickets, baselines and surrogates by name. A surrogate's name begins with its library's digest, to be unique."""
    entries = (*library.entries, *library.baseline_entries)
    rows = list(zip((entry.name for entry in entries), (*library.tickets, *library.baselines), strict=True))
    if outside is not None:
        rows += [(f"{outside.digest[:6]}/{name}", ticket) for name, ticket in all_members(outside)]
    return rows


def target_of(candidates: CandidateSet, system: Defense, seed: str) -> AttackTarget:
    """seed: of the attacker's own draws (set A). Scoring never sees them."""
    used = system.used
    draws = draws_of(system.policy, ATTACK_DRAWS, random.Random(seed)).to(candidates.device)
    members = tuple(candidates.members[index] for index in used)
    return AttackTarget(
        members, DrawSet(draws.rows[:, list(used)], draws.weights, draws.exhaustive), candidates.threads
    )


@torch.no_grad()
def logits_of(
    members: Sequence[Member], pixels: Tensor, device: torch.device, threads: WorkerThreads | None = None
) -> Tensor:
    """Of images on the uint8 grid: uint8 [N, 3, H, W] -> float32 [M, N, classes] on the CPU."""
    size = PASS_IMAGES if device.type == "cpu" else CUDA_PASS_IMAGES
    parts = [as_floats(part, device) for part in torch.split(pixels, size)]

    def run(member: Member) -> Tensor:
        return torch.cat([forward_no_grad(member, part) for part in parts]).cpu()

    mapper = threads if threads and device.type == "cpu" else WorkerThreads()
    return torch.stack(list(mapper.map(run, members)))


def as_floats(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]."""
    floats = pixels.to(device=device, dtype=torch.float32) / 255
    return floats.contiguous(memory_format=torch.channels_last)
