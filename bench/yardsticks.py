"""Other networks on the same images, which a whole CoDA-Net is compared with. Another one is added by a
function with the decorator ``yardstick`` in this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable

import torch

from bench.cases import EXPLANATION, INFERENCE, STEP, Network
from bench.networks import Classifier
from coda_fast import create_model

RESNET, BCOS, GRADIENT = "ResNet-50", "B-cos ResNet-50", "InputXGradient of ResNet-18"


class Missing(RuntimeError):
    """A provider that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """An entry of the registry; its fields are the arguments of ``yardstick``."""

    name: str
    setup: Callable
    description: str
    modes: tuple[str, ...]
    slow: bool


YARDSTICKS: dict[str, Yardstick] = {}  # in the order of the tables


def yardstick(name: str, *, modes: tuple[str, ...] = (STEP, INFERENCE, EXPLANATION), slow: bool = True):
    """Decorator for a function ``(case, mode, dtype, device) -> (inputs, function)`` (bench/providers.py).
    The first paragraph of its docstring describes it in the documents.

    Args:
        name: its name in rows and tables, which no other provider may have.
        modes: the modes in which it is measured.
        slow: on a CPU it is measured at batch sizes up to 16 only.

    Raises:
        ValueError: the name is taken, or there is no docstring.
    """
    if name in YARDSTICKS:
        raise ValueError(f"name: expected one that is not taken, got {name!r}")

    def register(setup):
        if not (setup.__doc__ or "").strip():
            raise ValueError(f"{name}: expected a function with a docstring, got none")
        description = " ".join(inspect.getdoc(setup).split("\n\n")[0].split())
        YARDSTICKS[name] = Yardstick(name, setup, description, modes, slow)
        return setup

    return register


@yardstick(RESNET)
def resnet50(case: Network, mode: str, dtype: torch.dtype, device: torch.device) -> tuple[list, Callable]:
    """torchvision's ResNet-50, with as many classes."""
    return _classifier(_resnet, case, mode, dtype, device)


@yardstick(BCOS)
def bcos(case: Network, mode: str, dtype: torch.dtype, device: torch.device) -> tuple[list, Callable]:
    """The B-cos ResNet-50 of the package `bcos`, on the encoded image, explained in its explanation mode."""
    encode = lambda x: torch.cat([x, 1 - x], 1)
    return _classifier(_bcos, case, mode, dtype, device, encode, lambda model: model.explanation_mode())


@yardstick(GRADIENT, modes=(EXPLANATION,), slow=False)
def input_times_gradient(
    case: Network, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[list, Callable]:
    """What explains an ordinary network for the least: captum's InputXGradient of a ResNet-18. For images of
    32 pixels it has the stem that they need to be classified as well as by S-CoDA: 3 x 3 and no pooling.
    """
    try:
        from captum.attr import InputXGradient
    except ImportError as error:
        raise Missing(f"captum: {error}") from None
    classes = create_model(case.name, device="meta").num_classes
    torch.manual_seed(0)
    model = _resnet(classes, "resnet18")
    if case.size <= 64:
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    method, network = InputXGradient(model), Classifier(model, model, [], classes, dtype, device)

    def explanation(images, labels):
        with network.autocast():
            return [method.attribute(images.detach().requires_grad_(), target=labels)]

    return network.inputs(case), explanation


def _classifier(
    make, case, mode, dtype, device, encode=lambda x: x, explaining=lambda model: contextlib.nullcontext()
):
    classes = create_model(case.name, device="meta").num_classes
    torch.manual_seed(0)
    model = make(classes).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    model.train(mode == STEP).requires_grad_(mode == STEP)
    around = explaining(model) if mode == EXPLANATION else contextlib.nullcontext()

    def logits(images):
        with around:
            return model(encode(images))

    network = Classifier(logits, logits, list(model.parameters()), classes, dtype, device)
    return network.setup(case, mode)


def _resnet(classes, name="resnet50"):
    try:
        from torchvision import models
    # with a version of torch that it was not built for, it raises RuntimeError
    except (ImportError, RuntimeError, OSError) as error:
        raise Missing(f"torchvision: {error}") from None
    return models.get_model(name, num_classes=classes)


def _bcos(classes):
    try:
        from bcos.models.resnet import resnet50
    except (ImportError, RuntimeError, OSError) as error:
        raise Missing(f"bcos (pip install 'coda-fast[bench]'): {error}") from None
    return resnet50(num_classes=classes, in_chans=6)
