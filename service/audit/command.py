"""tombola audit: the audit of a library from the command line, or of a running service."""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from model_store.files import write_atomically
from service.audit.errors import AuditError, AuditRejected

if TYPE_CHECKING:
    from service.audit.labelled_data import LabelledImages

Json = dict[str, Any]
BELOW: Final = 3  # exit code: the figure is below --fail-under
AGAIN_S: Final = 0.5  # until a running service is asked again, when it has ended what it was telling
INVALID: Final = 4  # exit code: a hard check failed
EPILOG: Final = """\
examples:
  tombola audit --profile smoke
  tombola audit my/library --data cifar10.zip --profile standard --out audit
  tombola audit my/library --data test.npz --fail-under 0.25     exit code 3 below it, 4 if a check fails
  tombola audit --url http://127.0.0.1:8001 --token-file state/admin-token --profile standard
  tombola audit --compare old/report.json new/report.json
  tombola audit --tables service/audit/results/report.json --out service/audit/results --into docs/RESULTS.md
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = run.__doc__, EPILOG
    parser.add_argument(
        "library", nargs="?", type=Path, help="folder of the library (TOMBOLA_LIBRARY, or the embedded one)"
    )
    parser.add_argument("--profile", default="standard", help="smoke, standard or full (standard)")
    parser.add_argument("--data", help="zip, npz or folder of labelled images; with --url, the name of a data set")
    parser.add_argument("--attacks", nargs="*", help="only these (all of the profile's)")
    parser.add_argument("--tickets", nargs="*", help="attack these one by one, for the transfer matrix (all)")
    parser.add_argument("--epsilons", nargs="*", type=float, help="in 255ths (0 2 4 8 12 20; l2: 0 32 64 128 192 320)")
    parser.add_argument("--norm", help="linf or l2 (linf)")
    parser.add_argument("--images", type=int, help="how many images (the profile's number)")
    parser.add_argument("--seed", type=int, help="of the attacker (0)")
    parser.add_argument("--defender-seed", type=int, help="of the draws that score (0)")
    parser.add_argument("--out", type=Path, default=Path("audit"), help="folder of the report; a rerun resumes (audit)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--threads", type=int, default=0, help="cores to use (those of this container)")
    parser.add_argument("--service", help="public URL of a service of the same library, for black-box attacks")
    parser.add_argument("--key", help="API key for --service")
    parser.add_argument("--outside", type=Path, help="folder of an attacker's own library, to transfer from")
    parser.add_argument("--fail-under", type=float, metavar="FRACTION", help="exit code 3 if accuracy is below it")
    parser.add_argument("--url", help="admin URL of a running service: audit there, and wait")
    parser.add_argument("--token-file", type=Path, help="file with the admin token, for --url")
    parser.add_argument(
        "--proxy", metavar="URL", help="proxy on the way to --url or --service (none: the environment's is not used)"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="REPORT", help="two report.json: what changed")
    parser.add_argument("--tables", type=Path, metavar="REPORT", help="print its Table 2, write its figures to --out")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="with --tables: put it between the page's marks instead"
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Attacks a library as its critics would, checks the attacks, and writes report.json and report.html."""
    if given.compare:
        return run_compare(*given.compare)
    if given.tables:
        return run_tables(given.tables, given.out, given.into)
    report = remote(given) if given.url else local(given)
    return conclude(report, given.fail_under)


def conclude(report: Json, fail_under: float | None) -> int:
    from service.audit.report.html_report import headline

    print(f"report {report['digest'][:12]} ({report['verdict']}): {headline(report)}")
    value = report["systems"]["tombola"]["robust"]["expected"]["value"]
    if report["verdict"] == "invalid":
        return INVALID
    return BELOW if fail_under is not None and value < fail_under else 0


def request_of(given: argparse.Namespace) -> Json:
    names = ("profile", "attacks", "tickets", "epsilons", "norm", "images", "seed", "defender_seed")
    return {name: value for name in names if (value := getattr(given, name)) not in (None, [])}


def local(given: argparse.Namespace) -> Json:
    from model_store.library import open_library
    from service.audit.config import read_audit
    from service.audit.run import load_images, run_audit
    from service.cpu import usable_cores
    from service.engine.base import EngineRejected
    from service.engine.factory import resolve_device
    from service.settings import read_settings

    try:
        device = str(resolve_device(given.device))
    except EngineRejected as error:
        raise AuditRejected(str(error)) from None
    threads = given.threads or usable_cores()
    asked = read_audit({**request_of(given), "data": given.data and Path(given.data).name})
    library = open_library(given.library or read_settings({}).library)
    outside = open_library(given.outside) if given.outside else None
    data: LabelledImages = load_images(asked, library, Path(given.data) if given.data else None, threads)
    print(f"library {library.digest[:12]}, {len(library.tickets)} tickets; {len(data)} images: {data.origin}")
    print(f"device {device}, {threads} cores, seed {asked.seed}, profile {asked.profile}")
    with ProgressBar() as shown:
        return run_audit(
            given.out,
            asked,
            library,
            data,
            device=device,
            url=given.service,
            key=given.key,
            proxy=given.proxy,
            outside=outside,
            emit=shown.tell,
            threads=threads,
        )


class ProgressBar:
    """The progress bar: one line a finished attack or check, and how long it will take."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self.task = self.bar.add_task("attacks", total=1.0)

    def __enter__(self) -> "ProgressBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, event: Json) -> None:
        if event["event"] == "step":
            self.line(f"{100 * event['accuracy']:5.1f} %  {event['id']}")
            left = f"attacks, about {event['seconds_left'] / 60:.0f} min left"
            self.bar.update(self.task, completed=event["share"], description=left)
        elif event["event"] == "check":
            self.line(f"check {event['id']:2d} {event['outcome']:7s} {event['name']}: {event['value']}")
        elif event["event"] == "cost":
            self.line(f"{event['attacks']} attacks and 34 checks, about {event['seconds'] / 60:.0f} min")

    def line(self, text: str) -> None:
        """One line whatever the width, for logs of CI pipelines."""
        self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


# A running service


def remote(given: argparse.Namespace) -> Json:
    """Starts an audit on the admin plane and waits for its report."""
    import httpx

    from service.outbound import ProxyRejected, http_client

    token = given.token_file.read_text(encoding="utf-8", errors="replace").strip() if given.token_file else ""
    if not token.isascii():
        raise AuditRejected(f"{given.token_file}: not an admin token")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with http_client(timeout_s=60, proxy=given.proxy, base_url=given.url, headers=headers) as client:
            return waited(client, given)
    except ProxyRejected as error:
        raise AuditRejected(str(error)) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AuditError(f"{given.url}: {type(error).__name__}: {error}; is the admin plane there?") from None


def waited(client: Any, given: argparse.Namespace) -> Json:
    asked = {**request_of(given), **({"data": given.data} if given.data else {})}
    job = answered(client.post("/admin/audits", json=asked))
    print(f"audit {job['id']}: about {job['cost']['seconds'] / 60:.0f} min")
    seen = 0
    with ProgressBar() as shown:
        while (state := answered(client.get(f"/admin/audits/{job['id']}")))["state"] in ("queued", "running"):
            seen = followed(client, job["id"], seen, shown)
            time.sleep(AGAIN_S)
    if state["state"] != "done":
        raise AuditError(f"audit {job['id']}: {state['state']}: {state.get('why', '')}")
    report = answered(client.get(f"/admin/audits/{job['id']}/report.json"))
    keep(given.out, report, client.get(f"/admin/audits/{job['id']}/report").text)
    return report


def followed(client: Any, name: str, seen: int, shown: ProgressBar) -> int:
    """Shows what the audit tells until it ends, or is silent for too long; how much has been shown by then."""
    import httpx

    with suppress(httpx.TimeoutException), client.stream("GET", f"/admin/audits/{name}/events") as answer:
        if answer.is_error:
            answer.read()
            answered(answer)
        told = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        for place, text in enumerate(told):
            event = json.loads(text)
            if place >= seen and "event" in event:  # the last one is the state, asked for anew
                shown.tell(event)
                seen = place + 1
    return seen


def keep(folder: Path, report: Json, page: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    write_atomically(folder / "report.html", page)


def answered(response: Any) -> Json:
    try:
        found = response.json()
    except ValueError:
        raise AuditError(f"{response.url}: {response.status_code}, and no JSON: not an admin plane") from None
    if response.is_error:
        raise AuditError(f"{response.url}: {response.status_code}: {found.get('error', found)}")
    return dict(found)


# Reports that are there


def read_report(path: Path) -> Json:
    """Raises AuditError if it is no report, or has been changed since it was written."""
    from service.audit.report.summary import digest_holds

    try:
        report: Json = json.loads(path.read_text(encoding="utf-8"))
        holds = digest_holds(report)
    except (OSError, ValueError, AttributeError) as error:
        raise AuditError(f"{path}: not a report of an audit ({error!r:.100})") from None
    if not holds:
        raise AuditError(f"{path}: its digest does not hold: no report, or one that was changed")
    return report


def run_tables(path: Path, folder: Path, into: Path | None) -> int:
    from service.audit.report.markdown_report import section, write_figures, write_into

    report = read_report(path)
    seen_from = into.resolve().parent if into else Path.cwd()
    text = section(report, Path(os.path.relpath(folder.resolve(), seen_from)).as_posix())
    if into is None:
        print(text)
    else:
        write_into(into, text)
        print(f"{into}: table and figures of report {report['digest'][:12]}")
    for written in write_figures(report, folder):
        print(f"written: {written}", file=sys.stderr)
    return 0


def run_compare(first: Path, second: Path) -> int:
    from service.audit.report.summary import compare

    found = compare(read_report(first), read_report(second))
    for name, pair in found["changed"].items():
        print(f"{name}: {pair[0]} -> {pair[1]}")
    for name, row in found["systems"].items():
        for kind, change in row.items():
            print(f"{name:24s} {kind:7s} {said(change)}")
    return 0


def said(change: Json | None) -> str:
    if change is None:
        return "other images: not paired"
    value, low, high = (100 * change[name] for name in ("value", "low", "high"))
    return f"{value:+.2f} points [{low:+.2f}, {high:+.2f}]"
