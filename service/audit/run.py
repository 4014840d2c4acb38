"""One audit from images to report: attacks, checks, figures, files."""

import json
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from model_store.ensemble import combine, predictions
from model_store.library import Library
from model_store.ticket import write_atomically
from service.audit import baselines
from service.audit import labelled_data as sets
from service.audit.attack_runner import AuditRun, Json, Tell
from service.audit.checks.run import run_checks
from service.audit.config import Audit
from service.audit.errors import DataRejected
from service.audit.evaluation import candidates_of, cores_used, logits_of, scoring_draws
from service.audit.labelled_data import LabelledImages
from service.audit.profiles import check_giga_multiply_adds, estimated_seconds, images_of
from service.audit.report import html_report, plots, summary

REPORT: Final = "report.json"
PAGE: Final = "report.html"


def labelled(audit: Audit, library: Library, path: Path | None) -> LabelledImages:
    """The images to attack. Without a path, generated ones, for a smoke test alone."""
    if path is not None:
        return sets.read_data(path, library.classes, images_of(audit))
    if audit.profile != "smoke":
        raise DataRejected(f"profile {audit.profile} needs labelled images; only smoke can run on generated ones")
    return sets.generated(images_of(audit), audit.seed, lambda pixels: majority(library, pixels))


def majority(library: Library, pixels: Tensor) -> Tensor:
    """What the ensemble says most often, int64 [N]."""
    bench = candidates_of(library)
    draws = scoring_draws(baselines.ours(bench), 0)
    said = predictions(combine(logits_of(bench.members, pixels, bench.device), draws.rows))
    classes = len(library.classes)
    shares = torch.stack([draws.weights @ (said == label).double() for label in range(classes)])
    return shares.argmax(dim=0)


def run_audit(
    folder: Path,
    asked: Audit,
    library: Library,
    data: LabelledImages,
    *,
    device: str = "cpu",
    url: str | None = None,
    key: str | None = None,
    outside: Library | None = None,
    int8_images: Path | None = None,
    tell: Tell = lambda _: None,
) -> Json:
    """Runs what is not yet on disk, and writes the report. The same audit in the same folder goes on where it was.

    url, key: of a service of the same library, for black-box attacks.  outside: a library to transfer from.
    int8_images: what the service is calibrated on, if it runs in 8 bits.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    run = AuditRun(
        folder,
        asked,
        library,
        data,
        device=device,
        url=url,
        key=key,
        tell=tell,
        outside=outside,
        int8_images=int8_images,
    )
    tell({"event": "cost", **cost(run)})
    run.attack()
    checks = run_checks(run)
    report = summary.summary(run, checks, time.monotonic() - began)
    write_atomically(folder / REPORT, json.dumps(report, indent=1, allow_nan=False).encode())
    text = html_report.page(report, plots.all_figures(report), plots.examples(run))
    write_atomically(folder / PAGE, text.encode())
    return report


def cost(run: AuditRun) -> dict[str, Any]:
    giga = sum(run.costs) + check_giga_multiply_adds(run.audit, run.multiply_adds)
    seconds = estimated_seconds(giga, cores_used[0])
    return {"attacks": len(run.steps), "giga_multiply_adds": round(giga, 1), "seconds": round(seconds)}
