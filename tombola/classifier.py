"""Classifies pictures in this process: the scheduler and the engine of `tombola serve`, without a server."""

import asyncio
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from model_store.errors import ImageRejected, TombolaError
from model_store.images import Pixels, decode
from service.errors import ServiceError
from service.library_manager import LibraryManager
from service.observability.metrics import Metrics
from service.scheduling.answers import Probabilities
from service.settings import Settings, SettingsRejected, read_settings
from service.web.inference import apply_output_detail
from tombola.client import bounded_map
from tombola.results_file import Row, batched, table_of
from tombola.sources import Picture

if TYPE_CHECKING:
    import pyarrow

BATCH: Final = 256  # images whose tickets are run together: nobody waits for one answer, and large batches cost less
CHUNK_DRAWS: Final = 2 * BATCH  # draws that are submitted together, or one picture's if they are more
CHUNKS: Final = 3  # decoded or computed at once; while one is decoded, the engine has two whole batches
PATIENCE_S: Final = 3600.0  # of a chunk, which nobody waits for
CLIENT: Final = "batch"
ALONE: Final = {"rate_images_per_s": 0.0, "latency_quantum_ms": 0.0, "max_queue_size": 1 << 30}
"""Settings that protect a service from its clients. One that waits for all of its answers has the engine to itself."""


class BatchClassifier:
    """A library and its engine, for many pictures. Close it, or use it in a `with`.

    digest: of the library.
    """

    def __init__(self, *, draws: int = 1, **settings: Any) -> None:
        """Opens the library and starts the engine, which takes seconds.

        Args:
          draws: random ensembles for each picture.
          settings: as of `tombola serve`, by name: library, threads, device, engine, output_detail.

        Raises:
          TombolaError: a setting or the library cannot be used.
        """
        self.draws = draws
        for name in settings.keys() - Settings.model_fields.keys():
            raise SettingsRejected(f"{name}: no such setting")
        self.settings = read_settings({"max_batch_size": BATCH, **settings, **ALONE})
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self.runner.get_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="classifier", daemon=True)
        self.thread.start()
        manager = LibraryManager(self.settings, Metrics())
        manager.on_step = lambda _: None
        self.workers = manager.workers
        try:
            self.loaded = asyncio.run_coroutine_threadsafe(manager.start(), self.loop).result()
        except BaseException:
            self.close()
            raise
        self.library = self.loaded.library
        self.digest = self.library.digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine; rows that are still being made end with an error. A second call does nothing."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.workers.stop)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.runner.close()

    def rows(self, pictures: Iterable[Picture]) -> Generator[Row]:
        """A row for each picture, in order. Pictures are read as far ahead as the engine needs.

        Raises:
          TombolaError: what is no fault of a picture.
        """
        room = self.settings.pixel_memory_bytes // (CHUNKS * self.library.input.numel)
        chunks = batched(iter(pictures), max(1, min(CHUNK_DRAWS, room) // self.draws))
        for rows in bounded_map(self.classify_chunk, chunks, CHUNKS):
            yield from rows

    def table(self, names: Sequence[str], files: Sequence[bytes]) -> "pyarrow.Table":
        """As rows, for encoded pictures in memory; the columns are those of `tombola classify`.

        Args:
          names: what the column `file` says, one a picture.
          files: encoded pictures.

        Returns:
          A table with one row for each picture, in order.

        Raises:
          TombolaError: what is no fault of a picture.
        """
        pictures = (Picture(name, data) for name, data in zip(names, files, strict=True))
        return table_of(list(self.rows(pictures)))

    # In the threads of bounded_map

    def classify_chunk(self, chunk: Sequence[Picture]) -> list[Row]:
        decoded = [self.decode(picture) for picture in chunk]
        pixels = [each for each in decoded if not isinstance(each, Row)]
        answers = iter(self.submit(pixels) if pixels else ())
        return [
            each if isinstance(each, Row) else self.row(picture.name, next(answers))
            for picture, each in zip(chunk, decoded, strict=True)
        ]

    def decode(self, picture: Picture) -> Pixels | Row:
        """uint8 [3, H, W], or the row of a picture that cannot be read."""
        if picture.error:
            return Row(picture.name, error=picture.error)
        try:
            return decode(picture.data, self.library.input, max_pixels=self.settings.max_pixels).pixels
        except ImageRejected as error:
            return Row(picture.name, error=str(error))

    def submit(self, pixels: Sequence[Pixels]) -> Probabilities:
        """uint8 [N, 3, H, W] -> [N, draws, classes]."""
        images = np.repeat(np.stack(pixels), self.draws, axis=0)
        try:
            answer = asyncio.run_coroutine_threadsafe(self.ask(images), self.loop).result()
        except ServiceError as error:
            raise TombolaError(f"the engine gave no answer: {error.message}") from None
        return answer.reshape(len(pixels), self.draws, -1)

    async def ask(self, images: Pixels) -> Probabilities:
        deadline = self.loop.time() + PATIENCE_S
        return await self.loaded.scheduler.submit(images, client=CLIENT, deadline=deadline)

    def row(self, name: str, probabilities: Probabilities) -> Row:
        """probabilities: [draws, classes]."""
        labels = probabilities.argmax(axis=1)
        counts = np.bincount(labels)
        index = int(labels[counts[labels].argmax()])  # of equals the first draw's, as with a running service
        detail = self.settings.output_detail
        shown = apply_output_detail(probabilities, detail)[labels == index, index]
        return Row(
            file=name,
            label=self.library.classes[index],
            index=index,
            probability=None if detail == "label" else round(float(shown.mean()), 6),
            agreement=round(float(counts[index] / len(labels)), 6),
            draws=len(labels),
            library=self.digest,
        )
