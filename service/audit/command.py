"""tombola audit: the audit of a library from the command line, or of a running service."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from model_store.files import write_atomically
from service.audit.errors import AuditError, AuditRejected
from service.settings import add_renamed_flag

if TYPE_CHECKING:
    from model_store.image_sample import LabelledImages
    from model_store.library import Library
    from service.audit.events import Event
    from service.audit.report.model import Interval, Report
    from service.audit.target import Target

BELOW: Final = 3  # exit code: the figure is below --fail-under
POLL_S: Final = 0.5  # between looks at an audit of a running service
INVALID: Final = 4  # exit code: a hard check failed, or there is nothing to hold against --fail-under
GATE_EPILOG: Final = """\
exit codes: 0 met, 3 below, 4 not a measurement, 5 too few images to decide (and how many would do)

example:
  tombola gate report.json --robust-lower 0.25 --max-drop 2 --against baseline.json --require valid --max-age 30d
"""
EPILOG: Final = """\
examples:
  tombola audit --profile smoke
  tombola audit my/library --data cifar10.zip --profile standard --out audit
  tombola audit my/library --data test.npz --fail-under 0.25     exit code 3 below it, 4 if a check fails
  tombola audit --admin-url http://127.0.0.1:8001 --token-file state/admin-token --profile standard
  tombola audit --endpoint http://host/v2/models/cat --budget 20000 --data test.npz --classes classes.txt
  tombola audit --compare old/report.json new/report.json
  tombola audit --tables service/audit/results/report.json --out service/audit/results --into docs/RESULTS.md
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = run.__doc__, EPILOG
    parser.add_argument(
        "library", nargs="?", help="the library's folder or location (TOMBOLA_LIBRARY, or the embedded one)"
    )
    parser.add_argument(
        "--model", metavar="MODULE:FACTORY", help="instead of a library: a function that returns a torch module"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="instead of a library: an ONNX file")
    parser.add_argument("--timm", metavar="NAME", help="instead of a library: a timm model, with --weights")
    parser.add_argument("--endpoint", metavar="URL", help="instead of a library: a model behind HTTP, as a black box")
    parser.add_argument("--protocol", default="oip", help="of --endpoint: oip (Open Inference Protocol) or v1 (oip)")
    parser.add_argument("--budget", type=int, metavar="N", help="the most images that --endpoint is asked about")
    parser.add_argument("--feedback", help="of --endpoint: score or decision (what it gives)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors file for --timm")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the model's class names, one a line (0 to 9)")
    parser.add_argument(
        "--size", metavar="SIDE|HxW", help="of the model's pictures: 64, or 48x64 for rows by columns (32)"
    )
    parser.add_argument("--mean", nargs=3, type=float, metavar="M", help="of the model's normalised channels (none)")
    parser.add_argument("--std", nargs=3, type=float, metavar="S", help="their deviations (none)")
    parser.add_argument("--profile", default="standard", help="smoke, standard, full or reference (standard)")
    parser.add_argument(
        "--data", help="zip, npz or folder of labelled images; with --admin-url, the name of a data set"
    )
    parser.add_argument(
        "--skip-damaged",
        action="store_true",
        help="count, list and pass over pictures that cannot be read (the first one ends the command)",
    )
    parser.add_argument("--attacks", nargs="*", help="only these (all of the profile's)")
    parser.add_argument("--tickets", nargs="*", help="attack these one by one, for the transfer matrix (all)")
    parser.add_argument(
        "--epsilons",
        nargs="*",
        type=float,
        help="in 255ths (0 2 4 8 12 20; l2: 0 32 64 128 192 320 for 32x32 pictures, by their size)",
    )
    parser.add_argument("--norm", help="linf or l2 (linf)")
    parser.add_argument("--images", type=int, help="how many images (the profile's number)")
    parser.add_argument("--seed", type=int, help="of the attacker (0)")
    parser.add_argument("--defender-seed", type=int, help="of the draws that score (0)")
    parser.add_argument("--out", type=Path, default=Path("audit"), help="folder of the report; a rerun resumes (audit)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--threads", type=int, default=0, help="cores to use (those of this container)")
    parser.add_argument("--target-url", help="public URL of a service of the same library, for black-box attacks")
    parser.add_argument("--key", help="API key for --target-url or --endpoint")
    parser.add_argument("--outside", type=Path, help="folder of an attacker's own library, to transfer from")
    parser.add_argument("--format", metavar="NAMES", help="write the report in other formats, too: junit,sarif,md,card")
    parser.add_argument(
        "--fail-under",
        type=float,
        metavar="FRACTION",
        help="exit code 3 if the lower bound of robust accuracy is below it",
    )
    parser.add_argument("--admin-url", help="admin URL of a running service: audit there, and wait")
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help="proxy on the way to --admin-url, --target-url or --endpoint (none: the environment's is not used)",
    )
    parser.add_argument("--token-file", type=Path, help="file with the admin token, for --admin-url")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="REPORT", help="two report.json: what changed")
    parser.add_argument("--tables", type=Path, metavar="REPORT", help="print its Table 2, write its figures to --out")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="with --tables: put it between the page's marks instead"
    )
    add_renamed_flag(parser, "--service", "--target-url")
    add_renamed_flag(parser, "--url", "--admin-url")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Attacks a library as its critics would, checks the attacks, and writes report.json and report.html."""
    if options.compare:
        return run_compare(*options.compare)
    if options.tables:
        return run_tables(options.tables, options.out, options.into)
    formats = read_formats(options.format)
    report = audit_remotely(options) if options.admin_url else audit_in_process(options)
    for path in write_formats(report, formats, options.out):
        print(f"written: {path}")
    return conclude(report, options.fail_under)


def conclude(report: "Report", fail_under: float | None) -> int:
    """Prints the line worth quoting. Returns the exit code, which the lower bound decides, never the value."""
    from service.audit.report.verdicts import has_figures, headline

    print(f"report {report.digest[:12]} ({report.verdict}): {headline(report)}")
    if report.verdict == "invalid" or (fail_under is not None and not has_figures(report)):
        return INVALID
    return BELOW if fail_under is not None and report.robust.low < fail_under else 0


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    names = ("profile", "attacks", "tickets", "epsilons", "norm", "images", "seed", "defender_seed")
    return {name: value for name in names if (value := getattr(options, name)) not in (None, [])}


def audit_in_process(options: argparse.Namespace) -> "Report":
    """Audits a library, or another model, in this process."""
    from model_store.library import open_library
    from service.audit.attack_runner import RunOptions
    from service.audit.config import read_audit
    from service.audit.run import load_held_out, load_images, run_audit
    from service.cpu import usable_cores
    from service.engine.errors import EngineRejected
    from service.engine.factory import resolve_device

    try:
        device = str(resolve_device(options.device))
    except EngineRejected as error:
        raise AuditRejected(str(error)) from None
    threads = options.threads or usable_cores()
    audit = read_audit({**request_fields(options), "data": options.data and Path(options.data).name})
    subject = open_subject(options)
    outside = open_library(options.outside) if options.outside else None
    path = Path(options.data) if options.data else None
    images: LabelledImages = load_images(audit, subject, path, threads, skip_damaged=options.skip_damaged)
    print(f"{describe_subject(subject)}; {len(images)} images: {images.origin}")
    for note in images.notes:
        print(f"{images.name}: {note}", file=sys.stderr)
    print(f"device {device}, {threads} cores, seed {audit.seed}, profile {audit.profile}")
    run_options = RunOptions(
        device=device, threads=threads, url=options.target_url, key=options.key, proxy=options.proxy, outside=outside
    )
    held_out = load_held_out(audit, subject, path, skip_damaged=options.skip_damaged)
    with ProgressBar() as bar:
        return run_audit(
            options.out,
            audit,
            subject,
            images,
            run_options,
            emit=bar.show,
            floor=options.fail_under,
            held_out=held_out,
        )


def open_subject(options: argparse.Namespace) -> "Library | Target":
    """The library, or the model that stands in its place. Raises AuditRejected, StoreError."""
    from model_store.library import open_library
    from service.audit.target import Target
    from service.library_source import local_library
    from service.settings import read_settings

    chosen = [name for name in ("library", "model", "onnx", "timm", "endpoint") if getattr(options, name) is not None]
    if len(chosen) > 1:
        raise AuditRejected(f"{' and '.join(chosen)} were given; expected one thing to audit")
    if options.size is not None and chosen in ([], ["library"]):
        raise AuditRejected("--size is for models of other kinds; a library says its own size")
    if chosen in ([], ["library"]):
        settings = read_settings({} if options.library is None else {"library": options.library})
        return open_library(local_library(settings))
    classes, size = read_classes(options.classes), read_size(options.size)
    expects = {"mean": options.mean, "std": options.std, "size": size}
    if options.model:
        return Target.from_factory(options.model, classes, **expects)
    if options.onnx:
        return Target.from_onnx(options.onnx, classes, **expects)
    if options.endpoint:
        if options.budget is None:
            raise AuditRejected("--endpoint needs --budget: the most images that it may be asked about")
        return Target.from_endpoint(
            options.endpoint,
            classes,
            budget=options.budget,
            protocol=options.protocol,
            feedback=options.feedback,
            key=options.key,
            proxy=options.proxy,
            size=size,
        )
    if options.weights is None:
        raise AuditRejected("--timm needs --weights: a safetensors file on this machine; nothing is downloaded")
    return Target.from_timm(options.timm, options.weights, classes, **expects)


def read_size(text: str | None) -> tuple[int, int]:
    """Height and width of the model's pictures; CIFAR-10's where nobody says. Raises AuditRejected."""
    from model_store.errors import InputRejected
    from model_store.input_spec import CIFAR10_INPUT, parse_size

    try:
        return CIFAR10_INPUT.size if text is None else parse_size(text)
    except InputRejected as error:
        raise AuditRejected(f"--size {error}") from None


def read_classes(path: Path | None) -> tuple[str, ...]:
    """One name a line; the digits where no file names others. Raises AuditRejected."""
    if path is None:
        return tuple(map(str, range(10)))
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise AuditRejected(f"{path}: cannot be read as class names ({error!s:.100})") from None
    if len(set(names)) != len(names):
        raise AuditRejected(f"{path}: a class is named twice; expected {len(names)} different names")
    return names


def describe_subject(subject: "Library | Target") -> str:
    from service.audit.target import Target

    if isinstance(subject, Target) and (endpoint := subject.endpoint) is not None:
        kind = "the same to equal images" if endpoint.repeats == 1 else "random"
        return f"endpoint {endpoint.url}, {endpoint.feedback} feedback, answers {kind}, budget {endpoint.budget} images"
    if isinstance(subject, Target):
        return f"model {subject.name}, digest {subject.digest[:12]}, {len(subject.networks)} networks"
    return f"library {subject.digest[:12]}, {len(subject.tickets)} tickets"


class ProgressBar:
    """A progress bar over the attacks, below one line for each that has ended."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self.task = self.bar.add_task("attacks", total=1.0)

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, event: "Event") -> None:
        """One line for each attack and check, and the time that is left."""
        match event.event:
            case "step":
                self.line(f"{100 * event.accuracy:5.1f} %  {event.id}")
                left = f"attacks, about {event.seconds_left / 60:.0f} min left"
                self.bar.update(self.task, completed=event.share, description=left)
            case "check":
                self.line(f"check {event.id:2d} {event.outcome:7s} {event.name}: {event.value}")
            case "rivals":
                self.line(f"choosing rivals on {event.images} held-out images, about {event.seconds / 60:.0f} min")
            case "cost":
                sizes = f"epsilons {', '.join(f'{epsilon:g}' for epsilon in event.epsilons)} in 255ths"
                why = f" ({event.epsilons_about})" if event.epsilons_about else ""
                self.line(f"{event.attacks} attacks and their checks, {sizes}{why}, about {event.seconds / 60:.0f} min")

    def line(self, text: str) -> None:
        """One line whatever the width, for logs of CI pipelines."""
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


# A running service


def audit_remotely(options: argparse.Namespace) -> "Report":
    """Starts an audit on the admin plane, waits for its report, and stores it in --out."""
    import httpx

    from service.outbound import ProxyRejected, http_client

    if options.skip_damaged:
        raise AuditRejected(
            "--skip-damaged is for files read here; a service accepts no data set with damaged pictures"
        )
    path = options.token_file
    token = path.read_text(encoding="utf-8", errors="replace").strip() if path else ""
    if not token.isascii():
        raise AuditRejected(f"{path}: not an admin token")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with http_client(timeout_s=60, proxy=options.proxy, base_url=options.admin_url, headers=headers) as client:
            return wait_for_report(client, options)
    except ProxyRejected as error:
        raise AuditRejected(str(error)) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AuditError(f"{options.admin_url}: {type(error).__name__}: {error}; is the admin plane there?") from None


def wait_for_report(client: Any, options: argparse.Namespace) -> "Report":
    from service.audit.report.model import parse_report

    data = {"data": options.data} if options.data else {}
    job = read_answer(client.post("/admin/audits", json={**request_fields(options), **data}))
    path = f"/admin/audits/{job['id']}"
    print(f"audit {job['id']}: about {(job['cost'].get('seconds_now') or job['cost']['seconds']) / 60:.0f} min")
    seen = 0
    with ProgressBar() as bar:
        while (state := read_answer(client.get(path)))["state"] in ("queued", "running"):
            seen = follow_events(client, path, seen, bar)
            time.sleep(POLL_S)
    if state["state"] != "done":
        raise AuditError(f"audit {job['id']}: {state['state']}: {state.get('why', '')}")
    report = parse_report(read_answer(client.get(f"{path}/report.json")), f"{options.admin_url}{path}")
    store_report(options.out, report, client.get(f"{path}/report").text)
    return report


def follow_events(client: Any, path: str, seen: int, bar: ProgressBar) -> int:
    """Shows the events from the `seen`-th on, until the audit ends or is silent for too long; how many it has had."""
    import httpx

    from service.audit.events import EVENT

    with suppress(httpx.TimeoutException), client.stream("GET", f"{path}/events") as response:
        if response.is_error:
            response.read()
            read_answer(response)
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        for place, line in enumerate(lines):
            fields = json.loads(line)
            if place >= seen and "event" in fields:  # the last line is the state, which the caller reads anew
                bar.show(EVENT.validate_python(fields))
                seen = place + 1
    return seen


def store_report(folder: Path, report: "Report", page: str) -> None:
    from service.audit.report.model import PAGE, REPORT

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT, report.as_bytes())
    write_atomically(folder / PAGE, page)


def read_answer(response: Any) -> dict[str, Any]:
    """The JSON object of a response. Raises AuditError for an error, or for something else than JSON."""
    try:
        fields = response.json()
    except ValueError:
        raise AuditError(f"{response.url}: {response.status_code}, and no JSON: not an admin plane") from None
    if response.is_error:
        raise AuditError(f"{response.url}: {response.status_code}: {fields.get('error', fields)}")
    return dict(fields)


# Existing reports


def run_tables(path: Path, folder: Path, into: Path | None) -> int:
    from model_store.pages import replace_section
    from service.audit.report.markdown_report import MARKS, document_section, marks_of, write_figures
    from service.audit.report.model import read_report

    report = read_report(path)
    seen_from = into.resolve().parent if into else Path.cwd()
    marks = marks_of(into.read_text(encoding="utf-8"), path) if into else MARKS
    figures = Path(os.path.relpath(folder.resolve(), seen_from)).as_posix()
    text = document_section(report, figures, paper=marks == MARKS)
    if into is None:
        print(text)
    else:
        replace_section(into, marks, text)
        print(f"{into}: table and figures of report {report.digest[:12]}")
    for written in write_figures(report, folder):
        print(f"written: {written}", file=sys.stderr)
    return 0


def run_compare(first: Path, second: Path) -> int:
    from service.audit.report.model import read_report
    from service.audit.report.summary import compare

    changes = compare(read_report(first), read_report(second))
    for name, (before, after) in changes.changed.items():
        print(f"{name}: {before} -> {after}")
    for name, change in changes.systems.items():
        for kind, difference in (("clean", change.clean), ("robust", change.robust)):
            print(f"{name:24s} {kind:7s} {describe_change(difference)}")
    return 0


def describe_change(change: "Interval | None") -> str:
    if change is None:
        return "other images: not paired"
    value, low, high = (100 * each for each in (change.value, change.low, change.high))
    return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"


# Results that a pipeline reads


def read_formats(text: str | None) -> list[str]:
    """Names from a comma-separated list, without those that are always written.

    Raises AuditRejected for an unknown one, before hours have gone into an audit.
    """
    from service.audit.report.formats import format_named

    names = [name.strip() for name in (text or "").split(",") if name.strip() not in ("", "json", "html")]
    for name in names:
        format_named(name)
    return names


def write_formats(report: "Report", names: Sequence[str], folder: Path) -> list[Path]:
    """Writes a report in other formats beside report.json."""
    from service.audit.report.formats import format_named

    written = []
    for chosen in [format_named(name) for name in names]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / chosen.filename
        write_atomically(path, chosen.write(report))
        written.append(path)
    return written


def add_gate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `tombola gate`."""
    parser.description, parser.epilog = run_gate.__doc__, GATE_EPILOG
    parser.add_argument("report", type=Path, help="report.json of an audit")
    parser.add_argument(
        "--robust-lower", type=float, metavar="FRACTION", help="the least lower bound of robust accuracy"
    )
    parser.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="the most that robust accuracy may fall below --against"
    )
    parser.add_argument("--against", type=Path, metavar="REPORT", help="report.json of the baseline, for --max-drop")
    parser.add_argument(
        "--require", choices=("valid", "warnings"), default="valid", help="the least verdict of the audit (valid)"
    )
    parser.add_argument("--max-age", metavar="AGE", help="the greatest age of the report: 12h, 30d, 4w")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON")
    parser.set_defaults(run=run_gate)


def run_gate(options: argparse.Namespace) -> int:
    """Holds a report against requirements. The 95 % interval decides, never the value."""
    return judge_report(
        options.report,
        robust_lower=options.robust_lower,
        max_drop=options.max_drop,
        against=options.against,
        require=options.require,
        max_age=options.max_age,
        as_json=options.as_json,
    )


def judge_report(
    path: Path,
    *,
    robust_lower: float | None = None,
    max_drop: float | None = None,
    against: Path | None = None,
    require: Literal["valid", "warnings"] = "valid",
    max_age: str | None = None,
    as_json: bool = False,
) -> int:
    """Prints what became of each requirement.

    Args:
      path: of a report.json, whose digest must hold.
      robust_lower: the least lower bound of robust accuracy, as a fraction.
      max_drop: the most points that robust accuracy may fall below the baseline's.
      against: report.json of the baseline.
      require: the least verdict of the measurement.
      max_age: such as 30d.
      as_json: print one JSON object instead of lines.

    Returns:
      0 met, 3 below, 4 not a measurement, 5 too few images to decide.

    Raises:
      AuditError: a file is no report, or a requirement means nothing.
    """
    from service.audit.report.model import read_report
    from service.audit.report.requirements import Requirements, judge, parse_age

    requirements = Requirements(
        robust_lower=robust_lower,
        max_drop=max_drop,
        against=read_report(against) if against else None,
        require=require,
        max_age=parse_age(max_age) if max_age is not None else None,
    )
    result = judge(read_report(path), requirements)
    if as_json:
        print(result.model_dump_json(indent=1))
        return result.exit_code
    for finding in result.findings:
        print(f"{finding.outcome}: {finding.requirement}; measured: {finding.measured}")
    print(f"gate {result.outcome} (exit code {result.exit_code}): {result.headline}")
    return result.exit_code
