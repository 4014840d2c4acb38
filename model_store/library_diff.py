"""What a second library has that the first has not: tickets, their weights and claims, and what all tickets share."""

from typing import Final, Literal

from model_store.library import Library
from model_store.manifest import Claim, Entry
from model_store.ticket import StrictModel

SHARED: Final = ("classes", "policy", "input")
Difference = Literal["added", "removed", "weights", "claims", "entry"]


class Figure(StrictModel):
    """A claimed accuracy, from 0 to 1, with its 95 % interval."""

    value: float
    low: float
    high: float
    images: int


class ClaimDifference(StrictModel):
    """One accuracy of a ticket in both libraries; None where a library does not claim it.

    comparable: whether the images and the attack behind both are the same.
    """

    metric: Literal["clean", "pgd"]
    split: Literal["test", "selection"]
    before: Figure | None
    after: Figure | None
    comparable: bool


class TicketDifference(StrictModel):
    """One ticket that differs. before, after: SHA-256 of its file; None where it is missing."""

    name: str
    difference: Difference
    before: str | None
    after: str | None
    claims: tuple[ClaimDifference, ...]


class LibraryDiff(StrictModel):
    """Two libraries compared. before, after: their digests.

    tickets: those that differ, by name.  unchanged: how many do not.  shared: which of SHARED differ.
    """

    before: str
    after: str
    tickets: tuple[TicketDifference, ...]
    unchanged: int
    shared: tuple[Literal["classes", "policy", "input"], ...]


def compare_libraries(first: Library, second: Library) -> LibraryDiff:
    """Compares manifests, which cover every byte of the tickets."""
    before, after = ({entry.name: entry for entry in library.manifest.entries} for library in (first, second))
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name), after.get(name)) for name in names]
    tickets = [compare_entries(name, old, new) for name, old, new in pairs if old != new]
    return LibraryDiff(
        before=first.digest,
        after=second.digest,
        tickets=tuple(tickets),
        unchanged=len(pairs) - len(tickets),
        shared=tuple(name for name in SHARED if getattr(first, name) != getattr(second, name)),
    )


def compare_entries(name: str, before: Entry | None, after: Entry | None) -> TicketDifference:
    return TicketDifference(
        name=name,
        difference=difference_of(before, after),
        before=None if before is None else before.sha256,
        after=None if after is None else after.sha256,
        claims=compare_claims(before, after),
    )


def difference_of(before: Entry | None, after: Entry | None) -> Difference:
    if before is None:
        return "added"
    if after is None:
        return "removed"
    if before.sha256 != after.sha256:
        return "weights"
    return "claims" if before.claims != after.claims else "entry"


def compare_claims(before: Entry | None, after: Entry | None) -> tuple[ClaimDifference, ...]:
    """The accuracies that differ, or that one side alone claims."""
    old, new = claims_of(before), claims_of(after)
    all_claims = (compare_claim(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()))
    return tuple(claim for claim in all_claims if claim.before != claim.after or not claim.comparable)


def compare_claim(key: "Key", before: Claim | None, after: Claim | None) -> ClaimDifference:
    metric, split = key
    comparable = conditions(before) == conditions(after)
    return ClaimDifference(
        metric=metric, split=split, before=figure(before), after=figure(after), comparable=comparable
    )


Key = tuple[Literal["clean", "pgd"], Literal["test", "selection"]]


def claims_of(entry: Entry | None) -> dict[Key, Claim]:
    return {} if entry is None else {(claim.metric, claim.data.split): claim for claim in entry.claims}


def figure(claim: Claim | None) -> Figure | None:
    if claim is None:
        return None
    return Figure(value=claim.value, low=claim.low, high=claim.high, images=claim.images)


def conditions(claim: Claim | None) -> object:
    return None if claim is None else (claim.data, claim.attack, claim.images)
