"""The attribution methods that the CoDA-Nets paper compares with (arXiv:2104.00032, section 4.3), behind one
call, by captum.

Every method explains the image through the model's own encoder, and its map is summed over the channels of
the image. A CoDA-Net has no non-linearity that captum knows: on one, DeepLIFT is Input x Gradient and guided
backpropagation is the gradient, to rounding. Show them as one method there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from coda_fast._autocast import wide
from coda_fast._classes import as_classes
from coda_fast._geometry import integer
from coda_fast._wrappers import unwrap
from coda_fast.dynamic_linear import network_in
from coda_fast.evaluation._common import evaluated
from coda_fast.models import CoDANet

_MISSING = "the baselines need {}: pip install 'coda-fast[evaluation]'"


@dataclasses.dataclass(frozen=True)
class Attribution:
    """A method for a model; make it with ``create``.

    Attributes:
        method: its name.
        settings: all of them, plain values: what a result must be stored with.
    """

    method: str
    model: nn.Module
    settings: dict
    layer: nn.Module | None = None
    _function: Callable = None

    def attribute(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps that say where ``images`` [N, C, H, W] speak for ``targets``: [N] -> [N, H, W], [N, K] -> [N,
        K, H, W].

        Leaves the model's mode, gradients and hooks as they were. ValueError, TypeError: shapes that do not
        fit.
        """
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if images.dim() != 4:
            raise ValueError(f"images: expected [N, C, H, W], got shape {list(images.shape)}")
        targets = as_classes(torch.as_tensor(targets, device=images.device), "targets")
        if targets.dim() not in (1, 2) or len(targets) != len(images) or targets.shape[1:].numel() == 0:
            raise ValueError(
                f"targets: expected [{len(images)}] or [{len(images)}, K], got shape {list(targets.shape)}"
            )
        if targets.numel() and targets.min() < 0:  # would count from the end
            raise ValueError(f"targets: expected classes from 0, got {int(targets.min())}")
        table = targets if targets.dim() == 2 else targets[:, None]
        if not len(images):
            return images.new_zeros(*targets.shape, *images.shape[2:])
        # not inference tensors, whatever the caller's mode: they are differentiated
        with torch.inference_mode(False), torch.enable_grad(), _quiet(self.model):
            _check_classes(self.model, images, table)
            maps = self._function(self, images.detach().clone(), table.clone())
        return maps if targets.dim() == 2 else maps[:, 0]


def create(method: str, model: nn.Module, *, layer: nn.Module | None = None, **settings) -> Attribution:
    """A method by name, with the published settings unless others are given.

    Args:
        method: a key of ``METHODS``; "Ours" is the contribution map of a CoDA-Net itself.
        model: a CoDA-Net, or any classifier [N, C, H, W] -> [N, classes]. Of a wrapped one
            (``coda_fast.unwrap``), the network inside: captum's hooks do not reach into what is compiled.
        layer: for "GCam", whose output is weighted; default: a CoDA-Net's last layer, else the last
            convolution that is called.
        settings: see ``METHODS[method]``; ``batch_size`` bounds how many images (perturbed ones included) are
            computed at once.

    Raises:
        ValueError: unknown method; "Ours" for a model that cannot explain itself. TypeError: unknown setting.
            ImportError: no captum.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> create("Ours", model).attribute(torch.rand(2, 1, 8, 8), torch.tensor([[3, 7], [1, 2]])).shape
    torch.Size([2, 2, 8, 8])
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    function, defaults = _FUNCTIONS[method], METHODS[method]
    if unknown := set(settings) - set(defaults):
        raise TypeError(
            f"{method}: expected settings among {', '.join(defaults) or 'none'}, got "
            f"{', '.join(sorted(unknown))}"
        )
    model = network_in(unwrap(model))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    _check_settings(method, {**defaults, **settings})
    if layer is not None and (method != "GCam" or not isinstance(layer, nn.Module)):
        raise TypeError(f"layer: expected a module, for GCam only, got a {type(layer).__name__} for {method}")
    if method == "Ours":
        if not isinstance(model, CoDANet):  # other libraries' models have an ``explain`` too
            raise ValueError(f"method: 'Ours' needs a model made of DAU layers, got a {type(model).__name__}")
    else:
        _captum()
    return Attribution(method, model, {**defaults, **settings}, layer, function)


def attribute(
    method: str, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, **settings
) -> torch.Tensor:
    """``create(method, model, **settings).attribute(images, targets)``."""
    return create(method, model, **settings).attribute(images, targets)


# -- the methods
# ------------------------------------------------------------------------------------------------------------


def _ours(self, images, targets):
    return self.model.explain(images, targets).contribution_map


def _in_pairs(function):
    """A method for one class of each image, as one for several: every image with every class of it,
    ``batch_size`` pairs at once.
    """

    def method(self, images, targets):
        count = targets.shape[1]
        pairs = images.repeat_interleave(count, 0), targets.flatten()
        step = self.settings["batch_size"]
        maps = [function(self, x, t) for x, t in zip(*(part.split(step) for part in pairs), strict=True)]
        return torch.cat(maps).detach().view(len(images), count, *images.shape[2:])

    return method


@_in_pairs
def _gradient(self, x, target):
    return _captum().Saliency(self.model).attribute(x, target=target, abs=False).sum(1)


@_in_pairs
def _input_x_gradient(self, x, target):
    return _captum().InputXGradient(self.model).attribute(x, target=target).sum(1)


@_in_pairs
def _integrated_gradients(self, x, target):
    s = self.settings
    found = (
        _captum()
        .IntegratedGradients(self.model)
        .attribute(
            x,
            baselines=0,
            target=target,
            n_steps=s["n_steps"],
            internal_batch_size=max(len(x), s["batch_size"]),
        )
    )
    return found.sum(1)


@_in_pairs
def _guided_backprop(self, x, target):
    return _captum().GuidedBackprop(_separate_activations(self.model)).attribute(x, target=target).sum(1)


@_in_pairs
def _deep_lift(self, x, target):
    try:
        return (
            _captum()
            .DeepLift(_separate_activations(self.model))
            .attribute(x, baselines=0, target=target)
            .sum(1)
        )
    except (AssertionError, RuntimeError) as error:
        if "more than once" not in str(error):  # of another cause: out of memory, a class that does not exist
            raise
        raise ValueError(
            "DeepLIFT: expected a model that calls each of its activation modules once, and captum says: "
            f"{error}"
        ) from error


@_in_pairs
def _grad_cam(self, x, target):
    layer = self.layer or _last_layer(self.model, x)
    captum = _captum()
    found = captum.LayerGradCam(self.model, layer).attribute(x, target=target, relu_attributions=True)
    return captum.LayerAttribution.interpolate(found, tuple(x.shape[2:]), "nearest")[:, 0]


def _occlusion(self, images, targets):
    """One sweep of the window for all classes of an image."""
    s = self.settings
    size, channels = min(s["size"], *images.shape[2:]), images.shape[1]
    maps = []
    with torch.no_grad():
        for x, classes in zip(images.split(s["batch_size"]), targets.split(s["batch_size"]), strict=True):
            occlusion = _captum().Occlusion(
                lambda perturbed, classes: self.model(perturbed).gather(1, classes)
            )
            found = occlusion.attribute(
                x,
                sliding_window_shapes=(channels, size, size),
                strides=(channels, min(s["stride"], size), min(s["stride"], size)),
                baselines=0,
                additional_forward_args=classes,
                perturbations_per_eval=max(1, s["batch_size"] // len(x)),
            )
            # the window covers all channels: each has the same value
            maps.append(found.view(len(x), -1, *x.shape[1:])[:, :, 0])
    # published: the drop of each window over its area, summed over the windows that cover a pixel; captum has
    # their mean
    height, width = (
        _coverage(length, size, min(s["stride"], size)).to(images.device) for length in images.shape[2:]
    )
    # captum adds up in float32
    return torch.cat(maps).to(images.dtype) * (height[:, None] * width / size**2).to(images.dtype)


def _coverage(length, window, stride):
    """How many windows cover each of ``length`` places; the last window may stick out."""
    starts = torch.arange(-(-(length - window) // stride) + 1) * stride
    place = torch.arange(length)[:, None]
    return ((starts <= place) & (place < starts + window)).sum(1)


def _rise(self, images, targets):
    """``1 / (N p1) sum_i score(x * M_i) M_i`` (arXiv:1806.07421, eq. 6), the masks for all images and
    classes alike.
    """
    s = self.settings
    drawn = _rise_random(
        s["masks"], s["cells"], s["p1"], images.shape[2:], torch.Generator().manual_seed(s["seed"])
    )
    count, (height, width) = targets.shape[1], images.shape[2:]
    maps = torch.zeros(len(images), count, height, width, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for part in zip(*(numbers.split(s["batch_size"]) for numbers in drawn), strict=True):
            masks = _rise_masks(part[0].to(images), *part[1:], height, width)
            for i, image in enumerate(images):
                logits = self.model(image * masks[:, None])
                scores = (
                    wide(logits).sigmoid() if isinstance(self.model, CoDANet) else wide(logits).softmax(1)
                )[:, targets[i]]
                maps[i] += torch.einsum("mk,mhw->khw", scores.double(), masks.double())
    return (maps / (s["masks"] * s["p1"])).to(images.dtype)


def _rise_random(number, cells, p1, size, generator):
    """What is random of all masks, whatever batches they are made in: patterns [number, cells, cells],
    shifts [number] down and across.
    """
    grid = (torch.rand(number, cells, cells, generator=generator) < p1).float()
    return grid, *(torch.randint(-(-length // cells), (number,), generator=generator) for length in size)


def _rise_masks(grid, down, across, height, width):
    """Patterns one cell larger than the image when enlarged, shifted by less than a cell; [number, H, W]
    in [0, 1].
    """
    cells = grid.shape[1]
    larger = [(cells + 1) * -(-length // cells) for length in (height, width)]
    large = F.interpolate(grid[:, None], larger, mode="bilinear", align_corners=False)[:, 0]
    return torch.stack(
        [
            m[t : t + height, i : i + width]
            for m, t, i in zip(large, down.tolist(), across.tolist(), strict=True)
        ]
    )


def _lime(self, images, targets):
    """captum draws the same samples for every class of an image, from the same seed: the network answers
    them once.
    """
    try:
        from captum._utils.models.linear_model import SkLearnRidge
        from skimage.segmentation import quickshift
    except ImportError as error:
        raise ImportError(_MISSING.format(error.name)) from None
    s, maps = self.settings, []
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), torch.no_grad():
        for image, classes in zip(images, targets, strict=True):
            picture = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
            segments = quickshift(
                picture, kernel_size=s["kernel_size"], max_dist=s["max_dist"], ratio=s["ratio"], rng=s["seed"]
            )
            segments = torch.from_numpy(segments).to(images.device)
            answers = _Answers(self.model)
            lime = _captum().Lime(answers, interpretable_model=SkLearnRidge(alpha=1.0))
            for target in classes.tolist():
                torch.manual_seed(s["seed"])
                answers.calls = 0
                found = lime.attribute(
                    image[None],
                    baselines=0,
                    target=target,
                    feature_mask=segments[None, None],
                    n_samples=s["samples"],
                    perturbations_per_eval=s["batch_size"],
                    return_input_shape=False,
                )[0]
                kept = torch.zeros_like(found)
                best = found.abs().topk(min(s["features"], len(found))).indices
                kept[best] = found[best]
                maps.append(kept[segments].to(images.dtype))
    return torch.stack(maps).view(*targets.shape, *images.shape[2:])


class _Answers:
    """A model that answers its k-th call as it did before; set ``calls`` to 0 to begin again."""

    def __init__(self, model):
        self.model, self.calls, self.given = model, 0, []

    def __call__(self, x):
        if self.calls == len(self.given):
            self.given.append(self.model(x))
        self.calls += 1
        return self.given[self.calls - 1]


# What a method is on a CoDA-Net, to rounding (tested)
TWINS = {"DeepLIFT": "IxG", "GB": "Grad"}
# Raised when a method gives other numbers than before: an evaluation does not go on with pieces of another
# revision
REVISION = 2
_BATCH = {"batch_size": 64}
# Published settings. GCam: a map for each class at the last layer; Occ5, Occ9: the edge of the window; RISE:
# p1 is the share that is kept
METHODS: dict[str, dict] = {
    "Ours": {},
    "Occ5": {"size": 5, "stride": 2, "batch_size": 256},
    "Occ9": {"size": 9, "stride": 2, "batch_size": 256},
    "RISE": {"masks": 6000, "cells": 6, "p1": 0.1, "seed": 0, "batch_size": 256},
    "LIME": {
        "samples": 256,
        "features": 3,
        "kernel_size": 1,
        "max_dist": 200,
        "ratio": 0.2,
        "seed": 0,
        "batch_size": 64,
    },
    "GCam": {**_BATCH},
    "Grad": {**_BATCH},
    "IxG": {**_BATCH},
    "IntGrad": {"n_steps": 20, **_BATCH},
    "GB": {**_BATCH},
    "DeepLIFT": {**_BATCH},
}
_FUNCTIONS = {
    "Ours": _ours,
    "Occ5": _occlusion,
    "Occ9": _occlusion,
    "RISE": _rise,
    "LIME": _lime,
    "GCam": _grad_cam,
    "Grad": _gradient,
    "IxG": _input_x_gradient,
    "IntGrad": _integrated_gradients,
    "GB": _guided_backprop,
    "DeepLIFT": _deep_lift,
}


# -- around them
# ------------------------------------------------------------------------------------------------------------


def _captum():
    try:
        import captum.attr
    except ImportError:
        raise ImportError(_MISSING.format("captum")) from None
    return captum.attr


@contextlib.contextmanager
def _quiet(model) -> Iterator[None]:
    """``evaluated``, captum's advice unsaid. Parameters' ``.grad`` is not touched, here or by captum: a
    thread that trains may be at it.
    """
    with evaluated(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\..*")
        yield


def _check_classes(model, images, targets):
    """ValueError for a class that the model does not have."""
    with torch.no_grad():
        count = model.num_classes if isinstance(model, CoDANet) else model(images[:1]).shape[1]
    if int(targets.max()) >= count:
        raise ValueError(f"targets: expected classes from 0 to {count - 1}, got {int(targets.max())}")


# Beyond these a method would take memory, or for ever: more than anyone has a use for
_MOST = {
    "p1": 1,
    "ratio": 1,
    "max_dist": 10**6,
    "kernel_size": 100,
    "size": 2**14,
    "stride": 2**14,
    "masks": 10**5,
    "cells": 64,
    "samples": 10**6,
    "features": 10**6,
    "n_steps": 10**4,
    "batch_size": 2**14,
    "seed": 2**32 - 1,
}


def _check_settings(method, settings):
    for name, value in settings.items():
        most = _MOST[name]
        if name in ("p1", "max_dist", "ratio", "kernel_size"):
            if not (isinstance(value, int | float) and 0 < value <= most):
                raise ValueError(f"{method}: {name}: expected a positive number up to {most}, got {value!r}")
            continue
        least = 0 if name == "seed" else 1
        try:
            wrong = integer(value) < least
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"{method}: {name}: expected an int of at least {least}, got {value!r}")
        if value > most:
            raise ValueError(f"{method}: {name}: expected at most {most}, got {value!r}")
    if "stride" in settings and settings["stride"] > settings["size"]:
        raise ValueError(
            f"{method}: stride: expected at most size {settings['size']}, got {settings['stride']}"
        )


_RELU = (torch.relu, torch.relu_, F.relu, F.relu_)


def _separate_activations(model):
    """A copy of ``model``, as it is now, that calls a module of its own, never in place, wherever it
    rectifies.

    captum's rules hang on modules: it misses what is in place or a function, and DeepLIFT needs a module for
    each call. A model that torch.fx cannot trace is copied without what is in place; captum then has the last
    word.
    """
    if isinstance(model, CoDANet):
        return model  # no activation
    copied = copy.deepcopy(model)
    with contextlib.suppress(Exception):  # tracing runs the model's own code: anything can be raised
        traced = torch.fx.symbolic_trace(copied)
        seen = set()
        for node in list(traced.graph.nodes):
            function = node.op == "call_function" and node.target in _RELU
            if function or (node.op == "call_method" and node.target in ("relu", "relu_")):
                module, node.op, node.args, node.kwargs = (
                    nn.ReLU(),
                    "call_module",
                    (node.args or (node.kwargs["input"],))[:1],
                    {},
                )
            elif node.op == "call_module" and node.target in seen:
                module = copy.deepcopy(traced.get_submodule(node.target))
            else:
                seen.add(node.target if node.op == "call_module" else None)
                continue
            name = f"separate_{node.name}"
            traced.add_submodule(name, module)
            node.target = name
        traced.recompile()
        copied = traced
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return copied.eval()


def _last_layer(model, x):
    """A CoDA-Net's last layer, or the last convolution that a forward pass calls. ValueError if there is
    none.
    """
    if isinstance(model, CoDANet):
        return model.layers[-1]
    called = []
    hooks = [
        m.register_forward_hook(lambda module, *_: called.append(module))
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvNd)
    ]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"GCam: expected a model with a convolution, or layer=, got a {type(model).__name__}"
        )
    return called[-1]
