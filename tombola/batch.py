"""Classifies many pictures, on this machine or by a running service, into a table that an interruption cannot spoil."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from tombola.client import Client, ImageUnreadable, RequestRefused, StablePrediction, bounded_map
from tombola.results_file import ResultsFile, ResultsRejected, Row, check_path
from tombola.sources import Picture, Source, list_pictures, read_pictures

SOME_FAILED: Final = 1  # exit code: some pictures have no answer
REFUSED_IMAGE: Final = (400, 413, 415)  # statuses that say something of the picture


def classify_files(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Runs `tombola classify`; its exit code. Raises TombolaError for what ends the run, which can be resumed.

    settings: those that were given, of the engine on this machine.
    """
    if arguments.url:
        for name in sorted(settings.keys() & {"library", "device", "engine", "threads"}):
            raise ResultsRejected(f"--{name} and --url: a running service has its own")
    check_path(arguments.out)  # before the seconds that an engine takes
    sources = list_pictures(arguments.paths)
    if arguments.url:
        return classify_remotely(arguments, sources)
    return classify_locally(arguments, settings, sources)


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


def classify_locally(arguments: argparse.Namespace, settings: Mapping[str, Any], sources: Sequence[Source]) -> int:
    from service.observability.logs import configure_logging
    from tombola.classifier import BatchClassifier

    configure_logging("error")
    with BatchClassifier(draws=arguments.draws, **settings) as classifier:
        run = {"draws": arguments.draws, "library": classifier.digest}
        with ResultsFile(arguments.out, run) as results:
            left = unfinished(sources, results)
            with progress(results, len(left)) as show, closing(classifier.rows(read_pictures(left))) as rows:
                for row in rows:
                    show(row)
            return finish(results)


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
        text += f"; {agreement / answered:.1%} of {results.run['draws']} draws agree on average"
    print(text)
    return SOME_FAILED if errors else 0
