"""What a library's networks take as a picture: its size, how other sizes become it, and the data's statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, get_args

from model_store.errors import InputRejected

Resize = Literal["squash", "cover", "contain"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
RESIZES: Final[tuple[Resize, ...]] = get_args(Resize)
INTERPOLATIONS: Final[tuple[Interpolation, ...]] = get_args(Interpolation)
CHANNELS: Final = 3
MIN_SIDE: Final = 8
MAX_SIDE: Final = 1024
MAX_PIXELS: Final = 89_478_485  # Pillow refuses more, whatever it is told; a test holds that it is Pillow's number
Three = tuple[float, float, float]


@dataclass(frozen=True)
class InputSpec:
    """The pictures that every network of a library takes.

    Attributes:
      height: rows of pixels.
      width: pixels of a row.
      mean: of each channel over the training images, in pixel units of [0, 1].
      std: standard deviation of each channel, in the same units.
      channels: 3, red, green and blue. Pictures of other kinds are converted.
      resize: "squash" stretches the picture to the size; "cover" cuts out its largest centred part of the right
        proportions; "contain" shows all of it, with white beside it.
      interpolation: of the resizing, antialiased but for "nearest".
    """

    height: int
    width: int
    mean: Three
    std: Three
    channels: Literal[3] = CHANNELS
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for field in ("height", "width"):
            side = getattr(self, field)
            if type(side) is not int or not MIN_SIDE <= side <= MAX_SIDE:
                raise InputRejected(f"input {field} {side!r}; expected an integer from {MIN_SIDE} to {MAX_SIDE}")
        for field, allowed in (("channels", (CHANNELS,)), ("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, field) not in allowed:
                known = ", ".join(map(str, allowed))
                raise InputRejected(f"input {field} {getattr(self, field)!r}; expected one of {known}")
        self.check_statistics()

    def check_statistics(self) -> None:
        for field, least in (("mean", 0.0), ("std", 1e-3)):
            values = getattr(self, field)
            if len(values) != CHANNELS or not all(least <= value <= 1 for value in values):
                raise InputRejected(f"input {field} {values!r}; expected {CHANNELS} numbers from {least:g} to 1")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}, {self.resize}, {self.interpolation}"

    @property
    def numel(self) -> int:
        """Numbers of one picture."""
        return self.channels * self.height * self.width


def parse_size(text: str) -> tuple[int, int]:
    """Height and width, of "64" or "48x64". Raises InputRejected."""
    sides = [int(part) for part in text.split("x") if part.isdecimal()]
    if len(sides) != text.count("x") + 1 or len(sides) > 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise InputRejected(f"{text}: expected a side such as 64, or 48x64, each from {MIN_SIDE} to {MAX_SIDE}")
    return sides[0], sides[-1]


# CIFAR-10: 32x32, and the mean and standard deviation of its training images. The input of every format 1 library.
CIFAR10_INPUT: Final = InputSpec(32, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
