"""A CoDA-Net's own explanations in the forms that other libraries call: captum's ``attribute`` and
Quantus' ``explain_func``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from coda_fast._classes import one_each
from coda_fast.dynamic_linear import need_network
from coda_fast.network import Network

try:  # nothing else of the package imports this module: who does not want captum does not pay for it
    from captum.attr import Attribution as _Attribution
except ImportError:
    _Attribution = object


def _inside(function):
    """Calls ``function``, no more: captum's NoiseTunnel calls what ``attribute.__wrapped__`` names, the
    inside of captum's decorator.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


class CoDAAttribution(_Attribution):
    """The exact decomposition as a ``captum.attr.Attribution``; without captum a class of its own with the
    same methods.

    The decomposition is of the encoded image ``[x, 1 - x]``; what a colour and its complement contribute is
    added, so that attributions have the shape of the image and still sum to the logit less its constant bias,
    exactly.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> method = CoDAAttribution(model)
    >>> attributions, delta = method.attribute(
    ...     torch.rand(2, 1, 8, 8), target=3, return_convergence_delta=True
    ... )
    >>> attributions.shape, bool(delta.abs().max() < 1e-4)
    (torch.Size([2, 1, 8, 8]), True)
    """

    def __init__(self, forward_func: Network):
        self.forward_func = need_network(forward_func, "forward_func")

    @classmethod
    def get_name(cls) -> str:
        return "CoDA"  # captum would space the capitals of the class

    @property
    def multiplies_by_inputs(self) -> bool:
        return True

    def has_convergence_delta(self) -> bool:
        return True

    @_inside
    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor],
        target=None,
        additional_forward_args: None = None,
        return_convergence_delta: bool = False,
    ):
        """Attributions [N, C, H, W] of images [N, C, H, W] for ``target``: an int, N ints, one int alone, or
        None for the predictions.

        A tuple of one tensor gives a tuple of one. With ``return_convergence_delta`` also what the sum lacks
        of logit less bias, [N]: rounding.

        Raises:
            ValueError, TypeError: as ``explain``; several inputs, arguments beside the image, which a
            CoDA-Net does not take, or several classes for an image, for which captum has no place.
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
            # captum leaves it as it is when it repeats the one image that it was for
            target = target.reshape(())
        explained = self.forward_func.explain(inputs, target)
        if explained.target.shape[1] != 1:
            raise ValueError(f"target: expected one class for each image, got {explained.target.shape[1]}")
        found = _in_colours(explained.contributions[:, 0])
        result = (found,) if several else found
        if not return_convergence_delta:
            return result
        logits = explained.logits.gather(1, explained.target)[:, 0]
        return result, found.sum((1, 2, 3)) - (logits - self.forward_func.logit_bias)


def quantus_explain_func(
    model: Network, inputs: np.ndarray, targets: np.ndarray, device=None, **kwargs
) -> np.ndarray:
    """Contribution maps [N, 1, H, W] of images [N, C, H, W] for one class each, [N]: give it to a Quantus
    metric as ``explain_func``.

    ``device`` is where it is computed (None: where the model is); other keywords that Quantus passes are not
    used.

    >>> import numpy, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> quantus_explain_func(model, numpy.random.rand(2, 1, 8, 8), numpy.array([3, 7])).shape
    (2, 1, 8, 8)
    """
    model = need_network(model)
    parameter = next(model.parameters())
    model = model if device is None else model.to(device)
    images = torch.as_tensor(
        np.asarray(inputs), dtype=parameter.dtype, device=next(model.parameters()).device
    )
    classes = one_each(torch.as_tensor(np.asarray(targets)), len(images), "targets")
    return model.explain(images, classes).contribution_map.detach().float().cpu().numpy()


def _in_colours(contributions):
    """[N, 2 C, H, W] -> [N, C, H, W]."""
    direct, inverse = contributions.chunk(2, 1)
    return direct + inverse
