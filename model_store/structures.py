"""The four dense networks, at any width, that tickets are cut from.

Post-activation ResNets and pre-activation WideResNets in their CIFAR form, as in Robust Scratch Tickets
(Fu et al., NeurIPS 2021) and its code: every weight is a convolution without bias (stem, 1x1 shortcuts and a 1x1
classifier included) and batch norm has no affine parameters. So a ticket is a mask over convolutions and nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, cast, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model_store.errors import StructureUnknown
from model_store.input_spec import CIFAR10_INPUT, InputSpec, Three

StructureName = Literal["resnet18", "resnet34", "wideresnet32", "wideresnet38"]
STRUCTURES: Final[tuple[StructureName, ...]] = get_args(StructureName)

STRIDES: Final = (1, 2, 4)  # of a stem
POOLS: Final = (1, 2, 4, 8, 16, 32)  # of a stem

RESNET_BLOCKS: Final[dict[str, tuple[int, ...]]] = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
# "WideResNet32" counts as Madry et al. do, 6n + 2 layers: it is WRN-34-k in the usual naming, and 38 is WRN-40-k.
WIDE_RESNET_BLOCKS: Final[dict[str, tuple[int, ...]]] = {"wideresnet32": (5, 5, 5), "wideresnet38": (6, 6, 6)}


class Norm(nn.BatchNorm2d):
    """Batch norm without affine parameters. In train mode it uses the batch and never touches the stored statistics.

    The statistics belong to one mask: `calibrate` measures them once the mask stands. They are not accumulated on the
    way, so neither an attack nor an audit can change them by running the network.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return functional.batch_norm(input, None, None, training=True, eps=self.eps)
        return functional.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def cover(stride: int) -> int:
    """The side of squares that overlap at this stride: 3 at 2, and 7 at 4. Padded by half, none is cut off."""
    return max(3, 2 * stride - 1)


def stem_of(outputs: int, stride: int, pool: int, *after: nn.Module) -> nn.Sequential:
    """The first convolution, what follows it, and a max-pooling where there is one. A side n becomes ceil(n / s)."""
    pooling = [nn.MaxPool2d(cover(pool), pool, padding=pool - 1)] if pool > 1 else []
    return nn.Sequential(conv(3, outputs, cover(stride), stride), *after, *pooling)


class BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm, add, relu; the shortcut is a 1x1 conv-norm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), Norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), Norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), Norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inside)) + self.shortcut(x))


class WideBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv, add; where the shape changes, the shortcut is a plain 1x1 conv of the active x."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1, self.norm2 = conv(inputs, outputs, 3, stride), Norm(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.norm1(x))
        inside = functional.relu(self.norm2(self.conv1(active)))
        return cast("Tensor", self.conv2(inside)) + (x if self.shortcut is None else self.shortcut(active))


class Network(nn.Module):
    """A classifier of images in [0, 1]: floats [N, 3, H, W] -> logits [N, classes]. Normalises pixels itself."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, spec: InputSpec, stem: nn.Module, stages: nn.Module, head: nn.Module, features: int, classes: int
    ) -> None:
        super().__init__()
        self.stem, self.stages, self.head = stem, stages, head
        self.classifier = conv(features, classes, 1)
        self.register_buffer("pixel_mean", by_channel(spec.mean), persistent=False)
        self.register_buffer("pixel_std", by_channel(spec.std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.stages(self.stem((images - self.pixel_mean) / self.pixel_std)))
        return cast("Tensor", self.classifier(x.mean(dim=(2, 3), keepdim=True)).flatten(1))


def by_channel(values: Three) -> Tensor:
    """[1, 3, 1, 1]."""
    return torch.tensor(values).view(1, 3, 1, 1)


def stages_of(
    block: type[BasicBlock | WideBlock], counts: Iterable[int], inputs: int, widths: Iterable[int]
) -> nn.Sequential:
    """`counts` blocks a stage; every stage but the first halves the resolution in its first block."""
    blocks: list[nn.Module] = []
    for stage, (count, outputs) in enumerate(zip(counts, widths, strict=True)):
        for index in range(count):
            blocks.append(block(inputs, outputs, 2 if stage > 0 and index == 0 else 1))
            inputs = outputs
    return nn.Sequential(*blocks)


@dataclass(frozen=True)
class Structure:
    """One of the four networks at one width.

    width: channels of a ResNet's first stage (paper 64), or a WideResNet's widening factor k (paper 10).
    stem_stride: 1 in the paper; 2 halves the resolution that every stage sees and quarters the cost. 4 has a kernel
        of 7x7, so that no pixel is skipped.
    stem_pool: the stride of a max-pooling behind the stem, for pictures larger than CIFAR's. 1: there is none.
    """

    name: StructureName
    width: int
    classes: int = 10
    stem_stride: int = 1
    stem_pool: Annotated[int, Field(exclude_if=lambda pool: pool == 1)] = 1

    __pydantic_config__: ClassVar[Mapping[str, object]] = {
        "extra": "forbid",
        "strict": True,
    }  # read strictly wherever a StrictModel holds one

    def __post_init__(self) -> None:
        if self.name not in STRUCTURES:
            raise StructureUnknown(f"structure {self.name!r}; expected one of {', '.join(STRUCTURES)}")
        for field, least, most in (("width", 1, 4096), ("classes", 2, 100_000)):
            value = getattr(self, field)
            if type(value) is not int or not least <= value <= most:
                raise StructureUnknown(f"{self.name}: {field} {value!r}; expected an integer from {least} to {most}")
        for field, allowed in (("stem_stride", STRIDES), ("stem_pool", POOLS)):
            value = getattr(self, field)
            if type(value) is not int or value not in allowed:
                known = ", ".join(map(str, allowed))
                raise StructureUnknown(f"{self.name}: {field} {value!r}; expected one of {known}")

    def build(self, spec: InputSpec = CIFAR10_INPUT) -> Network:
        """The dense network with PyTorch's default weights, in train mode. spec: whose mean and deviation it takes."""
        if self.name in RESNET_BLOCKS:
            widths = [self.width * 2**stage for stage in range(4)]
            stem = stem_of(widths[0], self.stem_stride, self.stem_pool, Norm(widths[0]), nn.ReLU())
            stages = stages_of(BasicBlock, RESNET_BLOCKS[self.name], widths[0], widths)
            return Network(spec, stem, stages, nn.Identity(), widths[-1], self.classes)
        widths = [16 * self.width * 2**stage for stage in range(3)]
        stem = stem_of(16, self.stem_stride, self.stem_pool)
        stages = stages_of(WideBlock, WIDE_RESNET_BLOCKS[self.name], 16, widths)
        head = nn.Sequential(Norm(widths[-1]), nn.ReLU())
        return Network(spec, stem, stages, head, widths[-1], self.classes)

    def blank(self, spec: InputSpec = CIFAR10_INPUT) -> Network:
        """The network with weights of zero and norms that change nothing; draws nothing from torch's generator."""
        with torch.device("meta"):
            network = self.build(spec)
        # Not Module.to_empty: it leaves the numbers to chance, and loads half of torch's compiler for it.
        for module in convs(network).values():
            module.weight = nn.Parameter(torch.zeros(module.weight.shape))
        for norm in norms(network).values():
            norm.running_mean, norm.running_var = torch.zeros(norm.num_features), torch.ones(norm.num_features)
            norm.num_batches_tracked = torch.tensor(0)
        network.pixel_mean, network.pixel_std = by_channel(spec.mean), by_channel(spec.std)
        return network

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON has them: `stem_pool` only where there is one."""
        fields = asdict(self)
        return fields if self.stem_pool > 1 else {name: fields[name] for name in fields if name != "stem_pool"}

    def __str__(self) -> str:
        reduction = self.stem_stride * self.stem_pool
        return f"{self.name}·{self.width}" + ("" if reduction == 1 else f"/{reduction}")


def convs(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Every convolution by its name, in forward order of construction. These are the layers that masks cover."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def norms(network: nn.Module) -> dict[str, Norm]:
    return {name: module for name, module in network.named_modules() if isinstance(module, Norm)}


def multiply_adds(structure: Structure, size: tuple[int, int]) -> int:
    """Multiply-adds of one image's forward pass through the dense network, convolutions only (norms are below 1 %).

    size: the picture's (height, width). A side that a stride does not divide is rounded up.
    """
    with torch.device("meta"):
        network = structure.build()
    total, (height, width) = 0, size
    for name, module in convs(network).items():
        if name == "stem.0" or name.endswith(
            ".conv1"
        ):  # where resolution changes; a shortcut goes along with its conv1
            height, width = (-(-side // module.stride[0]) for side in (height, width))
        total += module.weight.numel() * (1 if name == "classifier" else height * width)
        if name == "stem.0":
            height, width = (-(-side // structure.stem_pool) for side in (height, width))
    return total


@contextmanager
def hook_norms(network: nn.Module, observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls observe(name, input) for each Norm that runs inside."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _module, inputs: observe(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in norms(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(network: Network, batches: Iterable[Tensor]) -> None:
    """Sets every norm's statistics to the mean over `batches` of the batch's own mean and unbiased variance.

    batches: images [N, 3, H, W] in [0, 1], N >= 2.  Leaves the network in eval mode.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0

    def observe(name: str, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3))
        before = sums.get(name)
        sums[name] = (mean, variance) if before is None else (before[0] + mean, before[1] + variance)

    network.train()
    with hook_norms(network, observe):
        for images in batches:
            network(images)
            count += 1
    network.eval()
    if count == 0:
        raise ValueError("calibrate: no batch given; expected at least one")
    for name, norm in norms(network).items():
        cast("Tensor", norm.running_mean).copy_(sums[name][0] / count)
        cast("Tensor", norm.running_var).copy_(sums[name][1] / count)


def fold(network: Network) -> Network:
    """The inference form: norms behind a convolution are folded into it (weights and bias); eval mode, no gradients.

    The logits equal the network's own to 1e-5. A WideResNet's norm behind an addition has no convolution to go into
    and stays; so does the pixel normalisation, which zero padding keeps out of the stem's weights.
    """
    return fold_in_place(deepcopy(network))


def fold_in_place(network: Network) -> Network:
    """As `fold`, for a network that nobody else uses: it is changed, and returned. Copying costs half of the time."""
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, BasicBlock):
            module.conv1, module.norm1 = fuse(module.conv1, module.norm1)
            module.conv2, module.norm2 = fuse(module.conv2, module.norm2)
        elif isinstance(module, WideBlock):
            module.conv1, module.norm2 = fuse(module.conv1, module.norm2)
        elif isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[1], Norm):
            module[0], module[1] = fuse(module[0], module[1])
    return network


def fuse(convolution: nn.Module, norm: nn.Module) -> tuple[Any, Any]:
    """The convolution with the norm folded into its weight and bias, and what takes the norm's place."""
    conv, batch_norm = cast("nn.Conv2d", convolution), cast("Norm", norm)
    mean, variance = batch_norm.get_buffer("running_mean"), batch_norm.get_buffer("running_var")
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, batch_norm.eps, None, None)
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
    return conv, nn.Identity()
