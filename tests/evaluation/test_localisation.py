"""The grid pointing game on maps whose score is known."""

import numpy as np
import pytest
import torch

from coda_fast import create_model
from coda_fast.evaluation import _common as common
from coda_fast.evaluation import confident_images, draw_grids, localisation
from coda_fast.evaluation.localisation import canvases, cell_shares

CLASSES = 6


def data(per_class=4, size=5):
    """Every pixel of an image of class c is (c + 1) / 10. The logits are correct for all images, with a
    confidence that falls with the index.
    """
    labels = torch.arange(CLASSES).repeat(per_class)
    images = ((labels + 1) / 10)[:, None, None, None].expand(-1, 3, size, size).contiguous()
    logits = torch.full((len(labels), CLASSES), -9.0)
    logits[torch.arange(len(labels)), labels] = 9 - torch.arange(len(labels)) / 10
    return images, labels, logits


def where_it_is(grids, classes):
    """1 in the cell of each class, 0 elsewhere."""
    return torch.isclose(grids[:, :1], (classes[:, :, None, None] + 1) / 10).float()


def run(attribution, side=2, **options):
    images, labels, logits = data()
    return localisation(torch.nn.Identity(), images, labels, attribution, side=side, logits=logits, **options)


@pytest.mark.parametrize("protocol", ["plain", "published"])
@pytest.mark.parametrize(
    ("attribution", "score"),
    [
        (where_it_is, 1.0),
        (lambda x, c: where_it_is(x, c) - 5 * (1 - where_it_is(x, c)), 1.0),  # negative mass does not count
        (lambda x, c: torch.ones_like(where_it_is(x, c)), 0.25),
        (lambda x, c: 1 - where_it_is(x, c), 0.0),
        (lambda x, c: -where_it_is(x, c), 0.0),  # no positive mass at all
        (lambda x, c: 9 * where_it_is(x, c) + (1 - where_it_is(x, c)), 0.75),  # 9 of 9 + 3
        (lambda x, c: where_it_is(x, c.roll(1, 1)), 0.0),  # the maps of other classes
    ],
)
def test_known_scores(attribution, score, protocol):
    found = run(attribution, protocol=protocol, batch_size=2)
    torch.testing.assert_close(found.scores, torch.full_like(found.scores, score))
    assert found.summary()["mean"] == pytest.approx(score)
    assert found.summary()["chance"] == 0.25


def test_summary():
    scores = torch.tensor([[0.0, 1.0], [0.25, 0.75]])
    summary = type(run(where_it_is))(scores, scores, scores).summary()
    assert summary == {
        "mean": 0.5,
        "q25": 0.1875,
        "median": 0.5,
        "q75": 0.8125,
        "std": pytest.approx(0.3953, abs=1e-4),
        "above_half": 0.5,
        "grids": 2,
        "chance": 0.5,
    }


def test_all_classes_of_a_grid_in_one_call():
    calls = []

    def attribution(grids, classes):
        calls.append((tuple(grids.shape), tuple(classes.shape)))
        return where_it_is(grids, classes)

    found = run(attribution, grids=5, batch_size=3)
    assert calls == [((3, 3, 10, 10), (3, 4)), ((2, 3, 10, 10), (2, 4))]
    assert found.scores.shape == found.images.shape == found.targets.shape == (5, 4)


@pytest.mark.parametrize("side", [2, 3])
def test_layout(side):
    """The index of cell j counts row by row, or column by column."""
    cells = torch.arange(side**2.0).view(1, -1, 1, 1, 1).expand(1, -1, 2, 4, 5)
    for protocol in ("plain", "published"):
        grid = canvases(cells, side, protocol)
        assert grid.shape == (1, 2, side * 4, side * 5)
        for j in range(side**2):
            row, column = divmod(j, side) if protocol == "plain" else divmod(j, side)[::-1]
            assert (grid[0, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5] == j).all()
            maps = torch.zeros(1, side**2, side * 4, side * 5)
            maps[0, j, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5] = 1
            assert cell_shares(maps, side, protocol)[0].tolist() == [float(i == j) for i in range(side**2)]


def test_confident_images():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, -2.0], [0.0, 5.0], [4.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1, 0])
    assert confident_images(logits, labels) == {
        0: [5, 1, 0],
        1: [4],
    }  # image 2 is classified wrongly, image 3 correctly but without confidence
    assert confident_images(logits, labels, 0.9) == {0: [5, 1], 1: [4]}


def test_plain_draw():
    """Grids have distinct classes, use every image at most once and the most confident images of a class
    first, and there are as many grids as possible.
    """
    images, labels, logits = data(per_class=6)
    confident = confident_images(logits, labels)
    grids = draw_grids(confident, 4, 500)
    assert len(grids) >= 6 * CLASSES // 4 - 2
    assert len(set(grids.flatten())) == grids.size
    assert all(len(set(labels[torch.from_numpy(g)].tolist())) == 4 for g in grids)
    for label, order in confident.items():
        used = [i for i in grids.flatten() if labels[i] == label]
        assert used == order[: len(used)]
    assert (draw_grids(confident, 4, 3) == grids[:3]).all()
    assert (draw_grids(confident, 4, 500, seed=43)[:3] != grids[:3]).any()


def test_published_draw():
    """The published protocol written out: a list in blocks, and grids built from it, where each grid skips
    one image.
    """
    images, labels, logits = data(per_class=7)
    confident = confident_images(logits, labels)
    n = 4
    np.random.seed(42)
    position, flat = dict.fromkeys(confident, 0), []
    while True:
        still = [c for c in confident if position[c] < len(confident[c])]
        if not len(still) > n:
            break
        for c in np.random.choice(still, n, replace=False):
            flat.append(confident[c][position[c]])
            position[c] += 1
    expected, offset = [], 0
    while True:
        grid, at = [], offset
        while len(grid) < n and at < len(flat):
            if labels[flat[at]] not in [labels[i] for i in grid]:
                grid.append(flat[at])
            at += 1
        if len(grid) < n:
            break
        expected.append(grid)
        offset += n + 1
    found = draw_grids(confident, n, 500, protocol="published")
    assert found.tolist() == expected
    assert len(found) > 3
    assert found[0].tolist() == flat[:n]
    assert draw_grids(confident, n, 2, protocol="published").tolist() == expected[:2]


def test_own_maps_of_a_network():
    """Without an attribution method the contribution maps are scored. The scores equal those of the maps
    computed one grid and one class at a time.
    """
    torch.manual_seed(0)
    model = create_model("coda_xs_digits", num_classes=5).double()
    images, labels = torch.rand(20, 1, 8, 8, dtype=torch.float64), torch.arange(5).repeat(4)
    logits = torch.nn.functional.one_hot(labels, 5) * 8.0 - 4
    found = localisation(model, images, labels, side=2, grids=3, logits=logits)
    for g in range(len(found.scores)):
        cells = images[found.images[g]]
        grid = torch.cat([torch.cat([cells[0], cells[1]], 2), torch.cat([cells[2], cells[3]], 2)], 1)
        for j in range(4):
            mass = model.explain(grid[None], int(found.targets[g, j])).contribution_map[0, 0].clamp(min=0)
            own = mass[8 * (j // 2) : 8 * (j // 2) + 8, 8 * (j % 2) : 8 * (j % 2) + 8].sum()
            assert float(found.scores[g, j]) == pytest.approx(float(own / mass.sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(protocol="loose"), ValueError, "protocol: expected one of 'plain', 'published', got 'loose'"),
        (dict(side=0), ValueError, "side: expected a positive integer, got 0"),
        (dict(grids=2.5), ValueError, "grids: expected a positive integer, got 2.5"),
        (dict(side=3), ValueError, "of at least 9 classes, got 6 (classes 0, 1, 2, 3, 4, 5)"),
        (dict(logits=torch.zeros(3, CLASSES)), ValueError, "logits: expected [24, classes], got [3, 6]"),
        (
            dict(labels=torch.zeros(3, dtype=torch.long)),
            ValueError,
            "labels: expected one class for each of 24 images, got shape [3]",
        ),
        (dict(labels=torch.zeros(24)), TypeError, "labels: expected integers, got torch.float32"),
        (
            dict(images=torch.zeros(24, 5, 5)),
            ValueError,
            "images: expected [N, C, H, W], got shape [24, 5, 5]",
        ),
        (dict(attribution=None), ValueError, "attribution: expected a function for a Identity"),
        (
            dict(attribution=3),
            TypeError,
            "attribution: expected a function (images, targets) -> maps, got int",
        ),
        (
            dict(attribution=lambda x, c: x),
            ValueError,
            "attribution: expected maps of shape [5, 4, 10, 10], got [5, 3, 10, 10]",
        ),
        (
            dict(attribution=lambda x, c: where_it_is(x, c) / 0),
            ValueError,
            "attribution: expected finite maps, got NaN or infinity",
        ),
    ],
)
def test_bad_input(change, error, message):
    images, labels, logits = data()
    options = dict(images=images, labels=labels, attribution=where_it_is, side=2, logits=logits) | change
    with pytest.raises(error) as caught:
        localisation(
            torch.nn.Identity(),
            options.pop("images"),
            options.pop("labels"),
            options.pop("attribution"),
            **options,
        )
    assert message in str(caught.value)


def test_confidence_of_a_softmax_classifier():
    """Logits of 5, 4.9 and 4.8 are not confident for a softmax classifier, whatever their sigmoid is. For a
    CoDA-Net they are.
    """

    class Unsure(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[5.0, 4.9, 4.8], [9.0, 0.0, 0.0]])[: len(images)]

    images = torch.zeros(2, 1, 2, 2)
    odds = common.log_odds(Unsure(), Unsure()(images))
    torch.testing.assert_close(odds.sigmoid(), Unsure()(images).softmax(1))
    assert confident_images(odds, torch.tensor([0, 0])) == {0: [1]}
    model = create_model("coda_xs_digits")
    logits = torch.randn(3, 10)
    assert common.log_odds(model, logits) is logits


def test_threads_that_evaluate_one_model_leave_its_mode_as_it_was():
    """Afterwards the model is in the mode in which the first thread found it, in whatever order the threads
    begin and end.
    """
    model = create_model("coda_xs_digits").train()
    model.layers[1].eval()
    first, second = (common.evaluated(model) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules()), "the second thread is evaluating"
    second.__exit__(None, None, None)
    assert [module.training for module in model.layers] == [True, False, True]
    assert model.training
    assert not common._EVALUATED
