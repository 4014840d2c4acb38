"""Laws as a game: matching pennies by hand, the dual as a proof, and the command on an audit's own folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.library import open_library
from service.audit.config import Audit
from service.audit.errors import AuditError
from service.audit.evaluation.threads import WorkerThreads
from service.audit.explore import CHOSEN, SERVED, explore
from service.audit.laws import Game, Law, dual_bound, family, halves_of, keep, menu, prove, rights, solve
from service.audit.report.model import read_report
from service.audit.report.summary import with_digest
from service.audit.run import load_images, run_audit
from tests.support.audit_models import tiny
from tombola.cli import main

pytestmark = pytest.mark.usefixtures("quick_audits")


def test_matching_pennies_are_drawn_evenly() -> None:
    """Two choices, two attacks on each of three images: each attack fools one choice. Half is the best there is."""
    right = np.repeat(np.array([[[True], [False]], [[False], [True]]]), 3, axis=2)
    solution = solve(right)
    assert solution.weights.tolist() == pytest.approx([0.5, 0.5])
    assert solution.value == pytest.approx(0.5)
    assert solution.bound == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_dual_proves_that_no_law_of_the_menu_keeps_more(seed: int) -> None:
    """Against 2,000 random laws, and against the linear program with all its rows at once."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    right = rng.random((7, 5, 12)) < 0.6
    solution = solve(right)
    assert solution.value == pytest.approx(solution.bound, abs=1e-5)
    laws = rng.dirichlet(np.full(7, 0.3), 2000)
    kept = np.einsum("ls,san->lan", laws, right).min(axis=1).mean(axis=1)
    assert kept.max() <= solution.bound + 1e-9
    rows = [np.r_[-right[:, a, i].astype(float), np.eye(12)[i]] for a in range(5) for i in range(12)]
    whole = linprog(
        np.r_[np.zeros(7), np.full(12, -1 / 12)],
        A_ub=np.array(rows),
        b_ub=np.zeros(60),
        A_eq=np.r_[np.ones(7), np.zeros(12)][None],
        b_eq=[1],
        bounds=[(0, None)] * 7 + [(None, 1)] * 12,
    )
    assert solution.value == pytest.approx(-whole.fun, abs=1e-5)


def test_any_mixture_of_attacks_bounds_every_law() -> None:
    """Weak duality by hand: on one image, the attack that fools both of three choices leaves one in three right."""
    right = np.array([[[True]], [[False]], [[False]]])
    assert dual_bound(right, [(0, 0, 1.0)]) == 1.0
    assert dual_bound(right[1:], [(0, 0, 1.0)]) == 0.0
    assert dual_bound(right[1:], []) == 1.0  # what no attack covers counts as right


@pytest.mark.parametrize("seed", range(3))
def test_no_law_over_any_draw_keeps_more_than_is_proved(seed: int) -> None:
    """Against the linear program over all 63 draws at once: the menu has fewer, and its own bound holds for fewer."""
    generator, structures = torch.Generator().manual_seed(seed), ("a", "a", "b", "b", "c", "c")
    logits = torch.randn(5, 6, 14, 3, generator=generator)
    game = Game(logits, torch.randint(0, 3, (14,), generator=generator), (1,) * 6, structures)
    first, second = halves_of(structures)
    rows = (first[:, None] + second[None]).flatten(0, 1)[1:]
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 63
    proved = prove(game, menu(structures, 0)[:6], WorkerThreads())
    whole = solve(rights(game.logits, game.labels, rows).numpy())
    assert proved.draws == 63
    assert whole.value - 1e-6 <= proved.bound <= whole.value + 0.005 + 1e-6
    assert solve(rights(game.logits, game.labels, menu(structures, 0)[:6]).numpy()).bound < whole.value


def test_draws_of_more_tickets_of_a_structure_are_counted_in() -> None:
    """Three tickets of one structure, each wrong on an image of its own: only all three together are always right."""
    logits = torch.ones(1, 3, 3, 2)
    logits[..., 1] = 0.0
    for ticket in range(3):
        logits[0, ticket, ticket] = torch.tensor([0.0, 1.9])
    game = Game(logits, torch.zeros(3, dtype=torch.int64), (1, 1, 1), ("a", "a", "a"))
    proved = prove(game, torch.ones(1, 3), WorkerThreads())
    assert (proved.bound, proved.draws, proved.solved.value) == (1.0, 7, 1.0)


def three_tickets() -> Game:
    """Clean all right; one attack fools ticket 0 on image 0, and tickets 1 and 2 narrowly on image 1."""
    logits = torch.zeros(2, 3, 2, 2)
    logits[..., 0] = 1.0
    logits[1, 0, 0] = torch.tensor([0.0, 9.0])
    logits[1, 1:, 1] = torch.tensor([0.0, 0.1])
    return Game(logits, torch.zeros(2, dtype=torch.int64), (1, 2, 3), ("a", "b", "b"))


def test_a_law_is_scored_and_priced_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    law = Law("half", rows, torch.tensor([0.25, 0.75], dtype=torch.float64))
    kept = keep(three_tickets(), law)
    assert kept.right.tolist() == [0.75, 0.25]
    assert kept.after(2) == pytest.approx((0.75**2 + 0.25**2) / 2)
    assert kept.for_ever == 0
    assert law.cost((1, 2, 3)) == pytest.approx(0.25 * 1 + 0.75 * 5)


def test_the_menu_and_the_family_hold_what_they_say() -> None:
    rows = menu(("a", "b", "b", "c"), 0)
    assert sorted(rows.sum(dim=1).tolist()) == [1.0] * 4 + [2.0] * 6 + [3.0] * 2  # a, one of b, c
    laws = list(family(("a", "b", "b", "c"), 0))
    assert len({law.name for law in laws}) == len(laws)
    assert all(float(law.weights.sum()) == pytest.approx(1) for law in laws)
    only_b = next(law for law in laws if law.name == "b, n = 2")
    assert only_b.rows.tolist() == [[0, 1, 1, 0]]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("explored")
    library = tiny(folder / "library")
    audit = Audit("smoke", epsilons=(8.0,), images=6)
    run_audit(folder / "audit", audit, library, load_images(audit, library, None))
    return folder


def test_the_command_explores_an_audit_and_attacks_the_law_it_chose(audited: Path, capsys: Any) -> None:
    words = ["audit", "explore", str(audited / "audit"), "--library", str(audited / "library"), "--threads", "1"]
    assert main(words) == 0
    assert "no law over" in capsys.readouterr().out
    exploration = json.loads((audited / "audit/explore.json").read_text())
    assert exploration["chosen_on"] == exploration["reported_on"] == 3
    by_name = {law["name"]: law for law in exploration["laws"]}
    served, chosen = by_name[SERVED], by_name[CHOSEN]
    assert served["cost"] == 1
    assert (
        max(law["robust"]["value"] for law in exploration["laws"] if law["name"] == CHOSEN)
        <= exploration["bound"] + 1e-6
    )
    assert exploration["confirmed"]["value"] <= chosen["robust"]["value"] + 1e-9
    assert sum(p for p, _ in exploration["members"]) == pytest.approx(1, abs=1e-3)
    assert all(law["after_ten"] <= law["robust"]["value"] + 1e-9 for law in exploration["laws"])
    assert (audited / "audit/frontier.svg").read_text().startswith("<svg")


def test_a_folder_that_is_no_audit_is_refused_in_one_line(audited: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["audit", "explore", str(tmp_path)]) == 2
    assert "not a report" in capsys.readouterr().err
    (tmp_path / "report.json").write_bytes((audited / "audit/report.json").read_bytes())
    assert main(["audit", "explore", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "explore.npz: cannot be read" in error
    assert len(error.strip().splitlines()) == 1
    other = tiny(tmp_path / "other", densities=(0.3, 0.4))
    assert main(["audit", "explore", str(audited / "audit"), "--library", str(other.path), "--threads", "1"]) == 2
    assert "audited was" in capsys.readouterr().err


def test_another_audit_chooses_the_law_and_shares_no_image(audited: Path, tmp_path: Path) -> None:
    library = open_library(audited / "library")
    audit = Audit("smoke", epsilons=(8.0,), images=5, seed=1)
    run_audit(tmp_path / "held-out", audit, library, load_images(audit, library, None))
    report = read_report(tmp_path / "held-out/report.json")
    ids = [f"train/{place}" for place in range(5)]
    renamed = report.model_copy(update={"data": report.data.model_copy(update={"ids": ids})})
    (tmp_path / "held-out/report.json").write_bytes(with_digest(renamed).as_bytes())
    exploration = explore(audited / "audit", selection=tmp_path / "held-out")
    assert (exploration.chosen_on, exploration.reported_on) == (5, 6)
    with pytest.raises(AuditError, match="6 of its images are in both"):
        explore(audited / "audit", selection=audited / "audit")


def test_the_chosen_law_is_reported_on_images_that_did_not_choose_it(audited: Path) -> None:
    exploration = explore(audited / "audit")
    assert exploration.confirmed is None
    assert exploration.gain.value == pytest.approx(
        next(law for law in exploration.laws if law.name == CHOSEN).robust.value - exploration.laws[0].robust.value,
        abs=1e-5,
    )
