import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import binomtest

import model_store
from model_store.errors import LibraryRejected
from model_store.library import Library
from model_store.manifest import (
    MAX_MANIFEST_BYTES,
    Attack,
    Claim,
    DefaultPolicy,
    Entry,
    Images,
    Manifest,
    Provenance,
    canonical,
    parse,
    wilson,
)
from model_store.ticket import Header, StrictModel
from tests.support.tickets import ATTACK, make_claim

Fields = dict[str, Any]


@pytest.fixture
def fields(small_library: Library) -> Fields:
    """The small library's manifest as plain JSON, to be changed."""
    return dict(json.loads(canonical(small_library.manifest)))


def canonical_text(fields: object) -> bytes:
    """The canonical text as FORMAT.md describes it."""
    return json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def text(fields: Fields) -> bytes:
    """The same with a right digest: what a writer with a fault would write."""
    computed = hashlib.sha256(canonical_text(fields | {"digest": "0" * 64})).hexdigest()
    return canonical_text(fields | {"digest": computed} if "digest" in fields else fields)


def test_what_is_written_is_read_and_its_digest_is_that_of_the_bytes(small_library: Library) -> None:
    data = canonical(small_library.manifest)
    assert parse(data) == small_library.manifest
    assert data == text(json.loads(data))
    unsigned = data.replace(small_library.digest.encode(), b"0" * 64)
    assert small_library.manifest.digest == hashlib.sha256(unsigned).hexdigest() == small_library.digest


def at(*path: str | int) -> Callable[[Fields], Any]:
    def walk(fields: Fields) -> Any:
        for step in path:
            fields = fields[step]  # type: ignore[index]
        return fields

    return walk


PLACES = {
    "manifest": at(),
    "policy": at("policy"),
    "entry": at("entries", 0),
    "structure": at("entries", 0, "structure"),
    "provenance": at("entries", 0, "provenance"),
    "claim": at("entries", 0, "claims", 1),
    "images": at("entries", 0, "claims", 1, "data"),
    "attack": at("entries", 0, "claims", 1, "attack"),
}
KEYS = {
    "manifest": ("version", "digest", "classes", "data", "policy", "entries"),
    "policy": ("groups", "sizes", "every", "replacement"),
    "entry": ("name", "file", "sha256", "role", "structure", "density", "kind", "provenance", "claims"),
    "structure": ("name", "width"),
    "provenance": ("recipe", "data_digest", "seed", "commit", "seconds", "packages", "parent"),
    "claim": ("metric", "value", "low", "high", "images", "data", "attack", "seed", "commit", "measured"),
    "images": ("name", "digest", "split"),
    "attack": ("norm", "epsilon", "steps", "step_size", "restarts", "momentum", "loss"),
}


@pytest.mark.parametrize(("place", "key"), [(place, key) for place, keys in KEYS.items() for key in keys])
def test_no_key_may_be_missing_and_the_refusal_names_it(fields: Fields, place: str, key: str) -> None:
    del PLACES[place](fields)[key]
    with pytest.raises(LibraryRejected, match=key):
        parse(text(fields))


@pytest.mark.parametrize("place", PLACES)
def test_no_unknown_key_is_accepted(fields: Fields, place: str) -> None:
    PLACES[place](fields)["surplus"] = 1
    with pytest.raises(LibraryRejected, match=r"surplus: (Extra inputs|Unexpected keyword)"):
        parse(text(fields))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("manifest", {"version": 3}, "version 3; this reader knows 1 and 2"),
        ("manifest", {"version": "1"}, "version '1'"),
        ("manifest", {"version": True}, "version True"),
        ("manifest", {"version": 1.0}, "version 1.0"),
        ("manifest", {"classes": ["cat"]}, "classes: .*at least 2"),
        ("manifest", {"classes": ["cat", ""]}, "classes.1"),
        ("manifest", {"classes": ["cat", "cat"]}, "class 'cat' is there more than once"),
        ("manifest", {"classes": ["cat", "dog"]}, "resnet18-07: 10 classes; the library has 2"),
        ("manifest", {"entries": []}, "entries: "),
        ("manifest", {"data": 3}, "data: .*string, found 3"),
        ("entry", {"name": "../x"}, "entries.0.name"),
        ("entry", {"name": "resnet18-08"}, "file 'tickets/resnet18-07.*expected 'tickets/resnet18-08"),
        (
            "entry",
            {"file": "../tickets/x.safetensors"},
            r"file '\.\./tickets/x.*in the library's folder and nowhere else",
        ),
        ("entry", {"file": "/etc/passwd"}, "file '/etc/passwd'; expected 'tickets/resnet18-07-"),
        ("entry", {"file": "tickets/../x.safetensors"}, r"file 'tickets/\.\./x"),
        ("entry", {"sha256": "AB" * 32}, "entries.0.sha256"),
        ("entry", {"role": "spare"}, "entries.0.role"),
        ("entry", {"density": "0.07"}, "entries.0.density"),
        ("entry", {"kind": "dense"}, "entries.0.kind"),
        ("structure", {"name": "vgg"}, "entries.0.structure.name"),
        ("structure", {"width": 0}, "resnet18: width 0"),
        ("structure", {"width": 2.0}, "entries.0.structure.width"),
        ("provenance", {"seconds": -1.0}, "provenance.seconds"),
        ("provenance", {"data_digest": "xyz"}, "provenance.data_digest"),
        ("provenance", {"packages": {"torch": 2}}, "packages.torch"),
        ("claim", {"metric": "autoattack"}, "claims.1.metric"),
        ("claim", {"metric": "clean"}, "metric clean with attack"),
        ("claim", {"attack": None}, "metric pgd with attack None"),
        ("claim", {"value": 1.2}, "claims.1.value"),
        ("claim", {"value": 0.1}, "interval .* does not hold the value 0.1"),
        ("claim", {"value": 0.405}, "value 0.405 is no count of 100 images"),
        ("claim", {"images": 0}, "claims.1.images"),
        ("claim", {"measured": "yesterday"}, "claims.1.measured"),
        ("images", {"split": "train"}, "data.split"),
        ("attack", {"norm": "l1"}, "attack.norm"),
        ("attack", {"epsilon": 0.0}, "attack.epsilon"),
        ("attack", {"steps": 0}, "attack.steps"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields: Fields, place: str, change: Fields, message: str) -> None:
    PLACES[place](fields).update(change)
    with pytest.raises(LibraryRejected, match=message):
        parse(text(fields))


@pytest.mark.parametrize("key", ["name", "sha256"])
def test_two_entries_of_one_name_or_one_content_are_refused(fields: Fields, key: str) -> None:
    first, second = fields["entries"][:2]
    second[key] = first[key]
    second["file"] = f"tickets/{second['name']}-{second['sha256'][:12]}.safetensors"
    with pytest.raises(LibraryRejected, match=f"{key} .* is there more than once"):
        parse(text(fields))


def test_a_changed_value_is_refused_though_it_could_be_right(fields: Fields) -> None:
    written = fields["digest"]
    fields["entries"][0]["claims"][1]["seed"] = 1
    with pytest.raises(LibraryRejected, match=f"digest {written}, its content has [0-9a-f]{{64}}"):
        parse(canonical_text(fields))


def test_a_library_of_baselines_alone_is_refused(fields: Fields) -> None:
    for entry in fields["entries"]:
        entry["role"] = "baseline"
    with pytest.raises(LibraryRejected, match="nothing to draw from"):
        parse(text(fields))


def test_any_text_but_the_canonical_one_is_refused(fields: Fields) -> None:
    other = [
        json.dumps(fields, sort_keys=True).encode(),
        json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n",
        text(fields) + b"\n",
        text(fields).replace(b'"version": 1', b'"version": 1,\n "version": 1'),
    ]
    for data in other:
        with pytest.raises(LibraryRejected, match="not in canonical form"):
            parse(data)


def test_numbers_that_are_not_finite_are_refused_anywhere(fields: Fields) -> None:
    for place, key in (("claim", "value"), ("entry", "density"), ("attack", "epsilon")):
        changed = json.loads(json.dumps(fields))
        PLACES[place](changed)[key] = math.nan
        with pytest.raises(LibraryRejected, match=key):
            parse(text(changed))
    fields["entries"][0]["provenance"]["recipe"]["rate"] = math.inf
    with pytest.raises(LibraryRejected, match=r"not JSON compliant|recipe"):
        parse(text(fields))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_as_a_store_error(data: bytes) -> None:
    with pytest.raises(LibraryRejected):
        parse(data)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"7", b'{"version": 1}', b"[" * 100_000, b'{"version": 1' * 9])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(LibraryRejected):
        parse(data)


def test_an_over_long_manifest_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(LibraryRejected, match=f"at most {MAX_MANIFEST_BYTES}"):
        parse(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("record", [Header, Manifest, DefaultPolicy, Entry, Provenance, Claim, Images, Attack])
def test_the_format_s_description_names_every_key(record: type[StrictModel]) -> None:
    page = Path(model_store.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    assert [key for key in record.model_fields if f"`{key}`" not in page] == []


@given(st.integers(1, 100_000), st.data())
def test_the_interval_is_wilson_s_and_always_makes_a_claim(images: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, images))
    low, high = wilson(correct, images)
    expected = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    assert math.isclose(low, expected.low, abs_tol=1e-9)
    assert math.isclose(high, expected.high, abs_tol=1e-9)
    assert make_claim(correct, images).value == correct / images


def test_a_claim_is_frozen_and_refuses_to_leave_its_attack_out() -> None:
    claim = make_claim()
    with pytest.raises(ValidationError, match="frozen"):
        claim.value = 1.0
    with pytest.raises(ValidationError, match="metric pgd with attack None"):
        Claim(**(dict(claim) | {"attack": None}))
    with pytest.raises(ValidationError, match="metric clean with attack"):
        Claim(**(dict(make_claim(attack=None)) | {"attack": ATTACK}))
