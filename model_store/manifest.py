"""Manifest: what a library says of itself. Digests, provenance, and numbers with the attack that measured them.

Read strictly: a field missing, unknown or of another type is refused. So is any text but the canonical one: one content
has one digest. FORMAT.md lists every key.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from datetime import date
from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator
from pydantic_core import from_json

from model_store.errors import LibraryRejected, StoreError
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.json_object import first_error
from model_store.structures import Structure
from model_store.ticket import VERSIONS, ZERO_DIGEST, Kind, StrictModel, version_of

MAX_MANIFEST_BYTES: Final = 2**24

Text = Annotated[str, Field(min_length=1, max_length=200)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Attack(StrictModel):
    """The attack behind a claim, with nothing left out: projected gradient ascent on a loss.

    epsilon, step_size: pixel units of [0, 1], so 8/255 is 0.0314.  loss: the name of what was maximised.
    """

    norm: Literal["linf", "l2"]
    epsilon: Annotated[float, Field(gt=0)]
    steps: Count
    step_size: Annotated[float, Field(gt=0)]
    restarts: Count
    momentum: Annotated[float, Field(ge=0)]
    loss: Text


class Images(StrictModel):
    """Which images were used. digest: SHA-256 of their content, as training.data computes it."""

    name: Text
    digest: Digest
    split: Literal["test", "selection"]


class Claim(StrictModel):
    """One measured accuracy of one ticket.

    value: fraction of `images` classified rightly, 0 to 1.  low, high: its 95 % interval (Wilson's score).
    attack: None for metric "clean", and given for every other.  seed: of the attack's generator.
    """

    metric: Literal["clean", "pgd"]
    value: Fraction
    low: Fraction
    high: Fraction
    images: Count
    data: Images
    attack: Attack | None
    seed: int
    commit: Text
    measured: date

    @model_validator(mode="after")
    def whole(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"interval {self.low} to {self.high} does not hold the value {self.value}")
        if abs(self.value * self.images - round(self.value * self.images)) > 1e-6 * self.images:
            raise ValueError(f"value {self.value} is no count of {self.images} images")
        if (self.metric == "clean") != (self.attack is None):
            raise ValueError(f"metric {self.metric} with attack {self.attack}; expected one for all but clean")
        return self


class Provenance(StrictModel):
    """How a ticket came to be. parent: SHA-256 of the ticket file it was continued from, or None."""

    recipe: dict[str, JsonValue]
    data_digest: Digest
    seed: int
    commit: Text
    seconds: Annotated[float, Field(ge=0)]
    packages: dict[str, Text]
    parent: Digest | None


def file_name(name: str, sha256: str) -> str:
    """A ticket's place in its library: named after its content, so that no new file ever replaces another."""
    return f"tickets/{name}-{sha256[:12]}.safetensors"


class Entry(StrictModel):
    """One ticket file of a library. role: "ticket" may be drawn; "baseline" is there to be compared with."""

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9.-]{0,99}$")]
    file: str
    sha256: Digest
    role: Literal["ticket", "baseline"]
    structure: Structure
    density: float
    kind: Kind
    provenance: Provenance
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def in_its_place(self) -> Self:
        expected = file_name(self.name, self.sha256)
        if self.file != expected:
            raise ValueError(f"file {self.file!r}; expected {expected!r}, in the library's folder and nowhere else")
        return self


class DefaultPolicy(StrictModel):
    """The fields of a theta.Policy, its groups as ticket names."""

    groups: tuple[tuple[str, ...], ...]
    sizes: tuple[float, ...]
    every: bool
    replacement: bool


class Manifest(StrictModel):
    """classes: labels in the order of the logits.  data: the name of what the tickets were searched on.

    digest: SHA-256 of canonical() with 64 zeros in its place. It is the library's own: it covers every ticket's.
    input: what every ticket takes as a picture; None in version 1, which knows CIFAR-10's alone.
    """

    version: Literal[1, 2]
    digest: Digest
    classes: Annotated[tuple[Text, ...], Field(min_length=2)]
    data: Text
    policy: DefaultPolicy
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=1000)]
    input: InputSpec | None = Field(None, exclude_if=lambda spec: spec is None)

    @model_validator(mode="after")
    def consistent(self) -> Self:
        for field, values in (
            ("class", self.classes),
            ("name", (entry.name for entry in self.entries)),
            ("file", (entry.file for entry in self.entries)),
            ("sha256", (entry.sha256 for entry in self.entries)),
        ):
            refuse_repeats(field, values)
        for entry in self.entries:
            if entry.structure.classes != len(self.classes):
                raise ValueError(
                    f"{entry.name}: {entry.structure.classes} classes; the library has {len(self.classes)}"
                )
        if not any(entry.role == "ticket" for entry in self.entries):
            raise ValueError("no entry of role ticket: there is nothing to draw from")
        if (self.version == 1) != (self.input is None):
            there = "an" if self.input is not None else "no"
            raise ValueError(f"version {self.version} with {there} input; expected one in version 2, and in no other")
        expected = version_for((entry.structure for entry in self.entries), self.input or CIFAR10_INPUT)
        if self.version != expected:
            raise ValueError(f"version {self.version}; expected {expected} for these structures and this input")
        return self


def version_for(structures: Iterable[Structure], spec: InputSpec) -> Literal[1, 2]:
    """The lowest version that can describe such tickets, so that one content has one digest."""
    return max(version_of(structure, spec) for structure in structures)


def refuse_repeats(field: str, values: Iterable[str]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"{field} {repeated[0]!r} is there more than once")


def canonical(manifest: Manifest) -> bytes:
    """The manifest's file: UTF-8 JSON, keys sorted, indented by one space, a newline at its end."""
    fields = manifest.model_dump(mode="json")
    text = json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def with_digest(manifest: Manifest) -> Manifest:
    """The same manifest with its own digest in place."""
    unsigned = canonical(manifest.model_copy(update={"digest": ZERO_DIGEST}))
    return manifest.model_copy(update={"digest": hashlib.sha256(unsigned).hexdigest()})


def parse(data: bytes) -> Manifest:
    """Raises LibraryRejected, naming the field, what was found and what was expected."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise LibraryRejected(f"{len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    try:
        fields = from_json(data)
        number = fields["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise LibraryRejected(f"no manifest: {error!r:.200}") from error
    if type(number) is not int or number not in VERSIONS:
        raise LibraryRejected(f"version {number!r}; this reader knows {' and '.join(map(str, VERSIONS))}")
    manifest = validated(data)
    computed = with_digest(manifest).digest
    if computed != manifest.digest:
        raise LibraryRejected(f"digest {manifest.digest}, its content has {computed}: damaged, or altered by hand")
    return manifest


def validated(data: bytes) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(data)
        same = canonical(manifest) == data
    except ValidationError as error:
        raise LibraryRejected(first_error(error)) from error
    except (StoreError, ValueError) as error:
        raise LibraryRejected(str(error)) from error
    if not same:
        raise LibraryRejected("not in canonical form (keys sorted, once each; indented by one): use write_library")
    return manifest


def wilson(correct: int, images: int) -> tuple[float, float]:
    """95 % interval of a fraction, Wilson's score: (low, high), within [0, 1] and holding correct / images."""
    z = 1.959963984540054  # the normal law's 97.5 % point
    rate, spread = correct / images, z * z / images
    middle = (rate + spread / 2) / (1 + spread)
    half = (rate * (1 - rate) * spread + spread * spread / 4) ** 0.5 / (1 + spread)
    return min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half))
