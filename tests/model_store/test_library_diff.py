"""Two libraries compared: tickets added, removed and changed, claims that differ, and what all tickets share."""

from dataclasses import replace
from pathlib import Path

from model_store.input_spec import CIFAR10_INPUT
from model_store.library import Library, write_library
from model_store.library_diff import compare_libraries
from model_store.ticket import Ticket
from tests.support.tickets import CLASSES, items, make_claim, make_ticket

SOME, MORE = make_ticket("resnet18", 0.2), make_ticket("resnet18", 0.5, seed=1)


def written(path: Path, *tickets: Ticket, robust: tuple[int, int] = (40, 100)) -> Library:
    """A library of these tickets, which all claim to be right on so many of so many attacked images."""
    claims = [make_claim(attack=None), make_claim(*robust)]
    given = [(ticket, provenance, claims) for ticket, provenance, _ in items(tickets)]
    return write_library(path, classes=CLASSES, data="random", tickets=given)


def test_a_library_does_not_differ_from_itself(tmp_path: Path) -> None:
    library = written(tmp_path / "one", SOME, MORE)
    comparison = compare_libraries(library, library)
    assert (comparison.tickets, comparison.shared, comparison.unchanged) == ((), (), 2)
    assert comparison.before == comparison.after == library.digest


def test_tickets_that_come_and_go_are_named_with_their_digests_and_claims(tmp_path: Path) -> None:
    one, both = written(tmp_path / "one", SOME), written(tmp_path / "both", SOME, MORE)
    forth, back = compare_libraries(one, both), compare_libraries(both, one)
    (added,), (removed,) = forth.tickets, back.tickets
    assert (added.name, added.difference, added.before) == ("resnet18-50", "added", None)
    assert (removed.name, removed.difference, removed.after) == ("resnet18-50", "removed", None)
    assert added.after == removed.before == both.entries[1].sha256
    assert [claim.after and claim.after.value for claim in added.claims] == [
        claim.value for claim in both.entries[1].claims
    ]
    assert all(claim.before is None for claim in added.claims)
    assert forth.unchanged == 1
    assert forth.shared == ("policy",)


def test_other_weights_are_told_from_other_claims(tmp_path: Path) -> None:
    before = written(tmp_path / "before", SOME)
    retrained = written(tmp_path / "retrained", make_ticket("resnet18", 0.2, seed=5))
    (ticket,) = compare_libraries(before, retrained).tickets
    assert (ticket.difference, ticket.claims) == ("weights", ())
    assert ticket.before != ticket.after
    remeasured = written(tmp_path / "remeasured", SOME, robust=(25, 100))
    (ticket,) = compare_libraries(before, remeasured).tickets
    assert ticket.difference == "claims"
    assert ticket.before == ticket.after
    (claim,) = ticket.claims
    assert (claim.metric, claim.comparable, claim.after and claim.after.value) == ("pgd", True, 0.25)


def test_claims_under_other_conditions_are_not_comparable(tmp_path: Path) -> None:
    before, after = written(tmp_path / "before", SOME), written(tmp_path / "after", SOME, robust=(50, 200))
    (claim,) = compare_libraries(before, after).tickets[0].claims
    assert not claim.comparable


def test_what_all_tickets_share_is_named(tmp_path: Path) -> None:
    library = written(tmp_path / "one", SOME)
    classes = tuple(f"{label}s" for label in CLASSES)
    renamed = write_library(tmp_path / "renamed", classes=classes, data="random", tickets=items([SOME]))
    assert compare_libraries(library, renamed).shared == ("classes",)
    larger = written(tmp_path / "larger", make_ticket("resnet18", 0.2, spec=replace(CIFAR10_INPUT, height=48)))
    assert compare_libraries(library, larger).shared == ("input",)
