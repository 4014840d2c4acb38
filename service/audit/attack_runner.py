"""Runs an audit's attacks one by one. Each finished one is on disk, whole, before the next begins; a rerun resumes."""

import hashlib
import io
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from model_store.attacks import margin
from model_store.files import write_atomically
from model_store.image_sample import LabelledImages
from model_store.json_object import Json, digest_of
from model_store.library import Library
from model_store.processor import has_bfloat16
from service.audit import baselines
from service.audit.attacks import arc, autoattack, black_box, eot, simple
from service.audit.attacks.arc import ArcConfig
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.black_box import (
    BATCH_PROBES,
    TIMEOUT_S,
    HttpOracle,
    LocalOracle,
    QueryAttackConfig,
    snapshot_points,
)
from service.audit.attacks.eot import PgdConfig
from service.audit.attacks.losses import STAGED
from service.audit.attacks.simple import RandomCorners, SingleModelPgd, UniversalPerturbation
from service.audit.config import Audit, Step
from service.audit.cost import giga_multiply_adds, multiply_adds_of_subject
from service.audit.endpoint import PROBES, Endpoint, EndpointOracle
from service.audit.epsilons import Epsilons, epsilons_of
from service.audit.errors import AuditRejected
from service.audit.evaluation.draws import Defense, DrawSet, is_countable, scoring_draws
from service.audit.evaluation.members import (
    AttackTarget,
    CandidateSet,
    CraftingPrecision,
    Member,
    as_floats,
    candidates_of,
    target_of,
)
from service.audit.evaluation.pixel_grid import distance, quantize_to_uint8
from service.audit.evaluation.scoring import (
    CERTAIN,
    Scores,
    failure,
    pick_each,
    pointwise_worst,
    riskiest,
    score_exactly,
    scores,
)
from service.audit.events import Event, StepEvent
from service.audit.plan import endpoint_steps, plan
from service.audit.profiles import PROFILES, SHARED
from service.audit.rivals import Rivals
from service.audit.target import Target
from service.outbound import ProxyRejected, http_client
from service.settings import PrecisionChoice

AVERAGES: Final = 5  # answers to each probe of an endpoint whose answers are random
CODE: Final = 7  # of the attacks: a change that changes results makes stored ones stale
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """One finished attack. pixels: uint8 [n, 3, H, W], inside the threat model.  logits: float32 [M, n, classes].

    trace: curves by step (mean best risk and loss so far).  extra: what only this attack says.  passes: image-steps.
    """

    step: Step
    pixels: Tensor
    logits: Tensor
    trace: dict[str, list[float]]
    extra: Json
    passes: int
    seconds: float


@dataclass(frozen=True)
class WorstCases:
    """Images of earlier attacks. pixels: uint8 [n, 3, H, W].  logits: float32 [M, n, classes]."""

    pixels: Tensor
    logits: Tensor


@dataclass
class RawResult:
    """What an attack hands back, before it is put on the grid and scored."""

    images: Tensor
    trace: dict[str, list[float]] = field(default_factory=dict)
    extra: Json = field(default_factory=dict)
    passes: int = 0


@dataclass(frozen=True)
class RunOptions:
    """Where and beside what an audit runs. None of it is part of the request."""

    device: str = "cpu"
    threads: int = 1
    url: str | None = None  # of a service of the same library, for black-box attacks
    key: str | None = None  # of that service
    proxy: str | None = None  # on the way to it
    outside: Library | None = None  # the attacker's own, of the same classes, to transfer from
    precision: PrecisionChoice = "auto"  # of the service
    int8_images: Path | None = None  # what the service is calibrated on, if it runs in 8 bits


DEFAULT_OPTIONS: Final = RunOptions()


class AuditRun:
    """One audit of one library on one set of images, and its folder."""

    def __init__(
        self,
        folder: Path,
        audit: Audit,
        library: Library | Target,
        data: LabelledImages,
        options: RunOptions = DEFAULT_OPTIONS,
        *,
        emit: Emit = lambda _: None,
        candidates: CandidateSet | None = None,
        rivals: Rivals | None = None,
    ) -> None:
        """Plans an audit. Nothing is attacked yet.

        Args:
          candidates: other networks than the library's, to try the checks on.
          rivals: what the law is held against; by the library's claims if None.

        Raises:
          AuditRejected: the request does not fit the library or the data.
        """
        outside = options.outside
        self.folder = folder
        self.audit = audit
        self.epsilons = epsilons_of(audit, data.pixels[0].numel())
        self.library = library
        self.options = options
        self.data = data
        self.emit = emit
        self.candidates = candidates or candidates_of_subject(library, options, folder)
        self.crafting = crafting_candidates(audit, library, self.candidates)
        self.crafted_in = self.crafting.precision
        self.fingerprint = fingerprint(self.candidates.members)
        claims = baselines.strengths(library) or [0.0] * self.candidates.tickets
        self.rivals = rivals or baselines.claimed_rivals(self.candidates, claims)
        self.endpoint = library.endpoint if isinstance(library, Target) else None
        self.multiply_adds = multiply_adds_of_subject(library, outside)
        self.systems = (
            baselines.compared_systems(self.candidates, self.rivals, self.multiply_adds)
            if self.endpoint is None
            else [baselines.ours(self.candidates)]
        )
        thetas = PROFILES[audit.profile].thetas if self.endpoint is None else 0  # an endpoint's chance is its own
        self.known = baselines.known_draws(self.candidates, audit.seed, thetas)
        singles = [baselines.single(self.candidates, index) for index in range(len(self.candidates.members))]
        self.by_name = {system.name: system for system in (*singles, *self.systems, *self.known)}
        self.steps = (
            plan(audit, self.epsilons, self.candidates, self.systems, self.known)
            if self.endpoint is None
            else begin_endpoint(self.endpoint, audit, self.epsilons, len(data), folder)
        )
        self.costs = [self.cost(step) for step in self.steps]
        self.exact: dict[tuple[str, int, bool, bool], Scores] = {}
        self.keys: dict[Step, str] = {}
        self.parts: dict[int, str] = {}
        self.outcomes: list[Outcome] = []
        self.draws: dict[str, DrawSet] = {}
        self.scored: dict[tuple[str, int], tuple[Outcome, Scores]] = {}
        self.scored_clean: dict[str, Scores] = {}
        self.viewed: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.clean_logits = self.candidates.logits(data.pixels)
        if self.endpoint is not None:
            refuse_chance(self.endpoint, self.clean_logits, data.labels)

    def system(self, name: str) -> Defense:
        return self.by_name[name]

    def cost(self, step: Step) -> float:
        bfloat16 = self.crafted_in == "bfloat16"
        return giga_multiply_adds(step, self.system(step.system), self.multiply_adds, bfloat16=bfloat16)

    def target(self, name: str, *, exact: bool = False) -> AttackTarget:
        """A system as the attacker sees it. exact: in float32, as it is scored, however attacks are crafted."""
        candidates = self.candidates if exact else self.crafting
        return target_of(candidates, self.system(name), f"attacker {self.audit.seed} {name}")

    def scoring(self, system: Defense) -> DrawSet:
        if system.name not in self.draws:
            self.draws[system.name] = scoring_draws(system, self.audit.defender_seed)
        return self.draws[system.name]

    def scores(self, system: Defense, outcome: Outcome) -> Scores:
        key = (system.name, id(outcome))
        if key not in self.scored:
            labels = self.data.labels[: outcome.step.images]
            self.scored[key] = (outcome, scores(outcome.logits, labels, self.scoring(system)))
        return self.scored[key][1]

    def clean(self, system: Defense) -> Scores:
        if system.name not in self.scored_clean:
            self.scored_clean[system.name] = scores(self.clean_logits, self.data.labels, self.scoring(system))
        return self.scored_clean[system.name]

    # Running

    def attack(self) -> None:
        """All steps, from disk where they are there already."""
        done = 0.0
        began, paid = time.monotonic(), 0.0
        for step, cost in zip(self.steps, self.costs, strict=True):
            outcome, fresh = self.outcome(step)
            self.outcomes.append(outcome)
            done += cost
            paid += cost if fresh else 0.0
            rate = (time.monotonic() - began) / paid if paid else 0.0
            left = round(rate * (sum(self.costs) - done), 1)
            self.emit(self.progress(outcome, done / sum(self.costs), left))

    def progress(self, outcome: Outcome, share: float, left: float) -> StepEvent:
        """The event of one finished attack."""
        step = outcome.step
        right = float(self.scores(self.system(step.system), outcome).right.mean())
        ours = float(self.scores(self.systems[0], outcome).right.mean())
        return StepEvent(
            id=step.id,
            attack=step.name,
            system=step.system,
            epsilon=step.epsilon,
            images=step.images,
            accuracy=round(right, 4),
            tombola=round(ours, 4),
            share=round(share, 4),
            seconds_left=left,
        )

    def outcome(self, step: Step) -> tuple[Outcome, bool]:
        path = self.folder / "attacks" / f"{self.key_of(step)}.npz"
        if path.exists():
            return load(path, step), False
        began = time.monotonic()
        raw = self.run(step)
        pixels = quantize_to_uint8(raw.images, self.data.pixels[: step.images], step.norm, step.threat.epsilon)
        logits = self.logits_of(pixels, step)
        seconds = time.monotonic() - began
        outcome = Outcome(step, pixels, logits, raw.trace, raw.extra, raw.passes, seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump(outcome))
        return outcome, True

    def logits_of(self, pixels: Tensor, step: Step) -> Tensor:
        """float32 [M, n, classes]: of new images; those that an attack left as an earlier one made them have theirs."""
        if self.endpoint is not None:  # its answers may be random
            return self.candidates.logits(pixels)
        earlier = self.worst_cases(step) if builds_on_others(step) else WorstCases(self.data.pixels, self.clean_logits)
        logits = earlier.logits[:, : len(pixels)].clone()
        changed = (pixels != earlier.pixels[: len(pixels)]).flatten(1).any(dim=1).nonzero().flatten()
        if len(changed):
            logits[:, changed] = self.candidates.logits(pixels[changed])
        return logits

    def key_of(self, step: Step) -> str:
        """Changes with anything that changes the attack's result."""
        if step not in self.keys:
            warm = [self.key_of(other) for other in self.before(step)]
            service = self.options.url if isinstance(step.settings, QueryAttackConfig) else None
            part = self.part_digest(step.images)
            outside = self.options.outside and self.options.outside.digest
            about = [step.as_dict(), self.crafted_in]
            parts: list[Any] = [CODE, *about, self.library.digest, outside, part, self.audit.seed, warm, service]
            if self.rivals.images and step.system in (baselines.BEST, baselines.COST):
                parts.append(self.system(step.system).used)  # chosen by measuring, so that the library does not say it
            if self.candidates.rounded_on is not None:
                parts.append(self.candidates.rounded_on)
            self.keys[step] = digest_of(parts)[:32]
        return self.keys[step]

    def part_digest(self, images: int) -> str:
        if images not in self.parts:
            self.parts[images] = self.data.first(images).digest
        return self.parts[images]

    def before(self, step: Step) -> list[Step]:
        """The attacks of earlier stages whose images are inside this one's threat model."""
        if not builds_on_others(step):
            return []
        return [s for s in self.steps if s.stage < step.stage and s.epsilon <= step.epsilon]

    def run(self, step: Step) -> RawResult:
        target = self.target(step.system)
        part = self.data.first(step.images)
        images, labels = as_floats(part.pixels, self.candidates.device), part.labels.to(self.candidates.device)
        generator = torch.Generator().manual_seed(seed_of("attack", self.audit.seed, step.id, step.settings))
        known = [as_floats(self.worst_cases(step).pixels, self.candidates.device)] if builds_on_others(step) else []
        starts = known if step.warm else []
        match step.settings:
            case PgdConfig():
                result = eot.attack(target, images, labels, step.threat, step.settings, generator, starts, known)
                return from_pgd(result, step.settings)
            case ArcConfig():
                images_reached, _ = arc.attack(target, images, labels, step.threat, step.settings, generator, starts)
                return RawResult(images_reached)
            case AutoAttackConfig():
                seed = seed_of("library", self.audit.seed, step.id)
                return RawResult(autoattack.attack(target, images, labels, step.threat, step.settings, seed, known))
            case SingleModelPgd():
                member = target.members[0]
                return RawResult(
                    simple.attack_member(
                        member, images, labels, step.threat, step.settings, generator, threads=self.candidates.threads
                    )
                )
            case UniversalPerturbation():
                return RawResult(simple.universal(target, images, labels, step.threat, step.settings, generator))
            case RandomCorners():
                images_reached, _ = simple.corners(target, images, labels, step.threat, step.settings.count, generator)
                return RawResult(images_reached)
            case QueryAttackConfig():
                return self.query(step, step.settings, part)

    def worst_cases(self, step: Step) -> "WorstCases":
        """For each image the worst for the system, on the attacker's draws, of all attacks so far in reach."""
        best, reachable = self.data.pixels[: step.images].clone(), set(self.before(step))
        logits = self.clean_logits[:, : step.images].clone()
        lowest = self.attackers_view(step.system, self.clean_logits)[: step.images].clone()
        for outcome in self.outcomes:
            if outcome.step in reachable:
                n = min(step.images, outcome.step.images)
                right = self.attackers_view(step.system, outcome.logits)[:n]
                better = right < lowest[:n]
                best[:n][better] = outcome.pixels[:n][better]
                logits[:, :n][:, better] = outcome.logits[:, :n][:, better]
                lowest[:n] = torch.minimum(right, lowest[:n])
        return WorstCases(best, logits)

    def attackers_view(self, system: str, logits: Tensor) -> Tensor:
        """float64 [n]: p_i on the attacker's own draws, from an outcome's logits."""
        key = (system, id(logits))
        if key not in self.viewed:
            draws, used = self.target(system).draws, list(self.system(system).used)
            right = 1 - failure(logits[used], self.data.labels[: logits.shape[1]], draws)
            self.viewed[key] = (logits, right.cpu())
        return self.viewed[key][1]

    def query(self, step: Step, settings: QueryAttackConfig, part: LabelledImages) -> RawResult:
        seed, system = seed_of("query", self.audit.seed, step.id, settings), self.system(step.system)
        with self.oracle(step) as oracle:
            stops = black_box.attack(oracle, part.pixels, part.labels, step.threat, settings, seed)
        curve = [[stop.queries, float(self.rights(system, stop.pixels, part.labels).mean())] for stop in stops]
        where = "in-process" if isinstance(oracle, LocalOracle) else "service"
        extra: Json = {"oracle": where, "averages": settings.averages, "queries": oracle.queries, "curve": curve}
        if (nearest := stops[-1].unclipped) is not None:
            away = (nearest.int() - part.pixels.int()).flatten(1).abs().amax(dim=1).tolist()
            right = self.rights(system, nearest, part.labels).tolist()
            extra["nearest"] = [[size, round(share, 6)] for size, share in zip(away, right, strict=True)]
        return RawResult(stops[-1].pixels.float() / 255, extra=extra)

    def oracle(self, step: Step) -> HttpOracle | LocalOracle | EndpointOracle:
        if self.endpoint is not None:
            return EndpointOracle(self.endpoint)
        system = self.system(step.system)
        if self.options.url is not None and step.system == baselines.OURS:
            try:
                client = http_client(timeout_s=TIMEOUT_S, proxy=self.options.proxy)
            except ProxyRejected as error:
                raise AuditRejected(str(error)) from None
            return HttpOracle(self.options.url, len(self.library.classes), self.options.key, client=client)
        rng = random.Random(f"oracle {self.audit.defender_seed} {step.id} {step.settings}")
        return LocalOracle(
            self.candidates.members, system.policy, self.candidates.device, rng, threads=self.candidates.threads
        )

    def rights(self, system: Defense, pixels: Tensor, labels: Tensor) -> Tensor:
        """float64 [n]: p_i of any images on the grid, under the scoring draws."""
        logits = self.candidates.logits(pixels)
        return scores(logits, labels, self.scoring(system)).right

    # What the attacks add up to

    def robust(self, system: Defense, epsilon: float, images: int, *, shared: bool = False) -> Scores:
        """Each image under the worst of everything tried on it within epsilon (255ths), whatever system it was aimed
        at; the clean image is one of them. An attack on fewer images counts for those.

        shared: only of the attacks that all compared systems faced alike.
        """
        return pointwise_worst([tried.scores for tried in self.reached(system, epsilon, images, shared=shared)])

    def reported(self, system: Defense, images: int, *, shared: bool = False, clean: bool = False) -> Scores:
        """`robust` at the headline epsilon, or clean, as it is reported: what was chosen on the scoring draws is scored
        on every state of the law, where there are not too many to count."""
        key = (system.name, images, shared, clean)
        if key not in self.exact:
            epsilon = -1.0 if clean else self.epsilons.headline
            candidates = self.reached(system, epsilon, images, shared=shared)
            rights = torch.stack([tried.scores.right for tried in candidates])
            leads = torch.stack([self.leads(system, tried) for tried in candidates])
            pick = riskiest(rights, leads)
            worst = pick_each([tried.scores for tried in candidates], pick)
            if not self.scoring(system).exhaustive and is_countable(system.policy):
                worst = self.recount(system, candidates, worst, pick.tolist())
            self.exact[key] = worst
        return self.exact[key]

    def leads(self, system: Defense, tried: "Tried") -> Tensor:
        """float64 [images]: how far the right class leads in the mean over theta; infinite where nothing was tried."""
        drawn = self.scoring(system)
        shares = drawn.weights.to(drawn.rows) @ (drawn.rows / drawn.sizes[:, None])
        mean = torch.einsum("m,mnc->nc", shares.cpu(), tried.logits[:, : len(tried.scores.right)])
        lead = torch.full_like(tried.scores.right, math.inf)
        lead[: len(mean)] = -margin(mean, self.data.labels[: len(mean)]).double()
        return lead

    def recount(self, system: Defense, candidates: Sequence["Tried"], sampled: Scores, pick: Sequence[int]) -> Scores:
        """The chosen images on every state. Where no draw fails, each image made for this system is counted instead,
        since the draws cannot choose between them."""
        rows: list[tuple[int, int]] = []  # image, attempt
        for image, place in enumerate(pick):
            rows.append((image, place))
            if float(sampled.right[image]) >= CERTAIN:
                rows += [
                    (image, k) for k, tried in enumerate(candidates) if k != place and tried.aims_at(system, image)
                ]
        index = torch.tensor([image for image, _ in rows])
        chosen = torch.stack([candidates[place].logits[:, image] for image, place in rows], dim=1)
        counted = score_exactly(
            sampled.pick(index),
            chosen,
            self.data.labels[index],
            system.policy,
            self.candidates.threads,
            self.candidates.device,
        )
        right = torch.ones_like(sampled.right).scatter_reduce(0, index, counted.right, "amin")
        failed = sampled.any_wrong.clone()
        failed[index[counted.any_wrong]] = True
        return Scores(right, failed, sampled.by_size)

    def reached(self, system: Defense, epsilon: float, images: int, *, shared: bool = False) -> list["Tried"]:
        """What was tried within epsilon, the clean images first, with the logits behind each."""
        reached = [Tried(self.clean(system).pick(torch.arange(images)), self.clean_logits, None)]
        for outcome in self.outcomes:
            if outcome.step.epsilon <= epsilon and not (shared and not is_shared(outcome.step)):
                own = self.scores(system, outcome)
                count = min(images, outcome.step.images)
                scored = pad(own.pick(torch.arange(count)), images)
                reached.append(Tried(scored, outcome.logits, outcome.step))
        return reached


@dataclass(frozen=True)
class Tried:
    """Images that one attack made, under one system. step: None for the clean images."""

    scores: Scores  # padded to all images
    logits: Tensor
    step: Step | None

    def aims_at(self, system: Defense, image: int) -> bool:
        """Whether the attack made this image for this system."""
        return self.step is not None and self.step.system == system.name and image < self.step.images


def is_shared(step: Step) -> bool:
    """Whether an attack counts in comparisons. FGSM and PGD on one network are aimed at some systems and not at others:
    they would give those more attacks of their own."""
    return step.stage <= SHARED and not isinstance(step.settings, SingleModelPgd)


def builds_on_others(step: Step) -> bool:
    """Whether an attack starts from images of earlier stages, or leaves out those that they broke for good."""
    return step.stage > 0 and isinstance(step.settings, PgdConfig | ArcConfig | AutoAttackConfig)


def begin_endpoint(endpoint: Endpoint, audit: Audit, epsilons: Epsilons, images: int, folder: Path) -> list[Step]:
    """The attacks on an endpoint, whose ledger goes on in the folder. Raises AuditRejected: too small a budget."""
    averages = 1 if endpoint.repeats == 1 else AVERAGES
    steps = endpoint_steps(audit, epsilons, scores=endpoint.feedback == "score", averages=averages)
    endpoint.keep_in(folder)
    each = endpoint.repeats + sum(queries_an_image(step, endpoint.repeats) for step in steps)
    if (needed := images * each + 2 * PROBES) > endpoint.budget:
        fitting = (endpoint.budget - 2 * PROBES) // each
        smaller = f", or --images {fitting}" if fitting >= 2 else ""
        raise AuditRejected(
            f"budget {endpoint.budget}: this audit asks about up to {needed} images, {each} for each of {images}; "
            f"expected --budget {needed}{smaller}"
        )
    return steps


def queries_an_image(step: Step, repeats: int) -> int:
    """The most images that one attack and its scoring ask about, for each attacked one."""
    settings = step.settings
    if not isinstance(settings, QueryAttackConfig):
        return 0
    scored = len(snapshot_points(settings.probes)) + 1
    beyond = BATCH_PROBES if settings.method == "hopskipjump" else 0  # its last batch may go over its limit
    return settings.averages * (settings.probes + beyond) + repeats * scored


def refuse_chance(endpoint: Endpoint, logits: Tensor, labels: Tensor) -> None:
    """Raises AuditRejected where clean images are classified no better than by chance."""
    right = float((logits.argmax(dim=2) == labels).double().mean())
    if right <= 1 / len(endpoint.classes):
        raise AuditRejected(
            f"{endpoint.url}: {100 * right:.0f} % of {len(labels)} clean images are right, no more than by chance; "
            "are its classes in another order, or its pixels of another kind?"
        )


def crafting_precision(audit: Audit, subject: Library | Target, candidates: CandidateSet) -> CraftingPrecision:
    """What attacks compute in. A model that is no library may have operations that know float32 alone."""
    exact = candidates.device.type != "cpu" or candidates.rounded_on is not None  # 8 bits have a rounding of their own
    fast = PROFILES[audit.profile].bfloat16 and isinstance(subject, Library) and not exact
    return "bfloat16" if fast and has_bfloat16() else "float32"


def crafting_candidates(audit: Audit, subject: Library | Target, candidates: CandidateSet) -> CandidateSet:
    """The same networks as attacks are crafted on them."""
    return candidates.in_bfloat16() if crafting_precision(audit, subject, candidates) == "bfloat16" else candidates


def candidates_of_subject(subject: Library | Target, options: RunOptions, folder: Path) -> CandidateSet:
    """The networks of a library, as they are served in 8 bits or in float32, or of a model that is no library.

    Raises:
      AuditRejected: a surrogate library for a model that is none, or 8 bits on a machine that has them not.
    """
    if isinstance(subject, Target):
        if options.outside is not None:
            raise AuditRejected("a surrogate library goes with a library, not with a model of another kind")
        return subject.candidates(options.device, options.threads)
    if options.int8_images is not None:
        from service.audit.evaluation.rounding import rounded_candidates

        return rounded_candidates(subject, options.int8_images, folder, options.outside, options.threads)
    return candidates_of(subject, options.device, options.outside, threads=options.threads)


def pad(part: Scores, images: int) -> Scores:
    """Images that the attack left out count as right."""

    def longer(values: Tensor, fill: float) -> Tensor:
        return torch.cat([values, torch.full((images - len(values),), fill, dtype=values.dtype)])

    sizes = {n: longer(right, 1) for n, right in part.by_size.items()}
    return Scores(longer(part.right, 1), longer(part.any_wrong, 0), sizes)


def from_pgd(result: eot.AttackResult, settings: PgdConfig) -> RawResult:
    trace = {
        "accuracy": [round(1 - risk, 6) for risk in result.risks.mean(dim=1).tolist()],
        "loss": [round(loss, 6) for loss in result.losses.mean(dim=1).tolist()],
    }
    return RawResult(result.images, trace, {"converged": converged(result, settings)}, result.passes)


def converged(result: eot.AttackResult, settings: PgdConfig) -> float:
    """The share of images whose aim, rescaled to its own range, moved at most 0.05 over the last ten steps.

    The aim is the loss. Where the loss changes on the way it is the exact risk, which any change can be held against.
    """
    aim = result.risks if settings.loss in STAGED else result.losses
    low, high = aim.amin(dim=0), aim.amax(dim=0)
    tail = aim[-min(10, len(aim)) :]
    moved = (tail.amax(dim=0) - tail.amin(dim=0)) / (high - low).clamp_min(1e-12)
    certain = result.risk >= CERTAIN
    return round(float(((moved <= 0.05) | certain).double().mean()), 6)


def seed_of(*parts: Any) -> int:
    """A seed of its own for each use, so that attacks can be left out or added without moving the others."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# On disk


def dump(outcome: Outcome) -> bytes:
    about = {"trace": outcome.trace, "extra": outcome.extra, "passes": outcome.passes, "seconds": outcome.seconds}
    stream = io.BytesIO()
    np.savez(
        stream,
        pixels=outcome.pixels.numpy(),
        logits=outcome.logits.numpy(),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    return stream.getvalue()


def load(path: Path, step: Step) -> Outcome:
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(bytes(arrays["about"]))
        pixels, logits = torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["logits"])
    return Outcome(step, pixels, logits, about["trace"], about["extra"], about["passes"], about["seconds"])


def fingerprint(members: Sequence[Member]) -> str:
    """SHA-256 of all weights and statistics: nothing that an audit does may change it."""
    state = hashlib.sha256()
    for member in members:
        for name, tensor in sorted(member.network.state_dict().items()):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def largest_distance(outcome: Outcome, clean: Tensor) -> float:
    """The largest distance of an image from its clean one, in pixel units."""
    return float(distance(outcome.pixels, clean[: outcome.step.images], outcome.step.norm).max())
