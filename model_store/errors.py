"""What model_store raises. Every message says where, what was found, what was expected and, if it helps, what to do."""

from typing import ClassVar


class TombolaError(Exception):
    """What all of Tombola's own errors are. exit_code: what the command line ends with."""

    exit_code: ClassVar[int] = 2


class StoreError(TombolaError):
    """A stored model, or a request to draw from one, that cannot be used."""


class PageRejected(TombolaError):
    """A Markdown page without the marks of the section that is to be written."""


class StructureUnknown(StoreError):
    """A structure's name, width or class count that does not exist."""


class TicketRejected(StoreError):
    """A ticket, or its file, that is damaged, incomplete or not what its metadata says."""


class InputRejected(StoreError):
    """A description of input pictures with a size, a statistic or a way of resizing that does not exist."""


class LibraryRejected(StoreError):
    """A library whose manifest, digests or files do not hold together."""


class PolicyRejected(StoreError):
    """A law of theta that does not fit the library or is no probability law."""


class ImageRejected(StoreError):
    """A picture that cannot be read. The message names no file: the caller knows it."""


class ImageEmpty(ImageRejected):
    """No bytes."""


class ImageFormatUnknown(ImageRejected):
    """Another format than those asked for, going by its first bytes."""


class ImageDamaged(ImageRejected):
    """A file that ends early or contradicts itself."""


class ImageUnsupported(ImageRejected):
    """A sound file whose samples or colours are not read here: floats, or high dynamic range."""


class ImageTooLarge(ImageRejected):
    """More pixels, or more memory while it is decoded, than the limit allows."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"more than {limit} pixels once decoded, which is the limit")


class DataRejected(StoreError):
    """Labelled images that are missing, damaged, laid out otherwise, or of other classes than expected."""


class DataUnlabelled(DataRejected):
    """Files without a single picture in a folder that names its class."""


def os_error_text(error: OSError) -> str:
    """The file, if the error names one, and what is the matter with it: for a command to say and to end."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
