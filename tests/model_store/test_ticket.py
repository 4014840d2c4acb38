import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model_store.errors import StoreError, TicketRejected
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.structures import STRUCTURES, Structure, StructureName, convs
from model_store.ticket import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    ZERO_DIGEST,
    Kind,
    Ticket,
    ValueDtype,
    decode,
    encode,
    kept_count,
    load_ticket,
    pack,
    save_ticket,
    unpack,
)
from tests.support.tickets import identical, make_ticket

LARGER = InputSpec(48, 64, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4), resize="cover")
VARIANTS: tuple[tuple[Kind, ValueDtype], ...] = (
    ("scratch", "float16"),
    ("fine-tuned", "float16"),
    ("fine-tuned", "float32"),
)


@pytest.mark.parametrize(
    ("numel", "density", "kept"),
    [
        (10, 0.3, 3),
        (10, 0.7, 7),
        (27, 0.07, 2),
        (27, 1.0, 27),
        (100, 0.29, 29),
        (1, 0.0001, 1),
        (9, 0.5, 5),
        (3, 0.34, 2),
    ],
)
def test_kept_counts_worked_by_hand(numel: int, density: float, kept: int) -> None:
    assert kept_count(numel, density) == kept


@given(st.integers(1, 2**28), st.integers(1, 1000))
def test_the_kept_count_is_that_of_exact_decimal_arithmetic(numel: int, thousandths: int) -> None:
    removed = (numel * (1 - Decimal(thousandths) / 1000)).to_integral_value(ROUND_FLOOR)
    assert kept_count(numel, thousandths / 1000) == numel - removed


@given(st.integers(1, 2**28), st.integers(1, 2**28))
def test_a_density_that_is_a_count_s_share_keeps_that_count(numel: int, kept: int) -> None:
    kept = min(kept, numel)
    assert kept_count(numel, kept / numel) == kept


def test_bits_are_packed_row_major_with_the_first_lowest_and_zeros_behind_the_last() -> None:
    bits = torch.tensor([[True, False, False, True, False], [False, False, False, False, True]])
    assert pack(bits).tolist() == [0b00001001, 0b10]
    assert torch.equal(unpack("bits", pack(bits), (2, 5)), bits)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(("kind", "value_dtype"), VARIANTS)
@pytest.mark.parametrize("density", [0.07, 1.0])
def test_what_is_saved_is_loaded_bit_for_bit_and_saves_to_the_same_bytes(
    tmp_path: Path, name: StructureName, kind: Kind, value_dtype: ValueDtype, density: float
) -> None:
    ticket = make_ticket(name, density, kind=kind, value_dtype=value_dtype, temperature=1.0 / 3)
    sha256 = save_ticket(tmp_path / "first", ticket)
    loaded = load_ticket(tmp_path / "first")
    assert identical(ticket, loaded)
    assert save_ticket(tmp_path / "second", loaded) == sha256
    data = (tmp_path / "second").read_bytes()
    assert data == (tmp_path / "first").read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256


def test_negative_zeros_and_the_smallest_values_come_back() -> None:
    ticket = make_ticket(kind="fine-tuned")
    values = {name: value.clone() for name, value in ticket.values.items()}
    values["classifier"][:3] = torch.tensor([-0.0, 2.0**-24, -65504.0])
    changed = replace(ticket, values=values)
    assert identical(changed, decode(encode(changed)))


def test_each_layer_may_have_its_own_density() -> None:
    ticket = make_ticket("resnet18", 0.3)
    densities = dict(ticket.densities) | {"classifier": 1.0}
    kept = torch.ones(16 * 10)
    masks = dict(ticket.masks) | {"classifier": torch.ones(10, 16, 1, 1, dtype=torch.bool)}
    whole = replace(ticket, densities=densities, masks=masks, values=dict(ticket.values) | {"classifier": kept})
    assert identical(whole, decode(encode(whole)))
    with pytest.raises(TicketRejected, match=r"classifier.mask: keeps 160 of 160 weights; density 0.3 means 48"):
        replace(whole, densities=ticket.densities)


def test_the_network_holds_the_kept_values_and_zeros_and_draws_nothing() -> None:
    ticket = make_ticket("wideresnet32", 0.07, kind="fine-tuned")
    before = torch.get_rng_state()
    network = ticket.network()
    assert torch.equal(torch.get_rng_state(), before)
    for name, conv in convs(network).items():
        assert torch.equal(conv.weight[ticket.masks[name]], ticket.values[name])
        assert not conv.weight[~ticket.masks[name]].any()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("density", "name"), [(0.07, "resnet18-07"), (0.3, "resnet18-30"), (1.0, "resnet18-100")])
def test_a_ticket_is_named_for_its_structure_and_its_density_in_percent(density: float, name: str) -> None:
    assert make_ticket("resnet18", density).name == name


# A second reader, written from FORMAT.md with struct, json and numpy alone


def read_by_the_format(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    header: dict[str, Any] = json.loads(table.pop("__metadata__")["ticket"])
    dtypes = {"U8": "<u1", "F16": "<f2", "F32": "<f4"}
    tensors = {}
    for name, entry in table.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], dtypes[entry["dtype"]]).reshape(entry["shape"])
    assert hashlib.sha256(data.replace(header["digest"].encode(), b"0" * 64, 1)).hexdigest() == header["digest"]
    return header, tensors


def weight_by_the_format(
    header: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]], name: str, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    weight = np.zeros(math.prod(shape), np.float32)
    mask = tensors[f"{name}.mask"].tolist()
    kept = [i for i in range(weight.size) if mask[i // 8] >> (i % 8) & 1]
    for rank, i in enumerate(kept):
        if header["kind"] == "scratch":
            negative = tensors[f"{name}.signs"][rank // 8] >> (rank % 8) & 1
            weight[i] = tensors[f"{name}.scale"][0] * (-1 if negative else 1)
        else:
            weight[i] = tensors[f"{name}.values"][rank]
    return weight.reshape(shape)


@pytest.mark.parametrize(("kind", "value_dtype"), VARIANTS)
def test_a_reader_written_from_the_format_s_description_finds_the_same_network(
    kind: Kind, value_dtype: ValueDtype
) -> None:
    ticket = make_ticket("resnet18", 0.07, kind=kind, value_dtype=value_dtype, temperature=2.5)
    header, tensors = read_by_the_format(encode(ticket))
    assert header["structure"] == {"name": "resnet18", "width": 2, "classes": 10, "stem_stride": 1}
    assert (header["density"], header["temperature"], header["kind"]) == (0.07, 2.5, kind)
    network = ticket.network()
    for name, conv in convs(network).items():
        np.testing.assert_array_equal(
            weight_by_the_format(header, tensors, name, tuple(conv.weight.shape)), conv.weight.numpy()
        )
    for name, statistic in ticket.statistics.items():
        np.testing.assert_array_equal(tensors[name], statistic.numpy())


def logits_by_the_format(header: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]], images: Tensor) -> Tensor:
    """The network as FORMAT.md describes it, in functions alone."""
    structure = header["structure"]
    resnet = structure["name"].startswith("resnet")
    blocks = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "wideresnet32": (5,) * 3, "wideresnet38": (6,) * 3}
    counts, width, relu = blocks[structure["name"]], structure["width"] * (1 if resnet else 16), functional.relu
    channels = width if resnet else 16

    spec = header.get("input") or {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    stride, pool = structure["stem_stride"], structure.get("stem_pool", 1)

    def conv(x: Tensor, name: str, outputs: int, size: int = 3, stride: int = 1) -> Tensor:
        weight = weight_by_the_format(header, tensors, name, (outputs, x.shape[1], size, size))
        return functional.conv2d(x, torch.from_numpy(weight), stride=stride, padding=size // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = (torch.tensor(tensors[f"{name}.running_{part}"]).view(1, -1, 1, 1) for part in ("mean", "var"))
        return (x - mean) / (variance + 1e-5).sqrt()

    def post_activation(x: Tensor, name: str, outputs: int, stride: int) -> Tensor:
        inside = relu(norm(conv(x, f"{name}.conv1", outputs, stride=stride), f"{name}.norm1"))
        inside = norm(conv(inside, f"{name}.conv2", outputs), f"{name}.norm2")
        if x.shape != inside.shape:
            x = norm(conv(x, f"{name}.shortcut.0", outputs, 1, stride), f"{name}.shortcut.1")
        return relu(inside + x)

    def pre_activation(x: Tensor, name: str, outputs: int, stride: int) -> Tensor:
        active = relu(norm(x, f"{name}.norm1"))
        inside = conv(active, f"{name}.conv1", outputs, stride=stride)
        inside = conv(relu(norm(inside, f"{name}.norm2")), f"{name}.conv2", outputs)
        return inside + (x if x.shape == inside.shape else conv(active, f"{name}.shortcut", outputs, 1, stride))

    mean, std = (torch.tensor(spec[field]).view(1, 3, 1, 1) for field in ("mean", "std"))
    x = conv((images - mean) / std, "stem.0", channels, 7 if stride == 4 else 3, stride)
    x = relu(norm(x, "stem.1")) if resnet else x
    x = functional.max_pool2d(x, 2 * pool - 1, pool, pool - 1) if pool > 1 else x
    firsts = {sum(counts[:stage]) for stage in range(1, len(counts))}
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
    for number, stage in enumerate(stages):
        block = post_activation if resnet else pre_activation
        x = block(x, f"stages.{number}", width * 2**stage, 2 if number in firsts else 1)
    x = x if resnet else relu(norm(x, "head.0"))
    return conv(x.mean(dim=(2, 3), keepdim=True), "classifier", structure["classes"], 1).flatten(1)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    ("spec", "stem"),
    [(CIFAR10_INPUT, (1, 1)), (CIFAR10_INPUT, (2, 1)), (LARGER, (2, 2)), (LARGER, (4, 1)), (CIFAR10_INPUT, (1, 2))],
)
def test_and_a_network_built_from_that_description_has_the_same_logits(
    name: StructureName, spec: InputSpec, stem: tuple[int, int]
) -> None:
    ticket = make_ticket(name, 0.5, kind="fine-tuned", classes=3, spec=spec, stem=stem)
    images = torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(1))
    header, tensors = read_by_the_format(encode(ticket))
    assert header["version"] == (1 if (spec, stem[0], stem[1]) in ((CIFAR10_INPUT, 1, 1), (CIFAR10_INPUT, 2, 1)) else 2)
    assert (logits_by_the_format(header, tensors, images) - ticket.network()(images)).abs().max() <= 1e-4


# Refusals


@pytest.fixture(scope="module")
def scratch() -> bytes:
    return encode(make_ticket("resnet18", 0.07))


def header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_file_cut_short_anywhere_is_refused_by_name(scratch: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    start = header_length(scratch)
    for length in {
        0,
        1,
        7,
        8,
        9,
        start // 2,
        start - 1,
        start,
        start + 1,
        (start + len(scratch)) // 2,
        len(scratch) - 1,
    }:
        path.write_bytes(scratch[:length])
        with pytest.raises(TicketRejected, match=r"short\.safetensors: \d+ bytes"):
            load_ticket(path)


def test_bytes_behind_the_end_are_refused(scratch: bytes) -> None:
    with pytest.raises(TicketRejected, match="its header describes"):
        decode(scratch + b"\0")


def test_one_flipped_bit_anywhere_is_refused_as_a_store_error(scratch: bytes) -> None:
    start = header_length(scratch)
    places = [*range(8), *range(8, start, 7), *range(start, len(scratch), 61)]
    for place in places:
        damaged = bytearray(scratch)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(TicketRejected):
            decode(bytes(damaged))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_as_a_store_error(data: bytes) -> None:
    with pytest.raises(TicketRejected):
        decode(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda v: st.lists(v) | st.dictionaries(st.text(max_size=4), v),
        max_leaves=8,
    )
)
def test_arbitrary_json_in_the_header_is_refused_as_a_store_error(content: object) -> None:
    for table in (content, {"__metadata__": content}, {"__metadata__": {"ticket": json.dumps(content)}}):
        text = json.dumps(table).encode()
        with pytest.raises(TicketRejected):
            decode(struct.pack("<Q", len(text)) + text)


def forged(
    data: bytes, *, tensors: Callable[[dict[str, Tensor]], object] = len, header: dict[str, Any] | None = None
) -> bytes:
    """A file with other tensors or metadata and a right digest: what an exporter with a fault would write."""
    content = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    tensors(content)
    fields = json.loads(json.loads(data[8 : header_length(data)])["__metadata__"]["ticket"])
    fields |= {"digest": ZERO_DIGEST} | (header or {})
    fields = {name: value for name, value in fields.items() if value is not ...}
    unsigned = safetensors.torch.save(content, {"ticket": json.dumps(fields)})
    return unsigned.replace(ZERO_DIGEST.encode(), hashlib.sha256(unsigned).hexdigest().encode(), 1)


def test_a_forged_file_without_a_change_is_accepted(scratch: bytes) -> None:
    assert identical(decode(forged(scratch)), decode(scratch))


def flip(name: str, place: int, bit: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda content: content[name].__setitem__(place, int(content[name][place]) ^ 1 << bit)


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda content: content[name].__setitem__(0, value)


# resnet18·2 at density .07: the stem has 54 weights, 4 kept: 7 bytes of mask with 2 padding bits, 1 of signs with 4.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("stem.0.scale"), "tensors: missing stem.0.scale"),
        (lambda content: content.update(extra=torch.zeros(1)), "tensors: not expected extra"),
        (lambda content: content.update({"stem.0.values": torch.zeros(4)}), "not expected stem.0.values"),
        (lambda content: content.update({"stem.0.scale": torch.ones(1).half()}), r"\('F16', \[1\]\).*\('F32', \[1\]\)"),
        (lambda content: content.update({"stem.0.scale": torch.ones(2)}), r"stem.0.scale: .*\[2\].*\[1\]"),
        (lambda content: content.update({"stem.0.mask": torch.zeros(8, dtype=torch.uint8)}), r"\[8\].*expected.*\[7\]"),
        (lambda content: content.update({"stem.1.running_var": torch.ones(1, 2)}), r"\[1, 2\].*expected.*\[2\]"),
        (flip("stem.0.mask", 6, 7), "stem.0.mask: a padding bit behind the 54"),
        (flip("stem.0.signs", 0, 4), "stem.0.signs: a padding bit behind the 4"),
        (flip("stem.0.mask", 0, 0), r"stem.0.mask: keeps [35] of 54 weights; density 0.07 means 4"),
        (put("stem.0.scale", math.nan), "stem.0.scale: nan; expected a number above 0"),
        (put("stem.0.scale", math.inf), "stem.0.values: holds a number that is not finite"),
        (put("stem.0.scale", 0.0), "stem.0.scale: 0.0; expected a number above 0"),
        (put("stem.0.scale", -1.0), "stem.0.scale: -1.0"),
        (put("stem.1.running_mean", math.nan), "stem.1.running_mean: holds a number that is not finite"),
        (put("stem.1.running_var", math.inf), "stem.1.running_var: holds a number that is not finite"),
        (put("stem.1.running_var", -0.5), "stem.1.running_var: a variance of -0.5"),
    ],
)
def test_a_file_whose_tensors_are_not_what_they_must_be_is_refused_by_name(
    scratch: bytes, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(TicketRejected, match=message):
        decode(forged(scratch, tensors=change))


STRUCTURE = {"name": "resnet18", "width": 2, "classes": 10, "stem_stride": 1}
INPUT = json.loads(json.dumps(asdict(CIFAR10_INPUT)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"format and version \('tombola-ticket', 3\); this reader knows .* versions 1 and 2"),
        ({"version": 2}, "metadata: version 2 with no input"),
        ({"input": INPUT}, "metadata: version 1 with an input"),
        ({"version": 2, "input": INPUT}, "metadata: version 2; expected 1 for resnet18"),
        ({"version": 2, "input": INPUT | {"width": 4000}}, "metadata: input width 4000; expected an integer from 8"),
        ({"version": 2, "input": INPUT | {"std": [0.0] * 3}}, r"metadata: input std \(0.0, 0.0, 0.0\); expected"),
        ({"structure": STRUCTURE | {"stem_pool": 2}}, "metadata: version 1; expected 2"),
        ({"version": "1"}, "format and version"),
        ({"format": "other"}, "format and version"),
        ({"format": ...}, "format and version"),
        ({"density": 0.071}, None),
        ({"density": "0.07"}, "metadata: density"),
        ({"density": True}, "metadata: density"),
        ({"density": 0}, "density 0.0; expected a number from 0.0001 to 1"),
        ({"density": 1.5}, "density 1.5"),
        ({"densities": {}}, "densities: missing"),
        ({"kind": "dense"}, "metadata: kind"),
        ({"kind": "fine-tuned"}, "value_dtype None in a fine-tuned ticket"),
        ({"value_dtype": "float16"}, "tensors: missing"),
        ({"value_dtype": "bfloat16"}, "metadata: value_dtype"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": math.nan}, "metadata: .*NaN|metadata: temperature"),
        ({"temperature": math.inf}, "metadata: "),
        ({"temperature": ...}, "metadata: temperature: Field required"),
        ({"surplus": 1}, "metadata: surplus"),
        ({"digest": "0" * 63}, "metadata: digest"),
        ({"structure": STRUCTURE | {"name": "resnet50"}}, "metadata: structure.name: .*'resnet50'"),
        ({"structure": STRUCTURE | {"width": 0}}, "metadata: resnet18: width 0"),
        ({"structure": STRUCTURE | {"width": "2"}}, "metadata: structure.width"),
        ({"structure": STRUCTURE | {"depth": 2}}, "metadata: structure.depth"),
        ({"structure": STRUCTURE | {"width": 3}}, "stem.1.running_mean: dtype and shape"),
        ({"structure": STRUCTURE | {"width": 4096}}, "weights; at most"),
    ],
)
def test_a_file_whose_metadata_are_not_what_they_must_be_is_refused_by_name(
    scratch: bytes, change: dict[str, Any], message: str | None
) -> None:
    data = forged(scratch, header=change)
    if message is None:  # the nominal density may differ from the layers' own
        assert decode(data).density == change["density"]
        return
    with pytest.raises(TicketRejected, match=message):
        decode(data)


def test_a_wrong_digest_is_refused_with_both(scratch: bytes) -> None:
    written = json.loads(json.loads(scratch[8 : header_length(scratch)])["__metadata__"]["ticket"])["digest"]
    wrong = hashlib.sha256(b"another file").hexdigest()
    with pytest.raises(TicketRejected, match=f"{written}.*its metadata says {wrong}"):
        decode(scratch.replace(written.encode(), wrong.encode()))


def test_values_that_are_not_finite_are_refused() -> None:
    data = encode(make_ticket(kind="fine-tuned"))
    with pytest.raises(TicketRejected, match=r"stem.0.values: holds a number that is not finite"):
        decode(forged(data, tensors=put("stem.0.values", math.nan)))


def test_an_over_long_header_is_refused_before_it_is_parsed() -> None:
    text = b" " * (MAX_HEADER_BYTES + 1)
    with pytest.raises(TicketRejected, match=f"a header of {len(text)} bytes; at most {MAX_HEADER_BYTES}"):
        decode(struct.pack("<Q", len(text)) + text)
    with pytest.raises(TicketRejected, match="bytes"):
        decode(struct.pack("<Q", 2**63) + b"{}")


def test_deeply_nested_metadata_is_refused() -> None:
    text = b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(TicketRejected, match="no ticket's metadata"):
        decode(struct.pack("<Q", len(text)) + text)


def test_an_over_long_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no room
    with pytest.raises(TicketRejected, match=f"long.safetensors: {MAX_FILE_BYTES + 1} bytes; at most {MAX_FILE_BYTES}"):
        load_ticket(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TicketRejected, match=f"{path}: no such file"):
            load_ticket(path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    torch.save({"stem.0.mask": torch.zeros(1)}, path)
    with pytest.raises(TicketRejected, match="pickled: "):
        load_ticket(path)


def change(ticket: Ticket, **fields: Any) -> Ticket:
    return replace(ticket, **fields)


def test_a_ticket_that_is_not_whole_cannot_be_made() -> None:
    ticket, tuned = make_ticket(), make_ticket(kind="fine-tuned")
    stem = "stem.0"
    with pytest.raises(TicketRejected, match="expected \\+-one positive scale"):
        change(ticket, values=dict(ticket.values) | {stem: torch.linspace(1, 2, ticket.values[stem].numel())})
    with pytest.raises(TicketRejected, match="not rounded to float16"):
        change(tuned, values=dict(tuned.values) | {stem: tuned.values[stem] + 1e-6})
    with pytest.raises(TicketRejected, match="float64"):
        change(tuned, values=dict(tuned.values) | {stem: tuned.values[stem].double()})
    with pytest.raises(TicketRejected, match=r"masks: missing stem.0"):
        change(ticket, masks={name: mask for name, mask in ticket.masks.items() if name != stem})
    with pytest.raises(TicketRejected, match="a scratch ticket stores signs"):
        change(ticket, value_dtype="float32")
    with pytest.raises(TicketRejected, match="temperature nan"):
        change(ticket, temperature=math.nan)
    with pytest.raises(TicketRejected, match="kind 'other'"):
        change(ticket, kind="other")


def test_a_network_too_large_to_read_is_refused_before_anything_is_allocated() -> None:
    ticket = make_ticket()
    with pytest.raises(StoreError, match=r"resnet34·4096: 8\d,\d{3},\d{3},\d{3} weights; at most 268,435,456"):
        change(ticket, structure=Structure("resnet34", 4096))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ticket.safetensors"
    save_ticket(path, make_ticket(seed=1))
    before = path.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_ticket(path, make_ticket(seed=2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
