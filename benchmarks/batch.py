"""How much of the engine `tombola classify` uses: a folder of pictures to a finished table, beside the engine alone."""

import io
import os
import random
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from model_store.images import decode
from model_store.policy import draw_theta
from service.benchmarks.command import in_windows
from service.cpu import cpu_s, process_tree
from service.settings import Settings
from tombola.classifier import BatchClassifier
from tombola.results_file import ResultsFile
from tombola.sources import Source, list_pictures, read_pictures

PICTURES: Final = 10_000
ROUNDS: Final = 5
WARM: Final = 256  # pictures that both see before
Figures = dict[str, Any]


def measure_batch(data: Path, state: Path, library: Path | None) -> Figures:
    """Parts of the folder, and the engine alone on as many draws, take turns: a slow minute meets both.

    data: zip of pictures, which are written as PNG first.
    """
    folder = state / "pictures"
    write_pngs(data, folder)
    chosen: dict[str, Any] = {} if library is None else {"library": library}
    with (
        BatchClassifier(state_dir=state, **chosen) as classifier,
        ResultsFile(state / "results.jsonl", {"draws": 1, "library": classifier.digest}) as results,
    ):
        sources = list_pictures([str(folder)])
        size = -(-len(sources) // ROUNDS)
        parts = [sources[start : start + size] for start in range(0, len(sources), size)]
        run_engine(classifier, sources[:WARM], WARM)
        for row in classifier.rows(read_pictures(sources[:WARM])):
            assert row.error is None, row.error
        rounds = [measure_round(classifier, part, results) for part in parts]

        def list_and_finish() -> None:
            list_pictures([str(folder)])
            results.finish()

        extra_s, extra_cpu_s = measured(list_and_finish)
    extra = {"s": round(extra_s, 2), "cpu_ms": round(1000 * extra_cpu_s / len(sources), 3)}
    note = classifier.loaded.engine.note
    batches = [Settings().max_batch_size, classifier.settings.max_batch_size]
    return {"data": data.name, "pictures": len(sources), "rounds": rounds, "extra": extra, "note": note} | {
        "batches": batches
    }


def write_pngs(data: Path, folder: Path) -> None:
    """PICTURES of a zip as PNG files, spread over it."""
    folder.mkdir()
    with zipfile.ZipFile(data) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".png")))
        for number, name in enumerate(names[:: max(1, len(names) // PICTURES)][:PICTURES]):
            Image.open(io.BytesIO(archive.read(name))).save(folder / f"{number:05}.png")


def measure_round(classifier: BatchClassifier, part: Sequence[Source], results: ResultsFile) -> Figures:
    """The engine alone in the service's batches and in the command's, then the command."""
    served = run_engine(classifier, part, Settings().max_batch_size)
    large = run_engine(classifier, part, classifier.settings.max_batch_size)
    command = measured(lambda: keep_rows(classifier, part, results))
    return {
        name: {"images_per_s": round(len(part) / seconds, 2), "cpu_ms": round(1000 * cpu / len(part), 3)}
        for name, (seconds, cpu) in {"served": served, "engine": large, "command": command}.items()
    }


def keep_rows(classifier: BatchClassifier, part: Sequence[Source], results: ResultsFile) -> None:
    """As the command does."""
    for row in classifier.rows(read_pictures(part)):
        results.add(row)


def run_engine(classifier: BatchClassifier, part: Sequence[Source], size: int) -> tuple[float, float]:
    """The engine for these pictures' pixels on recorded draws: seconds, and seconds of processor time."""
    spec, rng = classifier.library.input, random.Random(0)
    images = np.stack([decode(picture.data, spec).pixels for picture in read_pictures(part)])
    thetas = [draw_theta(classifier.library.policy, rng) for _ in part]
    return measured(lambda: in_windows(classifier.loaded.engine, images, thetas, size))


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and seconds of processor time of this process and the engine's."""
    tree = process_tree(os.getpid())
    used, begun = sum(map(cpu_s, tree)), time.perf_counter()
    work()
    return time.perf_counter() - begun, sum(map(cpu_s, tree)) - used
