"""Whole audits: what repeats, what resumes, what is refused, and which defences the checks see through."""

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_store.json_object import Json
from model_store.library import write_library
from model_store.policy import expected_size, inclusion_probabilities
from service.audit import baselines, stats
from service.audit.attack_runner import AuditRun, Outcome, RunOptions, converged, is_shared
from service.audit.attacks import eot
from service.audit.attacks.autoattack import AutoAttackConfig
from service.audit.attacks.eot import PgdConfig
from service.audit.checks import attacks, base, model, planted, run
from service.audit.checks.base import CheckContext, CheckResult
from service.audit.command import BELOW, INVALID, conclude
from service.audit.config import Audit, Step
from service.audit.cost import multiply_adds_of
from service.audit.epsilons import epsilons_of
from service.audit.errors import AuditRejected, DataRejected
from service.audit.evaluation import draws
from service.audit.evaluation.members import candidates_of
from service.audit.events import Event
from service.audit.plan import attacks_of, images_of, plan
from service.audit.profiles import PROFILES, SHARED
from service.audit.report import html_report
from service.audit.report.markdown_report import MARKS
from service.audit.report.model import Check, Interval, Report, digest_holds
from service.audit.report.plots import Example, all_figures
from service.audit.report.summary import compare, contributions, verdict, words
from service.audit.report.verdicts import headline
from service.audit.run import load_images, run_audit
from tests.support.audit_models import DIGITS, Quantised, Scaled, faint_digits, run_on, tiny, undefended
from tests.support.tickets import items, make_ticket
from tombola.cli import main

pytestmark = pytest.mark.usefixtures("quick_audits")
SMALL = Audit("smoke", epsilons=(0.0, 2.0, 8.0), images=4)
USUAL = epsilons_of(Audit(), 3072)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_commit() -> Iterator[None]:
    """A report's digest covers the commit of the code, which another hand may move between two audits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOMBOLA_COMMIT", "0" * 40)
        yield


def compared_of(library: Any, candidates: Any) -> list[Any]:
    rivals = baselines.claimed_rivals(candidates, baselines.strengths(library))
    return baselines.compared_systems(candidates, rivals)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audits")


@pytest.fixture(scope="module")
def library(folder: Path) -> Any:
    return tiny(folder / "library")


@pytest.fixture(scope="module")
def report(folder: Path, library: Any) -> Json:
    """A smoke audit of four random tickets on images that they label themselves."""
    torch.set_num_threads(1)
    return run_audit(folder / "first", SMALL, library, load_images(SMALL, library, None)).as_json()


def without_timings(report: Json) -> Json:
    return {name: value for name, value in report.items() if name != "timings"}


def test_a_smoke_audit_is_whole(report: Json) -> None:
    assert digest_holds(report)
    assert len(report["checks"]) == 36
    assert [row["id"] for row in report["checks"]] == list(range(1, 37))
    assert not report["failed"], [row for row in report["checks"] if row["outcome"] == "fail"]
    assert {"tombola", "mean-of-all", "best-ticket", "fixed-equal-cost", "r2s resnet18", "r2s resnet34"} == set(
        report["systems"]
    )
    assert "no measure of accuracy" in report["data"]["origin"]


def test_the_figures_follow_from_the_definitions(report: Json) -> None:
    for name, system in report["systems"].items():
        robust, per_image = system["robust"], report["per_image"][name]["robust"]
        assert robust["expected"]["value"] == pytest.approx(np.mean(per_image), abs=1e-5)
        assert robust["tries"]["k10"]["value"] == pytest.approx(np.mean(np.array(per_image) ** 10), abs=1e-4)
        assert robust["majority"]["value"] == np.mean(np.array(per_image) > 0.5)
        assert robust["no_failing_draw"]["value"] <= robust["tries"]["k100"]["value"] + 1e-6
        assert robust["expected"]["value"] <= system["clean"]["expected"]["value"]


def test_the_attack_bites(report: Json) -> None:
    """The labels are the ensemble's own most frequent answers, so that epsilon 8/255 must cost something."""
    ours = report["systems"]["tombola"]
    assert ours["clean"]["expected"]["value"] > 0.1
    assert ours["robust"]["expected"]["value"] < ours["clean"]["expected"]["value"]


def test_another_attackers_seed_leaves_the_defender_alone(report: Json, library: Any, folder: Path) -> None:
    one, other = (
        AuditRun(folder / "unused", Audit("smoke", images=4, seed=s), library, faint_digits(4)) for s in (0, 1)
    )
    for system in one.systems:
        assert torch.equal(one.scoring(system).rows, other.scoring(system).rows)
        assert torch.equal(one.clean(system).right, other.clean(system).right)
    step = one.steps[-1]
    assert one.key_of(step) != other.key_of(step)


def test_a_finished_attack_is_never_run_again(report: Json, folder: Path, library: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(AuditRun, "run", lambda *_: pytest.fail("an attack ran again"))
    assert run_audit(folder / "first", SMALL, library, load_images(SMALL, library, None)).digest == report["digest"]


def test_an_interrupted_audit_goes_on_where_it_was(
    report: Json, folder: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, cut off after five attacks: the rest alone is run, and the report is the same to the digest,
    as with equal seeds it must be."""
    events: list[Event] = []

    def cut(event: Event) -> None:
        events.append(event)
        if sum(e.event == "step" for e in events) == 5:
            raise KeyboardInterrupt

    data = load_images(SMALL, library, None)
    with pytest.raises(KeyboardInterrupt):
        run_audit(folder / "cut", SMALL, library, data, emit=cut)
    ran: list[Step] = []
    uncounted = AuditRun.run

    def counted(run: AuditRun, step: Step) -> Any:
        ran.append(step)
        return uncounted(run, step)

    monkeypatch.setattr(AuditRun, "run", counted)
    resumed = run_audit(folder / "cut", SMALL, library, data).as_json()
    assert resumed["digest"] == report["digest"]
    assert without_timings(resumed) == without_timings(report)
    repeated = 1  # check 32 runs one attack again to compare
    assert len(ran) == len(report["attacks"]) - 5 + repeated


def test_a_stored_check_is_judged_anew_once_its_code_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is changed, or a file more; a second run of the same code takes what is stored."""
    audited, judged = run_on(undefended(), tmp_path, Audit("smoke", images=2, attacks=("fgsm",)), 2), list[int]()

    def judge(_: CheckContext) -> CheckResult:
        judged.append(1)
        return CheckResult(True, f"judged {len(judged)} times")

    assert all(source.exists() for source in run.SOURCES)
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(run, "CHECKS", (base.Check(1, "name", "criterion", hard=True, least="smoke", run=judge),))
    monkeypatch.setattr(run, "SOURCES", (sources,))
    for name, text in (("one.py", "LIMIT = 1"), ("one.py", "LIMIT = 2"), ("two.py", "")):
        (sources / name).write_text(text)
        run.digest_of_code.cache_clear()
        first, second = (run.run_checks(audited)[0]["value"] for _ in range(2))
        assert first == second == f"judged {len(judged)} times"
    assert len(judged) == 3


def test_the_page_needs_nothing_but_itself(report: Json, folder: Path) -> None:
    audited = (folder / "first/report.html").read_text(encoding="utf-8")
    measured = Report.model_validate(labelled_by_others(report))
    for page in (audited, html_report.render(measured, all_figures(measured), [])):
        assert page.startswith("<!doctype html>")
        assert "<script" not in page
        assert 'src="http' not in page
        assert "@import" not in page
        for row in report["checks"]:
            assert escape(row["name"]) in page
    assert audited.count('<img src="data:image/png') == 3 * 4
    assert page.count("<svg") >= 3
    assert "upper bound" in page


def labelled_by_others(report: Json) -> Json:
    """The same report, as if its images had been somebody's."""
    return {**report, "data": {**report["data"], "name": "digits"}}


def test_images_that_the_ensemble_labels_itself_give_no_figures(report: Json, folder: Path) -> None:
    page = (folder / "first/report.html").read_text(encoding="utf-8")
    assert "Not a measurement" in page
    assert "<svg" not in page
    assert not re.search(r"\d\.\d %", page.partition("<main>")[0])  # no accuracy above the checks
    assert headline(Report.model_validate(report)).startswith("not a measurement")
    assert headline(Report.model_validate(labelled_by_others(report))).startswith("Accuracy under the attacks run")


def test_names_from_a_library_cannot_break_the_page(report: Json) -> None:
    text = json.dumps(labelled_by_others(report)).replace("generated smooth colours", "<script>alert(1)</script>")
    evil = Report.model_validate_json(text.replace("resnet18-20", "<b onclick=x>"))
    page = html_report.render(evil, {}, [Example("<i>", 1, 0, ('a"onerror=x', "", ""))])
    for markup in ("<script>", "<b onclick", "<i>", '"onerror'):
        assert markup not in page
    assert "&lt;script&gt;" in page


def test_two_reports_compare(report: Json) -> None:
    first = Report.model_validate(report)
    same = compare(first, first)
    assert same.paired
    assert not same.changed
    assert same.systems["tombola"].robust == Interval(value=0, low=0, high=0)
    worse = json.loads(json.dumps(report))
    worse["per_image"]["tombola"]["clean"] = [0.0] * 4
    change = compare(first, Report.model_validate(worse)).systems["tombola"].clean
    assert change is not None
    assert change.value < 0
    other = json.loads(json.dumps(report))
    other["data"]["ids_digest"] = "0" * 64
    assert compare(first, Report.model_validate(other)).systems["tombola"].robust is None


def test_words_are_said_only_where_the_interval_says_them() -> None:
    assert words(stats.Interval(0.1, 0.01, 0.2), 0.01, randomness=True) == "randomisation helps"
    assert words(stats.Interval(-0.1, -0.2, -0.01), 0.01, randomness=True).startswith("randomisation does not help")
    assert words(stats.Interval(0.1, -0.01, 0.2), 0.2, randomness=True).startswith("no difference shown")
    assert words(stats.Interval(0.1, 0.01, 0.2), 0.2, randomness=True).endswith("p = 0.20 after Holm's correction")


# The command


def command(*arguments: str) -> int:
    return main(["audit", *arguments])


def test_the_command_audits_and_gates(report: Json, folder: Path, library: Any, capsys: Any) -> None:
    """--out is the first audit's folder: everything is there already."""
    words = ["--profile", "smoke", "--images", "4", "--epsilons", "0", "2", "8", "--threads", "1"]
    words += ["--out", str(folder / "first"), str(library.path)]
    assert command(*words) == 0
    assert report["digest"][:12] in capsys.readouterr().out
    assert command(*words, "--fail-under", "1.0") == INVALID  # the ensemble's own labels are no measurement
    ended = Report.model_validate(labelled_by_others(report))
    assert conclude(ended, None) == conclude(ended, 0.0) == 0
    assert conclude(ended, 1.0) == BELOW
    assert conclude(ended.model_copy(update={"verdict": "invalid"}), None) == INVALID
    capsys.readouterr()
    first = str(folder / "first/report.json")
    assert command("--compare", first, first) == 0
    assert "+0.00 points" in capsys.readouterr().out


def test_the_readme_s_table_and_figures_are_made_from_a_report(
    report: Json, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert command("--tables", str(folder / "first/report.json"), "--out", str(tmp_path / "figures")) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == len(report["systems"]) + 1  # and one row for the attacks on ours alone
    assert report["digest"][:12] in shown
    made = tmp_path / "figures"
    assert {path.name for path in made.iterdir()} == {"report.json", "transfer.svg", "accuracy.svg"}
    assert json.loads((made / "report.json").read_text())["digest"] == report["digest"]
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKS[0]}\nto be replaced\n{MARKS[1]}\nafter\n")
    assert command("--tables", str(made / "report.json"), "--out", str(made), "--into", str(page)) == 0
    text = page.read_text("utf-8")
    assert text.startswith(f"before\n{MARKS[0]}\n| System")
    assert text.endswith(f"{MARKS[1]}\nafter\n")
    assert "to be replaced" not in text
    assert "](figures/accuracy.svg)" in text
    assert "The paper reports" in text
    own = f"<!-- audit: tombola audit --tables {(made / 'report.json').as_posix()} -->"
    page.write_text(f"{MARKS[0]}\nanother's\n{MARKS[1]}\n{own}\nto be replaced\n{MARKS[1]}\n")
    assert command("--tables", str(made / "report.json"), "--out", str(made), "--into", str(page)) == 0
    text = page.read_text("utf-8")
    assert text.startswith(f"{MARKS[0]}\nanother's\n{MARKS[1]}\n{own}\n| System")
    assert "to be replaced" not in text
    assert "The paper reports" not in text
    page.write_text("no marks")
    assert command("--tables", str(made / "report.json"), "--out", str(made), "--into", str(page)) == 2
    capsys.readouterr()
    changed = {**report, "verdict": "perfect"}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert command("--tables", str(tmp_path / "changed.json")) == 2
    assert "digest does not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--profile", "quick"], "expected one of smoke, standard, full, reference"),
        (["--profile", "standard"], "needs labelled images"),
        (["--profile", "smoke", "--epsilons", "0.03"], "8 is 8/255"),
        (["--profile", "smoke", "--data", "nothing.zip"], "no such file"),
        (["--profile", "smoke", "--attacks", "square-queries"], "does not run it; it has fgsm"),
        (["--profile", "smoke", "--device", "nothing"], "device nothing: torch cannot use"),
        (["--compare", "a", "b"], "not a report of an audit"),
        (["--profile", "smoke", "--format", "pdf"], "expected one of json, junit, sarif, md, card, html"),
        (["--profile", "smoke", "--model", "os:getcwd"], "library and model were given"),
        (["--profile", "smoke", "--admin-url", "http://127.0.0.1:1"], "ConnectError"),
        (["--profile", "smoke", "--admin-url", "nowhere"], "is the admin plane there?"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], text: str, library: Any, tmp_path: Path, capsys: Any) -> None:
    assert command(*words, "--threads", "1", "--out", str(tmp_path / "out"), str(library.path)) == 2
    assert text in capsys.readouterr().err


def test_the_configured_library_is_the_one_that_is_audited(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TOMBOLA_LIBRARY", str(library.path))
    words = ["--profile", "smoke", "--data", "nothing.zip", "--threads", "1", "--out", str(tmp_path / "out")]
    assert command(*words) == 2  # after the library was opened
    monkeypatch.setenv("TOMBOLA_LIBRARY", str(tmp_path / "nothing"))
    capsys.readouterr()
    assert command(*words) == 2
    assert capsys.readouterr().err.startswith(f"tombola: {tmp_path}/nothing: no such folder")


def test_generated_images_are_for_smoke_alone(library: Any) -> None:
    with pytest.raises(DataRejected, match="needs labelled images"):
        load_images(Audit("standard"), library, None)


# Plans and costs


def test_every_profile_knows_its_cost_and_grows(library: Any, folder: Path) -> None:
    costs = []
    for profile in ("smoke", "standard", "full"):
        audit = Audit(profile)
        candidates = candidates_of(library)
        steps = plan(audit, epsilons_of(audit, 3072), candidates, compared_of(library, candidates))
        assert len({step.id for step in steps}) == len(steps)
        assert all(step.images <= images_of(audit) for step in steps)
        costs.append(sum(AuditRun(folder / "unused", audit, library, faint_digits(2)).costs))
    assert costs == sorted(costs)
    assert costs[1] > 10 * costs[0]


def test_each_norm_has_sizes_of_its_own(library: Any) -> None:
    """8/255 of l2 length is a hundredth of a grey level: nothing would be attacked, and all would look robust."""
    candidates = candidates_of(library)
    for norm, usual, unbounded in (("linf", 8.0, 255.0), ("l2", 128.0, 255 * 3072**0.5)):
        audit = Audit("standard", norm=norm)  # type: ignore[arg-type]
        epsilons = epsilons_of(audit, 3072)
        assert epsilons.headline == usual
        steps = plan(audit, epsilons, candidates, compared_of(library, candidates))
        assert max(step.epsilon for step in steps) == unbounded
        assert {step.epsilon for step in steps} >= set(epsilons.swept) - {0.0}


def test_what_all_systems_face_is_the_same_for_all(library: Any) -> None:
    """Comparisons count stages 0 to 2: the same attacks with the same settings on every compared system."""
    candidates = candidates_of(library)
    compared = compared_of(library, candidates)
    for profile in PROFILES:
        if profile in ("standard", "full"):
            margins = [s for _, s in PROFILES[profile].shared if isinstance(s, PgdConfig) and s.loss == "hinge"]
            assert margins
            assert all(each.restarts >= 2 for each in margins)  # starts of their own, before the refinement
            assert {s.temperature for _, s in PROFILES[profile].shared if isinstance(s, PgdConfig)} == {0.1, 1.0, 10.0}
        steps = [step for step in plan(Audit(profile), USUAL, candidates, compared) if step.stage <= SHARED]
        faced = {
            system.name: {(s.name, s.epsilon, s.settings, s.warm) for s in steps if s.system == system.name}
            for system in compared
        }
        assert len({frozenset(attacks) for attacks in faced.values()}) == 1
        assert faced["tombola"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["smoke", "standard", "full", "reference"])
def test_a_profile_runs_the_attacks_that_it_says_it_has(name: Any, norm: Any, library: Any) -> None:
    candidates = candidates_of(library)
    audit = Audit(name, norm=norm)
    steps = plan(audit, epsilons_of(audit, 3072), candidates, compared_of(library, candidates))
    assert {step.name for step in steps} == set(attacks_of(PROFILES[name], norm))


def test_single_network_attacks_count_for_no_comparison(library: Any, folder: Path) -> None:
    """FGSM and PGD-20 are aimed at the best ticket and at dense networks, and at none of the random systems."""
    run = AuditRun(folder / "unused", Audit("standard"), library, faint_digits(2))
    counted = [step for step in run.steps if is_shared(step) and step.epsilon == 8]
    best = run.system("best-ticket").used
    alone = {baselines.single(run.candidates, index).name for index in best}
    assert {step.name for step in run.steps if step.system in alone} == {"fgsm", "pgd-20"}
    assert not [step for step in counted if step.system in alone]
    aimed = {system.name: sum(step.system == system.name for step in counted) for system in run.systems}
    assert len(set(aimed.values())) == 1


def test_a_dense_rival_costs_what_a_draw_costs(tmp_path: Path) -> None:
    tickets = [make_ticket("resnet18", density, seed=place) for place, density in enumerate((0.2, 0.3, 0.4, 0.5))]
    dense = [make_ticket("resnet18", 1.0, seed=5), make_ticket("resnet34", 1.0, seed=6)]
    path = tmp_path / "library"
    both = write_library(path, classes=DIGITS, data="random", tickets=items(tickets), baselines=items(dense))
    candidates, each = candidates_of(both), multiply_adds_of(both)
    draw = expected_size(both.policy)
    (rival,) = baselines.dense_at_equal_cost(candidates, [each[0]] * 4 + [int(each[0] * draw / 2)] * 2)
    assert rival.used == (4, 5)
    assert "at 100 % of what one draw costs" in rival.about
    assert baselines.dense_at_equal_cost(candidates, [each[0]] * 4 + [each[0] * 5] * 2) == []


def test_the_reference_profile_runs_autoattack_as_its_authors_publish_it(library: Any) -> None:
    """Standard: APGD-CE and APGD-T of 100 steps, FAB-T with nine targets, Square with 5,000 queries. Rand: CE, DLR."""
    candidates = candidates_of(library)
    compared = compared_of(library, candidates)
    steps = plan(Audit("reference"), USUAL, candidates, compared)
    for system in ("best-ticket", "mean-of-all"):
        ran = {s.name: s.settings for s in steps if s.system == system and isinstance(s.settings, AutoAttackConfig)}
        assert {name: (each.iterations, each.restarts) for name, each in ran.items()} == {
            "apgd-ce": (100, 1),
            "apgd-t": (100, 1),
            "fab-t": (100, 1),
            "square": (5000, 1),
        }
        assert ran["apgd-t"].targets == ran["fab-t"].targets == 9
    rand = {s.name for s in steps if s.system == "tombola" and isinstance(s.settings, AutoAttackConfig)}
    assert rand == {"apgd-ce", "apgd-dlr"}


def test_a_chosen_attack_is_the_only_one(library: Any) -> None:
    candidates = candidates_of(library)
    audit = Audit("standard", attacks=("arc", "fgsm"))
    steps = plan(audit, epsilons_of(audit, 3072), candidates, compared_of(library, candidates))
    assert {step.name for step in steps} == {"arc", "fgsm"}


@pytest.mark.parametrize(
    ("audit", "missing"),
    [
        (Audit("smoke", attacks=("fgsm", "arc")), "arc"),
        (Audit("standard", attacks=("square-queries",), norm="l2"), "square-queries"),
    ],
)
def test_an_attack_that_was_asked_for_is_refused_where_it_would_not_run(
    audit: Audit, missing: str, library: Any
) -> None:
    """An audit of nothing would report the clean accuracy as what the attacks left."""
    candidates = candidates_of(library)
    with pytest.raises(AuditRejected, match=f"'{missing}': profile {audit.profile} in {audit.norm} does not run it"):
        plan(audit, epsilons_of(audit, 3072), candidates, compared_of(library, candidates))


def test_some_attacks_alone_head_the_report_with_a_warning(report: Json) -> None:
    assert verdict([], partial=True)["verdict"] == "warnings"
    measured = labelled_by_others(report)
    some = {**measured, "verdict": "warnings", "audit": {**report["audit"], "attacks": ["fgsm"]}}
    assert "Only chosen attacks ran: fgsm" in html_report.render(Report.model_validate(some), {}, [])
    assert "(of them only fgsm)" in headline(Report.model_validate(some))
    assert "only" not in headline(Report.model_validate(measured))


def test_a_choice_of_tickets_makes_a_matrix_of_their_own(report: Json, library: Any, folder: Path) -> None:
    chosen = ("resnet18-50", "resnet34-20")
    audit = Audit("smoke", attacks=("fgsm",), tickets=chosen, epsilons=(8.0,), images=4)
    some = run_audit(folder / "some", audit, library, load_images(audit, library, None)).as_json()["transfer"]
    whole = report["transfer"]
    places = [whole["names"].index(name) for name in chosen]
    assert some["names"] == list(chosen)
    assert some["accuracy"] == [[whole["accuracy"][i][j] for j in places] for i in places]
    assert set(some["blocks"]) == {"resnet18 -> resnet34", "resnet34 -> resnet18"}
    with pytest.raises(AuditRejected, match="'resnet18-51'; expected some of resnet18-20"):
        AuditRun(folder / "unused", Audit("smoke", tickets=("resnet18-51",)), library, faint_digits(2))


def test_an_attackers_own_networks_are_attacked_and_tried_but_never_compared(
    report: Json, library: Any, folder: Path
) -> None:
    theirs = tiny(folder / "theirs", ("resnet18",), (0.3,))
    with_surrogate = run_audit(
        folder / "outside", SMALL, library, load_images(SMALL, library, None), RunOptions(outside=theirs)
    ).as_json()
    name = f"{theirs.digest[:6]}/resnet18-30"
    assert with_surrogate["library"]["outside"] == {"digest": theirs.digest, "members": [name]}
    assert set(with_surrogate["systems"]) == set(report["systems"])
    (row,) = [row for row in with_surrogate["attacks"] if row["system"] == f"outside {name}"]
    assert (
        with_surrogate["systems"]["tombola"]["robust"]["expected"]["value"] <= row["tombola"] + 1e-6
    )  # it counts on ours
    assert with_surrogate["transfer"]["names"] == [*report["transfer"]["names"], name]
    assert with_surrogate["transfer"]["diagonal"] == report["transfer"]["diagonal"]
    two = items([make_ticket("resnet18", 0.5, classes=2)])
    others = write_library(folder / "others", classes=("cat", "dog"), data="random", tickets=two)
    with pytest.raises(AuditRejected, match="expected the library's own"):
        AuditRun(folder / "unused", SMALL, library, faint_digits(2), RunOptions(outside=others))


# Defences that only look strong


def context_of(network: nn.Module, folder: Path) -> CheckContext:
    return CheckContext(run_on(network, folder, Audit("smoke", images=12), 12))


def test_the_undefended_network_raises_no_flag_and_falls(tmp_path: Path) -> None:
    context = context_of(undefended(), tmp_path)
    assert model.no_zero_gradients(context).ok
    assert model.right_gradients(context).ok
    left = context.right(context.attack(model.PROBE, "probe").images)
    assert float(left.mean()) <= 0.01


def test_saturated_logits_raise_the_flags(tmp_path: Path) -> None:
    context = context_of(Scaled(undefended(), 1e4), tmp_path)
    assert model.no_zero_gradients(context).ok is False
    assert attacks.output_range(context).ok is False


def test_what_all_logits_share_is_no_lead(tmp_path: Path) -> None:
    """Softmax takes no notice of the same number on every logit."""
    reading = attacks.output_range(context_of(undefended(), tmp_path / "as it is")).value
    shifted = attacks.output_range(context_of(Shifted(), tmp_path / "shifted")).value
    saturated = attacks.output_range(context_of(Scaled(undefended(), 1e4), tmp_path / "saturated")).value
    assert (lead := lead_of(reading)) == pytest.approx(lead_of(shifted), abs=0.1)
    assert lead < attacks.LARGEST_LEAD < lead_of(saturated)


class Shifted(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = undefended()(images)
        return logits - 75


def lead_of(reading: str) -> float:
    return float(reading.split("largest lead of a class ")[1].split(";")[0])


def test_quantised_inputs_raise_the_flags(tmp_path: Path) -> None:
    """No gradient at all: the white box finds nothing, Square does, and both checks say so."""
    context = context_of(Quantised(undefended(), 64), tmp_path)
    assert model.no_zero_gradients(context).ok is False
    square = Audit("standard", attacks=("eot-mean-loss", "square"), images=12)
    run = run_on(Quantised(undefended(), 64), tmp_path / "square", square, 12)
    run.steps = [s for s in run.steps if s.system == "tombola" and s.epsilon == 8 and s.name in square.attacks][:1] + [
        s for s in run.steps if s.name == "square"
    ]
    run.costs = [1.0] * len(run.steps)
    run.attack()
    finding = attacks.below_black_box(CheckContext(run))
    assert finding.ok is False, finding.value
    assert not finding.warn


@pytest.mark.parametrize("hidden", [False, True])
def test_a_black_box_that_comes_nearer_than_the_white_box_is_noticed(hidden: bool, tmp_path: Path) -> None:
    network = Quantised(undefended(), 64) if hidden else undefended()
    audit = Audit("standard", attacks=("eot-mean-loss", "hopskipjump-queries"), images=4)
    run = run_on(network, tmp_path, audit, 4)
    ours = [step for step in run.steps if step.system == "tombola" and step.epsilon == 8]
    kept = {step.name: step for step in reversed(ours)}  # of the ones that average answers, the first: here all agree
    run.steps, run.costs = list(kept.values()), [1.0] * len(kept)
    run.attack()
    context = CheckContext(run)
    nearest = context.attacks("hopskipjump-queries")[0].extra["nearest"]
    assert len(nearest) == 4
    assert all(1 <= size <= 255 and right < 0.5 for size, right in nearest)
    finding = attacks.below_hard_label(context)
    assert finding.ok is not hidden, finding.value
    least = attacks.least_epsilons(context, 4)
    which = torch.arange(4)
    if hidden:
        assert all(size < white for (size, _), white in zip(nearest, least.tolist(), strict=True))
        return
    for size in sorted(set(least.tolist())):
        at = which[least == size]
        assert attacks.fools_most_draws(context, at, size).all()
        assert not attacks.fools_most_draws(context, at, size - 1).any()


def test_chance_is_switched_on_again_step_by_step(library: Any, folder: Path) -> None:
    run = AuditRun(folder / "known", Audit("full", attacks=("eot-mean-loss",), images=8), library, faint_digits(8))
    run.known = run.known[:2]
    names = {"tombola", *(theta.name for theta in run.known)}
    run.steps = [step for step in run.steps if step.system in names and step.epsilon == 8]
    run.costs = [1.0] * len(run.steps)
    run.attack()
    finding = attacks.known_theta(CheckContext(run))
    assert finding.ok, finding.value
    assert all(f"{count}: " in finding.value for count in (4, 16, 256))


def test_where_no_draw_fails_every_image_made_for_the_system_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three draws score. A member that none of them holds misreads an attacked image: the states that hold it fail."""
    monkeypatch.setattr(draws, "SCORING_DRAWS", 3)
    structures = ("resnet18", "resnet34", "wideresnet32", "wideresnet38")
    many = tiny(tmp_path / "many", structures, (0.2, 0.3, 0.4, 0.5))
    run = AuditRun(tmp_path / "run", Audit("smoke", images=2), many, faint_digits(2))
    ours, labels = run.systems[0], run.data.labels
    unseen = int((run.scoring(ours).rows.sum(dim=0) == 0).nonzero()[0])
    run.clean_logits = torch.nn.functional.one_hot(labels, 10).float().expand(16, 2, 10).clone()
    attacked = run.clean_logits.clone()
    attacked[unseen, 0] = torch.roll(attacked[unseen, 0], 1) * 100
    step = next(step for step in run.steps if step.system == "tombola" and step.epsilon == 8)
    run.outcomes = [Outcome(step, run.data.pixels, attacked, {}, {}, 0, 0.0)]
    assert run.scores(ours, run.outcomes[0]).right.tolist() == [1, 1]
    reported = run.reported(ours, 2)
    assert reported.right[0] == pytest.approx(1 - inclusion_probabilities(ours.policy)[unseen])
    assert reported.right[1] == 1
    assert reported.any_wrong.tolist() == [True, False]


def test_convergence_is_asked_of_each_attack_the_smoothed_risk_too(tmp_path: Path) -> None:
    """The old check took the best attack and left the risk out, whose loss sets the headline."""
    context = context_of(undefended(), tmp_path)
    steps = {step.name: step for step in context.run.steps if step.system == "tombola" and step.epsilon == 8}

    def finding(**shares: float) -> CheckResult:
        context.run.outcomes = [
            Outcome(
                steps[name.replace("_", "-")],
                context.run.data.pixels,
                context.run.clean_logits,
                {},
                {"converged": share},
                0,
                0,
            )
            for name, share in shares.items()
        ]
        return attacks.convergence(context)

    assert finding(eot_mean_loss=1.0, eot_risk=0.96).ok
    assert finding(eot_mean_loss=1.0, eot_risk=0.81).ok is False
    assert finding(eot_mean_loss=0.9, eot_risk=1.0).ok is False


def test_a_loss_that_changes_on_the_way_is_judged_by_its_risk() -> None:
    risks = torch.cat([torch.linspace(0, 1, 12), torch.ones(10)])[:, None].double()
    losses = torch.linspace(0, 1, 22)[:, None]
    still = eot.AttackResult(torch.zeros(1), torch.tensor([0.9]), risks, losses, 0)
    assert converged(still, PgdConfig("mean-loss")) == 0
    assert converged(still, PgdConfig("risk")) == 1


def test_planted_examples_are_found_unless_gradients_are_masked(tmp_path: Path) -> None:
    assert planted.planted_examples(context_of(undefended(), tmp_path / "open")).ok
    masked = planted.planted_examples(context_of(Quantised(undefended(), 64), tmp_path / "masked"))
    assert masked.ok is False, masked.value


def test_small_random_steps_move_the_loss_of_a_ragged_network_most(tmp_path: Path) -> None:
    moves = []
    for name, network in (("flat", Scaled(undefended(), 0.0)), ("smooth", undefended()), ("ragged", ragged())):
        context = context_of(network, tmp_path / name)
        moves.append(attacks.jitter(context, context.images, context.labels))
    assert moves[0] == 0
    assert moves[0] < moves[1] < moves[2]
    assert moves[2] > 0.1


def ragged() -> nn.Module:
    return Quantised(undefended(), 6)


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    network = undefended()
    context = context_of(network, tmp_path)
    assert model.no_side_effects(context).ok
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.bias[0] += 1e-3
    try:
        assert model.no_side_effects(context).ok is False
    finally:
        last.bias[0] -= 1e-3


def test_an_image_outside_the_ball_is_noticed(tmp_path: Path) -> None:
    context = context_of(undefended(), tmp_path)
    step = next(step for step in context.run.steps if step.epsilon == 8)
    pixels = context.run.data.pixels.clone()
    pixels[0, 0, 0, 0] += 9
    context.run.outcomes = [Outcome(step, pixels, context.run.clean_logits, {}, {}, 0, 0.0)]
    assert model.feasible(context).ok is False


def test_a_black_box_on_few_images_leaves_the_others_their_power(tmp_path: Path) -> None:
    audited = run_on(undefended(), tmp_path, Audit("standard", images=20), 20)
    steps = {step.name: step for step in audited.steps if step.system == "tombola" and step.epsilon == 8}
    for name in ("eot-mean-loss", "square", "square-queries"):
        step = steps[name]
        pixels, logits = audited.data.pixels[: step.images], audited.clean_logits[:, : step.images]
        audited.outcomes.append(Outcome(step, pixels, logits, {}, {}, 0, 0.0))
    assert steps["square-queries"].images < steps["square"].images < 20
    seen = attacks.below_black_box(CheckContext(audited)).seen
    assert seen is not None
    assert seen.images == int((audited.clean(audited.systems[0]).right[: steps["square"].images] >= 0.5).sum())


def test_what_attacks_add_is_what_the_figure_loses_with_them(tmp_path: Path) -> None:
    audit = Audit("standard", images=24, epsilons=(3.0,), attacks=("eot-mean-loss", "mora", "apgd-ce"))
    audited = run_on(undefended(), tmp_path, audit, 24)
    audited.steps = [step for step in audited.steps if step.system == "tombola" and step.epsilon == 3]
    audited.costs = [1.0] * len(audited.steps)
    audited.attack()
    ours = audited.systems[0]
    right = {outcome.step.name: audited.scores(ours, outcome).right for outcome in audited.outcomes}
    right["clean"] = audited.clean(ours).right

    def left(*names: str) -> float:
        return float(torch.stack([right[name] for name in names]).amin(dim=0).mean())

    aimed, others = contributions(audited)
    everything = left("clean", "eot-mean-loss", "mora", "apgd-ce")
    assert (aimed.attacks, others.attacks) == (["mora"], ["apgd-ce"])
    assert aimed.lowers.value == pytest.approx(left("clean", "eot-mean-loss", "apgd-ce") - everything, abs=1e-6)
    assert others.lowers.value == pytest.approx(left("clean", "eot-mean-loss", "mora") - everything, abs=1e-6)


def test_a_hard_failure_makes_the_audit_invalid_and_a_warning_heads_it() -> None:
    def row(outcome: Any) -> Check:
        return Check(id=5, name="name", criterion="criterion", hard=True, outcome=outcome, value="value")

    assert verdict([row("pass")])["verdict"] == "valid"
    assert verdict([row("warn")]) == {"verdict": "warnings", "failed": [], "warned": [5]}
    assert verdict([row("fail"), row("warn")])["verdict"] == "invalid"


def test_a_check_is_judged_by_its_weight(tmp_path: Path) -> None:
    context = context_of(undefended(), tmp_path)

    def judged(ok: bool | None, hard: bool, warn: bool = False, least: Any = "smoke") -> str:
        check = base.Check(1, "name", "criterion", hard, least, lambda _: CheckResult(ok, "value", warn))
        return str(base.evaluate_check(check, context)["outcome"])

    assert judged(True, True) == "pass"
    assert judged(False, True) == "fail"
    assert judged(False, True, warn=True) == "warn"
    assert judged(False, False) == "warn"
    assert judged(None, True) == "skipped"
    assert judged(False, True, least="full") == "skipped"


def test_all_thirty_six_checks_are_there_once() -> None:
    assert [check.id for check in run.CHECKS] == list(range(1, 37))


def test_a_warm_start_comes_from_earlier_stages_alone(library: Any, folder: Path) -> None:
    """So that every system's refined attack starts from the same images, and a key costs one look at each attack."""
    run = AuditRun(folder / "unused", Audit("standard"), library, faint_digits(8))
    warm = [step for step in run.steps if step.warm]
    assert {"eot-risk", "arc"} <= {step.name for step in warm}
    for step in warm:
        assert all(other.stage < step.stage and other.epsilon <= step.epsilon for other in run.before(step))
    refined = [step for step in warm if step.name == "eot-risk" and step.epsilon == 8 and step.stage == SHARED]
    assert len({tuple(run.before(step)) for step in refined}) == 1
    assert [step.stage for step in run.steps] == sorted(step.stage for step in run.steps)
    assert len({run.key_of(step) for step in run.steps}) == len(run.steps)
