"""Writes blocks of EXIF that hold an orientation, in the forms that cameras and tools write."""

import struct
from typing import Final, Literal

ORIENTATION: Final = 0x0112
Kind = Literal["SHORT", "LONG"]
CODES: Final[dict[Kind, tuple[int, str]]] = {"SHORT": (3, "HH"), "LONG": (4, "I")}


def write_exif(orientation: int, *, big_endian: bool = True, kind: Kind = "SHORT", other_tags: int = 0) -> bytes:
    """A TIFF block with one directory: `other_tags` entries, then the orientation. No `Exif` header in front."""
    order = ">" if big_endian else "<"
    code, layout = CODES[kind]
    entries = [struct.pack(order + "HHIHH", 0x010A + index, 3, 1, 1, 0) for index in range(other_tags)]
    values = (orientation, 0) if kind == "SHORT" else (orientation,)
    entries.append(struct.pack(order + "HHI" + layout, ORIENTATION, code, 1, *values))
    head = (b"MM\0*" if big_endian else b"II*\0") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(entries) + struct.pack(order + "I", 0)
