"""The base class of classifiers that this package explains, penalises, saves and makes by name.

A new network needs two things: a subclass of ``Network`` in a file of its own, and one call of
``coda_fast.register_model`` (docs/networks.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from coda_fast import _arguments
from coda_fast._modes import explanation_mode
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.dynamic_linear import DynamicLinear
from coda_fast.explain import MEMORY_BUDGET, explain
from coda_fast.explanation import Explanation
from coda_fast.nn import DAUConv2d

LOGIT_BIAS = math.log(0.1 / 0.9)


class Network(DynamicLinear):
    """A ``DynamicLinear`` that describes itself: which pictures it takes, the names of its classes, and the
    arguments with which it can be made again.

    A subclass takes the arguments below as keywords (``**options``) and passes them on; it also takes
    ``device`` and ``dtype``, for its layers. It defines ``evidence``, and ``config`` with its own arguments.

    Args:
        num_classes: the number of logits.
        temperature: T; a larger T makes the layers align better (paper, section 3.3).
        logit_bias: added to every logit; ``log(0.1 / 0.9)`` starts all classes at 10 %.
        image_channels: 3 for colour, 1 for grey images.
        image_size: native size in pixels, as a hint for tools; any size is accepted.
        preprocessing: how ``transform`` turns pictures into inputs: a ``coda_fast.data.Preprocessing``, or a
            dict of its resize, crop and interpolation; None: resize and crop to ``image_size``, if that is
            given.
        class_names: one for each class, as a hint for tools.
        encoder: as in ``DynamicLinear``; not a part of ``config``.

    Attributes:
        transform: ``coda_fast.data.Preprocessing``: ``model(model.transform("photo.jpg")[None])``. Stored
            with the weights.
        classifier: name of the DAU layer that turns features into evidence, if there is one that all paths
            go through and that nothing follows; timm's interface needs it, and ``coda_fast.load`` with
            another number of classes. The subclass sets it.

    Raises:
        ValueError, TypeError: an argument is not valid.
    """

    classifier: str | None = None

    def __init__(
        self,
        *,
        num_classes: int,
        temperature: float,
        logit_bias: float = LOGIT_BIAS,
        image_channels: int = 3,
        image_size: int | None = None,
        preprocessing: Preprocessing | Mapping | None = None,
        class_names: Sequence[str] | None = None,
        encoder: nn.Module | None = None,
    ):
        super().__init__(
            image_channels=image_channels, temperature=temperature, logit_bias=logit_bias, encoder=encoder
        )
        self._num_classes = _arguments.positive_integer(num_classes, "num_classes")
        self.image_size = (
            None
            if image_size is None
            else _arguments.positive_integer(image_size, "image_size", _arguments.MOST)
        )
        self.transform = Preprocessing.of(preprocessing, self.image_channels, self.image_size)
        self.class_names = None if class_names is None else _arguments.names(class_names, self._num_classes)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of logits."""
        return self._num_classes

    def config(self) -> dict:
        """The constructor's arguments as plain JSON values, without device and dtype: calling the class with
        them gives the same layers. A subclass adds its own: ``{"width": self.width} | super().config()``.

        Raises:
            ValueError: ``transform`` is not a ``Preprocessing`` with the network's channels.
        """
        if not isinstance(self.transform, Preprocessing) or self.transform.channels != self.image_channels:
            raise ValueError(
                f"transform: expected a Preprocessing of {self.image_channels} channels, got "
                f"{str(self.transform)[:100]}, which no configuration describes"
            )
        return {
            "num_classes": self.num_classes,
            "temperature": float(self.temperature),
            "logit_bias": float(self.logit_bias),
            "image_channels": self.image_channels,
            "image_size": self.image_size,
            "preprocessing": self.transform.config(),
            "class_names": self.class_names,
        }

    @classmethod
    def adapted(cls, config: dict, num_classes: int | None = None, rank: int | None = None) -> dict:
        """``config`` with another number of classes or another rank; None leaves it unchanged. A subclass
        whose arguments express these differently overrides it.
        """
        changes = {"num_classes": num_classes, "rank": rank}
        return config | {name: value for name, value in changes.items() if value is not None}

    def explain(
        self,
        images: torch.Tensor,
        target: int | Sequence | torch.Tensor | None = None,
        *,
        layer: int | str | DAUConv2d | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> Explanation:
        """Exact contributions of pixels to logits: see ``coda_fast.explain.explain``."""
        return explain(self, images, target, layer=layer, memory_budget=memory_budget)

    def explanation_mode(self) -> AbstractContextManager[torch.nn.Module]:
        """Context in which gradients are rows of the global linear map: see
        ``coda_fast.explanation_mode``.
        """
        return explanation_mode(self)

    def extra_repr(self) -> str:
        """The temperature and the logit bias."""
        return f"temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"
