"""Every kind of training data, made by the tests: digits, .npz files, CIFAR-10, folders of classes."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from support_train import ONE, class_folders, folder_data, picture, save_npz, tree

from coda_fast.data import DataError
from coda_fast.data.sources import Arrays
from coda_fast.train import TrainingError
from coda_fast.train.data import open_data
from coda_fast.train.recipes import Data


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "set")


def test_digits():
    found = open_data(Data(kind="digits"), 1)
    assert (len(found.train), len(found.val), found.num_classes) == (1347, 450, 10)
    assert found.train.images.dtype == torch.uint8
    assert found.train.images.max() == 255


@pytest.mark.parametrize("grey", [False, True])
def test_npz_of_arrays(tmp_path, grey):
    shape = (7, 5, 6) if grey else (7, 5, 6, 3)
    images, labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.arange(7)
    np.savez(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:3],
        test_labels=labels[:3],
    )
    found = open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 1 if grey else 3)
    assert list(found.train.images.shape) == [7, 1 if grey else 3, 5, 6]
    assert (len(found.val), found.num_classes) == (3, 7)
    assert found.train.images[2, 0, 4, 1] == (images[2, 4, 1] if grey else images[2, 4, 1, 0])


def test_npz_of_medmnist(tmp_path):
    """Labels have the shape [N, 1] and the dtype uint8."""
    images, labels = np.zeros((7, 5, 6), np.uint8), np.arange(7, dtype=np.uint8)[:, None]
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    found = open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 1)
    assert found.train.labels.tolist() == found.val.labels.tolist() == list(range(7))


def test_npz_of_jpegs(tmp_path):
    arrays, exact = {}, np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    for split, values in (("train", [10, 200, 90]), ("test", [50])):
        files = [picture(v, (8, 8)) for v in values]
        arrays |= {
            f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
            f"{split}_offset": np.cumsum([0, *map(len, files)]),
            f"{split}_label": np.arange(len(values)),
        }
    arrays |= {"train_lossless_idx": np.array([1]), "train_lossless_rgb": exact}
    np.savez(tmp_path / "j.npz", **arrays)
    found = open_data(Data(kind="cifar10", path=str(tmp_path / "j.npz")), 3)
    assert found.class_names[3] == "cat"  # the class names of CIFAR-10 are known without the file
    assert found.train.images.float().mean((1, 2, 3))[[0, 2]].tolist() == pytest.approx([10, 90], abs=1.5)
    assert np.array_equal(found.train.images[1].permute(1, 2, 0).numpy(), exact[0])
    arrays["train_offset"] = arrays["train_offset"] + 3
    np.savez(tmp_path / "j.npz", **arrays)
    with pytest.raises(TrainingError, match=r"expected train_jpeg, train_offset and train_label that fit"):
        open_data(Data(kind="cifar10", path=str(tmp_path / "j.npz")), 3)


@pytest.fixture
def cifar(tmp_path):
    """A small data set in the binary version of CIFAR-10: each record is a label, followed by 1024 red, 1024
    green and 1024 blue values, row by row.
    """
    generator, everything = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
        everything.append(records)
    (tmp_path / "batches.meta.txt").write_text(
        "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    )
    return tmp_path, everything


def test_cifar10_in_the_binary_version(cifar):
    folder, records = cifar
    found = open_data(Data(kind="cifar10", path=str(folder)), 3)
    assert (len(found.train), len(found.val)) == (20, 4)
    assert found.class_names[3] == "cat"
    assert found.train.labels[5] == records[1][1, 0]
    assert found.train.images[5, 1, 2, 3] == records[1][1, 1 + 1024 + 2 * 32 + 3]  # green, row 2, column 3
    assert found.val.images[3, 2, 31, 31] == records[5][3, 3072]


def test_cifar10_truncated_or_pickled(cifar, tmp_path):
    folder, _ = cifar
    (folder / "data_batch_3.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(TrainingError, match="expected records of 3073 bytes, got 52168 bytes: truncated"):
        open_data(Data(kind="cifar10", path=str(folder)), 3)
    python = tmp_path / "python"
    python.mkdir()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (python / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TrainingError, match=r"could run any code; expected the binary version"):
        open_data(Data(kind="cifar10", path=str(python)), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tree_of_folders(folder, workers):
    found = open_data(folder_data(folder, workers=workers), 3)
    assert (found.class_names, len(found.train), len(found.val)) == (["ant", "bee", "cat"], 24, 11)
    batches = list(found.val.evaluation(4, ONE))
    assert [len(b.labels) for b in batches] == [4, 4, 3]
    assert torch.cat([b.labels for b in batches]).tolist() == [0] * 3 + [1] * 4 + [2] * 4
    brightness = torch.cat([b.images for b in batches]).float().mean((1, 2, 3)).tolist()
    assert brightness == pytest.approx([100 + 4 * i for i in range(11)], abs=1.5)
    assert batches[0].images.shape == (4, 3, 16, 16)
    assert batches[0].images.dtype == torch.uint8


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid, value in (("n01", 20), ("n02", 120)):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(picture(value, (64, 64)))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    (root / "val" / "images").mkdir(parents=True)
    for i, value in enumerate((120, 20, 120)):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(picture(value, (64, 64)))
    rows = [f"val_{i}.JPEG\t{label}\t0\t0\t9\t9" for i, label in enumerate(("n02", "n01", "n02"))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    found = open_data(Data(kind="folder", path=str(root), in_memory=True, workers=0), 3)
    assert isinstance(found.train, Arrays)
    assert found.train.images.shape == (6, 3, 64, 64)
    assert found.val.labels.tolist() == [0, 1, 1]
    assert found.val.images.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 120, 120], abs=1.5)


def test_the_first_classes_only(folder):
    found = open_data(folder_data(folder, classes=2), 3)
    assert (found.class_names, len(found.train), len(found.val)) == (["ant", "bee"], 16, 7)
    with pytest.raises(TrainingError, match="data.classes: expected at least 4 folders"):
        open_data(folder_data(folder, classes=4), 3)


def test_classes_of_validation_go_by_name(folder):
    """Some classes may be missing in the validation images; unknown ones are refused."""
    shutil.rmtree(folder / "val" / "ant")
    (folder / "val" / ".hidden").mkdir()
    (folder / "train" / ".hidden").mkdir()
    found = open_data(folder_data(folder), 3)
    assert (found.class_names, [label for _, label in found.val.files]) == (
        ["ant", "bee", "cat"],
        [1] * 4 + [2] * 4,
    )
    assert open_data(folder_data(folder, classes=2), 3).val.files == found.val.files[:4]
    (folder / "val" / "cat").rename(folder / "val" / "Cat")
    with pytest.raises(
        TrainingError,
        match=r"data.val_path: expected the classes of .*train in .*val, found others: \['Cat'\]",
    ):
        open_data(folder_data(folder), 3)


def test_annotations_of_other_classes_or_torn(folder):
    (folder / "val" / "val_annotations.txt").write_text("a.JPEG\tant\t0\nb.JPEG\tdog\t0\n")
    with pytest.raises(TrainingError, match=r"found others: \['dog'\]"):
        open_data(folder_data(folder), 3)
    (folder / "val" / "val_annotations.txt").write_text("a.JPEG\tant\t0\nb.JPEG")
    with pytest.raises(
        TrainingError,
        match="val_annotations.txt: expected the name of a file in images/, a tab and its class",
    ):
        open_data(folder_data(folder), 3)


def test_a_class_without_images_is_refused(folder):
    (folder / "train" / "bat").mkdir()
    with pytest.raises(
        TrainingError, match=r"expected images of every class in .*train, found none of \['bat'\]"
    ):
        open_data(folder_data(folder), 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "found no folder .*train"),
        (lambda p: (p / "train" / "a").mkdir(parents=True), "found no folder .*val"),
        (
            lambda p: [(p / s / "a").mkdir(parents=True) for s in ("train", "val")],
            "found no image in .*train",
        ),
        (lambda p: [(p / s).mkdir() for s in ("train", "val")], "found no folder of a class in .*train"),
    ],
)
def test_a_folder_without_images(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="folder", path=str(tmp_path)), 3)


def test_images_of_several_sizes_need_a_size(tmp_path):
    tree(tmp_path / "set" / "train", {"a": 2})
    tree(tmp_path / "set" / "train2", {"b": 1}, size=(20, 20))
    (tmp_path / "set" / "train2" / "b").rename(tmp_path / "set" / "train" / "b")
    tree(tmp_path / "set" / "val", {"a": 1, "b": 1})
    source = open_data(Data(kind="folder", path=str(tmp_path / "set"), workers=0), 3)
    message = (
        r"data: expected images of one size, or a size to crop them to \(data.size in a recipe, --size\), "
        r"got 20 x 20, 30 x 40"
    )
    for workers in (0, 2):
        source.train.workers = workers
        with pytest.raises(DataError, match=message) as caught:
            list(source.train.training(0, 0, 0, 3, ONE))
        assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="folder", path=str(tmp_path / "set"), workers=0, in_memory=True), 3)


def test_in_memory_takes_no_random_crops(folder):
    with pytest.raises(
        TrainingError, match=r"data.in_memory: expected false where data.resize is above data.size \(24, 16\)"
    ):
        open_data(folder_data(folder, in_memory=True), 3)
    assert len(open_data(folder_data(folder, in_memory=True, resize=16), 3).train) == 24
    with pytest.raises(TrainingError, match="data.size: expected the side of the crop"):
        open_data(folder_data(folder, size=None, resize=None, scale=(0.5, 1.0)), 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "expected an .npz file with train_images .* got x"),
        (
            {"train_images": np.zeros((3, 4, 4, 3)), "train_labels": np.zeros(3)},
            r"got float64 \[3, 4, 4, 3\]",
        ),
        (
            {"train_images": np.zeros((3, 4, 4, 3), np.uint8), "train_labels": np.zeros(2)},
            r"as many labels, got .* and \[2\]",
        ),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_labels": np.array([0.0, 1.7, 2.0])},
            "expected labels of train that are integers from 0 on, got float64 from 0.0",
        ),
        (
            {"test_labels": np.array([0, -1, 2])},
            "expected labels of test that are integers from 0 on, got int64 from -1",
        ),
        ({"class_names": np.array(["a", "b"])}, "expected labels 0 to 1, got 0 to 2"),
        (
            {"test_images": np.zeros((3, 4, 5, 3), np.uint8)},
            r"images of one size, got \[4, 4\] to train with, \[4, 5\] to",
        ),
        ({"test_images": np.zeros((3, 4, 4, 2), np.uint8)}, "expected test_images of 1 or 3 channels, got 2"),
        (
            {"test_images": np.zeros((0, 4, 4, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "expected labels of test .*, got none",
        ),
    ],
)
def test_npz_that_does_not_fit(tmp_path, changes, message):
    path = save_npz(tmp_path / "a.npz", changes)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(path)), 3)


@pytest.mark.parametrize("change", [{"size": 8}, {"randaugment": {"n": 1}}, {"scale": (0.5, 1.0)}])
def test_what_decoding_does_is_refused_for_what_is_decoded(change):
    with pytest.raises(TrainingError, match=f"data.{next(iter(change))}: expected none for data.kind=digits"):
        open_data(Data(kind="digits", **change), 1)


def test_the_files_of_a_folder_are_those_of_torchvision_in_its_order(folder):
    """Except for hidden files. A resumed run depends on the order. torchvision's own list would follow links
    to a parent folder again and again.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    for path in ("deep/er/x.PNG", "deep/a.jpg", "._0.jpeg", "notes.txt", "B.webp", "deep.png"):
        (folder / "train" / "bee" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / "bee" / path).touch()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "y.png").touch()
    (folder / "train" / "cat" / "linked").symlink_to(folder / "elsewhere", target_is_directory=True)
    index = {"ant": 0, "bee": 1, "cat": 2}
    expected = [
        entry for entry in make_dataset(str(folder / "train"), index, IMG_EXTENSIONS) if "._0" not in entry[0]
    ]
    assert open_data(folder_data(folder), 3).train.files == expected
    assert str(folder / "train" / "cat" / "linked" / "y.png") in [path for path, _ in expected]
