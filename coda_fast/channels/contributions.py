"""The channels of a stem that contribute most to a logit."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import NamedTuple

import torch

from coda_fast import _arguments
from coda_fast.explanation import Explanation


class Term(NamedTuple):
    """What a channel adds to a logit: ``contribution``, in logits; ``share``, its part of the sum of absolute
    contributions of all channels; ``sign``: whether more of it comes from its positive (1) or its negative
    values (-1).
    """

    channel: int
    contribution: float
    share: float
    sign: int


class Leading(NamedTuple):
    """A logit as a sum: ``logit = bias + sum of the contributions of terms + rest``, exactly. ``rest`` is
    what the ``others`` channels add, with the rounding of the explanation (``completeness_error``).
    """

    terms: tuple[Term, ...]
    others: int
    rest: float
    bias: float
    logit: float

    def amounts(self) -> list[str]:
        """Bias, terms, rest and logit as texts. Of these numbers, too, the last is the sum of the others:
        what they are rounded by is in the rest.
        """
        largest = max((abs(term.contribution) for term in self.terms), default=0.0)
        digits = max(2, 1 - math.floor(math.log10(largest))) if largest else 2
        exact = (self.bias, *(term.contribution for term in self.terms), self.logit)
        bias, *terms, logit = (Decimal(f"{value:.{digits}f}") for value in exact)
        return [f"{value + 0:+f}" for value in (bias, *terms, logit - bias - sum(terms), logit)]


def leading(explanation: Explanation, image: int = 0, class_index: int = 0, count: int = 6) -> Leading:
    """The channels of the stem with the largest absolute contributions to a logit, the largest first.

    Args:
        explanation: of a network with a stem, of the features at the joint.
        image, class_index: which image, and which of its explained classes.
        count: the number of channels.

    Raises:
        ValueError: the explanation is another one. IndexError: there is no such image or class.
    """
    if explanation.stem is None or explanation.layer != 0:
        raise ValueError(
            "explanation: expected that of the features of a network with a stem, got that of "
            + ("a network without one" if explanation.stem is None else f"layer {explanation.layer}")
        )
    count = _arguments.positive_integer(count, "count")
    positive, negative = halves(explanation, image, class_index).sum((-2, -1), dtype=torch.float64).cpu()
    each, total = positive + negative, float((positive + negative).abs().sum()) or 1.0
    signs = torch.where(positive.abs() >= negative.abs(), 1, -1)
    order = each.abs().sort(descending=True, stable=True).indices[:count].tolist()
    terms = tuple(
        Term(channel, float(each[channel]), abs(float(each[channel])) / total, int(signs[channel]))
        for channel in order
    )
    logit = float(explanation.logits[image, explanation.target[image, class_index]])
    rest = logit - explanation.logit_bias - math.fsum(term.contribution for term in terms)
    return Leading(terms, len(each) - len(terms), rest, explanation.logit_bias, logit)


def halves(explanation: Explanation, image: int, class_index: int) -> torch.Tensor:
    """Contributions of the positive and of the negative values of the features, [2, C, h, w]."""
    found = explanation.contributions[image, class_index]
    return torch.stack(found.chunk(2) if explanation.signed else (found, torch.zeros_like(found)))
