"""Pixel removal against known curves, and against one image and one mask at a time."""

import pytest
import torch
from torch import nn

from coda_fast import CoDANet, create_model
from coda_fast.evaluation import Removal, pixel_removal, removal


class Linear(nn.Module):
    """A softmax classifier: the probability of class 0 is the sigmoid of the sum of all pixels."""

    def forward(self, images):
        total = images.sum((1, 2, 3))
        return torch.stack([total / 2, -total / 2], 1)


def test_linear_model():
    """Pixels of 1 to 4 are ranked by their value, so that the remaining sum after each removal is known."""
    image = torch.tensor([[3.0, 1.0], [4.0, 2.0]]).view(1, 1, 2, 2) / 10
    value = lambda images, classes: images
    left = {"least": [1.0, 0.9, 0.7, 0.4, 0.0], "most": [1.0, 0.6, 0.3, 0.1, 0.0]}
    for order, sums in left.items():
        found = pixel_removal(Linear(), image, torch.tensor([0]), value, order=order, fraction=1, points=5)
        assert found.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
        torch.testing.assert_close(
            found.probabilities[0], torch.tensor(sums, dtype=torch.float64).sigmoid(), rtol=1e-6, atol=1e-6
        )
        inserted = pixel_removal(
            Linear(), image, torch.tensor([0]), value, order=order, fraction=1, points=5, insert=True
        )
        expected = (1 - torch.tensor(sums, dtype=torch.float64)).sigmoid()
        torch.testing.assert_close(inserted.probabilities[0], expected, rtol=1e-6, atol=1e-6)


def test_published_points():
    found = pixel_removal(Linear(), torch.rand(1, 3, 32, 32), torch.tensor([1]), lambda x, c: x[:, :1])
    assert (found.fractions * 1024).tolist() == list(range(0, 257, 2))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("order", ["least", "most"])
def test_batched_is_one_by_one(order, batch_size):
    """All six channels of the encoded image are masked, and the map is the model's own."""
    torch.manual_seed(0)
    model = create_model("coda_xs_digits", num_classes=4).double()
    images, targets = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([2, 0, 3])
    found = pixel_removal(model, images, targets, order=order, points=9, batch_size=batch_size)
    assert found.probabilities.shape == (3, 9)
    for i in range(3):
        importance = model.explain(images[i : i + 1], int(targets[i])).contribution_map[0, 0].flatten()
        ranking = importance.argsort(descending=order == "most")
        for k in range(9):
            encoded = model.encoder(images[i : i + 1]).flatten(2).clone()
            encoded[:, :, ranking[: 2 * k]] = 0
            with torch.no_grad():
                logits = model.head(model.run_layers(encoded.view(1, 2, 8, 8)))
            assert float(found.probabilities[i, k]) == pytest.approx(
                float(logits[0, targets[i]].sigmoid()), rel=1e-9
            )


def _network(norm="squash"):
    """A network with strides, asymmetric padding, dilation, a kernel of even size and a layer without
    padding.
    """
    torch.manual_seed(1)
    return CoDANet(
        [4, 5, 6, 4, 3],
        [4, 4, 9, 4, 4],
        kernel_sizes=[3, (2, 3), 3, 2, 1],
        strides=[1, (1, 2), 1, 2, 1],
        paddings=["valid", (1, 0), "same", 0, 0],
        dilations=[1, 1, 2, 1, 1],
        temperature=1,
        norm=norm,
    ).double()


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_what_does_not_change_is_not_computed_again(norm, insert, monkeypatch):
    """The curves equal those of masked images that are computed in full, from fewer outputs of the layers."""
    model, images, targets = (
        _network(norm),
        torch.rand(5, 3, 16, 14, dtype=torch.float64),
        torch.tensor([0, 2, 1, 1, 0]),
    )
    updated, whole = [], removal._update
    monkeypatch.setattr(
        removal,
        "_update",
        lambda layer, x, y, where: updated.append(where.float().mean()) or whole(layer, x, y, where),
    )
    find = lambda: pixel_removal(model, images, targets, points=40, insert=insert, batch_size=2).probabilities
    found = find()
    assert len(updated) > 39
    assert torch.stack(updated).mean() <= removal.WHOLE
    count = len(updated)
    with monkeypatch.context() as patched:
        patched.setattr(removal, "_by_changes", lambda *arguments: False)
        torch.testing.assert_close(found, find(), rtol=1e-11, atol=1e-12)
    assert len(updated) == count
    reached = removal._reached
    monkeypatch.setattr(
        removal, "_reached", lambda layer, changed: reached(layer, changed) & (torch.rand(()) < 0.9)
    )
    with pytest.raises(AssertionError, match="not close"):  # an output that should have changed
        torch.testing.assert_close(find(), found, rtol=1e-11, atol=1e-12)


def test_layers_that_are_watched_are_called(monkeypatch):
    """A hook on a layer sees every masked image in full."""
    model, images, targets = _network(), torch.rand(2, 3, 16, 14, dtype=torch.float64), torch.tensor([0, 1])
    seen = []
    model.layers[2].register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    pixel_removal(model, images, targets, points=40)
    assert sum(seen) >= 2 * 40
    seen.clear()
    monkeypatch.setattr(removal, "_by_changes", lambda *arguments: True)
    pixel_removal(model, images, targets, points=40)
    assert sum(seen) < 2 * 40


def test_ties_go_in_order():
    """Of equal pixels the first in the image is removed first, so that the same map gives the same curve
    everywhere.
    """
    image = torch.tensor([0.1, 0.2, 0.4, 0.8]).view(1, 1, 2, 2)
    for order in ("least", "most"):
        found = pixel_removal(
            Linear(),
            image,
            torch.tensor([0]),
            lambda x, c: torch.zeros_like(x),
            order=order,
            fraction=1,
            points=5,
        )
        expected = torch.tensor([1.5, 1.4, 1.2, 0.8, 0.0], dtype=torch.float64).sigmoid()
        torch.testing.assert_close(found.probabilities[0], expected, rtol=1e-6, atol=1e-6)


def test_curve_and_area():
    removal = Removal(torch.tensor([0.0, 0.1, 0.2]), torch.tensor([[1.0, 0.5, 0.0], [0.4, 0.4, 0.4]]))
    assert removal.area().tolist() == pytest.approx([0.5, 0.4])
    assert removal.curve().tolist() == pytest.approx([0.7, 0.45, 0.2])


def test_no_images():
    found = pixel_removal(Linear(), torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), lambda x, c: x)
    assert found.probabilities.shape == (0, 129)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(order="last"), ValueError, "order: expected one of 'least', 'most', got 'last'"),
        (dict(fraction=0), ValueError, "fraction: expected a number above 0 and at most 1, got 0"),
        (dict(fraction=1.5), ValueError, "fraction: expected a number above 0 and at most 1, got 1.5"),
        (dict(fraction=0.01), ValueError, "expected at least two points and one pixel, got 129 and 0 of 16"),
        (dict(points=1), ValueError, "expected at least two points and one pixel, got 1 and 4 of 16"),
        (dict(batch_size=0), ValueError, "batch_size: expected a positive integer, got 0"),
        (
            dict(targets=torch.zeros(3, dtype=torch.long)),
            ValueError,
            "targets: expected one class for each of 2 images, got shape [3]",
        ),
        (
            dict(attribution=lambda x, c: x[:, 0]),
            ValueError,
            "attribution: expected maps of shape [2, 1, 4, 4], got [2, 4, 4]",
        ),
    ],
)
def test_bad_input(change, error, message):
    options = dict(targets=torch.zeros(2, dtype=torch.long), attribution=lambda x, c: x) | change
    with pytest.raises(error) as caught:
        pixel_removal(
            Linear(), torch.rand(2, 1, 4, 4), options.pop("targets"), options.pop("attribution"), **options
        )
    assert message in str(caught.value)


def test_points_that_are_one_are_computed_once():
    """129 points on an image of 8 x 8 pixels are only 17 different numbers of pixels."""
    model, seen = create_model("coda_xs_digits"), []
    images, targets = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    hook = model.layers[0].register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    found = pixel_removal(model, images, targets, lambda x, c: x)
    hook.remove()
    assert sum(seen) == 2 * 17
    assert found.probabilities.shape == (2, 129)
    few = pixel_removal(model, images, targets, lambda x, c: x, points=17)
    torch.testing.assert_close(found.probabilities[:, ::8], few.probabilities)


class Normalised(nn.Module):
    """A model with a part called ``encoder``, as a transformer has, and with batch statistics that must not
    change.
    """

    def __init__(self):
        super().__init__()
        self.encoder, self.norm, self.drop = nn.Identity(), nn.BatchNorm2d(1), nn.Dropout(0.5)

    def forward(self, images):
        total = self.drop(self.norm(images)).sum((1, 2, 3))
        return torch.stack([total / 2, -total / 2], 1)


def test_a_model_in_training_mode_is_evaluated_and_left_as_it_was():
    model, images = Normalised(), torch.rand(3, 1, 4, 4)
    model.drop.eval()
    before = model.norm.running_mean.clone()
    found = pixel_removal(
        model, images, torch.zeros(3, dtype=torch.long), lambda x, c: x, points=3, batch_size=2
    )
    assert torch.equal(model.norm.running_mean, before)
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    torch.testing.assert_close(
        found.probabilities[:, 0], images.double().sum((1, 2, 3)).sigmoid(), rtol=1e-4, atol=1e-5
    )
