"""Models to audit that are not libraries of ours: torch modules, ONNX files, timm models, endpoints."""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.policy import Policy
from service.audit.endpoint import AnswersOf, Endpoint, Feedback, Protocol
from service.audit.errors import AuditRejected, ModelFailed
from service.audit.evaluation.members import CandidateSet, Member
from service.audit.evaluation.threads import WorkerThreads

PROBES: Final = 4  # random images that a model answers before it is accepted
TOLERANCE: Final = 1e-4  # of equal answers, relative to the largest logit; float32 sums in another order
Law = Literal["one", "mean"]
LAWS: Final[tuple[Law, ...]] = ("one", "mean")


@dataclass(frozen=True, eq=False)
class Target:
    """A model, or several and the law by which they answer, ready to be audited."""

    name: str
    networks: tuple[nn.Module, ...]  # uint8-grid images [N, 3, H, W] in [0, 1] -> logits [N, classes]
    classes: tuple[str, ...]
    size: tuple[int, int]  # height and width of its images
    policy: Policy
    digest: str  # SHA-256 of weights and statistics; of the address where weights are not known
    endpoint: Endpoint | None = None  # what the networks ask, if they are answers over HTTP

    # What an audit reads of a library, and a model does not have.
    tickets: tuple[()] = ()
    baselines: tuple[()] = ()
    entries: tuple[()] = ()
    baseline_entries: tuple[()] = ()

    @property
    def input(self) -> InputSpec:
        """How labelled pictures become its images. Its own normalisation is part of its networks."""
        height, width = self.size
        return InputSpec(height, width, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    @classmethod
    def from_torch(
        cls,
        model: nn.Module | Sequence[nn.Module],
        classes: Sequence[str] | int,
        *,
        name: str = "model",
        size: tuple[int, int] = CIFAR10_INPUT.size,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        law: Law = "one",
    ) -> "Target":
        """Wraps torch modules.

        Args:
          model: gives logits; or several, which answer by `law`.
          classes: their names in the order of the logits, or how many there are.
          name: for the report.
          size: height and width of its images; CIFAR-10's if it is not given.
          mean: of each channel, in [0, 1], where the model expects normalised images.
          std: of each channel.
          law: "one" draws one of several models for each image; "mean" sums the logits of all.

        Raises:
          AuditRejected: the model raises, is in train mode, gives no logits, or changes its answer.
        """
        networks = [model] if isinstance(model, nn.Module) else list(model)
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        if not networks or not all(isinstance(network, nn.Module) for network in networks):
            raise AuditRejected(f"{name}: expected a torch module or a list of them, found {model!r:.60}")
        if len(names) < 2:
            raise AuditRejected(f"{name}: {len(names)} classes; expected at least 2")
        if law not in LAWS:
            raise AuditRejected(f"law {law!r:.40}; expected one of {', '.join(LAWS)}")
        if mean is not None or std is not None:
            networks = [Normalised(network, mean, std) for network in networks]
        for index, network in enumerate(networks):
            check_network(network, f"{name}[{index}]" if len(networks) > 1 else name, len(names), size)
        members = list(range(len(networks)))
        policy = Policy.all(len(networks)) if law == "mean" else Policy.switching(members, len(networks))
        for parameter in (each for network in networks for each in network.parameters()):
            parameter.requires_grad_(False)
        return cls(name, tuple(networks), names, size, policy, digest_of_weights(networks))

    @classmethod
    def from_factory(cls, reference: str, classes: Sequence[str] | int, **options: Any) -> "Target":
        """Calls `package.module:factory`, which returns a module, several, or a Target.

        Raises:
          AuditRejected: it cannot be imported, raises, or returns something else.
        """
        made = call_factory(reference)
        return made if isinstance(made, Target) else cls.from_torch(made, classes, name=reference, **options)

    @classmethod
    def from_onnx(cls, path: Path, classes: Sequence[str] | int, **options: Any) -> "Target":
        """Converts an ONNX file with onnx2torch.

        Raises:
          AuditRejected: it cannot be read or converted.
        """
        try:
            from onnx2torch import convert
        except ImportError:
            raise AuditRejected("--onnx needs onnx2torch: pip install 'tombola[onnx]'") from None
        try:
            network = convert(str(path)).eval()
        except Exception as error:  # noqa: BLE001 -- whatever a foreign file makes the converter raise
            raise AuditRejected(f"{path}: cannot be converted to torch ({one_line(error)}){hint(error)}") from None
        return cls.from_torch(network, classes, name=path.name, **options)

    @classmethod
    def from_timm(cls, model: str, weights: Path, classes: Sequence[str] | int, **options: Any) -> "Target":
        """Builds a timm model with weights from a local safetensors file.

        Raises:
          AuditRejected: there is no such model, or the weights are not its own.
        """
        if weights.suffix != ".safetensors":
            raise AuditRejected(
                f"{weights}: expected a .safetensors file; other formats are unpickled, which can run code"
            )
        try:
            import timm
        except ImportError:
            raise AuditRejected("--timm needs timm: pip install 'tombola[timm]'") from None
        count = classes if isinstance(classes, int) else len(classes)
        try:
            network = timm.create_model(model, pretrained=False, num_classes=count, checkpoint_path=str(weights))
        except Exception as error:  # noqa: BLE001 -- timm raises many kinds
            raise AuditRejected(f"timm {model}: cannot be built ({one_line(error)})") from None
        return cls.from_torch(network.eval(), classes, name=model, **options)

    @classmethod
    def from_endpoint(
        cls,
        url: str,
        classes: Sequence[str] | int,
        *,
        budget: int,
        protocol: Protocol = "oip",
        feedback: Feedback | None = None,
        key: str | None = None,
        proxy: str | None = None,
        size: tuple[int, int] = CIFAR10_INPUT.size,
    ) -> "Target":
        """Takes a model behind HTTP as a black box. It is asked about eight random images.

        Args:
          url: of the model under the Open Inference Protocol, or of a service with /v1/classify.
          classes: their names in the order of the answers, or how many there are.
          budget: the most images that it may be asked about.
          protocol: "oip" or "v1".
          feedback: what attacks use, "score" or "decision"; what the endpoint gives if None.
          key: sent as a bearer token.
          proxy: on the way to it; the environment's is not used.
          size: height and width of its images; CIFAR-10's if it is not given.

        Raises:
          AuditRejected: it takes no such images, or its labels are not in the classes' order.
          OracleFailed: it does not answer as it should.
        """
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        endpoint = Endpoint(url, names, size, budget, protocol, feedback, key, proxy)
        endpoint.accept()
        networks = tuple(AnswersOf(endpoint, place) for place in range(endpoint.repeats))
        law = Policy.switching(list(range(len(networks))), len(networks))
        return cls(endpoint.url, networks, names, size, law, endpoint.digest, endpoint)

    def candidates(self, device: torch.device | str, threads: int = 1) -> CandidateSet:
        """Its networks as an audit attacks them."""
        place = torch.device(device)
        if self.endpoint is not None:
            answers = tuple(Member(f"answer {i}", network, 1.0) for i, network in enumerate(self.networks, 1))
            kinds = tuple("endpoint" for _ in answers)
            return CandidateSet(answers, len(answers), kinds, self.policy, torch.device("cpu"))
        names = [self.name] if len(self.networks) == 1 else [f"{self.name}[{i}]" for i in range(len(self.networks))]
        members = tuple(
            Member(name, OneLineErrors(network.to(place), name), 1.0)
            for name, network in zip(names, self.networks, strict=True)
        )
        kinds = tuple("model" for _ in members)
        return CandidateSet(members, len(members), kinds, self.policy, place, threads=WorkerThreads(threads))

    def multiply_adds(self) -> list[int]:
        """Of one image through each network; 1 for an endpoint's, which are not known."""
        if self.endpoint is not None:
            return [1] * len(self.networks)
        return [count_multiply_adds(network, self.size) for network in self.networks]


class Normalised(nn.Module):
    """A network that expects normalised images, given images in [0, 1]."""

    def __init__(self, network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        mean, std = mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise AuditRejected(f"mean {list(mean)}, std {list(std)}; expected three numbers each, deviations above 0")
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = cast("Tensor", self.mean), cast("Tensor", self.std)
        return cast("Tensor", self.network((images - mean) / std))


class OneLineErrors(nn.Module):
    """A stranger's network. Whatever it raises becomes one line that names it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        try:
            return cast("Tensor", self.network(images))
        except Exception as error:
            raise ModelFailed(f"{self.name}: raises {one_line(error)} for images {list(images.shape)}") from error


# What is refused


def check_network(network: nn.Module, name: str, classes: int, size: tuple[int, int]) -> None:
    """Raises AuditRejected, which says what was found and what was expected."""
    training = [path or type(module).__name__ for path, module in network.named_modules() if module.training]
    if training:
        raise AuditRejected(f"{name}: {len(training)} modules are in train mode ({training[0]}); call .eval() first")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(PROBES, 3, *size, generator=generator)
    logits = answer(network, images, name)
    if logits.shape != (PROBES, classes):
        raise AuditRejected(f"{name}: answers {list(logits.shape)} to {PROBES} images; expected [{PROBES}, {classes}]")
    if not logits.is_floating_point() or not bool(torch.isfinite(logits).all()):
        raise AuditRejected(f"{name}: answers that are not finite numbers; expected logits")
    if bool((logits >= 0).all()) and bool(((logits.sum(dim=1) - 1).abs() < TOLERANCE).all()):
        raise AuditRejected(f"{name}: answers that are probabilities; expected logits, before the softmax")
    if (change := relative(answer(network, images, name), logits)) > TOLERANCE:
        raise AuditRejected(
            f"{name}: equal calls differ by {change:.1e}; expected one. A random model needs its members and a law"
        )
    alone = torch.cat([answer(network, image[None], name) for image in images])
    if (change := relative(alone, logits)) > TOLERANCE:
        raise AuditRejected(f"{name}: an image's answer changes by {change:.1e} with the others of its batch")


def answer(network: nn.Module, images: Tensor, name: str) -> Tensor:
    try:
        with torch.no_grad():
            logits = network(images)
    except Exception as error:  # noqa: BLE001 -- a stranger's model raises what it likes
        raise AuditRejected(f"{name}: raises {one_line(error)} for images {list(images.shape)} in [0, 1]") from None
    if not isinstance(logits, Tensor):
        raise AuditRejected(f"{name}: answers a {type(logits).__name__}; expected a tensor of logits")
    return logits.detach().clone()


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max().clamp_min(1.0))


def call_factory(reference: str) -> Any:
    module, colon, function = reference.partition(":")
    if not colon or not module or not function:
        raise AuditRejected(f"model {reference!r:.60}; expected package.module:factory")
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise AuditRejected(f"model {reference}: cannot be imported ({one_line(error)})") from None
    try:
        return factory()
    except Exception as error:  # noqa: BLE001 -- a stranger's factory raises what it likes
        raise AuditRejected(f"model {reference}: raises {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.160}"


def hint(error: Exception) -> str:
    unknown = isinstance(error, NotImplementedError) and "Converter" in str(error)
    return "; onnx2torch reads operators of opset 13, and most of later ones" if unknown else ""


def digest_of_weights(networks: Sequence[nn.Module]) -> str:
    state = hashlib.sha256()
    for index, network in enumerate(networks):
        for name, tensor in sorted(network.state_dict().items()):
            state.update(f"{index} {name} {list(tensor.shape)} {tensor.dtype}".encode())
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def count_multiply_adds(network: nn.Module, size: tuple[int, int]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *size))
    return max(1, int(counter.get_total_flops()) // 2)
