"""What model_store raises. Every message says where, what was found, what was expected and, if it helps, what to do."""

from typing import ClassVar


class TombolaError(Exception):
    """What all of Tombola's own errors are. exit_code: what the command line ends with."""

    exit_code: ClassVar[int] = 2


class StoreError(TombolaError):
    """A stored model, or a request to draw from one, that cannot be used."""


class StructureUnknown(StoreError):
    """A structure's name, width or class count that does not exist."""


class TicketRejected(StoreError):
    """A ticket, or its file, that is damaged, incomplete or not what its metadata says."""


class LibraryRejected(StoreError):
    """A library whose manifest, digests or files do not hold together."""


class PolicyRejected(StoreError):
    """A law of theta that does not fit the library or is no probability law."""


def os_error_text(error: OSError) -> str:
    """The file, if the error names one, and what is the matter with it: for a command to say and to end."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
