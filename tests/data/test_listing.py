"""Which files count as images, and of which class, in folders as users have them."""

import os

import pytest

from coda_fast.data import DataError
from coda_fast.data.listing import class_folders, evenly, labelled_pictures, pictures


@pytest.fixture
def tree(tmp_path):
    """Images at several depths, next to files that are not images."""
    files = [
        "cat/a.png",
        "cat/B.JPG",
        "cat/deep/er/c.webp",
        "dog/._a.png",
        "dog/a.png",
        "dog/notes.txt",
        "dog/.cache/a.png",
        "dog/.DS_Store",
        ".hidden/a.png",
        "._cat/a.png",
        "dog/b.gif",
        "dog/c.JPEG",
        "dog/d.tiff",
        "dog/e.ppm",
        "dog/f.mp4",
        "loose.png",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_pictures(tree):
    found = [path.relative_to(tree).as_posix() for path in pictures(tree)]
    assert found == [
        "loose.png",
        "cat/B.JPG",
        "cat/a.png",
        "cat/deep/er/c.webp",
        "dog/a.png",
        "dog/b.gif",
        "dog/c.JPEG",
        "dog/d.tiff",
        "dog/e.ppm",
    ]


def test_classes(tree):
    assert class_folders(tree) == ["cat", "dog"]
    found = labelled_pictures(tree)
    assert list(found) == ["cat", "dog"]
    assert [os.path.basename(path) for path in found["cat"]] == ["B.JPG", "a.png", "c.webp"]


def test_links_that_lead_back_count_once(tree):
    for name in ("again", "once_more"):
        (tree / "cat" / name).symlink_to(tree / "cat", target_is_directory=True)
        (tree / "cat" / f"up_{name}").symlink_to("..", target_is_directory=True)
    assert len(pictures(tree / "dog")) == 5
    assert len(pictures(tree)) == 9


def test_of_two_names_of_a_folder_the_first_counts(tmp_path):
    """A folder with two names is listed under the first one, whatever the order in the file system."""
    for real, link in (("m", "a"), ("b", "z")):
        (tmp_path / real).mkdir()
        (tmp_path / real / "x.png").touch()
        (tmp_path / link).symlink_to(tmp_path / real, target_is_directory=True)
    assert [path.relative_to(tmp_path).as_posix() for path in pictures(tmp_path)] == ["a/x.png", "b/x.png"]


def test_annotations(tree):
    """The annotation file of Tiny-ImageNet is read where the caller asks for it."""
    (tree / "val_annotations.txt").write_text("x.JPEG\tdog\t0\t0\n\ny.JPEG\tcat\t1\nz.JPEG\tdog\n")
    images = str(tree / "images")
    assert labelled_pictures(tree) == {
        "cat": [f"{images}/y.JPEG"],
        "dog": [f"{images}/x.JPEG", f"{images}/z.JPEG"],
    }
    for line in ("x.JPEG", "../x.JPEG\tdog", "\tdog", "..\tdog", "/etc/passwd\tdog"):
        (tree / "val_annotations.txt").write_text(line)
        with pytest.raises(DataError, match="val_annotations.txt: expected the name of a file in images/"):
            labelled_pictures(tree)


def test_evenly():
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7]
    assert evenly([1, 2], 4) == evenly([1, 2], None) == [1, 2]


def test_a_folder_that_cannot_be_read(tree, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        pictures(tree)
