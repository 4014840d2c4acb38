"""What the commands that make libraries do, from `plan` to `figures`."""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Final, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from model_store.files import write_atomically
from model_store.input_spec import CIFAR10_INPUT, InputSpec, Interpolation, Resize
from model_store.library import EMBEDDED, Library, open_library
from model_store.manifest import Entry
from model_store.pages import END, replace_section
from model_store.quiet_imports import import_dataset
from model_store.structures import STRUCTURES
from model_store.ticket import Ticket, load_ticket
from training import export, trial
from training.cost import GPU_SPEED, SPEEDS, THREAD_SPEED, cost
from training.data import CACHE, Split, read_split
from training.diversity import differences, summary
from training.errors import JobsUnfinished, TrainingError
from training.executors.local import run_local
from training.executors.ray import run_ray
from training.jobs import TICKET, Job, Status, find_jobs, read_job, status
from training.recipes import (
    CIFAR10_SEARCH,
    PRESETS,
    SHAPE,
    Preset,
    TrainConfig,
    baseline,
    continued_from,
    mask_phase,
    whole_library,
)
from training.recommendation import BUDGETS, RECOMMENDED, recommend
from training.run_job import run_job

NO_SCRATCH: Final = "--scratch: a mask over a dense network's weights is no scratch ticket"
BASELINES: Final = ("resnet18", "wideresnet32")  # the dense networks of Table 2; --only names others
# Fields of a recipe that are at least 1; the others may be 0.
COUNTS: Final = ("steps", "batch", "attack_steps", *SHAPE)


def preset_of(arguments: argparse.Namespace) -> Preset:
    """Raises TrainingError for a name that is none."""
    if arguments.preset not in PRESETS:
        raise TrainingError(f"--preset {arguments.preset}: expected one of {', '.join(PRESETS)}")
    return PRESETS[arguments.preset]


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
        value = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise TrainingError(f"--set {item}: {error.errors()[0]['msg'].lower()}") from None
    if isinstance(value, int | float) and not least <= value < math.inf:
        raise TrainingError(f"--set {item}: expected a number from {least}")
    return value


def size_of(arguments: argparse.Namespace) -> InputSpec:
    """What --size, --resize and --interpolation ask for, with CIFAR-10's statistics until others are measured."""
    height, width = arguments.size or CIFAR10_INPUT.size
    resize: Resize = arguments.resize or "squash"
    interpolation: Interpolation = arguments.interpolation or "bilinear"
    return replace(CIFAR10_INPUT, height=height, width=width, resize=resize, interpolation=interpolation)


def recipes_of(
    arguments: argparse.Namespace, images: int, classes: int, spec: InputSpec, changes: dict[str, Any] | None = None
) -> list[TrainConfig]:
    """The tickets that are wanted. changes: to the preset; the arguments' own if None."""
    preset, changes = preset_of(arguments), changes_of(arguments) if changes is None else changes
    every = preset.tickets(images, classes, spec, **changes)
    chosen = [recipe for recipe in every if wanted(recipe.name, arguments.only)]
    if not chosen:
        raise TrainingError(
            f"--only {' '.join(arguments.only)}: no such ticket; expected names such as {every[0].name}"
        )
    return chosen


def split_for(library: Library, given: Path, arguments: argparse.Namespace) -> Split:
    """The data set at a library's size and with its statistics. given: where the library was asked for."""
    for option in ("size", "resize", "interpolation"):
        if getattr(arguments, option, None):
            raise TrainingError(f"--{option}: settled by the tickets of {given}, which take {library.input}")
    split = split_of(arguments, cache_of(arguments), library.input)
    if split.classes != library.classes:
        in_data, expected = (", ".join(classes)[:100] for classes in (split.classes, library.classes))
        raise TrainingError(f"{arguments.data}: classes {in_data}; the library {given} has {expected}")
    return replace(split, input=library.input)


def cache_of(arguments: argparse.Namespace) -> Path | None:
    return arguments.state / CACHE if "state" in arguments else None


def jobs_from(arguments: argparse.Namespace, library: Library, images: int) -> list[Job]:
    """Jobs that train an exported library's tickets further."""
    changes = changes_of(arguments)
    changes.pop("epochs", None)
    jobs = []
    for entry in entries_of(library, arguments.start, arguments.only):
        before = TrainConfig.from_dict(entry.provenance.recipe)
        batch = changes.get("batch", before.batch)
        steps = max(1, round((arguments.epochs or 1) * images / batch))
        recipe = continued_from(before, parent=entry.sha256, steps=steps, rate=arguments.rate, **changes)
        jobs.append(Job(recipe, arguments.state / recipe.name, start=library.path / entry.file))
    return jobs


def starts_of(
    arguments: argparse.Namespace, tickets: Sequence[TrainConfig], images: int, classes: int, spec: InputSpec
) -> list[TrainConfig]:
    """The dense networks that a preset's tickets start in. Those of a --dense folder are there already.

    Raises TrainingError for options that have no meaning with the preset.
    """
    preset, changes = preset_of(arguments), changes_of(arguments)
    if preset.dense is None and arguments.dense_epochs:
        raise TrainingError(f"--dense-epochs: tickets of --preset {preset.name} start from random weights")
    if preset.dense is not None and arguments.scratch:
        raise TrainingError(NO_SCRATCH)
    changes.pop("epochs", None)
    if arguments.dense_epochs:
        changes["epochs"] = arguments.dense_epochs
    return preset.starts((recipe.structure.name for recipe in tickets), images, classes, spec, **changes)


def jobs_from_dense(arguments: argparse.Namespace, split: Split, folder: Path) -> list[Job]:
    """Jobs that search tickets inside the dense networks of a --state folder, at full epsilon from the first step.

    Raises TrainingError for a network that is not there, or of another structure or input.
    """
    changes = {"clean_until": 0.0, "ramp_until": 0.0, **changes_of(arguments)}
    starts: dict[Path, tuple[Ticket, str]] = {}
    jobs = []
    for recipe in recipes_of(arguments, len(split.search), len(split.classes), split.input, changes):
        path = folder / f"{recipe.structure.name}-100" / TICKET
        if path not in starts:
            if not path.exists():
                raise TrainingError(f"{path}: no such file; expected a --state folder of `tombola baseline`, finished")
            starts[path] = load_ticket(path), hashlib.sha256(path.read_bytes()).hexdigest()
        dense, digest = starts[path]
        if (dense.structure, dense.input) != (recipe.structure, split.input):
            raise TrainingError(
                f"{path}: {dense.structure} for {dense.input}; expected {recipe.structure} for {split.input}. "
                "Give search and baseline the same --set and --size"
            )
        jobs.append(Job(replace(recipe, parent=digest), arguments.state / recipe.name, start=path.resolve()))
    return jobs


def refuse_settled(arguments: argparse.Namespace) -> None:
    """Raises TrainingError for what a library's tickets have settled already."""
    changes = changes_of(arguments)
    for name in ("mask_share", "steps", *SHAPE):
        if name in changes:
            option = "--scratch" if name == "mask_share" and arguments.scratch else f"--set {name}"
            raise TrainingError(f"{option}: settled by the tickets of {arguments.start}, which --from goes on with")


def entries_of(library: Library, given: Path, only: Sequence[str] | None) -> list[Entry]:
    """The tickets of a library that are wanted. given: where it was asked for."""
    value = [entry for entry in library.entries if wanted(entry.name, only)]
    if not value:
        raise TrainingError(f"{given}: no ticket matches --only {' '.join(only or [])}")
    return value


def show_plan(arguments: argparse.Namespace) -> None:
    preset = preset_of(arguments)
    speed, unit = (GPU_SPEED, "GPU-hours") if preset.gpus else (THREAD_SPEED, "thread-hours")
    table = Table("ticket", "structure", "kind", "steps", "PFLOP", unit, title=preset.about)
    table.caption = SPEEDS
    costs: dict[str, float] = {}
    spec = size_of(arguments)
    if arguments.data is not None:
        show_trial(arguments, spec)
        return
    for recipe in planned(arguments, CIFAR10_SEARCH, 10, spec):
        costs[recipe.name] = cost(recipe, spec)
        kind = "dense" if recipe.density == 1 else recipe.kind
        steps = f"{recipe.steps:,}"
        table.add_row(recipe.name, str(recipe.structure), kind, steps, *spent(costs[recipe.name], speed))
    table.add_section()
    for name in STRUCTURES:
        if total := sum(each for ticket, each in costs.items() if wanted(ticket, [name])):
            table.add_row(f"all {name}", "", "", "", *spent(total, speed))
    table.add_row("all", "", "", "", *spent(sum(costs.values()), speed))
    Console().print(table)


def planned(arguments: argparse.Namespace, images: int, classes: int, spec: InputSpec) -> list[TrainConfig]:
    """The jobs of a search in their order."""
    tickets = recipes_of(arguments, images, classes, spec)
    return starts_of(arguments, tickets, images, classes, spec) + tickets


def split_of(arguments: argparse.Namespace, cache: Path | None, spec: InputSpec) -> Split:
    return read_split(arguments.data, cache, spec, skip_damaged=arguments.skip_damaged)


def show_trial(arguments: argparse.Namespace, spec: InputSpec) -> None:
    """Measures what `search` with the same options takes on this machine, and recommends options for some hours."""
    device = device_of(arguments.device)
    sample = listed, split, _ = trial.sample_of(arguments.data, spec)
    images, classes = listed.sizes()["search"], len(listed.classes)
    recipes = planned(arguments, images, classes, split.input)
    whole = {preset.name: whole_library(preset, images, classes, split.input) for preset in RECOMMENDED}
    result = trial.measure(sample, [*recipes, *chain.from_iterable(whole.values())], device, arguments.seconds)
    table = Table("jobs", "steps", "ms a step", "minutes each", "hours for all")
    for (structure, dense), alike in groupby(recipes, lambda recipe: (recipe.structure, recipe.density == 1)):
        mine = list(alike)
        hours = sum(result.hours(mine))
        fewest, most = min(each.steps for each in mine), max(each.steps for each in mine)
        steps = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        row = steps, f"{1000 * result.timed[trial.timed_as(mine[0])].step_s:,.0f}"
        name = f"{len(mine)} {structure}" + (", dense" if dense else "")
        table.add_row(name, *row, f"{60 * hours / len(mine):,.1f}", f"{hours:,.2f}")
    Console().print(table)
    for line in summary_of(arguments, result, recipes):
        print(line)
    costs = {name: [each / arguments.workers for each in result.hours(jobs)] for name, jobs in whole.items()}
    Console().print(recommendations([(preset, *costs[preset.name]) for preset in RECOMMENDED], images))


def recommendations(costs: Sequence[tuple[Preset, float, float]], images: int) -> Table:
    """What to give `search` for some budgets. costs: presets, the best first, with hours of their claims and steps."""
    table = Table(
        "hours", "options of search", "takes", title="Recommended for all forty tickets, by the hours there are"
    )
    for hours in BUDGETS:
        best = recommend(hours, costs, images)
        if best is None:
            table.add_row(f"{hours:g}", "too few: search some tickets with --only", "")
            continue
        options = f"--preset {best.preset.name} --epochs {best.epochs:.1f}"
        options += "" if best.dense_epochs is None else f" --dense-epochs {best.dense_epochs:.0f}"
        table.add_row(f"{hours:g}", options, f"{best.taken:.1f}")
    return table


def summary_of(
    arguments: argparse.Namespace,
    result: trial.Trial,
    recipes: Sequence[TrainConfig],
) -> Iterator[str]:
    """What there is, then what it takes; the last line is the one to quote."""
    listed, decode_s, workers = result.listed, result.decode_s, arguments.workers
    sizes, hours = listed.sizes(), sum(result.hours(recipes))
    of_all = f"{listed.pictures:,} pictures of {len(listed.classes):,} classes"
    decoded, rest = result.cache_bytes / 1e9, trial.state_bytes(recipes, workers) / 1e9
    yield f"data    {of_all}: " + ", ".join(f"{count:,} for {part}" for part, count in sizes.items())
    yield f"input   {result.input}, mean {result.input.mean}, deviation {result.input.std} (of a sample)"
    yield f"decode  {1000 * decode_s:.1f} ms a picture, {listed.pictures * decode_s / 60:,.1f} minutes, once"
    yield f"memory  {result.memory_bytes / 1e9:.1f} GB a process, {workers} at once"
    yield f"disk    {decoded:.2f} GB of decoded arrays, twice that on the way; {rest:.2f} GB of tickets and checkpoints"
    tickets = sum(recipe.density < 1 for recipe in recipes)
    yield (
        f"{tickets} tickets: {hours / workers:,.1f} hours in {workers} processes of one thread on "
        f"{arguments.device}, measured on this machine, as busy as it is."
    )


def spent(flops: float, speed: float) -> tuple[str, str]:
    return f"{flops / 1e15:,.1f}", f"{flops / speed / 3600:,.1f}"


def run_search(arguments: argparse.Namespace) -> None:
    if arguments.dense_epochs and (arguments.start or arguments.dense):
        raise TrainingError("--dense-epochs: with --from or --dense no dense network is trained")
    if arguments.start:
        library = open_library(arguments.start)
        refuse_settled(arguments)
        split = split_for(library, arguments.start, arguments)
        run_jobs(jobs_from(arguments, library, len(split.search)), arguments, split)
        return
    if arguments.dense and arguments.scratch:
        raise TrainingError(NO_SCRATCH)
    split = split_of(arguments, arguments.state / CACHE, size_of(arguments))
    part = len(split.search), len(split.classes), split.input
    recipes = recipes_of(arguments, *part)
    starts = [] if arguments.dense else starts_of(arguments, recipes, *part)
    if starts:
        run_jobs([Job(recipe, arguments.state / recipe.name, "baseline") for recipe in starts], arguments, split)
    if starts or arguments.dense:
        jobs = jobs_from_dense(arguments, split, arguments.dense or arguments.state)
    else:
        jobs = [Job(recipe, arguments.state / recipe.name) for recipe in recipes]
    run_jobs(jobs, arguments, split)


def run_scratch(arguments: argparse.Namespace) -> None:
    library = open_library(arguments.library)
    entries = entries_of(library, arguments.library, arguments.only)
    split = split_for(library, arguments.library, arguments)
    jobs = []
    for entry in entries:
        trained = TrainConfig.from_dict(entry.provenance.recipe)
        recipe, spent = mask_phase(trained), trained.mask_share * entry.provenance.seconds
        folder, masks = arguments.state / recipe.name, library.path / entry.file
        jobs.append(Job(recipe, folder, masks=masks, search_seconds=round(spent, 1)))
    run_jobs(jobs, arguments, split)


def run_baseline(arguments: argparse.Namespace) -> None:
    split = split_of(arguments, arguments.state / CACHE, size_of(arguments))
    preset = preset_of(arguments)
    recipes = [
        baseline(preset, name, len(split.search), len(split.classes), split.input, **changes_of(arguments))
        for name in (STRUCTURES if arguments.only else BASELINES)
        if wanted(name, arguments.only)
    ]
    run_jobs([Job(recipe, arguments.state / recipe.name, "baseline") for recipe in recipes], arguments, split)


def run_jobs(jobs: Sequence[Job], arguments: argparse.Namespace, split: Split) -> None:
    device_of(arguments.device, local=arguments.ray is None)
    name = arguments.data_name or arguments.data.name
    jobs = [replace(job, data=name, classes=split.classes, input=split.input) for job in jobs]
    console = Console()
    rows: list[Status] = []
    with Live(console=console, auto_refresh=False) as live:
        for rows in statuses(jobs, arguments):
            live.update(status_table(rows), refresh=True)
    if not console.is_terminal:  # there rich leaves the table's last line open
        print()
    left = [row for row in rows if row.state != "done"]
    for row in left:
        print(f"{row.job.name}: {row.error or f'{row.state}, but not by this command'}", file=sys.stderr)
    if left:
        raise JobsUnfinished(f"{len(left)} of {len(jobs)} jobs are not done; the same command goes on with them")
    print(f"{len(jobs)} jobs done in {arguments.state}; `tombola export --state {arguments.state} LIBRARY`")


def statuses(jobs: Sequence[Job], arguments: argparse.Namespace) -> Iterator[list[Status]]:
    if arguments.ray is None:
        return run_local(jobs, arguments.data, arguments.workers, arguments.device, skip_damaged=arguments.skip_damaged)
    preset = preset_of(arguments)
    return run_ray(
        jobs,
        arguments.data,
        arguments.ray,
        arguments.device,
        cores=preset.cores,
        gpus=preset.gpus,
        skip_damaged=arguments.skip_damaged,
    )


def device_of(name: str, *, local: bool = True) -> torch.device:
    """here: whether this machine has to have it. Raises TrainingError."""
    try:
        device = torch.device(name)
        if local:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch says both for a device that is not there
        raise TrainingError(f"--device {name}: torch cannot use such a device here") from None
    return device


def show_status(arguments: argparse.Namespace) -> None:
    Console().print(status_table([status(job) for job in find_jobs(arguments.state)]))


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
    from training.plots import draw, draw_libraries

    if arguments.library:
        draw_libraries([open_library(path) for path in arguments.library], arguments.out)
    else:
        draw(find_jobs(arguments.state), arguments.out)
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
        replace_section(arguments.into, (export.mark(arguments.library), END), text)
        print(f"{arguments.into}: table of {arguments.library or 'the embedded library'} rebuilt")


def show_differences(arguments: argparse.Namespace) -> None:
    device = device_of(arguments.device)
    library = open_library(arguments.library)
    split = split_for(library, arguments.library or EMBEDDED, arguments)
    images = split.selection.balanced(arguments.images)
    with Progress(transient=True) as progress:
        task = progress.add_task("attacking each ticket", total=len(library.tickets))
        value = differences(library, images, device, lambda done: progress.update(task, completed=done))
    print(f"library {library.digest[:12]}\n{summary(value)}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps({"library": library.digest, **asdict(value)}, indent=1))


def fetch(arguments: argparse.Namespace) -> None:
    cifar10 = import_dataset("CIFAR10")
    try:
        cifar10(str(arguments.folder), download=True)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"CIFAR-10 could not be downloaded ({error}). Without a network, copy cifar-10-python.tar.gz from "
            f"another machine into {arguments.folder} and unpack it there. Or give any zip of train/<class>/* and "
            "test/<class>/* images as --data."
        ) from None
    print(f"{arguments.folder}: CIFAR-10 is there; give it as --data {arguments.folder}")


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    job = read_job(arguments.folder)
    run_job(job, split_of(arguments, arguments.folder.parent / CACHE, job.input), device_of(arguments.device))
