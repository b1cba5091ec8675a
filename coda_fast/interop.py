"""A CoDA-Net's own explanations through the interfaces of other libraries: captum's ``attribute`` and
Quantus' ``explain_func``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from coda_fast._classes import one_each
from coda_fast.dynamic_linear import need_network

try:  # no other module of the package imports this one, so that only its users wait for captum
    from captum.attr import Attribution as _Attribution
except ImportError:
    _Attribution = object

_Function = TypeVar("_Function", bound=Callable)


def _with_wrapped(function: _Function) -> _Function:
    """A decorator that changes nothing but sets ``__wrapped__``: captum's NoiseTunnel expects the
    decorator of captum's own methods and calls ``attribute.__wrapped__``.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class CoDAAttribution(_Attribution):
    """The exact decomposition as a ``captum.attr.Attribution``; if captum is not installed, a plain class
    with the same methods.

    The network decomposes the encoded image ``[x, 1 - x]``. The contributions of a colour and its complement
    are added, so that attributions have the shape of the image and still sum exactly to the logit minus its
    constant bias.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> method = CoDAAttribution(model)
    >>> attributions, delta = method.attribute(
    ...     torch.rand(2, 1, 8, 8), target=3, return_convergence_delta=True
    ... )
    >>> attributions.shape, bool(delta.abs().max() < 1e-4)
    (torch.Size([2, 1, 8, 8]), True)
    """

    def __init__(self, forward_func: nn.Module):
        self.forward_func = need_network(forward_func, "forward_func")

    @classmethod
    def get_name(cls) -> str:
        """The name of the method; captum's default would put spaces between the capitals of the class."""
        return "CoDA"

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are weights times inputs: they are."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` can return the error of the sum of attributions: it can."""
        return True

    @_with_wrapped
    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor],
        target: int | Sequence[int] | torch.Tensor | None = None,
        additional_forward_args: None = None,
        return_convergence_delta: bool = False,
    ) -> torch.Tensor | tuple:
        """Attributions [N, C, H, W] of images [N, C, H, W] for one class each.

        Args:
            inputs: the images; a tuple of one tensor gives a tuple of one.
            target: one class for all images, a class for each, or None for the predicted classes.
            additional_forward_args: None, because a CoDA-Net takes nothing but images.
            return_convergence_delta: whether to return also the sum of attributions minus (logit minus bias),
                [N], which is rounding error only.

        Raises:
            ValueError, TypeError: as ``explain``; or there are several inputs, further arguments, or several
                classes for an image.
        """
        if additional_forward_args is not None:
            got = type(additional_forward_args).__name__
            raise TypeError(
                f"additional_forward_args: expected None, as a CoDANet takes an image alone, got a {got}"
            )
        several = isinstance(inputs, tuple)
        if several:
            if len(inputs) != 1:
                raise ValueError(f"inputs: expected a tensor or a tuple of one, got {len(inputs)} inputs")
            (inputs,) = inputs
        if isinstance(target, torch.Tensor) and target.numel() == 1:
            # When captum repeats a single image, it does not repeat the class of that image.
            target = target.reshape(())
        explained = self.forward_func.explain(inputs, target)
        if explained.target.shape[1] != 1:
            raise ValueError(f"target: expected one class for each image, got {explained.target.shape[1]}")
        if explained.stem is None:
            found = _in_colours(explained.contributions[:, 0])
        else:  # contributions of features, shared among pixels and, in equal parts, colours
            channels, size = self.forward_func.image_channels, tuple(explained.images.shape[2:])
            found = explained.placement.spread(explained.contribution_map, size)
            found = found.expand(-1, channels, -1, -1) / channels
        result = (found,) if several else found
        if not return_convergence_delta:
            return result
        logits = explained.logits.gather(1, explained.target)[:, 0]
        return result, found.sum((1, 2, 3)) - (logits - self.forward_func.logit_bias)


def quantus_explain_func(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Contribution maps [N, 1, H, W] of images [N, C, H, W] for one class each, [N]: the ``explain_func`` of
    a Quantus metric.

    The model is moved to ``device`` (None: it stays where it is). Further keywords that Quantus passes are
    ignored.

    >>> import numpy, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> quantus_explain_func(model, numpy.random.rand(2, 1, 8, 8), numpy.array([3, 7])).shape
    (2, 1, 8, 8)
    """
    network = need_network(model)
    parameter = next(network.parameters())
    network = network if device is None else network.to(device)
    images = torch.as_tensor(
        np.asarray(inputs), dtype=parameter.dtype, device=next(network.parameters()).device
    )
    classes = one_each(torch.as_tensor(np.asarray(targets)), len(images), "targets")
    return network.explain(images, classes).pixel_map.detach().float().cpu().numpy()


def _in_colours(contributions):
    """Contributions of the encoded image, [N, 2 C, H, W], as those of the colours, [N, C, H, W]."""
    direct, inverse = contributions.chunk(2, 1)
    return direct + inverse
