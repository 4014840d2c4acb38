"""An audit from Python: one call, from a library or a model of any kind to its report."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike

from model_store.image_sample import LabelledImages
from model_store.input_spec import InputSpec
from model_store.library import Library, open_library
from service.audit.attack_runner import RunOptions
from service.audit.config import read_audit
from service.audit.errors import DataRejected
from service.audit.events import Event
from service.audit.plan import images_of
from service.audit.report.model import Report
from service.audit.run import load_held_out, load_images, run_audit
from service.audit.target import Target
from service.cpu import usable_cores

ARRAYS: Final = "arrays"


def audit(
    target: Target | Library | Path | str | None = None,
    *,
    data: Path | str | tuple[ArrayLike, ArrayLike] | None = None,
    profile: str = "standard",
    epsilons: Sequence[float] = (),
    norm: str = "linf",
    attacks: Sequence[str] = (),
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    out: Path | str | None = None,
    emit: Callable[[Event], None] = lambda _: None,
) -> Report:
    """Attacks a model, checks the attacks, and reports what was left.

    Args:
      target: a model, a library or its folder; the embedded library if None.
      data: a folder, zip or npz of labelled images; or images, uint8 [N, H, W, 3] or [N, 3, H, W], and labels [N].
      profile: which attacks run, on how many images.
      epsilons: in 255ths; those of the norm and the size of pictures if empty.
      norm: "linf" or "l2".
      attacks: only these of the profile's attacks.
      images: how many; the profile's number if None.
      seed: of the attacker.
      device: of torch.
      threads: cores to use; those of this container if None.
      out: a folder for the report, where an interrupted audit goes on; a temporary one if None.
      emit: called with each event.

    Returns:
      The report. `robust` is its robust accuracy with a 95 % interval; `verdict` says whether to believe it.

    Raises:
      AuditError: the request, the data or the model cannot be used.
      StoreError: the library cannot be opened.
    """
    subject = target if isinstance(target, Target | Library) else open_library(None if target is None else Path(target))
    fields: dict[str, Any] = {"profile": profile, "norm": norm, "images": images, "seed": seed}
    fields |= {"epsilons": list(epsilons) or None, "attacks": list(attacks) or None}
    path = Path(data) if isinstance(data, str | Path) else None
    request = read_audit({**fields, "data": path and path.name})
    cores = threads or usable_cores()
    held_out = load_held_out(request, subject, path)
    if isinstance(data, tuple):
        labelled = from_arrays(*data, subject.classes, subject.input)
        labelled = labelled.first(images_of(request))
        request = replace(request, images=len(labelled))
    else:
        labelled = load_images(request, subject, path, cores)
    with tempfile.TemporaryDirectory(prefix="tombola-audit-") as temporary:
        folder = Path(out) if out is not None else Path(temporary)
        options = RunOptions(device=device, threads=cores)
        return run_audit(folder, request, subject, labelled, options, emit=emit, held_out=held_out)


def from_arrays(images: ArrayLike, labels: ArrayLike, classes: Sequence[str], spec: InputSpec) -> LabelledImages:
    """Images in memory as a data set. Raises DataRejected."""
    pixels, truth = np.asarray(images), np.asarray(labels).reshape(-1)
    if pixels.ndim == 4 and pixels.shape[3] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.uint8:
        given = np.asarray(images)
        raise DataRejected(f"images: {given.dtype} {list(given.shape)}; expected uint8 [N, H, W, 3] or [N, 3, H, W]")
    if len(truth) != len(pixels) or not np.issubdtype(truth.dtype, np.integer) or len(truth) == 0:
        raise DataRejected(f"labels: {truth.dtype} [{len(truth)}]; expected {len(pixels)} whole numbers, at least one")
    if truth.min() < 0 or truth.max() >= len(classes):
        raise DataRejected(f"labels from {truth.min()} to {truth.max()}; expected 0 to {len(classes) - 1}")
    if pixels.shape[2:] != spec.size:
        height, width = pixels.shape[2:]
        raise DataRejected(f"images of {height}x{width}; the model takes {spec.height}x{spec.width}: resize them")
    return LabelledImages(
        ARRAYS,
        "arrays handed over in Python",
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.from_numpy(truth.astype(np.int64)),
        tuple(f"{ARRAYS}/{index}" for index in range(len(truth))),
        held_out=False,
    )
