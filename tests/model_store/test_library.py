import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store import library as library_module
from model_store.errors import LibraryRejected, StoreError, TicketRejected
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.library import EMBEDDED, MANIFEST, WRITING, Library, open_library, write_library
from model_store.manifest import Entry, canonical
from model_store.policy import Policy, draw_theta
from model_store.ticket import Ticket, encode
from tests.support.tickets import CLASSES, identical, items, make_ticket

ROOT = Path(__file__).parents[2]


def write(path: Path, tickets: Sequence[Ticket], **others: Any) -> Library:
    return write_library(path, classes=CLASSES, data="random", tickets=items(tickets), **others)


def first_ticket(folder: Path) -> Path:
    return min((folder / "tickets").iterdir())


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and writes it back in canonical form, with a right digest."""
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    fields["digest"] = hashlib.sha256(text(fields | {"digest": "0" * 64})).hexdigest()
    (folder / MANIFEST).write_bytes(text(fields))


def text(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def test_what_is_written_is_opened_bit_for_bit(small_library: Library, small_tickets: list[Ticket]) -> None:
    opened = open_library(small_library.path)
    assert opened.digest == small_library.digest
    assert opened.classes == CLASSES
    assert [entry.name for entry in opened.entries] == [ticket.name for ticket in small_tickets]
    assert all(identical(*pair) for pair in zip(opened.tickets, small_tickets, strict=True))
    assert opened.policy == Policy.over([ticket.structure.name for ticket in small_tickets])
    assert opened.baselines == ()


LARGER = InputSpec(48, 64, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4), resize="cover", interpolation="bicubic")


def test_a_library_says_what_its_networks_take(tmp_path: Path) -> None:
    tickets = [make_ticket("resnet18", spec=LARGER, stem=(2, 2)), make_ticket("wideresnet32", spec=LARGER)]
    opened = open_library(write(tmp_path, tickets).path)
    assert opened.manifest.version == 2
    assert opened.input == LARGER
    assert all(identical(*pair) for pair in zip(opened.tickets, tickets, strict=True))
    assert opened.tickets[0].network().pixel_mean.flatten().tolist() == [0.5, 0.25, 0.125]
    assert opened.tickets[0].network().pixel_std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])


def test_the_embedded_library_is_of_version_1_and_written_again_byte_for_byte() -> None:
    library = open_library()
    assert library.manifest.version == 1
    assert library.input == CIFAR10_INPUT
    assert library.digest == "1004c303e854b4234fa877288f1b87584d28f2d8146d11bf821d2f590b7820d0"
    assert canonical(library.manifest) == (EMBEDDED / MANIFEST).read_bytes()
    for ticket, entry in zip(library.tickets, library.entries, strict=True):
        assert hashlib.sha256(encode(ticket)).hexdigest() == entry.sha256


def test_tickets_of_two_inputs_are_no_library(tmp_path: Path) -> None:
    tickets = [make_ticket("resnet18", spec=LARGER), make_ticket("resnet34")]
    with pytest.raises(LibraryRejected, match="resnet34-30: its input height is 32, and 48 of resnet18-30"):
        write(tmp_path, tickets)


def test_a_ticket_of_another_input_than_its_manifest_s_is_refused(tmp_path: Path) -> None:
    library = write(tmp_path, [make_ticket("resnet18", spec=LARGER)])
    edit(library.path, lambda fields: fields["input"].update(resize="squash"))
    with pytest.raises(TicketRejected, match=r"resnet18-30.*: its input resize is cover, and squash in the manifest"):
        open_library(library.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(version=1), "version 1 with an input; expected one in version 2"),
        (lambda fields: fields.pop("input"), "version 2 with no input"),
        (lambda fields: fields["input"].update(height=4), "input height 4; expected an integer from 8 to 1024"),
        (lambda fields: fields["input"].update(mean=[0.5, 0.5]), "input.mean"),
        (lambda fields: fields["input"].update(colours=3), "input.colours"),
        (lambda fields: fields["input"].pop("resize"), "not in canonical form"),
        (lambda fields: fields["entries"][0]["structure"].update(stem_pool=3), "stem_pool 3; expected one of 1, 2, 4"),
    ],
)
def test_an_input_that_is_not_whole_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    library = write(tmp_path, [make_ticket("resnet18", spec=LARGER, stem=(2, 2))])
    edit(library.path, change)
    with pytest.raises(LibraryRejected, match=message):
        open_library(library.path)


def test_cifar_s_input_is_never_written_as_version_2(library_folder: Path) -> None:
    def claim(fields: dict[str, Any]) -> None:
        fields |= {"version": 2, "input": json.loads(json.dumps(asdict(CIFAR10_INPUT)))}

    edit(library_folder, claim)
    with pytest.raises(LibraryRejected, match="version 2; expected 1 for these structures and this input"):
        open_library(library_folder)


def test_the_same_parts_make_the_same_library(
    small_library: Library, small_tickets: list[Ticket], tmp_path: Path
) -> None:
    assert write(tmp_path / "again", small_tickets).digest == small_library.digest


def test_baselines_are_kept_but_never_drawn(tmp_path: Path) -> None:
    tickets, dense = [make_ticket("resnet18"), make_ticket("resnet34")], make_ticket("resnet18", 1.0, kind="fine-tuned")
    library = write(tmp_path, tickets, baselines=items([dense]))
    assert [entry.name for entry in library.baseline_entries] == ["resnet18-100"]
    assert identical(library.baselines[0], dense)
    assert library.policy.tickets == 2
    rng = random.Random(0)
    assert {member for _ in range(100) for member in draw_theta(library.policy, rng).members} == {0, 1}


@pytest.mark.parametrize("policy", [Policy.switching((0, 1), 2), Policy.fixed((1,), 2), Policy.all(2)])
def test_a_library_keeps_the_policy_it_was_given(tmp_path: Path, policy: Policy) -> None:
    tickets = [make_ticket(density=0.07), make_ticket(density=0.3)]
    assert open_library(write(tmp_path, tickets, policy=policy).path).policy == policy


def test_without_a_path_the_embedded_library_is_opened(small_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "EMBEDDED", small_library.path)
    assert open_library().digest == small_library.digest


# Refusals: a library that was tampered with never opens


def test_one_flipped_byte_in_any_file_is_refused_by_its_name(library_folder: Path) -> None:
    for path in sorted(path for path in library_folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for place in range(0, len(data), len(data) // 6):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(StoreError, match=path.name):
                open_library(library_folder)
        path.write_bytes(data)
    open_library(library_folder)


def test_a_file_cut_short_is_refused_with_both_digests(library_folder: Path) -> None:
    path = first_ticket(library_folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TicketRejected, match=rf"{path}: SHA-256 [0-9a-f]{{64}}; the manifest says [0-9a-f]{{64}}"):
        open_library(library_folder)


def test_a_missing_ticket_manifest_or_folder_is_refused(library_folder: Path) -> None:
    path = first_ticket(library_folder)
    path.unlink()
    with pytest.raises(TicketRejected, match=f"{path}: no such file"):
        open_library(library_folder)
    shutil.rmtree(library_folder / "tickets")
    with pytest.raises(LibraryRejected, match="tickets: no such folder"):
        open_library(library_folder)
    (library_folder / MANIFEST).unlink()
    with pytest.raises(LibraryRejected, match=r"manifest\.json: no such file"):
        open_library(library_folder)
    with pytest.raises(LibraryRejected, match="absent: no such folder"):
        open_library(library_folder / "absent")


def test_two_tickets_that_changed_places_are_refused(library_folder: Path) -> None:
    """By their files' bytes, and by the manifest's own names for them, which its digest covers."""
    first, second = sorted((library_folder / "tickets").iterdir())[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(TicketRejected, match="the manifest says"):
        open_library(library_folder)
    first.write_bytes(one)
    second.write_bytes(other)
    path = library_folder / MANIFEST
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(first.name, "here").replace(second.name, first.name).replace("here", second.name))
    with pytest.raises(LibraryRejected, match=r"manifest\.json: entries\.0: .*expected"):
        open_library(library_folder)


@pytest.mark.parametrize(
    "name", ["extra.safetensors", "resnet18-07-0123456789ab.safetensors", "model.pt", ".hidden", "folder"]
)
def test_a_file_the_manifest_does_not_name_is_refused(library_folder: Path, name: str) -> None:
    stranger = library_folder / "tickets" / name
    if name == "folder":
        stranger.mkdir()
    else:
        stranger.write_bytes(b"x")
    with pytest.raises(LibraryRejected, match=f"{stranger}: not in the manifest"):
        open_library(library_folder)


@pytest.mark.parametrize("what", ["manifest.json", "tickets", "ticket"])
def test_symbolic_links_are_refused_even_to_the_right_content(library_folder: Path, tmp_path: Path, what: str) -> None:
    path = first_ticket(library_folder) if what == "ticket" else library_folder / what
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(StoreError, match=f"{path.name}: .*(symbolic link|not a regular one)"):
        open_library(library_folder)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/outside.safetensors", "tickets/../../outside.safetensors"]
)
def test_a_path_that_leaves_the_folder_is_refused_even_to_the_right_content(library_folder: Path, file: str) -> None:
    shutil.copy(first_ticket(library_folder), library_folder.parent / "outside.safetensors")
    edit(library_folder, lambda fields: fields["entries"][0].update(file=file))
    with pytest.raises(LibraryRejected, match=r"manifest\.json: .*outside\.safetensors.*and nowhere else"):
        open_library(library_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.071}, "density 0.07 in the file, 0.071 in the manifest"),
        ({"kind": "fine-tuned"}, "kind scratch in the file, fine-tuned in the manifest"),
        (
            {"structure": {"name": "resnet18", "width": 3, "classes": 10, "stem_stride": 1}},
            "structure resnet18·2 in the file, resnet18·3 in the manifest",
        ),
    ],
)
def test_a_ticket_that_differs_from_its_entry_is_refused(
    library_folder: Path, change: dict[str, Any], message: str
) -> None:
    edit(library_folder, lambda fields: fields["entries"][0].update(change))
    with pytest.raises(TicketRejected, match=message):
        open_library(library_folder)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"groups": [["resnet18-07", "vgg-07"]]}, "'vgg-07' is no ticket of this library"),
        ({"groups": []}, "expected at least one"),
        ({"groups": [["resnet18-07", "resnet18-07"]]}, "more than once"),
        ({"sizes": [0.5, 0.6]}, "sum to 1"),
        ({"sizes": [0.0, 0.0, 1.0]}, "asks for more"),
    ],
)
def test_a_policy_that_does_not_fit_the_tickets_is_refused(
    library_folder: Path, policy: dict[str, Any], message: str
) -> None:
    edit(library_folder, lambda fields: fields["policy"].update(policy))
    with pytest.raises(LibraryRejected, match=message):
        open_library(library_folder)


# Writing: all or nothing


def test_a_library_is_replaced_and_nothing_of_the_old_one_stays(library_folder: Path) -> None:
    new = write(library_folder, [make_ticket("wideresnet32", 0.2, seed=5)])
    assert open_library(library_folder).digest == new.digest
    names = {str(path.relative_to(library_folder)) for path in library_folder.rglob("*") if path.is_file()}
    assert names == {MANIFEST, new.entries[0].file}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tickets": [make_ticket(), make_ticket(seed=1)]}, "name 'resnet18-30' is there more than once"),
        ({"tickets": [make_ticket(classes=7)]}, "7 classes; the library has 10"),
        ({"tickets": []}, "no tickets given"),
        ({"policy": Policy.all(3)}, "a policy over 3 tickets; the library has 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(
    library_folder: Path, others: dict[str, Any], message: str
) -> None:
    before = snapshot(library_folder)
    with pytest.raises(StoreError, match=message):
        write(library_folder, **({"tickets": [make_ticket()]} | others))
    assert snapshot(library_folder) == before


def test_files_of_another_origin_are_never_swept_away(tmp_path: Path) -> None:
    (tmp_path / "tickets").mkdir()
    (tmp_path / "tickets" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(LibraryRejected, match=r"holiday\.jpg: no file of a library's"):
        write(tmp_path, [make_ticket()])
    assert [path.name for path in (tmp_path / "tickets").iterdir()] == ["holiday.jpg"]


def test_two_writers_of_one_folder_do_not_mix(library_folder: Path) -> None:
    before = open_library(library_folder).digest
    with library_module.write_lock(library_folder), pytest.raises(LibraryRejected, match="another process is writing"):
        write(library_folder, [make_ticket()])
    assert open_library(library_folder).digest == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Kills itself before its n-th change to the file system, as the interpreter reports them; n = 0: runs to the end.
# Each round works on a fresh copy, in a fork: the interpreter and torch are loaded once.
KILLED_WRITER = """
import os, shutil, signal, sys, torch
from pathlib import Path
from model_store.library import open_library
from tests.model_store.test_library import write
from tests.support.tickets import make_ticket

old, room = Path(sys.argv[1]), Path(sys.argv[2])
tickets = [make_ticket("resnet18", 0.1), make_ticket("resnet34", 0.2)]

def changes(event, arguments):
    flags = arguments[2] if event == "open" else None
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_APPEND)
    return writes or event in ("os.rename", "os.remove", "os.mkdir", "fcntl.flock")

def die_before(n):
    left = n
    def hook(event, arguments):
        nonlocal left
        if changes(event, arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

n, signalled = 0, True
while signalled:
    n += 1
    folder = room / f"killed-{n:03d}"
    shutil.copytree(old, folder)
    child = os.fork()
    if child == 0:
        die_before(n)
        write(folder, tickets)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    signalled = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert signalled or status == 0, status
print(n)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_point_leaves_the_old_library_or_the_new_one(tmp_path: Path) -> None:
    old = write(tmp_path / "old", [make_ticket("resnet18", 0.1), make_ticket("wideresnet32", 0.3)])
    new = write(tmp_path / "new", [make_ticket("resnet18", 0.1), make_ticket("resnet34", 0.2)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(old.path), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rounds = int(done.stdout)
    digests = [open_library(tmp_path / f"killed-{n:03d}").digest for n in range(1, rounds + 1)]
    # lock, then two tickets and the manifest written and renamed, the old ticket and the lock removed
    assert rounds > 8
    commit = digests.index(new.digest)
    assert 0 < commit < rounds - 1
    assert digests == [old.digest] * commit + [new.digest] * (rounds - commit)
    # What was left behind does not stay: the next writer takes it away.
    for n in (2, commit, commit + 1):
        folder = tmp_path / f"killed-{n:03d}"
        again = write(folder, [make_ticket("wideresnet38", 0.2)])
        assert snapshot(folder).keys() == {MANIFEST, again.entries[0].file}


def test_a_new_library_cut_off_is_refused_and_the_next_writer_completes_it(tmp_path: Path) -> None:
    (tmp_path / "tickets").mkdir()
    (tmp_path / WRITING).touch()
    ticket = make_ticket()
    (tmp_path / "tickets" / ".resnet18-30-0123456789ab.safetensors.0123456789abcdef.part").write_bytes(
        encode(ticket)[:99]
    )
    with pytest.raises(LibraryRejected, match=r"manifest\.json: no such file"):
        open_library(tmp_path)
    assert open_library(write(tmp_path, [ticket]).path).entries[0].name == "resnet18-30"
    assert not (tmp_path / WRITING).exists()


def test_a_library_replaced_while_it_is_read_opens_as_the_new_one(
    library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, written = library_module.read_ticket, list[Library]()

    def replacing(root: Path, entry: Entry, spec: InputSpec) -> Ticket:
        if not written:
            monkeypatch.setattr(library_module, "read_ticket", read)
            written.append(write(library_folder, [make_ticket("resnet34", 0.2)]))
        return read(root, entry, spec)

    monkeypatch.setattr(library_module, "read_ticket", replacing)
    assert open_library(library_folder).digest == written[0].digest


def test_a_reader_beside_a_writer_always_opens_one_library_or_the_other(library_folder: Path) -> None:
    first, second = [make_ticket("resnet18", 0.1)], [make_ticket("resnet34", 0.2)]
    digests = {write(library_folder, tickets).digest for tickets in (first, second)}
    faults: list[BaseException] = []

    def rewrite() -> None:
        try:
            for turn in range(20):
                write(library_folder, (first, second)[turn % 2])
        except BaseException as error:  # noqa: BLE001 - reported by the test itself
            faults.append(error)

    writer = threading.Thread(target=rewrite)
    writer.start()
    opened = 0
    while writer.is_alive() or not opened:
        assert open_library(library_folder).digest in digests
        opened += 1
    writer.join()
    assert not faults


def test_opening_draws_nothing_from_the_global_generators(small_library: Library) -> None:
    before, torch_before = random.getstate(), torch.get_rng_state()
    open_library(small_library.path)
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_ticket_may_be_continued_from_another(tmp_path: Path) -> None:
    ticket = make_ticket()
    (_, provenance, claims) = items([ticket])[0]
    parent = provenance.model_copy(update={"parent": "ef" * 32})
    library = write_library(tmp_path, classes=CLASSES, data="random", tickets=[(ticket, parent, claims)])
    assert open_library(library.path).entries[0].provenance.parent == "ef" * 32


def test_a_changed_temperature_is_another_library(tmp_path: Path) -> None:
    ticket = make_ticket()
    warmer = replace(ticket, temperature=2.0)
    assert write(tmp_path / "a", [ticket]).digest != write(tmp_path / "b", [warmer]).digest
