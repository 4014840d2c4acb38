"""Which law of theta is worth its price, from the attack images that an audit has stored.

Laws are chosen on the images of another audit, or on one half of these, and reported on the rest. The law chosen is
attacked once more, because its images were made against another.
"""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model_store.attacks import Norm, ThreatModel
from model_store.files import write_atomically
from service.audit.errors import AuditError
from service.audit.evaluation.threads import WorkerThreads
from service.audit.laws import Game, Kept, Law, family, keep, menu, prove, rights
from service.audit.report.model import Interval, read_report
from service.audit.stats import bootstrap, paired_difference

if TYPE_CHECKING:
    from service.audit.attack_runner import AuditRun
    from service.audit.report.model import Report

INDEX: Final = "explore.npz"
SERVED: Final = "served"
CHOSEN: Final = "best law"
TRIES: Final = 10
LEAST_WEIGHT: Final = 1e-4  # of a choice in the law that is chosen; smaller ones are noise of the solver
LEAST_IMAGES: Final = 4


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class LawFigures(Part):
    """One law on the half of the images that chose none."""

    name: str
    cost: float = Field(description="multiply-adds of an image, as a share of the served law's")
    robust: Interval
    after_ten: float
    for_ever: float = Field(description="images that no draw misreads under any stored attack")
    frontier: bool = Field(description="whether no cheaper law of the family was more robust where laws were chosen")


class Exploration(Part):
    """What the stored attack images say of other laws."""

    report: str = Field(description="digest of the audit's report")
    epsilon: float = Field(description="in 255ths")
    attacks: int
    chosen_on: int = Field(description="images")
    reported_on: int
    laws: list[LawFigures]
    draws: int = Field(description="that the bound covers: all of at most two tickets of each structure, or a menu")
    value: float = Field(description="of the best law, on the images that chose it")
    bound: float = Field(description="what no law over these draws exceeds on the reported images, by duality")
    gain: Interval = Field(description="the chosen law less the served one, on the reported images")
    members: list[tuple[float, list[str]]] = Field(description="the chosen law: probability, tickets")
    confirmed: Interval | None = Field(description="the chosen law after an attack on itself; None without the library")


# What an audit leaves for it


def write_index(run: "AuditRun", path: Path) -> None:
    """The images, their labels, and which stored attacks lie within the headline epsilon and cover them all."""
    stored = [o for o in run.outcomes if o.step.epsilon <= run.epsilons.headline and o.step.images == len(run.data)]
    about = {
        "keys": [run.key_of(outcome.step) for outcome in stored],
        "tickets": list(run.candidates.names[: run.candidates.tickets]),
        "structures": list(run.candidates.structures[: run.candidates.tickets]),
        "multiply_adds": [int(each) for each in run.multiply_adds[: run.candidates.tickets]],
    }
    stream = io.BytesIO()
    np.savez(
        stream,
        pixels=run.data.pixels.numpy(),
        labels=run.data.labels.numpy(),
        clean=run.clean_logits.numpy(),
        served=run.scoring(run.systems[0]).rows[:, : run.candidates.tickets].numpy(),
        weights=run.scoring(run.systems[0]).weights.numpy(),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    write_atomically(path, stream.getvalue())


class Stored:
    """An audit's folder: its report, and the logits of all its attack images. Raises AuditError."""

    def __init__(self, folder: Path) -> None:
        self.report: Report = read_report(folder / "report.json")
        path = folder / INDEX
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about: dict[str, Any] = json.loads(bytes(arrays["about"]))
                self.pixels, labels = torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["labels"])
                clean = torch.from_numpy(arrays["clean"])
                self.served = Law(SERVED, torch.from_numpy(arrays["served"]), torch.from_numpy(arrays["weights"]))
            self.names = tuple(about["tickets"])
            made = [load_attack(folder / "attacks" / f"{key}.npz") for key in about["keys"]]
        except (OSError, ValueError, KeyError) as error:
            raise AuditError(f"{path}: cannot be read ({error!s:.120}); expected the folder of a whole audit") from None
        if len(self.names) < 2 or len(labels) < LEAST_IMAGES or not made:
            raise AuditError(
                f"{folder}: {len(self.names)} tickets, {len(labels)} images, {len(made)} attacks; "
                f"expected at least 2, {LEAST_IMAGES} and 1"
            )
        count = len(self.names)
        self.attacked = torch.stack([self.pixels, *(pixels for pixels, _ in made)])
        logits = torch.stack([clean[:count], *(logits[:count] for _, logits in made)])
        self.game = Game(logits, labels, tuple(about["multiply_adds"]), tuple(about["structures"]))


def load_attack(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, H, W] and logits float32 [M, N, classes]."""
    with np.load(path, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["pixels"]), torch.from_numpy(arrays["logits"])


# Exploring


def explore(folder: Path, library: Path | None = None, threads: int = 1, selection: Path | None = None) -> Exploration:
    """Holds laws against an audit's stored attacks.

    Args:
      folder: of a finished audit.
      selection: of another audit of the same library, on held-out training images, whose images choose the law; None
        lets every other image of the first choose, and reports the rest.
      library: the audited library, for the confirming attack; None leaves it out.
      threads: cores to use.

    Raises:
      AuditError: the folder is not that of a whole audit, or the library is another.
    """
    stored = Stored(folder)
    served_cost = stored.served.cost(stored.game.multiply_adds)
    index, workers = torch.arange(len(stored.game.labels)), WorkerThreads(threads)
    if selection is None:
        choosing, reported = stored.game.pick(index[0::2]), index[1::2]
    else:
        choosing, reported = held_out(stored, selection), index
    game, reporting = stored.game, stored.game.pick(reported)
    seed = stored.report.audit.seed
    choices = menu(game.structures, seed)
    proof = prove(choosing, choices, workers)
    best = proof.solved
    shares = torch.from_numpy(np.where(best.weights >= LEAST_WEIGHT, best.weights, 0))
    chosen = Law(CHOSEN, proof.choices[shares > 0], shares[shares > 0] / shares.sum())
    laws = [*family(game.structures, seed), chosen]
    first = [(law.cost(game.multiply_adds), keep(choosing, law).after(1)) for law in laws]
    there = keep(reporting, stored.served)
    kept = {law.name: keep(reporting, law) for law in laws}
    rows = [figures_of(stored.served, there, 1.0, frontier=False)]
    for law, (cost, robust) in zip(laws, first, strict=True):
        ahead = not any(other <= cost and better > robust for other, better in first)
        rows.append(figures_of(law, kept[law.name], cost / served_cost, frontier=ahead))
    gain = paired_difference(kept[CHOSEN].right.numpy(), there.right.numpy())
    confirmed = None
    if library is not None:
        confirmed = as_interval(confirm(stored, chosen, reported, library, threads).right)
    proved = prove(reporting, torch.unique(torch.cat([choices, proof.choices]), dim=0), workers)
    return Exploration(
        report=stored.report.digest,
        epsilon=stored.report.audit.headline,
        attacks=len(game.logits) - 1,
        chosen_on=len(choosing.labels),
        reported_on=len(reporting.labels),
        laws=rows,
        draws=proved.draws,
        value=round(best.value, 6),
        bound=round(proved.bound, 6),
        gain=Interval(value=gain.value, low=gain.low, high=gain.high),
        members=[
            (round(float(p), 4), [stored.names[j] for j in row.nonzero().flatten().tolist()])
            for p, row in sorted(zip(chosen.weights, chosen.rows, strict=True), key=lambda pair: -float(pair[0]))
        ],
        confirmed=confirmed,
    )


def held_out(stored: Stored, selection: Path) -> Game:
    """The attack images of another audit of the same library. Raises AuditError: another library, or images in both."""
    other = Stored(selection)
    audited, theirs = (each.report.library.digest for each in (stored, other))
    if audited != theirs:
        raise AuditError(f"{selection}: library {theirs[:12]}; expected that of the first audit, {audited[:12]}")
    if shared := set(stored.report.data.ids) & set(other.report.data.ids):
        raise AuditError(f"{selection}: {len(shared)} of its images are in both audits; expected held-out ones")
    return other.game


def figures_of(law: Law, kept: Kept, cost: float, *, frontier: bool) -> LawFigures:
    return LawFigures(
        name=law.name,
        cost=round(cost, 4),
        robust=as_interval(kept.right),
        after_ten=round(kept.after(TRIES), 6),
        for_ever=round(kept.for_ever, 6),
        frontier=frontier,
    )


def as_interval(right: Tensor) -> Interval:
    value, low, high = bootstrap(right.numpy())
    return Interval(value=round(value, 6), low=round(low, 6), high=round(high, 6))


def confirm(stored: Stored, law: Law, index: Tensor, library: Path, threads: int) -> Kept:
    """The chosen law under the stored attacks and one made against itself: two starts on the hinge, then the risk."""
    from model_store.library import open_library
    from service.audit.attacks import eot
    from service.audit.evaluation.draws import DrawSet
    from service.audit.evaluation.members import AttackTarget, as_floats, candidates_of
    from service.audit.evaluation.pixel_grid import quantize_to_uint8
    from service.audit.profiles import apgd, refine

    opened = open_library(library)
    if opened.digest != stored.report.library.digest:
        raise AuditError(f"{library}: library {opened.digest[:12]}; audited was {stored.report.library.digest[:12]}")
    candidates = candidates_of(opened, threads=threads)
    members = candidates.members[: candidates.tickets]
    draws = DrawSet(law.rows, law.weights, exhaustive=True)
    target, game = AttackTarget(members, draws, WorkerThreads(threads)), stored.game.pick(index)
    norm: Norm = "l2" if stored.report.audit.norm == "l2" else "linf"
    threat = ThreatModel(norm, stored.report.audit.headline / 255)
    right = torch.einsum("r,ran->an", law.weights, rights(game.logits, game.labels, law.rows).double())
    riskiest = stored.attacked[right.argmin(dim=0), index]
    clean, generator = as_floats(stored.pixels[index]), torch.Generator().manual_seed(stored.report.audit.seed)
    cold = eot.attack(target, clean, game.labels, threat, apgd("hinge", 20, restarts=2), generator).images
    starts = [as_floats(riskiest), cold]
    reached = eot.attack(target, clean, game.labels, threat, refine(30), generator, starts).images
    pixels = quantize_to_uint8(reached, stored.pixels[index], threat.norm, threat.epsilon)
    fresh = candidates.logits(pixels)[: candidates.tickets]
    widened = Game(torch.cat([game.logits, fresh[None]]), game.labels, game.multiply_adds, game.structures)
    return keep(widened, law)
