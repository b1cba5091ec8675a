"""Methods that compare the network's outputs for perturbed images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coda_fast._autocast import wide
from coda_fast.baselines._attribution import Attribution
from coda_fast.baselines._registry import Setting, baseline, captum, missing
from coda_fast.dynamic_linear import DynamicLinear

BATCH_SIZE = Setting(256, most=2**14)  # perturbed images at once
SEED = Setting(0, least=0, most=2**32 - 1)


def _fits(settings: dict) -> None:
    if settings["stride"] > settings["size"]:
        raise ValueError(f"stride: expected at most size {settings['size']}, got {settings['stride']}")


def occlusion(method: Attribution, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Occlusion: the logit's drop under a black window, over its area, summed over the windows that cover a
    pixel.

    All classes of an image share one sweep of the window.
    """
    s = method.settings
    size, channels = min(s["size"], *images.shape[2:]), images.shape[1]
    maps = []
    with torch.no_grad():
        for x, classes in zip(images.split(s["batch_size"]), targets.split(s["batch_size"]), strict=True):
            occlusion = captum().Occlusion(
                lambda perturbed, classes: method.model(perturbed).gather(1, classes)
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
    # The published map is the drop of each window over its area, summed over the windows that cover a pixel;
    # captum returns their mean.
    height, width = (
        _coverage(length, size, min(s["stride"], size)).to(images.device) for length in images.shape[2:]
    )
    # captum accumulates in float32
    return torch.cat(maps).to(images.dtype) * (height[:, None] * width / size**2).to(images.dtype)


def _coverage(length, window, stride):
    """The number of windows that cover each of ``length`` positions; the last window may extend beyond the
    end.
    """
    starts = torch.arange(-(-(length - window) // stride) + 1) * stride
    place = torch.arange(length)[:, None]
    return ((starts <= place) & (place < starts + window)).sum(1)


for _name, _size in (("Occ5", 5), ("Occ9", 9)):
    baseline(
        _name,
        check=_fits,
        size=Setting(_size, most=2**14),
        stride=Setting(2, most=2**14),
        batch_size=BATCH_SIZE,
    )(occlusion)


@baseline(
    "RISE",
    masks=Setting(6000, most=10**5),
    cells=Setting(6, most=64),
    p1=Setting(0.1, most=1, least=None),
    seed=SEED,
    batch_size=BATCH_SIZE,
)
def rise(method: Attribution, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """RISE: the mean of random masks that keep a share p1 of the image, weighted by the probability under
    each.

    ``1 / (N p1) sum_i score(x * M_i) M_i`` (arXiv:1806.07421, eq. 6), with the same N masks M_i for all
    images and classes. captum does not implement it.
    """
    s = method.settings
    drawn = _rise_random(
        s["masks"], s["cells"], s["p1"], images.shape[2:], torch.Generator().manual_seed(s["seed"])
    )
    count, (height, width) = targets.shape[1], images.shape[2:]
    maps = torch.zeros(len(images), count, height, width, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for cells, down, across in zip(*(numbers.split(s["batch_size"]) for numbers in drawn), strict=True):
            masks = _rise_masks(cells.to(images), down, across, height, width)
            for i, image in enumerate(images):
                logits = method.model(image * masks[:, None])
                scores = (
                    wide(logits).sigmoid()
                    if isinstance(method.model, DynamicLinear)
                    else wide(logits).softmax(1)
                )[:, targets[i]]
                maps[i] += torch.einsum("mk,mhw->khw", scores.double(), masks.double())
    return (maps / (s["masks"] * s["p1"])).to(images.dtype)


def _rise_random(number, cells, p1, size, generator):
    """The random numbers of all masks, drawn at once so that they do not depend on the batch size: patterns
    [number, cells, cells], and shifts [number] down and across.
    """
    grid = (torch.rand(number, cells, cells, generator=generator) < p1).float()
    return grid, *(torch.randint(-(-length // cells), (number,), generator=generator) for length in size)


def _rise_masks(grid, down, across, height, width):
    """Masks [number, H, W] in [0, 1]: patterns enlarged to one cell more than the image, and shifted by less
    than a cell.
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


@baseline(
    "LIME",
    samples=Setting(256, most=10**6),
    features=Setting(3, most=10**6),
    kernel_size=Setting(1, most=100, least=None),
    max_dist=Setting(200, most=10**6, least=None),
    ratio=Setting(0.2, most=1, least=None),
    seed=SEED,
    batch_size=Setting(64, most=2**14),
)
def lime(method: Attribution, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """LIME: a linear model of which segments, found by quickshift, are shown; its largest coefficients.

    From the same seed, captum draws the same samples for every class of an image, so the network classifies
    them only once.
    """
    try:
        from captum._utils.models.linear_model import SkLearnRidge
        from skimage.segmentation import quickshift
    except ImportError as error:
        raise missing(str(error.name)) from None
    s, maps = method.settings, []
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), torch.no_grad():
        for image, classes in zip(images, targets, strict=True):
            picture = image.expand(3, -1, -1).permute(1, 2, 0).double().cpu().numpy()
            segments = quickshift(
                picture, kernel_size=s["kernel_size"], max_dist=s["max_dist"], ratio=s["ratio"], rng=s["seed"]
            )
            segments = torch.from_numpy(segments).to(images.device)
            answers = _Answers(method.model)
            lime = captum().Lime(answers, interpretable_model=SkLearnRidge(alpha=1.0))
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
    """A model that remembers its outputs: after ``calls`` is set to 0, the k-th call returns the k-th output
    again, without looking at its input.
    """

    def __init__(self, model):
        self.model, self.calls, self.given = model, 0, []

    def __call__(self, x):
        if self.calls == len(self.given):
            self.given.append(self.model(x))
        self.calls += 1
        return self.given[self.calls - 1]
