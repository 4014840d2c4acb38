"""python -m training: plan, search, scratch, baseline, status, export, table, compare, figures, fetch."""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from model_store.errors import StoreError, os_error_text
from model_store.library import Library, open_library
from model_store.manifest import Entry
from model_store.structures import STRUCTURES
from training import export
from training import jobs as job_store
from training.data import Split, read_split
from training.diversity import differences, summary
from training.errors import TrainingError
from training.executors.ray import run_ray
from training.jobs import Job, Status
from training.recipes import DENSITIES, PRESETS, SHAPE, TrainConfig, baseline, continued_from, mask_phase

COUNTS = ("steps", "batch", "attack_steps", *SHAPE)  # numbers of a recipe that are at least 1; the others may be 0
EXAMPLES = """\
a library from nothing, on two cores (hours; interrupt it whenever you like, it goes on where it was):
  python -m training fetch data
  python -m training search --data data --state run
  python -m training status --state run
  python -m training export --state run my-library

an hour more for two tickets of a library that exists:
  python -m training search --data data --state more --from my-library --only resnet18-07 resnet34-07 --epochs 2
  python -m training export --state more --base my-library my-library

the pure scratch tickets (masks alone) that its searches went through, in minutes:
  python -m training scratch my-library --data data --state scratch
  python -m training export --state scratch my-scratch-library
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except (TrainingError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {os_error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m training",
        description="Searches adversarially robust lottery tickets and exports them as a library.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(command=command)
        return sub

    add_recipe_options(add("plan", show_plan, "Show the jobs of a library and what each should cost."))
    for name, command, about in (
        ("search", run_search, "Search tickets, in processes of one thread each; goes on where it was interrupted."),
        ("baseline", run_baseline, "Train the dense comparison networks with the same adversary, data and cost."),
    ):
        sub = add(name, command, about)
        add_recipe_options(sub)
        add_run_options(sub)
        add_start_options(sub)
    sub = add(
        "scratch",
        run_scratch,
        "Make the pure scratch tickets that a library's own were trained from: the same masks over the frozen weights "
        "that they were found for. Nothing is searched again.",
    )
    sub.add_argument("library", type=Path, help="a library of tickets whose weights were trained")
    sub.set_defaults(preset="compact")  # whose cores a task asks of a cluster
    add_only(sub)
    add_run_options(sub)
    sub = add("status", show_status, "Show what is done, its accuracy, what remains and how long it should take.")
    sub.add_argument("--state", type=Path, required=True, help="the folder of the search")
    sub = add("figures", draw_figures, "Draw the searches' loss and accuracy against time.")
    sub.add_argument("--state", type=Path, required=True, help="the folder of the search")
    sub.add_argument("--out", type=Path, default=Path("searches.svg"), help=".svg or .png (default: %(default)s)")
    sub = add("export", run_export, "Write the finished tickets and their claims as a library (a partial one too).")
    sub.add_argument("library", type=Path, help="the folder to write; an existing library there is replaced atomically")
    sub.add_argument("--state", type=Path, action="append", default=[], help="folder of a search; may be repeated")
    sub.add_argument("--base", type=Path, help="a library whose tickets stay unless a finished job has a better one")
    sub = add("table", show_table, "Print the paper's Table 1 from a library's claims, in Markdown.")
    sub.add_argument("library", type=Path, nargs="?", help="default: the embedded library")
    sub.add_argument("--into", type=Path, metavar="PAGE", help="put it between the page's table marks instead")
    sub = add("compare", show_differences, "Measure how different a library's tickets are: mask overlap and transfer.")
    sub.add_argument("library", type=Path, nargs="?", help="default: the embedded library")
    sub.add_argument("--data", type=Path, required=True, help="the data set that the library was searched on")
    sub.add_argument("--images", type=at_least_one, default=250, help="held-out training images (default: %(default)s)")
    sub.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    sub.add_argument("--json", type=Path, help="write the whole matrices here")
    sub = add("fetch", fetch, "Download CIFAR-10 (170 MB) with torchvision.")
    sub.add_argument("folder", type=Path, help="where to put it; give the same folder as --data")
    sub = add("work", work, "Carry one job's folder to its end (what `search` starts for each ticket).")
    sub.add_argument("folder", type=Path, help="the job's folder inside a --state folder")
    sub.add_argument("--data", type=Path, required=True, help="the data set, as given to search")
    sub.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    return top


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def add_recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--preset", choices=PRESETS, default="compact", help="widths and schedule (default: %(default)s)")
    add_only(sub)
    sub.add_argument("--scratch", action="store_true", help="pure scratch tickets: masks alone, weights never trained")
    sub.add_argument("--epochs", type=positive, help="passes over the search images (default: the preset's)")
    sub.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the recipe, such as noise=0.5, width=24 or precision=bfloat16",
    )


def add_only(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--only", nargs="+", metavar="NAME", help="these tickets alone: a structure, or resnet18-07")


def add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--data", type=Path, required=True, help="CIFAR-10 as torchvision keeps it, an image folder, or a zip"
    )
    sub.add_argument("--data-name", help="what claims call the data (default: the name of --data)")
    sub.add_argument("--state", type=Path, required=True, help="where checkpoints and finished tickets go")
    sub.add_argument("--workers", type=at_least_one, default=2, help="processes at once (default: %(default)s)")
    sub.add_argument("--device", default="cpu", help="torch device of each process (default: %(default)s)")
    sub.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, host:port, or local")


def add_start_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--from", dest="start", type=Path, metavar="LIBRARY", help="go on from this library's tickets")
    sub.add_argument(
        "--rate",
        type=positive,
        default=0.4,
        help="first rates with --from, as a share of the recipe's (default: %(default)s)",
    )


# --- jobs ------------------------------------------------------------------------------------------------------------


def wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name == each or name.startswith(f"{each}-") for each in only)


def changes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    changes: dict[str, Any] = {"mask_share": 1.0} if arguments.scratch else {}
    if arguments.epochs:
        changes["epochs"] = arguments.epochs
    known = settable()
    for item in arguments.set:
        field, equals, value = item.partition("=")
        if not equals or field not in known:
            raise TrainingError(f"--set {item}: expected FIELD=VALUE with one of {', '.join(known)}")
        changes[field] = read_field(item, known[field], value, least=int(field in COUNTS))
    return changes


def settable() -> dict[str, Any]:
    """The fields that --set may change, with their types. The others say which ticket it is, and of what parent."""
    kinds = {
        name: kind
        for name, kind in get_type_hints(TrainConfig).items()
        if name not in ("structure", "density", "parent")
    }
    return kinds | dict.fromkeys(SHAPE, int)


def read_field(item: str, kind: Any, text: str, *, least: int) -> Any:
    """A field's value, from JSON or as it stands. Raises TrainingError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    try:
        found = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise TrainingError(f"--set {item}: {error.errors()[0]['msg'].lower()}") from None
    if isinstance(found, int | float) and not least <= found < math.inf:
        raise TrainingError(f"--set {item}: expected a number from {least}")
    return found


def recipes_of(arguments: argparse.Namespace, images: int, classes: int) -> list[TrainConfig]:
    preset, changes = PRESETS[arguments.preset], changes_of(arguments)
    every = [
        preset.recipe(structure, density, images, classes, **changes)
        for structure in STRUCTURES
        for density in DENSITIES
    ]
    chosen = [recipe for recipe in every if wanted(recipe.name, arguments.only)]
    if not chosen:
        raise TrainingError(
            f"--only {' '.join(arguments.only)}: no such ticket; expected names such as {every[0].name}"
        )
    return chosen


def jobs_from(arguments: argparse.Namespace, images: int) -> list[Job]:
    """Jobs that train an exported library's tickets further."""
    library = open_library(arguments.start)
    changes = changes_of(arguments)
    changes.pop("epochs", None)
    for name in ("mask_share", "steps", *SHAPE):
        if name in changes:
            asked = "--scratch" if name == "mask_share" and arguments.scratch else f"--set {name}"
            raise TrainingError(f"{asked}: settled by the tickets of {arguments.start}, which --from goes on with")
    jobs = []
    for entry in entries_of(library, arguments.start, arguments.only):
        before = TrainConfig.from_dict(entry.provenance.recipe)
        batch = changes.get("batch", before.batch)
        steps = max(1, round((arguments.epochs or 1) * images / batch))
        recipe = continued_from(before, parent=entry.sha256, steps=steps, rate=arguments.rate, **changes)
        jobs.append(Job(recipe, arguments.state / recipe.name, start=library.path / entry.file))
    return jobs


def entries_of(library: Library, given: Path, only: Sequence[str] | None) -> list[Entry]:
    """The tickets of a library that are wanted. given: where it was asked for."""
    found = [entry for entry in library.entries if wanted(entry.name, only)]
    if not found:
        raise TrainingError(f"{given}: no ticket matches --only {' '.join(only or [])}")
    return found


def show_plan(arguments: argparse.Namespace) -> None:
    preset = PRESETS[arguments.preset]
    speed, unit = (job_store.GPU_SPEED, "GPU-hours") if preset.gpus else (job_store.THREAD_SPEED, "thread-hours")
    table = Table("ticket", "structure", "kind", "steps", "PFLOP", unit, title=preset.about)
    table.caption = job_store.SPEEDS
    costs: dict[str, float] = {}
    for recipe in recipes_of(arguments, images=49_000, classes=10):
        costs[recipe.name] = job_store.cost(recipe)
        steps = f"{recipe.steps:,}"
        table.add_row(recipe.name, str(recipe.structure), recipe.kind, steps, *spent(costs[recipe.name], speed))
    table.add_section()
    for name in STRUCTURES:
        if total := sum(cost for ticket, cost in costs.items() if wanted(ticket, [name])):
            table.add_row(f"all {name}", "", "", "", *spent(total, speed))
    table.add_row("all", "", "", "", *spent(sum(costs.values()), speed))
    Console().print(table)


def spent(flops: float, speed: float) -> tuple[str, str]:
    return f"{flops / 1e15:,.1f}", f"{flops / speed / 3600:,.1f}"


def run_search(arguments: argparse.Namespace) -> None:
    split = read_split(arguments.data)
    if arguments.start:
        jobs = jobs_from(arguments, len(split.search))
    else:
        recipes = recipes_of(arguments, len(split.search), len(split.classes))
        jobs = [Job(recipe, arguments.state / recipe.name) for recipe in recipes]
    run_jobs(jobs, arguments, split)


def run_scratch(arguments: argparse.Namespace) -> None:
    library, split = open_library(arguments.library), read_split(arguments.data)
    jobs = []
    for entry in entries_of(library, arguments.library, arguments.only):
        trained = TrainConfig.from_dict(entry.provenance.recipe)
        recipe, spent = mask_phase(trained), trained.mask_share * entry.provenance.seconds
        folder, masks = arguments.state / recipe.name, library.path / entry.file
        jobs.append(Job(recipe, folder, masks=masks, found_in=round(spent, 1)))
    run_jobs(jobs, arguments, split)


def run_baseline(arguments: argparse.Namespace) -> None:
    split = read_split(arguments.data)
    preset = PRESETS[arguments.preset]
    recipes = [
        baseline(preset, name, len(split.search), len(split.classes), **changes_of(arguments))
        for name in ("resnet18", "wideresnet32")
        if wanted(name, arguments.only)
    ]
    run_jobs([Job(recipe, arguments.state / recipe.name, "baseline") for recipe in recipes], arguments, split)


def run_jobs(jobs: Sequence[Job], arguments: argparse.Namespace, split: Split) -> None:
    device_of(arguments.device, here=arguments.ray is None)
    name = arguments.data_name or arguments.data.name
    jobs = [replace(job, data=name, classes=split.classes) for job in jobs]
    console = Console()
    rows: list[Status] = []
    with Live(console=console, auto_refresh=False) as live:
        for rows in statuses(jobs, arguments):
            live.update(status_table(rows), refresh=True)
    left = [row for row in rows if row.state != "done"]
    for row in left:
        print(f"{row.job.name}: {row.error or f'{row.state}, but not by this command'}", file=sys.stderr)
    if left:
        raise TrainingError(f"{len(left)} of {len(jobs)} jobs are not done; the same command goes on with them")
    print(f"{len(jobs)} jobs done in {arguments.state}; `python -m training export --state {arguments.state} LIBRARY`")


def statuses(jobs: Sequence[Job], arguments: argparse.Namespace) -> Iterator[list[Status]]:
    if arguments.ray is None:
        return job_store.run_local(jobs, arguments.data, arguments.workers, arguments.device)
    preset = PRESETS[arguments.preset]
    gpus = 0 if arguments.device == "cpu" else preset.gpus
    return run_ray(jobs, arguments.data, arguments.ray, arguments.device, cores=preset.cores, gpus=gpus)


def device_of(name: str, *, here: bool = True) -> torch.device:
    """here: whether this machine has to have it. Raises TrainingError."""
    try:
        device = torch.device(name)
        if here:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch says both for a device that is not there
        raise TrainingError(f"--device {name}: torch cannot use such a device here") from None
    return device


def show_status(arguments: argparse.Namespace) -> None:
    Console().print(status_table([job_store.status(job) for job in job_store.find_jobs(arguments.state)]))


def status_table(rows: Sequence[Status]) -> Table:
    table = Table("ticket", "state", "step", "clean", "PGD", "minutes", "left")
    for row in rows:
        recipe = row.job.recipe
        left = row.seconds / row.step * (recipe.steps - row.step) / 60 if row.step else None
        table.add_row(
            row.job.name,
            row.state,
            f"{row.step:,} / {recipe.steps:,}",
            *("" if value is None else f"{100 * value:.1f}" for value in (row.clean, row.robust)),
            f"{row.seconds / 60:.0f}",
            "" if left is None else f"{left:.0f}",
        )
    done = sum(row.state == "done" for row in rows)
    table.caption = f"{done} of {len(rows)} done; accuracy in % (test when done, held-out training images before)"
    return table


def draw_figures(arguments: argparse.Namespace) -> None:
    from training.plots import draw

    draw(job_store.find_jobs(arguments.state), arguments.out)
    print(f"figure in {arguments.out}")


def run_export(arguments: argparse.Namespace) -> None:
    library = export.export(arguments.library, arguments.state, arguments.base)
    print(
        f"{arguments.library}: {len(library.tickets)} tickets, {len(library.baselines)} baselines, "
        f"digest {library.digest}"
    )


def show_table(arguments: argparse.Namespace) -> None:
    text = export.table(open_library(arguments.library))
    if arguments.into is None:
        print(text)
    else:
        export.write_into(arguments.into, text, export.mark(arguments.library))
        print(f"{arguments.into}: table of {arguments.library or 'the embedded library'} rebuilt")


def show_differences(arguments: argparse.Namespace) -> None:
    device = device_of(arguments.device)
    library, split = open_library(arguments.library), read_split(arguments.data)
    images = split.selection.balanced(arguments.images)
    with Progress(transient=True) as progress:
        task = progress.add_task("attacking each ticket", total=len(library.tickets))
        found = differences(library, images, device, lambda done: progress.update(task, completed=done))
    print(f"library {library.digest[:12]}\n{summary(found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"library": library.digest, **asdict(found)}, indent=1))


def fetch(arguments: argparse.Namespace) -> None:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(arguments.folder), download=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"CIFAR-10 could not be downloaded ({error}). Without a network, copy cifar-10-python.tar.gz from a "
            f"machine that has one into {arguments.folder} and unpack it there, or give any zip of train/<class>/* and "
            "test/<class>/* images as --data."
        ) from None
    print(f"{arguments.folder}: CIFAR-10 is there; give it as --data {arguments.folder}")


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    job_store.run_job(job_store.read_job(arguments.folder), read_split(arguments.data), device_of(arguments.device))


if __name__ == "__main__":
    sys.exit(main())
