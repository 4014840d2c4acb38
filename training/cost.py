"""What a search costs in operations, and how many a processor does in a second."""

from typing import Final

from model_store.input_spec import CIFAR10_INPUT, InputSpec
from model_store.structures import multiply_adds
from training.recipes import LOW_RESOLUTION, TrainConfig

# Operations a second, a multiply-add counting as two. One thread: resnet18·16 on a stem of stride 2, float32, on a busy
# Zen 3 (see LOG.md: 242 images/s, two passes).
THREAD_SPEED: Final = 2.2e10
# No GPU was measured: a tenth of an A100's 312 TFLOP/s in bfloat16 is assumed, what small images usually leave of it.
GPU_SPEED: Final = 0.1 * 312e12
SPEEDS: Final = (
    f"estimates: {THREAD_SPEED / 1e9:.0f} GFLOP/s a thread (measured in float32 on a busy machine: an idle one is "
    f"faster), {GPU_SPEED / 1e12:.0f} TFLOP/s a GPU (assumed: a tenth of an A100's bfloat16 peak)"
)


def cost(recipe: TrainConfig, spec: InputSpec = CIFAR10_INPUT) -> float:
    """Floating-point operations of the whole search: the attack's passes and the update's, forward and backward."""
    shrink = max(1, min(spec.height, spec.width) // LOW_RESOLUTION)  # as Search.make_batch has it
    sizes = (spec.height // shrink, spec.width // shrink), spec.size
    low, high = (multiply_adds(recipe.structure, size) for size in sizes)
    low_steps = recipe.low_resolution_until * recipe.steps
    passes = 3 + 2 * recipe.attack_steps  # backward costs two forwards for weights and input, one for the input alone
    return 2 * passes * recipe.batch * (low * low_steps + high * (recipe.steps - low_steps))
