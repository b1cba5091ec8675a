"""The localisation score of the demonstration, on maps whose score is known."""

import dataclasses

import pytest
import torch

from coda_fast import demo


@dataclasses.dataclass
class _Oracle:
    """Explains class c of a grid by a map that is ``inside`` on the pixels of its own cell, and ``outside``
    elsewhere.
    """

    inside: float
    outside: float

    def explain(self, canvases, targets):
        maps = torch.full((len(canvases), targets.shape[1], *canvases.shape[2:]), self.outside)
        for i in range(len(canvases)):
            for k in range(targets.shape[1]):
                # the pixels of each image are its class
                maps[i, k][canvases[i, 0] == targets[i, k]] = self.inside
        return dataclasses.make_dataclass("E", ["pixel_map"])(maps)


LABELS = torch.arange(6).repeat(3)
IMAGES = LABELS.view(-1, 1, 1, 1).expand(-1, 1, 4, 3).float()
LOGITS = torch.nn.functional.one_hot(LABELS, 6) * 2.0 - 1


DATA = demo.Data(None, None, IMAGES, LABELS, [str(c) for c in range(6)])


@pytest.mark.parametrize(
    ("inside", "outside", "score"), [(1, 0, 1.0), (1, 1, 0.25), (3, 1, 0.5), (-1, -1, 0.0)]
)
def test_localisation_of_known_maps(inside, outside, score):
    ours, grids = demo.localisation_score(_Oracle(inside, outside), DATA, LOGITS, seed=0)
    assert grids > 0
    assert ours == pytest.approx(score)


def test_localisation_takes_confident_correct_images_only():
    wrong = LOGITS.clone()
    wrong[LABELS >= 3] = -1  # three classes are never confident, so that too few are left for a grid
    assert demo.localisation_score(_Oracle(1, 0), DATA, wrong, seed=0) == (None, 0)


def test_digits():
    data = demo.digits()
    assert len(data.train_images) == 1347
    assert len(data.test_images) == 450
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
