"""Classes of any integer dtype, shaped [N] or [N, 1], give the same numbers everywhere. All other classes are
refused in one line.
"""

import numpy as np
import pytest
import torch

from coda_fast import baselines, create_model
from coda_fast.evaluation import completeness_error, confident_images, localisation, pixel_removal
from coda_fast.evaluation import data as evaluation_data
from coda_fast.interop import quantus_explain_func
from coda_fast.losses import DynamicMatrixLoss, matrix_penalty

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 1, 4, 1])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return create_model("coda_xs_digits")


def _removal(net, labels):
    return pixel_removal(net, IMAGES, labels, points=3).probabilities


def _localisation(net, labels):
    logits = 8.0 * torch.nn.functional.one_hot(LABELS, 10) - 4
    return localisation(net, IMAGES, labels, side=1, logits=logits).scores


def _confident(net, labels):
    logits = 8.0 * torch.nn.functional.one_hot(LABELS, 10) - 4
    return torch.tensor(
        [v for some in sorted(confident_images(logits, labels).items()) for v in (some[0], *some[1])]
    )


def _loss(net, labels):
    return DynamicMatrixLoss(0.1, classes=1)(net, IMAGES, labels).total.detach()


def _quantus(net, labels):
    return torch.from_numpy(quantus_explain_func(net, IMAGES.numpy(), labels.numpy()))


ONE_EACH = {
    "removal": _removal,
    "localisation": _localisation,
    "confident_images": _confident,
    "completeness": lambda net, labels: completeness_error(net, IMAGES, labels),
    "loss": _loss,
    "quantus": _quantus,
}
SEVERAL = {
    "explain": lambda net, classes: net.explain(IMAGES, classes).contribution_map,
    "penalty": lambda net, classes: matrix_penalty(net, IMAGES, classes).detach(),
    "rows": lambda net, classes: DynamicMatrixLoss(0.1)(net, IMAGES, LABELS, classes).total.detach(),
    "attribution": lambda net, classes: baselines.attribute("Grad", net, IMAGES, classes),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ONE_EACH, *SEVERAL])
def test_any_integer_dtype(net, name, dtype):
    if name in ONE_EACH:
        expected = ONE_EACH[name](net, LABELS)
        assert torch.equal(ONE_EACH[name](net, LABELS.to(dtype)), expected)
        assert torch.equal(ONE_EACH[name](net, LABELS[:, None].to(dtype)), expected)
    else:
        assert torch.equal(SEVERAL[name](net, LABELS[:, None].to(dtype)), SEVERAL[name](net, LABELS[:, None]))


@pytest.mark.parametrize("name", [*ONE_EACH, *SEVERAL])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.complex64], ids=str)
def test_no_other_dtype(net, name, dtype):
    with pytest.raises(TypeError, match=f"(labels|targets?|classes|rows): expected integers, got {dtype}"):
        (ONE_EACH | SEVERAL)[name](net, (LABELS[:, None] > 2).to(dtype))


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize(
    "labels",
    [LABELS[None], LABELS[:3], LABELS[:, None].expand(4, 2), LABELS[:, None, None]],
    ids=["1N", "3", "N2", "N11"],
)
def test_one_class_for_each_image(net, name, labels):
    with pytest.raises(
        ValueError, match=r"(labels|targets): expected one class for each of 4 images, got shape \["
    ):
        ONE_EACH[name](net, labels)


@pytest.mark.parametrize("name", [*ONE_EACH, *SEVERAL])
@pytest.mark.parametrize("wrong", [10, -1])
def test_classes_that_do_not_exist(net, name, wrong):
    """The error is one clear line, and not the message of torch.gather."""
    labels = torch.tensor([3, 1, wrong, 1])
    with pytest.raises(
        ValueError, match=r"(labels|targets?|classes|rows): expected (classes from )?0(, got -1| to 9, got)"
    ):
        (ONE_EACH | SEVERAL)[name](net, labels if name in ONE_EACH else labels[:, None])


def test_a_softmax_classifier_without_the_class():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 4, got 1 to 7"):
        pixel_removal(model, IMAGES, torch.tensor([1, 2, 3, 7]), lambda x, c: x, points=3)


def test_files_of_medmnist(net, tmp_path):
    """Labels have the shape [N, 1] and the dtype uint8."""
    pixels, labels = (IMAGES[:, 0] * 255).byte().numpy(), LABELS[:, None].byte().numpy()
    for names in (("images", "labels"), ("test_images", "test_labels")):
        np.savez(tmp_path / "data.npz", **dict(zip(names, (pixels, labels), strict=True)))
        found = evaluation_data.load(tmp_path / "data.npz", net)
        assert torch.equal(found.source.labels, LABELS)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels.repeat(2, 1))
    with pytest.raises(ValueError, match="as many labels"):
        evaluation_data.load(tmp_path / "data.npz", net)
