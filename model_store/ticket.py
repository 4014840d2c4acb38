"""Ticket: one sparse network as it is stored, and its file.

A file is one safetensors container. Its single metadata string describes the ticket whole and carries a SHA-256 of the
file itself. So a ticket on its own is checked as closely as one inside a library. FORMAT.md is the reference.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, cast

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from safetensors import SafetensorError
from torch import Tensor

from model_store.errors import StoreError, TicketRejected
from model_store.files import write_atomically
from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.json_object import first_error
from model_store.structures import Network, Structure, convs, norms

Kind = Literal["scratch", "fine-tuned"]
ValueDtype = Literal["float16", "float32"]

FORMAT: Final = "tombola-ticket"
VERSIONS: Final = (1, 2)
MAX_HEADER_BYTES: Final = 2**20  # WideResNet38, the largest, needs 18 KiB
MAX_FILE_BYTES: Final = 2**30  # a dense float32 WideResNet38 at the paper's width is 230 MB
MAX_WEIGHTS: Final = 2**28  # nearly five times that network's
MIN_DENSITY: Final = 1e-4
TEMPERATURES: Final = (1e-3, 1e3)
DTYPES: Final = {"float16": torch.float16, "float32": torch.float32}
CODES: Final = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
ZERO_DIGEST: Final = "0" * 64  # what stands in the digest's place while the digest is computed


class StrictModel(BaseModel):
    """The strict reading of anything stored as JSON: no key missing or unknown, no conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorSpec(NamedTuple):
    """One tensor of a file: what its dtype and shape must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Header(StrictModel):
    """The metadata string of a ticket's file."""

    format: Literal["tombola-ticket"]
    version: Literal[1, 2]
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    structure: Structure
    input: InputSpec | None = Field(None, exclude_if=lambda spec: spec is None)
    density: float
    densities: dict[str, float]
    kind: Kind
    value_dtype: ValueDtype | None
    temperature: float

    @model_validator(mode="after")
    def of_its_version(self) -> Self:
        check_version(self.version, self.structure, self.input)
        return self


def version_of(structure: Structure, spec: InputSpec) -> Literal[1, 2]:
    """The lowest version that can describe it, so that one content has one file.

    Version 1 knows CIFAR-10's input alone, and stems without pooling and of a stride of at most 2.
    """
    return 1 if spec == CIFAR10_INPUT and structure.stem_pool == 1 and structure.stem_stride <= 2 else 2


def check_version(version: int, structure: Structure, spec: InputSpec | None) -> None:
    """Raises TicketRejected where a header's version is not the one that its content has."""
    if (version == 1) != (spec is None):
        there = "an" if spec is not None else "no"
        raise TicketRejected(f"version {version} with {there} input; expected one in version 2, and in no other")
    expected = version_of(structure, spec or CIFAR10_INPUT)
    if version != expected:
        raise TicketRejected(f"version {version}; expected {expected} for {structure} and this input")


@dataclass(frozen=True, eq=False, kw_only=True)
class Ticket:
    """A mask over a structure's convolutions, the weights it keeps, and the norm statistics that belong to it.

    density: nominal fraction kept, from 0.0001 to 1.  densities: the same for each convolution, by name.
    masks: bool, in the shape of the convolution's weight; exactly kept_count() of them true.
    values: float32 [kept], the kept weights in row-major order. In a scratch ticket all of a layer are +-one scale.
    statistics: "<norm>.running_mean" and "<norm>.running_var", float32 [channels].
    temperature: what the logits are divided by in an ensemble.
    value_dtype: how a fine-tuned ticket's values are stored; they are rounded to it already.
    input: the pictures that it takes, and their mean and deviation.

    Raises TicketRejected if any of this does not hold, so that a Ticket that exists is whole.
    """

    structure: Structure
    density: float
    densities: Mapping[str, float]
    masks: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    kind: Kind
    temperature: float = 1.0
    value_dtype: ValueDtype = "float16"
    input: InputSpec = CIFAR10_INPUT

    def __post_init__(self) -> None:
        check_numbers(self)
        shapes, channels = layers(self.structure)
        for field, expected in (("densities", shapes), ("masks", shapes), ("values", shapes), ("statistics", channels)):
            same_names(field, getattr(self, field), expected)
        for name in shapes:
            check_layer(self, name)
        for name in channels:
            check_statistic(name, self.statistics[name], channels[name])

    @property
    def name(self) -> str:
        """Such as resnet18-07: the structure, and the density in percent."""
        return f"{self.structure.name}-{round(100 * self.density):02d}"

    def network(self) -> Network:
        """The dense network with the mask baked into its weights: eval mode, no gradients, norms not folded."""
        network = self.structure.blank(self.input).eval().requires_grad_(False)
        for name, module in convs(network).items():
            module.weight[self.masks[name]] = self.values[name]
        for name, norm in norms(network).items():
            norm.get_buffer("running_mean").copy_(self.statistics[f"{name}.running_mean"])
            norm.get_buffer("running_var").copy_(self.statistics[f"{name}.running_var"])
        return network


def kept_count(numel: int, density: float) -> int:
    """How many of a layer's `numel` weights a ticket of this density keeps: numel - floor((1 - density) * numel)."""
    # 1e-6: in floating point (1 - .3) * 10 is 6.999...; the error stays below it up to MAX_WEIGHTS.
    return numel - math.floor((1 - density) * numel + 1e-6)


def uniform(structure: Structure, density: float) -> dict[str, float]:
    """The same density for every convolution."""
    return dict.fromkeys(layers(structure)[0], density)


@lru_cache(maxsize=64)
def layers(structure: Structure) -> tuple[dict[str, torch.Size], dict[str, int]]:
    """The convolutions' weight shapes by name, and the length of every statistic by name. Allocates no weights."""
    with torch.device("meta"):
        network = structure.build()
    shapes = {name: module.weight.shape for name, module in convs(network).items()}
    total = sum(shape.numel() for shape in shapes.values())
    if total > MAX_WEIGHTS:
        raise TicketRejected(f"{structure}: {total:,} weights; at most {MAX_WEIGHTS:,} are read")
    parts = ("running_mean", "running_var")
    return shapes, {f"{name}.{part}": norm.num_features for name, norm in norms(network).items() for part in parts}


def check_numbers(ticket: Ticket) -> None:
    check_number("density", ticket.density, MIN_DENSITY, 1)
    for name, density in ticket.densities.items():
        check_number(f"densities: {name}", density, MIN_DENSITY, 1)
    check_number("temperature", ticket.temperature, *TEMPERATURES)
    if ticket.kind not in ("scratch", "fine-tuned"):
        raise TicketRejected(f"kind {ticket.kind!r}; expected 'scratch' or 'fine-tuned'")
    if ticket.value_dtype not in DTYPES or (ticket.kind == "scratch" and ticket.value_dtype != "float16"):
        allowed = "float16 or float32 if fine-tuned; a scratch ticket stores signs and leaves the default"
        raise TicketRejected(f"value_dtype {ticket.value_dtype!r} in a {ticket.kind} ticket; expected {allowed}")


def check_number(where: str, value: object, least: float, most: float) -> None:
    if type(value) not in (int, float) or not least <= cast("float", value) <= most:
        raise TicketRejected(f"{where} {value!r}; expected a number from {least} to {most}")


def same_names(where: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{word} {', '.join(names[:4])}" for word, names in (("missing", missing), ("not expected", extra)) if names
        ]
        raise TicketRejected(f"{where}: {'; '.join(parts)} ({len(actual)} found, {len(expected)} expected)")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or tensor.device.type != "cpu":
        actual = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device.type}"
        raise TicketRejected(f"{name}: {actual}; expected {dtype} {list(shape)} on cpu")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise TicketRejected(f"{name}: holds a number that is not finite")


def check_layer(ticket: Ticket, name: str) -> None:
    mask, values, density = ticket.masks[name], ticket.values[name], ticket.densities[name]
    check_tensor(f"{name}.mask", mask, torch.bool, layers(ticket.structure)[0][name])
    kept, expected = int(mask.sum()), kept_count(mask.numel(), density)
    if kept != expected:
        raise TicketRejected(f"{name}.mask: keeps {kept} of {mask.numel()} weights; density {density} means {expected}")
    check_tensor(f"{name}.values", values, torch.float32, (kept,))
    if ticket.kind == "scratch":
        check_signs(name, values)
    elif not torch.equal(values.to(DTYPES[ticket.value_dtype]).float(), values):
        raise TicketRejected(f"{name}.values: not rounded to {ticket.value_dtype}; round them before you store them")


def check_signs(name: str, values: Tensor) -> None:
    scale = values[0].abs()
    if not (bool(scale > 0) and bool((values.abs() == scale).all())):
        raise TicketRejected(f"{name}.values: expected +-one positive scale in a scratch ticket, found others")


def check_statistic(name: str, statistic: Tensor, channels: int) -> None:
    """Finite, and no variance below 0. A variance of 0 is a channel none of whose weights is kept: legal."""
    check_tensor(name, statistic, torch.float32, (channels,))
    if name.endswith("running_var") and bool((statistic < 0).any()):
        raise TicketRejected(f"{name}: a variance of {statistic.min().item()}; expected none below 0")


# The file


def pack(bits: Tensor) -> Tensor:
    """bool [...] -> uint8 [ceil(numel / 8)]: row-major, the first bit lowest in its byte, zeros behind the last."""
    return torch.from_numpy(np.packbits(bits.flatten().numpy(), bitorder="little"))


def unpack(name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of pack(). Raises TicketRejected if a padding bit is not 0."""
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little").view(np.bool_))
    count = math.prod(shape)
    if bool(bits[count:].any()):
        raise TicketRejected(f"{name}: a padding bit behind the {count} of the tensor is set; expected zeros")
    return bits[:count].clone().view(shape)


def slots(header: Header) -> dict[str, TensorSpec]:
    """Every tensor the file must hold, and no other, from what its metadata says."""
    shapes, channels = layers(header.structure)
    same_names("densities", header.densities, shapes)
    actual = {name: TensorSpec(torch.float32, (length,)) for name, length in channels.items()}
    for name, shape in shapes.items():
        kept = kept_count(shape.numel(), header.densities[name])
        actual[f"{name}.mask"] = TensorSpec(torch.uint8, (-(-shape.numel() // 8),))
        if header.value_dtype is None:
            actual[f"{name}.signs"] = TensorSpec(torch.uint8, (-(-kept // 8),))
            actual[f"{name}.scale"] = TensorSpec(torch.float32, (1,))
        else:
            actual[f"{name}.values"] = TensorSpec(DTYPES[header.value_dtype], (kept,))
    return actual


def header_of(ticket: Ticket) -> Header:
    version = version_of(ticket.structure, ticket.input)
    return Header(
        format=FORMAT,
        version=version,
        digest=ZERO_DIGEST,
        structure=ticket.structure,
        input=None if version == 1 else ticket.input,
        density=float(ticket.density),
        densities={name: float(ticket.densities[name]) for name in layers(ticket.structure)[0]},
        kind=ticket.kind,
        value_dtype=None if ticket.kind == "scratch" else ticket.value_dtype,
        temperature=float(ticket.temperature),
    )


def tensors_of(ticket: Ticket) -> dict[str, Tensor]:
    tensors = {name: statistic.contiguous() for name, statistic in ticket.statistics.items()}
    for name, values in ticket.values.items():
        tensors[f"{name}.mask"] = pack(ticket.masks[name])
        if ticket.kind == "scratch":
            tensors[f"{name}.signs"] = pack(values < 0)
            tensors[f"{name}.scale"] = values[:1].abs()
        else:
            tensors[f"{name}.values"] = values.to(DTYPES[ticket.value_dtype]).contiguous()
    return tensors


def encode(ticket: Ticket) -> bytes:
    """The ticket's file. Equal tickets give equal bytes."""
    # One metadata string: safetensors does not promise an order of several.
    unsigned = safetensors.torch.save(tensors_of(ticket), {"ticket": header_of(ticket).model_dump_json()})
    return unsigned.replace(ZERO_DIGEST.encode(), hashlib.sha256(unsigned).hexdigest().encode(), 1)


def decode(data: bytes) -> Ticket:
    """The ticket in a file's bytes, checked whole. Raises TicketRejected."""
    header, entries = read_header(data)
    expected = slots(header)
    same_names("tensors", entries, expected)
    for name, slot in expected.items():
        check_entry(name, entries[name], slot)
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise TicketRejected(f"not a sound safetensors file: {error}") from error
    return assemble(header, tensors)


def check_entry(name: str, entry: Any, slot: TensorSpec) -> None:
    actual = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else entry
    expected = (CODES[slot.dtype], list(slot.shape))
    if actual != expected:
        raise TicketRejected(f"{name}: dtype and shape {actual!r}; expected {expected!r}")


def read_header(data: bytes) -> tuple[Header, dict[str, Any]]:
    """The metadata, and the table of tensors as the container gives it, once the whole file's digest is right."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + min(length, MAX_HEADER_BYTES):
        raise TicketRejected(f"{len(data)} bytes, cut short inside the header")
    if length > MAX_HEADER_BYTES:
        raise TicketRejected(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        table = from_json(data[8 : 8 + length])
        text = table.pop("__metadata__")["ticket"]
        fields = from_json(text)
        actual = fields.get("format"), fields.get("version")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise TicketRejected(f"no ticket's metadata in its header ({error!r:.100})") from error
    if actual[0] != FORMAT or type(actual[1]) is not int or actual[1] not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise TicketRejected(f"format and version {actual!r}; this reader knows {FORMAT!r}, versions {known}")
    check_length(data, 8 + length, table)
    header = parse_header(text)
    check_digest(data, header.digest)
    return header, table


def check_length(data: bytes, start: int, table: dict[str, Any]) -> None:
    ends = [entry.get("data_offsets") for entry in table.values() if isinstance(entry, dict)]
    end = start + max(
        (end[1] for end in ends if isinstance(end, list) and len(end) == 2 and type(end[1]) is int), default=0
    )
    if len(data) != end:
        raise TicketRejected(f"{len(data)} bytes; its header describes {end}: cut short, or something was added")


def parse_header(text: str) -> Header:
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        raise TicketRejected(f"metadata: {first_error(error)}") from error
    except StoreError as error:
        raise TicketRejected(f"metadata: {error}") from error


def check_digest(data: bytes, written: str) -> None:
    unsigned = data.replace(written.encode(), ZERO_DIGEST.encode(), 1)
    computed = hashlib.sha256(unsigned).hexdigest()
    if computed != written:
        raise TicketRejected(f"its content has the digest {computed}, its metadata says {written}: damaged or altered")


def assemble(header: Header, tensors: Mapping[str, Tensor]) -> Ticket:
    shapes, channels = layers(header.structure)
    masks = {name: unpack(f"{name}.mask", tensors[f"{name}.mask"], shape) for name, shape in shapes.items()}
    return Ticket(
        structure=header.structure,
        density=header.density,
        densities=header.densities,
        masks=masks,
        values={name: stored_values(header, name, tensors) for name in shapes},
        statistics={name: tensors[name] for name in channels},
        kind=header.kind,
        temperature=header.temperature,
        value_dtype=header.value_dtype or "float16",
        input=header.input or CIFAR10_INPUT,
    )


def stored_values(header: Header, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if (header.kind == "scratch") != (header.value_dtype is None):
        raise TicketRejected(f"metadata: value_dtype {header.value_dtype!r} in a {header.kind} ticket")
    if header.value_dtype is not None:
        return tensors[f"{name}.values"].float()
    kept = kept_count(layers(header.structure)[0][name].numel(), header.densities[name])
    scale = tensors[f"{name}.scale"]
    if not bool(scale > 0):
        raise TicketRejected(f"{name}.scale: {scale.item()}; expected a number above 0")
    return torch.where(unpack(f"{name}.signs", tensors[f"{name}.signs"], (kept,)), -scale, scale)


def read_bytes(path: Path) -> bytes:
    """A regular file of at most MAX_FILE_BYTES."""
    try:
        if not path.is_file():
            raise TicketRejected(f"{path}: no such file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TicketRejected(f"{path}: {size} bytes; at most {MAX_FILE_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise TicketRejected(f"{path}: cannot be read: {error}") from error


def load_ticket(path: Path) -> Ticket:
    """Reads a ticket's file and verifies it.

    Args:
      path: a `.safetensors` file as FORMAT.md describes it.

    Returns:
      The ticket.

    Raises:
      TicketRejected: the file is damaged or incomplete. The message names it, what was found and what was expected.
    """
    data = read_bytes(path)
    try:
        return decode(data)
    except TicketRejected as error:
        raise TicketRejected(f"{path}: {error}") from error


def save_ticket(path: Path, ticket: Ticket) -> str:
    """Writes a ticket's file, whole or not at all.

    Args:
      path: the file; its folder must exist.
      ticket: the ticket.

    Returns:
      The file's SHA-256 in hex.
    """
    data = encode(ticket)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()
