"""Which samples each process sees, and augmentation: against plain loops, and the same for any number of
workers and processes.
"""

import collections

import numpy as np
import pytest
import torch
from PIL import Image
from support_train import ONE, class_folders, folder_data, picture

from coda_fast.data import Preprocessing
from coda_fast.data.sources import Arrays, Item, Process, decode_all, to_float
from coda_fast.train import augmentation
from coda_fast.train.augmentation import Augmentation, augment
from coda_fast.train.data import open_data
from coda_fast.train.recipes import Data


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "set")


def test_augmentation_against_plain_loops():
    images = torch.randint(256, (12, 3, 6, 5), dtype=torch.uint8)
    found = augment(images, Data(kind="digits", pad=2, flip=True), torch.Generator().manual_seed(5), ONE)
    generator = torch.Generator().manual_seed(5)
    offsets = torch.randint(5, (12, 2), generator=generator).tolist()
    flips = (torch.rand(12, generator=generator) < 0.5).tolist()
    assert 0 < sum(flips) < 12
    for i, ((top, left), flip) in enumerate(zip(offsets, flips, strict=True)):
        padded = np.zeros((3, 10, 9), np.uint8)
        padded[:, 2:8, 2:7] = images[i].numpy()
        crop = padded[:, top : top + 6, left : left + 5]
        assert np.array_equal(found[i].numpy(), crop[:, :, ::-1] if flip else crop)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_take_slices_of_one_batch(world):
    """The slices of all processes of a step, put together, are the batch of a single process."""
    data = Arrays(torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8), torch.arange(50))
    wanted = Data(kind="digits", pad=1, flip=True)
    whole = list(data.training(3, 1, 0, 12, ONE))
    assert len(whole) == 4
    for step, batch in enumerate(whole):
        parts = [list(data.training(3, 1, 0, 12, Process(rank, world)))[step] for rank in range(world)]
        assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
        seen = [
            augment(p.images, wanted, torch.Generator().manual_seed(9), Process(r, world))
            for r, p in enumerate(parts)
        ]
        assert torch.equal(
            torch.cat(seen), augment(batch.images, wanted, torch.Generator().manual_seed(9), ONE)
        )


def test_an_epoch_is_a_permutation_and_no_two_are_alike():
    data = Arrays(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), torch.arange(60))

    def labels(seed, epoch, start=0):
        return torch.cat([b.labels for b in data.training(seed, epoch, start, 20, ONE)]).tolist()

    assert sorted(labels(0, 0)) == list(range(60))
    assert labels(0, 0) == labels(0, 0)
    assert len({tuple(labels(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert labels(0, 0, start=2) == labels(0, 0)[40:]


def test_to_float_divides_by_255():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(
        to_float(images, torch.float64).flatten(), torch.arange(256, dtype=torch.float64) / 255
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_sample_once(world, folder):
    arrays = Arrays(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), torch.arange(50))
    files = open_data(folder_data(folder), 3).val
    for source, count in ((arrays, 50), (files, 11)):
        seen = collections.Counter()
        for rank in range(world):
            for batch in source.evaluation(4, Process(rank, world)):
                seen.update(zip(batch.labels.tolist(), batch.images[:, 0, 0, 0].tolist(), strict=True))
        assert sum(seen.values()) == count
        assert max(seen.values()) == 1


def test_workers_and_processes_do_not_change_what_is_decoded(folder):
    """Random crops and RandAugment depend on (seed, epoch, image) only."""
    wanted = {"randaugment": {"n": 2, "m": 10}, "scale": (0.3, 1.0)}

    def images(workers, rank=0, world=1, epoch=0):
        found = open_data(folder_data(folder, workers=workers, **wanted), 3).train
        return torch.cat([b.images for b in found.training(7, epoch, 0, 8, Process(rank, world))])

    whole = images(0)
    assert torch.equal(whole, images(2))
    halves = [images(0, rank, 2).unflatten(0, (3, 4)) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves, 1).flatten(0, 1))
    assert not torch.equal(whole, images(0, epoch=1))


def test_decoding_leaves_the_global_generators_alone(folder):
    import random

    before = np.random.get_state()[1].tolist(), random.getstate()
    list(open_data(folder_data(folder, randaugment={"n": 2, "m": 10}), 3).train.training(0, 0, 0, 8, ONE))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_crops_have_the_size_that_is_asked(tmp_path):
    """A ramp of brightness from left to right shows where a crop was taken and how wide it is. With resize 20
    and crop 10 it is half as wide as the shorter side.
    """
    ramp = np.broadcast_to(np.linspace(0, 240, 80, dtype=np.uint8)[None, :, None], (40, 80, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    preprocessing = Preprocessing(3, resize=20, crop=10)
    middle = preprocessing.pixels(tmp_path / "ramp.png")[0, 5].astype(float)
    assert middle.mean() == pytest.approx(120, abs=2)
    # the crop covers 20 source pixels; between the centres of its outer tenths lie 18 of them
    assert middle[-1] - middle[0] == pytest.approx(240 / 80 * 20 * 0.9, abs=4)
    augmented = Augmentation(preprocessing)
    means = [augmented.pixels(tmp_path / "ramp.png", np.random.default_rng(i))[0].mean() for i in range(60)]
    assert 28 < min(means) < 55
    assert 185 < max(means) < 212


def test_translation_is_a_share_of_the_side():
    """At full strength RandAugment translates by 45 % of the side, for images of any size."""
    (shift,) = (op for op in augmentation._randaugment(2, 30, 3).ops if op.name == "TranslateXRel")
    for width in (20, 200):
        found = np.asarray(shift(Image.new("RGB", (width, 8))))[4, :, 0]
        assert (found > 64).sum() == 0.45 * width


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0, 1, 5, 30])
def test_randaugment_of_any_strength(channels, strength):
    decoder = Augmentation(Preprocessing(channels, 24, 16), randaugment=(2, strength))
    items = [Item(str(i), picture(120), 0) for i in range(150)]
    _, _, valid, failures = decode_all(items, decoder, [np.random.default_rng(i) for i in range(150)])
    assert valid.all(), failures[:3]


def test_a_failure_of_augmentation_is_no_damaged_image(monkeypatch):
    def broken(*_):
        raise ArithmeticError("a bug")

    monkeypatch.setattr(augmentation, "_randaugment", lambda *_: broken)
    decoder = Augmentation(Preprocessing(3, 24, 16), randaugment=(2, 10))
    with pytest.raises(ArithmeticError):
        decode_all([Item("x", picture(120), 0)], decoder, [np.random.default_rng(0)])


@pytest.mark.parametrize(("scale", "least"), [(None, 48), ((0.25, 1.0), 48), ((0.04, 1.0), 80)])
def test_jpegs_are_read_no_smaller_than_crops_need(monkeypatch, scale, least):
    from PIL import JpegImagePlugin

    asked, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        "draft",
        lambda self, mode, size: asked.append(size) or draft(self, mode, size),
    )
    Augmentation(Preprocessing(3, 24, 16), scale).pixels(picture(120, (400, 300)), np.random.default_rng(0))
    assert asked == [(least, least)]
    # for validation the whole image is decoded
    Preprocessing(3, 24, 16).pixels(picture(120, (400, 300)))
    assert asked == [(least, least)]


def test_more_processes_than_images_to_validate_with():
    few = Arrays(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    assert [sum(len(batch.labels) for batch in few.evaluation(4, Process(rank, 4))) for rank in range(4)] == [
        1,
        1,
        0,
        0,
    ]
