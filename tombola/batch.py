"""Classifies many pictures, on this machine or by a running service, into a table that an interruption cannot spoil."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from model_store.errors import ImageRejected, TombolaError
from tombola.client import Client, ImageUnreadable, RequestRefused, StablePrediction, bounded_amap, bounded_map
from tombola.results_file import ResultsFile, ResultsRejected, Row
from tombola.sources import Picture, Source, list_pictures, read_pictures

if TYPE_CHECKING:
    from model_store.images import Pixels
    from service.library_manager import LoadedLibrary
    from service.scheduling.batch import Probabilities
    from service.settings import Settings

SOME_FAILED: Final = 1  # exit code: some pictures have no answer
CHUNK_DRAWS: Final = 128  # draws that are submitted together
CHUNKS: Final = 4  # in flight: one decodes while others are computed
PATIENCE_S: Final = 3600.0  # of a chunk, which nobody waits for
REFUSED_IMAGE: Final = (400, 413, 415)  # statuses that say something of the picture
LOCAL_CLIENT: Final = "batch"


def classify_files(arguments: argparse.Namespace) -> int:
    """Runs `tombola classify`; its exit code. Raises TombolaError for what ends the run, which can be resumed."""
    if arguments.url:
        given = sorted(name for name in vars(arguments) if name in ("library", "device", "engine", "threads"))
        if given:
            raise ResultsRejected(f"--{given[0]} and --url: a running service has its own")
    sources = list_pictures(arguments.paths)
    if arguments.url:
        return classify_remotely(arguments, sources)
    return asyncio.run(classify_locally(arguments, sources))


# A running service


def classify_remotely(arguments: argparse.Namespace, sources: Sequence[Source]) -> int:
    key = read_key(arguments.key_file)
    options = {"key": key, "proxy": arguments.proxy, "timeout_s": arguments.timeout_s}
    with (
        Client(arguments.url, **options) as client,
        ResultsFile(arguments.out, {"draws": arguments.draws, "url": arguments.url}) as results,
    ):

        def classify(picture: Picture) -> Row:
            return ask(client, picture, arguments.draws)

        left = unfinished(sources, results)
        with progress(results, len(left)) as show:
            for row in bounded_map(classify, read_pictures(left), arguments.concurrency):
                show(row)
        return finish(results)


def read_key(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8", errors="replace").strip()


def ask(client: Client, picture: Picture, draws: int) -> Row:
    """Raises ClientError: what is no fault of this picture."""
    if picture.error:
        return Row(picture.name, error=picture.error)
    try:
        return row_of(picture.name, client.stable(picture.data, draws=draws))
    except ImageUnreadable as error:
        return Row(picture.name, error=str(error))
    except RequestRefused as error:
        if error.status not in REFUSED_IMAGE:
            raise
        return Row(picture.name, error=error.text)


def row_of(name: str, answer: StablePrediction) -> Row:
    commonest = answer.commonest
    shown = [
        each.probability
        for each in answer.predictions
        if each.label == commonest.label and each.probability is not None
    ]
    return Row(
        file=name,
        label=commonest.label,
        index=commonest.index,
        probability=round(fmean(shown), 6) if shown else None,
        agreement=round(answer.agreement, 6),
        draws=len(answer.predictions),
        library=commonest.library,
    )


# This machine


async def classify_locally(arguments: argparse.Namespace, sources: Sequence[Source]) -> int:
    """As the service does: its scheduler, its engine, a draw for each image from the system's entropy."""
    from service.library_manager import LibraryManager
    from service.observability.logs import configure_logging
    from service.observability.metrics import Metrics
    from service.settings import read_settings

    settings = read_settings({**vars(arguments), "log_level": "error"})
    configure_logging(settings.log_level)
    from model_store.library import open_library
    from service.library_source import local_library

    digest = open_library(local_library(settings)).digest
    with ResultsFile(arguments.out, {"draws": arguments.draws, "library": digest}) as results:
        manager = LibraryManager(settings, Metrics())
        manager.on_step = lambda _: None
        loaded = await manager.start()
        try:
            left = unfinished(sources, results)
            with progress(results, len(left)) as show:
                async for rows in answers(read_pictures(left), loaded, settings, arguments.draws):
                    for row in rows:
                        show(row)
        finally:
            manager.workers.stop()
        return finish(results)


def answers(
    pictures: Iterable[Picture], loaded: "LoadedLibrary", settings: "Settings", draws: int
) -> AsyncIterator[list[Row]]:
    async def classify(chunk: list[Picture]) -> list[Row]:
        return await classify_chunk(chunk, loaded, settings, draws)

    return bounded_amap(classify, chunks(pictures, max(1, CHUNK_DRAWS // draws)), CHUNKS)


def chunks(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    chunk: list[Picture] = []
    for picture in pictures:
        chunk.append(picture)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def classify_chunk(
    chunk: Sequence[Picture], loaded: "LoadedLibrary", settings: "Settings", draws: int
) -> list[Row]:
    """A row for each picture, in order. Raises TombolaError: what is no fault of these pictures."""
    import numpy as np

    from service.errors import ServiceError

    decoded = await asyncio.to_thread(decode_chunk, chunk, loaded, settings)
    rows = [row for row in decoded if not isinstance(row, Row)]
    if not rows:
        return [row for row in decoded if isinstance(row, Row)]
    images = np.repeat(np.stack(rows), draws, axis=0)
    loop = asyncio.get_running_loop()
    try:
        parts = [
            await loaded.scheduler.submit(part, client=LOCAL_CLIENT, deadline=loop.time() + PATIENCE_S)
            for part in np.split(images, range(settings.max_images, len(images), settings.max_images))
        ]
    except ServiceError as error:
        raise TombolaError(f"the engine gave no answer: {error.message}") from None
    by_picture = iter(np.concatenate(parts).reshape(len(rows), draws, -1))
    return [
        row if isinstance(row, Row) else local_row(picture.name, next(by_picture), loaded, settings)
        for picture, row in zip(chunk, decoded, strict=True)
    ]


def decode_chunk(chunk: Sequence[Picture], loaded: "LoadedLibrary", settings: "Settings") -> "list[Pixels | Row]":
    return [decode_picture(picture, loaded, settings) for picture in chunk]


def decode_picture(picture: Picture, loaded: "LoadedLibrary", settings: "Settings") -> "Pixels | Row":
    """uint8 [3, H, W], or the row of a picture that cannot be read."""
    from model_store.images import decode

    if picture.error:
        return Row(picture.name, error=picture.error)
    try:
        return decode(picture.data, loaded.library.input, max_pixels=settings.max_pixels).pixels
    except ImageRejected as error:
        return Row(picture.name, error=str(error))


def local_row(name: str, probabilities: "Probabilities", loaded: "LoadedLibrary", settings: "Settings") -> Row:
    """probabilities: [draws, classes]."""
    import numpy as np

    from service.web.inference import apply_output_detail

    labels = probabilities.argmax(axis=1)
    counts = np.bincount(labels)
    index = int(labels[counts[labels].argmax()])  # of equals the first draw's, as with a running service
    shown = apply_output_detail(probabilities, settings.output_detail)[labels == index, index]
    return Row(
        file=name,
        label=loaded.library.classes[index],
        index=index,
        probability=None if settings.output_detail == "label" else round(float(shown.mean()), 6),
        agreement=round(float(counts[index] / len(labels)), 6),
        draws=len(labels),
        library=loaded.library.digest,
    )


# Both


def unfinished(sources: Sequence[Source], results: ResultsFile) -> list[Source]:
    return [source for source in sources if source.name not in results.done]


@contextmanager
def progress(results: ResultsFile, left: int) -> Iterator[Callable[[Row], None]]:
    """Keeps each row, and shows a bar where a person is watching."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, done = Console(stderr=True), len(results.done)
    rate = TextColumn("{task.fields[rate]:.0f} pictures/s")
    with Progress(
        BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("pictures", total=done + left, completed=done, rate=0.0)
        started_at, count = time.monotonic(), 0

        def show(row: Row) -> None:
            nonlocal count
            results.add(row)
            count += 1
            bar.update(task, advance=1, rate=count / max(1e-3, time.monotonic() - started_at))

        yield show


def finish(results: ResultsFile) -> int:
    """Puts the table in its place, and prints the line worth quoting."""
    answered, errors, agreement = 0, 0, 0.0
    for row in results.rows():
        if row.error is None:
            answered += 1
            agreement += row.agreement or 0.0
        else:
            errors += 1
    results.finish()
    text = f"{results.path}: {answered:,} pictures classified, {errors:,} with an error"
    if answered and results.run["draws"] > 1:
        text += f"; {agreement / answered:.1%} of {results.run['draws']} draws agree in the mean"
    print(text)
    return SOME_FAILED if errors else 0
