"""One audit from images to report: attacks, checks, figures, files."""

import time
from pathlib import Path

import torch
from torch import Tensor

from model_store.arithmetic import use_reproducible_arithmetic
from model_store.attacks import ThreatModel
from model_store.ensemble import combine, predictions
from model_store.files import write_atomically
from model_store.image_sample import LabelledImages
from model_store.json_object import digest_of
from model_store.library import Library
from service.audit import baselines
from service.audit import labelled_data as sets
from service.audit.attack_runner import (
    CODE,
    DEFAULT_OPTIONS,
    AuditRun,
    Emit,
    RunOptions,
    candidates_of_subject,
    crafting_candidates,
    seed_of,
)
from service.audit.checks.run import run_checks
from service.audit.config import Audit
from service.audit.cost import (
    check_giga_multiply_adds,
    estimated_seconds,
    multiply_adds_of_subject,
    rivals_giga_multiply_adds,
)
from service.audit.epsilons import epsilons_of
from service.audit.errors import DataRejected
from service.audit.evaluation.draws import scoring_draws
from service.audit.evaluation.members import CandidateSet, candidates_of
from service.audit.events import CostEvent, RivalsEvent
from service.audit.explore import INDEX, write_index
from service.audit.plan import attacked_epsilons, images_of
from service.audit.profiles import PROFILES
from service.audit.report import html_report, plots, summary
from service.audit.report.model import PAGE, REPORT, Report
from service.audit.rivals import Rivals, choose_rivals, rival_size, store_rivals, stored_rivals
from service.audit.target import Target


def load_images(
    audit: Audit, library: Library | Target, path: Path | None, threads: int = 1, *, skip_damaged: bool = False
) -> LabelledImages:
    """The images to attack. Without a path, generated ones, for a smoke test alone."""
    if path is not None:
        return sets.read_data(path, library.classes, images_of(audit), library.input, skip_damaged=skip_damaged)
    if isinstance(library, Target):
        raise DataRejected("a model of your own needs labelled images: only a library can label generated ones")
    if audit.profile != "smoke":
        raise DataRejected(f"profile {audit.profile} needs labelled images; only smoke can run on generated ones")
    count, spec = images_of(audit), library.input
    return sets.generated(count, audit.seed, spec, lambda pixels: majority(library, pixels, threads))


def load_held_out(
    audit: Audit, library: Library | Target, path: Path | None, *, skip_damaged: bool = False
) -> LabelledImages | None:
    """The images to choose rivals on, or None: the profile wants none, or the data set has no training images."""
    count = PROFILES[audit.profile].rival_images
    if path is None or not count or (isinstance(library, Target) and library.endpoint is not None):
        return None
    return sets.read_held_out(path, library.classes, count, library.input, skip_damaged=skip_damaged)


def majority(library: Library, pixels: Tensor, threads: int = 1) -> Tensor:
    """What the ensemble says most often, int64 [N]."""
    candidates = candidates_of(library, threads=threads)
    draws = scoring_draws(baselines.ours(candidates), 0)
    answers = predictions(combine(candidates.logits(pixels), draws.rows))
    classes = len(library.classes)
    shares = torch.stack([draws.weights @ (answers == label).double() for label in range(classes)])
    return shares.argmax(dim=0)


def run_audit(
    folder: Path,
    audit: Audit,
    library: Library | Target,
    data: LabelledImages,
    options: RunOptions = DEFAULT_OPTIONS,
    *,
    emit: Emit = lambda _: None,
    floor: float | None = None,
    held_out: LabelledImages | None = None,
) -> Report:
    """Runs what is not yet on disk, and writes the report. The same audit in the same folder goes on where it was.

    floor: the least lower bound of robust accuracy that is enough, for the page alone.
    held_out: training images to choose rivals on; None for the library's claims.
    """
    use_reproducible_arithmetic()
    torch.set_num_threads(1)  # members run in threads of their own: results do not depend on the number of cores
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    candidates = candidates_of_subject(library, options, folder)
    rivals = rivals_on(held_out, folder, audit, library, candidates, emit) if held_out is not None else None
    run = AuditRun(folder, audit, library, data, options, emit=emit, candidates=candidates, rivals=rivals)
    emit(cost_event(run))
    run.attack()
    checks = run_checks(run)
    report = summary.summarize(run, checks, time.monotonic() - began)
    write_index(run, folder / INDEX)
    write_atomically(folder / REPORT, report.as_bytes())
    text = html_report.render(report, plots.all_figures(report), plots.choose_examples(run), floor)
    write_atomically(folder / PAGE, text.encode())
    return report


def rivals_on(
    data: LabelledImages, folder: Path, audit: Audit, library: Library | Target, candidates: CandidateSet, emit: Emit
) -> Rivals | None:
    """The rivals that this audit chose before, or chooses now. None of a single network, which has none."""
    if candidates.tickets < 2:
        return None
    crafting = crafting_candidates(audit, library, candidates)
    headline = epsilons_of(audit, data.pixels[0].numel()).headline
    parts = [
        CODE,
        library.digest,
        data.digest,
        audit.norm,
        headline,
        audit.seed,
        crafting.precision,
        candidates.rounded_on,
    ]
    key = digest_of(parts)
    if (stored := stored_rivals(folder, key)) is not None:
        return stored
    each, size = multiply_adds_of_subject(library)[: candidates.tickets], rival_size(candidates)
    giga = rivals_giga_multiply_adds(len(data), each, size, bfloat16=crafting.precision == "bfloat16")
    emit(RivalsEvent(images=len(data), seconds=round(estimated_seconds(giga, candidates.threads.count))))
    threat = ThreatModel(audit.norm, headline / 255)
    rivals = choose_rivals(candidates, crafting, data, threat, seed_of("rivals", audit.seed))
    store_rivals(folder, key, rivals)
    return rivals


def cost_event(run: AuditRun) -> CostEvent:
    bfloat16 = run.crafted_in == "bfloat16"
    giga = sum(run.costs) + check_giga_multiply_adds(run.audit, run.multiply_adds, bfloat16=bfloat16)
    seconds = estimated_seconds(giga, run.candidates.threads.count)
    return CostEvent(
        attacks=len(run.steps),
        giga_multiply_adds=round(giga, 1),
        seconds=round(seconds),
        epsilons=attacked_epsilons(run.steps, run.epsilons),
        epsilons_about=run.epsilons.about,
    )
