"""Evaluations that are interrupted and resumed, the files that they write, and the data that they read."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from coda_fast import create_model
from coda_fast.evaluation import data, localisation, pixel_removal, runner
from coda_fast.evaluation.runner import Evaluation, Settings

SETTINGS = {
    "localisation": Settings("localisation", side=2, grids=7, piece=2),
    "removal": Settings("removal", points=5, piece=3),
}


@pytest.fixture(scope="module")
def model():
    """A network whose head classifies by mean brightness, so that it is confident. The maps are those of the
    network.
    """
    torch.manual_seed(0)
    return create_model("coda_xs_digits", num_classes=5).eval()


@pytest.fixture
def evaluation(model, tmp_path, monkeypatch):
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(5).repeat(8)
    logits = torch.nn.functional.one_hot(labels, 5) * 8.0 - 4
    monkeypatch.setattr("coda_fast.evaluation._common.logits_of", lambda *a: logits)

    def make(metric, folder="out", **description):
        return Evaluation(model, images, labels, SETTINGS[metric], tmp_path / folder, description)

    return make


class Counted:
    """A model's own maps as an attribution method that counts its calls and is interrupted at one of them."""

    def __init__(self, model, stop=None):
        self.model, self.stop, self.calls = model, stop, 0

    def attribute(self, images, targets):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return self.model.explain(images, targets).contribution_map


def numbers(found):
    return found.scores if hasattr(found, "scores") else found.probabilities


@pytest.mark.parametrize("metric", runner.METRICS)
def test_interrupted(evaluation, model, metric):
    """The second run resumes at the first missing piece. Its numbers equal those of an uninterrupted run and
    of the function itself.
    """
    first = evaluation(metric)
    total = len(first.work().split(SETTINGS[metric].piece))
    with pytest.raises(KeyboardInterrupt):
        first.measure("Ours", Counted(model, stop=3), {})
    again = Counted(model)
    found = evaluation(metric).measure("Ours", again, {})
    assert again.calls == total - 2
    once = evaluation(metric, "other").measure("Ours", Counted(model), {})
    assert torch.equal(numbers(found), numbers(once))
    third = Counted(model)
    evaluation(metric).measure("Ours", third, {})
    assert third.calls == 0
    e = evaluation(metric)
    if metric == "localisation":
        whole = localisation(model, e.images, e.labels, side=2, grids=7).scores
    else:
        whole = pixel_removal(model, e.images, e.labels, points=5).probabilities
    torch.testing.assert_close(numbers(found), whole, rtol=1e-4, atol=1e-6)


def test_a_half_written_piece_is_not_taken(evaluation, model, monkeypatch):
    """When the disk is full, the piece and its temporary file are removed, and the earlier pieces stay."""
    save, count = np.save, [0]

    def full(file, values, **options):
        count[0] += 1
        if count[0] == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(file, values, **options)

    monkeypatch.setattr(runner.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        evaluation("removal").measure("Ours", None, {})
    pieces = sorted(p.name for p in evaluation("removal").folder.glob("pieces/*/*"))
    assert pieces == ["00000.npy"]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY half", None])
def test_a_damaged_piece_is_measured_again(evaluation, model, damage):
    e = evaluation("removal")
    whole = numbers(e.measure("Ours", None, {}))
    piece = sorted(e.folder.glob("pieces/*/*"))[1]
    if damage is None:
        np.save(piece, np.zeros((1, 2)))  # a complete file with another shape
    else:
        piece.write_bytes(damage)
    counted = Counted(model)
    torch.testing.assert_close(numbers(e.measure("Ours", counted, {})), whole)
    assert counted.calls == 1


def test_what_cannot_be_measured_claims_no_folder(evaluation, monkeypatch):
    monkeypatch.setattr("coda_fast.evaluation._common.logits_of", lambda *a: torch.full((40, 5), -1.0))
    e = evaluation("localisation")
    with pytest.raises(ValueError, match="of at least 4 classes, got 0"):
        e.measure("Ours", None, {})
    assert not e.folder.exists()


def test_other_settings_of_a_method_are_measured_anew(evaluation, model):
    e, counted = evaluation("removal"), Counted(model)
    e.measure("Ours", counted, {"n": 1})
    e.measure("Ours", counted, {"n": 2})
    assert counted.calls == 2 * 14


def test_a_folder_holds_one_evaluation(evaluation, model):
    evaluation("removal", checkpoint="a").measure("Ours", None, {})
    with pytest.raises(
        ValueError,
        match=r"output: .*out holds another evaluation \(other checkpoint\); choose another folder",
    ):
        evaluation("removal", checkpoint="b").measure("Ours", None, {})
    with pytest.raises(ValueError, match=r"\(other settings\)"):
        evaluation("localisation", checkpoint="a").measure("Ours", None, {})


@pytest.mark.parametrize("metric", runner.METRICS)
def test_results(evaluation, metric):
    e = evaluation(metric, checkpoint="abc")
    uniform = lambda images, targets: torch.ones(len(images), targets.shape[1], *images.shape[2:])
    found = {"Ours": e.measure("Ours", None, {}), "flat": e.measure("flat", uniform, {"n": 1})}
    paths = e.write(found, {"Ours": {}, "flat": {"n": 1}})
    assert [p.name for p in paths] == ["results.json", "results.csv", f"{metric}.png", f"{metric}.svg"]
    document = json.loads(paths[0].read_text())
    assert document["checkpoint"] == "abc"
    assert document["settings"]["metric"] == metric
    assert document["methods"]["flat"]["settings"] == {"n": 1}
    rows = list(csv.reader(paths[1].open()))
    for name, result in found.items():
        mine = [row for row in rows if row[0] == name]
        written = torch.tensor(
            [[float(x) for x in row[-1 if metric == "localisation" else 2 :]] for row in mine],
            dtype=torch.float64,
        )
        torch.testing.assert_close(written.flatten(), numbers(result).flatten(), rtol=1e-8, atol=1e-9)
        assert document["methods"][name]["mean"] == pytest.approx(runner.summary(result)["mean"])
    if metric == "localisation":
        assert document["methods"]["flat"]["mean"] == pytest.approx(0.25)
    with Image.open(paths[2]) as picture:
        assert min(picture.size) > 400
    assert paths[3].read_text().lstrip().startswith("<?xml")
    assert runner.markdown(found).count("\n") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(metric="x"), "metric: expected one of"), (dict(piece=0), "piece: expected a positive")],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


# -- data
# ------------------------------------------------------------------------------------------------------------


def folder_of_classes(path, sizes=((8, 8),) * 3, classes=("cat", "dog")):
    for c, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.fromarray(np.full(size, 10 * c + i, np.uint8)).save(path / name / f"{i}.png")
    return path


def read(source, model, **options):
    """The whole data set, as ``coda-fast evaluate`` reads it: (images, labels, survey)."""
    found = data.survey(model, data.load(source, model, **options), batch_size=3)
    return found.images[torch.arange(len(found.images))], found.labels, found


def test_folder(tmp_path, model):
    images, labels, found = read(folder_of_classes(tmp_path / "d"), model)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0, 1, 2, 10, 11, 12]) / 255)
    assert read(tmp_path / "d", model, limit=4)[1].tolist() == [0, 0, 1, 1]
    named = create_model("coda_xs_digits", num_classes=3, class_names=["dog", "owl", "cat"])
    other = read(tmp_path / "d", named)[2]
    assert other.labels.tolist() == [2, 2, 2, 0, 0, 0]
    assert read(tmp_path / "d", model)[2].digest == found.digest != other.digest
    assert found.names == [str(tmp_path / "d" / c / f"{i}.png") for c in ("cat", "dog") for i in range(3)]


def test_survey(tmp_path, model):
    """The logits of each image do not depend on the batches, and neither do those of a selection computed
    again.
    """
    images, labels, found = read(folder_of_classes(tmp_path / "d"), model)
    with torch.no_grad():
        logits = model(images)
    assert found.predictions.tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(found.own, logits.gather(1, labels[:, None])[:, 0])
    assert found.accuracy() == {
        "top1": float((logits.argmax(1) == labels).double().mean()),
        "top5": 1.0,
        "images": 6,
    }
    assert found.images.shape == (6, 1, 8, 8)
    index = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(found.images[index], images[index])


def test_a_picture_that_is_gone_when_it_is_read_again(tmp_path, model):
    _, _, found = read(folder_of_classes(tmp_path / "d"), model)
    (tmp_path / "d" / "cat" / "1.png").unlink()
    with pytest.raises(ValueError, match="1.png: could be read before: no such file"):
        found.images[torch.tensor([1])]


def test_folders_that_are_only_partly_classes(tmp_path):
    """Such folders are refused, because a guess would silently give wrong numbers."""
    named = create_model("coda_xs_digits", num_classes=3, class_names=["dog", "owl", "cat"])
    folder_of_classes(tmp_path / "d", classes=("cat", "wolf"))
    with pytest.raises(
        ValueError, match="expected folders named after classes of the model, in .* others are not: wolf"
    ):
        data.load(tmp_path / "d", named)
    folder_of_classes(tmp_path / "e", classes=("n01", "n02"))
    with pytest.raises(
        ValueError, match="the model has 3 classes, .* has 2 folders, none of them named after a class"
    ):
        data.load(tmp_path / "e", named)
    folder_of_classes(tmp_path / "f", classes=("n01", "n02", "n03"))
    found = data.load(tmp_path / "f", named)
    assert [label for _, label in found.source.files] == [0] * 3 + [1] * 3 + [2] * 3
    assert found.note == "folders in the order of their names are taken for classes 0 (n01) to 2 (n03)"


def test_corrupt_files_are_skipped_and_named(tmp_path, model):
    path = folder_of_classes(tmp_path / "d")
    (path / "cat" / "1.png").write_bytes(b"no image")
    (path / "cat" / "notes.txt").write_text("not looked at")
    (path / "dog" / "._0.png").write_bytes(b"of macOS, not looked at")
    images, labels, found = read(path, model)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert found.skipped == {str(path / "cat" / "1.png"): "not an image that Pillow can read"}
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0, 2, 10, 11, 12]) / 255)
    # only the readable images are counted
    assert torch.equal(found.images[torch.tensor([1, 2])], images[1:3])
    assert read(path, model, limit=6)[2].labels.tolist() == labels.tolist()


def test_a_set_that_cannot_be_read(tmp_path, model):
    path = folder_of_classes(tmp_path / "d", classes=("cat",))
    for i in range(3):
        (path / "cat" / f"{i}.png").write_bytes(b"no image")
    found = data.load(path, model)
    for function in (lambda: data.survey(model, found), lambda: data.first_size(found)):
        with pytest.raises(
            ValueError, match=r"data: no readable image among 3: .*cat.[02].png: not an image"
        ):
            function()


def test_sizes(tmp_path, model):
    """By default all images get the size that the network was trained on. Without resizing, they must have
    one size.
    """
    path = folder_of_classes(tmp_path / "d", sizes=((8, 8), (8, 12)))
    assert read(path, model)[0].shape == (4, 1, 8, 8)
    with pytest.raises(
        ValueError,
        match=r"expected images of one size, or a size to crop them to .*--size.*, "
        r"got 8 x 12, 8 x 8|8 x 8, 8 x 12",
    ):
        read(path, model, preprocessing=model.transform.at(0))
    assert read(path, model, preprocessing=model.transform.at(6))[0].shape == (4, 1, 6, 6)
    assert data.first_size(data.load(path, model, preprocessing=model.transform.at(6))) == (6, 6)


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [(1, [0]), (2, [0, 1]), (4, [0, 0, 1, 2]), (5, [0, 0, 1, 1, 2]), (6, [0, 0, 1, 1, 2, 2])],
)
def test_a_limit_is_shared_by_all_classes(tmp_path, model, limit, wanted):
    found = data.load(folder_of_classes(tmp_path / "d", classes=("a", "b", "c")), model, limit=limit)
    assert [label for _, label in found.source.files] == wanted
    more = folder_of_classes(tmp_path / "e", classes=("a", "b"))
    (more / "a" / "1.png").unlink(), (more / "a" / "2.png").unlink()
    assert [label for _, label in data.load(more, model, limit=4).source.files] == [0, 1, 1, 1]


def test_the_digest_is_of_the_data_alone(tmp_path, model):
    found = data.load(folder_of_classes(tmp_path / "d"), model)
    assert len({data.survey(model, found, batch_size=size).digest for size in (1, 2, 5, 64)}) == 1


def test_a_network_that_diverged_has_no_accuracy(tmp_path):
    broken = create_model("coda_xs_digits", num_classes=5)
    with torch.no_grad():
        broken.layers[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="cat.0.png: the network gives logits that are not finite"):
        read(folder_of_classes(tmp_path / "d"), broken)


def test_memory_does_not_grow_with_the_set(tmp_path, model):
    """Only one batch of a set is in memory: the peak is the same for a set with 40 times as many images."""
    import tracemalloc

    peaks = []
    for count in (4, 160):
        path = folder_of_classes(tmp_path / str(count), sizes=((128, 128),) * count, classes=("cat",))
        found = data.load(path, model, preprocessing=model.transform.at(128))
        tracemalloc.start()
        survey = data.survey(model, found, batch_size=4)
        survey.images[torch.arange(4)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # an image adds its name and numbers; its pixels would be 16,384 bytes
    assert peaks[1] < 1.5 * peaks[0] + 160 * 2000, peaks


def test_npz(tmp_path, model):
    images, labels = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.array([0, 1, 2, 3])
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    found = read(tmp_path / "a.npz", model, limit=3)
    torch.testing.assert_close(found[0][:, 0], torch.from_numpy(images[:3]).float() / 255)
    assert found[1].tolist() == [0, 1, 2]
    assert read(tmp_path / "a.npz", model, preprocessing=model.transform.at(3))[0].shape == (4, 1, 3, 3)
    np.savez(
        tmp_path / "b.npz",
        train_images=images[:0],
        train_labels=labels[:0],
        test_images=images,
        test_labels=labels,
    )
    assert read(tmp_path / "b.npz", model, limit=3)[2].digest == found[2].digest  # what training reads


@pytest.mark.parametrize("size", [(20, 30), (8, 8), (8, 12), (10, 10)])
@pytest.mark.parametrize("resize", [8, 10])
def test_arrays_are_fitted_as_files_are(tmp_path, size, resize):
    """Arrays of any size and colour give the same pixels as files of the same images."""
    model = create_model("coda_xs_digits", num_classes=5, preprocessing=dict(resize=resize, crop=8))
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(3))
    (tmp_path / "d" / "one").mkdir(parents=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "d" / "one" / f"{i}.png")
    assert torch.equal(read(tmp_path / "a.npz", model)[0], read(tmp_path / "d", model)[0])


def test_npz_of_jpegs(tmp_path):
    """The pickle-free form of CIFAR-10: JPEGs one after the other, some of them replaced by lossless data."""
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (40, 80, 120)]
    parts = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        parts.append(np.frombuffer(buffer.getvalue(), np.uint8))
    arrays = dict(
        test_jpeg=np.concatenate(parts),
        test_offset=np.cumsum([0, *map(len, parts)]),
        test_label=np.array([0, 1, 1]),
    )
    arrays |= dict(test_lossless_idx=np.array([2]), test_lossless_rgb=np.full((1, 8, 8, 3), 121, np.uint8))
    np.savez(tmp_path / "c.npz", **arrays)
    network = create_model("coda_s_cifar10", rank=1, image_size=8)
    images, labels, _ = read(tmp_path / "c.npz", network)
    assert images.shape == (3, 3, 8, 8)
    assert [round(255 * float(v)) for v in images[:, 0, 0, 0]] == [40, 80, 121]
    assert labels.tolist() == [0, 1, 1]
    start = arrays["test_offset"][1]
    arrays["test_jpeg"][start : start + 20] = 0  # the second image cannot be decoded any more
    np.savez(tmp_path / "c.npz", **arrays)
    images, labels, found = read(tmp_path / "c.npz", network)
    assert (labels.tolist(), images.shape) == ([0, 1], (2, 3, 8, 8))
    assert found.skipped == {f"{tmp_path / 'c.npz'}, test_jpeg 1": "not an image that Pillow can read"}
    arrays["test_lossless_rgb"] = np.zeros((1, 6, 8, 3), np.uint8)
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match="c.npz: expected images of one size, got 2 sizes: 6 x 8, 8 x 8"):
        data.load(tmp_path / "c.npz", network)


def test_digits():
    images, _, _ = read("digits", create_model("coda_xs_digits"), limit=30)
    assert images.shape == (30, 1, 8, 8)
    # 17 levels, in bytes
    assert float((images * 16 - (images * 16).round()).abs().max()) < 0.5 * 16 / 255 + 1e-6


def test_bad_data(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "odd.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object), labels=np.zeros(1))
    np.savez(tmp_path / "float.npz", images=np.zeros((1, 4, 4)), labels=np.zeros(1))
    np.savez(tmp_path / "two.npz", images=np.zeros((1, 4, 4, 2), np.uint8), labels=np.zeros(1))
    np.savez(tmp_path / "labels.npz", images=np.zeros((1, 4, 4), np.uint8), labels=np.array([7]))
    np.savez(tmp_path / "negative.npz", images=np.zeros((1, 4, 4), np.uint8), labels=np.array([-1]))
    many = folder_of_classes(tmp_path / "many", classes=[f"c{i}" for i in range(6)])
    for source, message in {
        tmp_path / "nowhere": "data: expected 'digits', an .npz file or a folder of classes",
        tmp_path / "empty": "expected a folder for each class",
        tmp_path / "classes": "data: no images in .*classes",
        tmp_path / "no.npz": "not an .npz file",
        tmp_path / "odd.npz": "expected an .npz file with train_images .* got x",
        tmp_path / "pickled.npz": "not an .npz file",
        tmp_path / "float.npz": "expected images .* uint8",
        tmp_path / "two.npz": "expected images of 1 or 3 channels, got 2",
        tmp_path / "labels.npz": "classes 0 to 4, .* labels up to 7",
        tmp_path / "negative.npz": "expected labels that are integers from 0 on, got int64 from -1",
        many: "the model has 5 classes, .* has 6 folders",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load(source, model)
