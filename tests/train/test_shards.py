"""WebDataset shards: every sample once, exact resumption, and contents that cannot be read."""

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from support_train import ONE, assert_same, checkpoint_at, command, finished, picture, recipe, run, stuck

from coda_fast import train
from coda_fast.data import DataError, Preprocessing
from coda_fast.data import shards as shards_module
from coda_fast.data.sources import Process, decode_all
from coda_fast.train import TrainingError
from coda_fast.train.data import open_data
from coda_fast.train.recipes import Data


def pack(path, files):
    """Add files, {name: content}, to a shard."""
    with tarfile.open(path, "a") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """6 shards of 5 training images, and 3 of 4, 1 and 2 images for validation. Each image has its own
    brightness.
    """
    value = 0
    for kind, sizes in (("train", [5] * 6), ("val", [4, 1, 2])):
        for i, size in enumerate(sizes):
            for j in range(size):
                files = {
                    f"{i}{j}.jpg": picture(value % 256, (20, 20)),
                    f"{i}{j}.cls": b"%d" % (value // 6 % 3),
                }
                pack(tmp_path / f"{kind}-{i:03d}.tar", files)
                value += 6
    pattern = str(tmp_path)
    return Data(
        kind="webdataset",
        path=pattern + "/train-{000..005}.tar",
        val_path=pattern + "/val-{000..002}.tar",
        classes=3,
        resize=20,
        size=16,
        workers=0,
        train_samples=30,
        shuffle=10,
    )


def values(batches):
    return [round(float(v)) for b in batches for v in b.images.float().mean((1, 2, 3))]


def test_shards_give_every_image_once_an_epoch(shards):
    pytest.importorskip("webdataset")
    found = open_data(shards, 3)
    seen = values(found.train.training(0, 0, 0, 5, ONE))
    assert len(seen) == 30
    assert sorted(round(v / 6) for v in seen) == list(range(30))
    assert seen != sorted(seen)
    assert seen != values(found.train.training(0, 1, 0, 5, ONE))
    for world in (1, 2, 4):
        some = [values(found.val.evaluation(3, Process(rank, world))) for rank in range(world)]
        assert sorted(round(v / 6) for part in some for v in part) == list(range(30, 37))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_go_on_in_the_middle(shards, workers):
    pytest.importorskip("webdataset")
    source = open_data(shards.model_copy(update={"workers": workers}), 3).train
    for process in (ONE, Process(1, 2)):
        whole = list(source.training(0, 0, 0, 6, process))
        assert len(whole) == 5
        for start in (1, 2, 4):
            rest = list(source.training(0, 0, start, 6, process))
            assert len(rest) == 5 - start
            for a, b in zip(whole[start:], rest, strict=True):
                assert torch.equal(a.images, b.images)
                assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_samples": None}, "data.train_samples: expected"),
        ({"classes": None}, "data.classes: expected a value for shards"),
        ({"path": "/nowhere/{0..3}.tar"}, "found 0; missing: .*/nowhere/0.tar"),
    ],
)
def test_what_shards_need(shards, change, message):
    pytest.importorskip("webdataset")
    with pytest.raises(TrainingError, match=message):
        open_data(shards.model_copy(update=change), 3)


def test_too_few_shards(shards):
    pytest.importorskip("webdataset")
    """Refused in every process, also in those that have enough: they would wait for the others."""
    source = open_data(shards.model_copy(update={"workers": 2}), 3).train
    for rank in range(4):
        with pytest.raises(DataError, match="a shard at least for each of 4 processes x 2 workers, got 6"):
            source.need_enough(Process(rank, 4))


def test_too_few_shards_leave_no_folder(shards, tmp_path):
    pytest.importorskip("webdataset")
    options = (
        "model.name=coda_s_cifar10",
        "model.out_channels=[4, 3]",
        "data.kind=webdataset",
        "data.workers=7",
        "batch_size=4",
    )
    given = ("path", "val_path", "classes", "size", "train_samples")
    with pytest.raises(TrainingError, match="a shard at least for each of 1 processes x 7 workers, got 6"):
        run(tmp_path / "out", *options, *(f"data.{key}={getattr(shards, key)}" for key in given))
    assert not (tmp_path / "out").exists()


def test_a_run_on_shards_stops_and_goes_on(shards, tmp_path):
    pytest.importorskip("webdataset")
    options = (
        "model.name=coda_s_cifar10",
        "model.out_channels=[4, 3]",
        "data.kind=webdataset",
        f"data.path={shards.path}",
        f"data.val_path={shards.val_path}",
        "data.classes=3",
        "data.resize=20",
        "data.size=16",
        "data.workers=0",
        "data.train_samples=30",
        "batch_size=5",
        "checkpoint.every_steps=4",
        "checkpoint.keep=9",
        "log.maps=2",
    )
    row = run(tmp_path / "whole", *options)
    assert (row["val_images"], row["updates"]) == (7, 12)
    assert len(list((tmp_path / "whole" / "maps").iterdir())) == 2
    run(
        tmp_path / "rest",
        *options,
        resume=str(tmp_path / "whole" / "checkpoints" / "epoch_0001_step_0000002.pt"),
    )
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "rest"))


def test_other_workers_in_the_middle_of_an_epoch_of_shards_are_told_of(shards, tmp_path, capsys):
    options = (
        "model.name=coda_s_cifar10",
        "model.out_channels=[4, 3]",
        "data.kind=webdataset",
        f"data.path={shards.path}",
        f"data.val_path={shards.val_path}",
        "data.classes=3",
        "data.resize=20",
        "data.size=16",
        "data.train_samples=30",
        "batch_size=5",
        "checkpoint.every_steps=4",
        "checkpoint.keep=9",
        "epochs=1",
    )
    run(tmp_path / "whole", *options, "data.workers=0")
    middle = str(tmp_path / "whole" / "checkpoints" / "epoch_0000_step_0000004.pt")
    for workers, told in ((1, False), (2, True)):
        train.run(recipe(*options, f"data.workers={workers}"), tmp_path / f"rest{workers}", middle)
        message = f"shards: (processes, workers) were (1, 1), now (1, {workers})"
        assert (message in capsys.readouterr().err) is told


@pytest.mark.slow
def test_workers_end_with_a_run_on_shards_and_leave_nothing(shards, tmp_path):
    """Workers of an endless stream end with the run, even if it ends with an error while a worker waits for a
    shard on storage that does not respond.
    """
    options = (
        "model.name=coda_s_cifar10",
        "model.out_channels=[4, 3]",
        "data.kind=webdataset",
        f"data.val_path={shards.val_path}",
        "data.classes=3",
        "data.resize=20",
        "data.size=16",
        "data.train_samples=30",
        "batch_size=5",
        "data.workers=2",
    )
    # not in tmp_path, because paths of sockets must be short
    with tempfile.TemporaryDirectory(prefix="coda") as temporary:
        finished(command(tmp_path / "out", *options, f"data.path={shards.path}"), TMPDIR=temporary)
        assert not list(Path(temporary).glob("pymp-*"))
    (tmp_path / "bad").mkdir()
    pack(tmp_path / "bad" / "t-0.tar", {"notes.txt": b"nothing"})
    (tmp_path / "bad" / "t-1.tar").touch()
    path = f"data.path={tmp_path}/bad/t-{{0..1}}.tar"
    printed = finished(command(tmp_path / "none", *options, path), 2, **stuck(tmp_path / "site", "t-1.tar"))
    assert "coda-fast: data: no samples with an image and a class in" in printed


@pytest.fixture
def damaged_shards(shards):
    """Training shards 2 and 5 are torn. The others have 6 samples that cannot be read, and entries that are
    not samples.
    """
    paths = [Path(shards.path.replace("{000..005}", f"00{i}")) for i in range(6)]
    good = picture(250, (20, 20))
    for i, files in (
        (0, {"broken.jpg": b"\xff\xd8 broken", "broken.cls": b"2", "unlabelled.jpg": good}),
        (1, {"pathless.cls": b"1", "README.txt": b"x", "many.jpg": good, "many.cls": b"3"}),
        (3, {"text.cls": b"cat", "text.jpg": good, "negative.jpg": good, "negative.cls": b"-1"}),
    ):
        pack(paths[i], {**files, f"last{i}.jpg": good, f"last{i}.cls": b"0"})
    for i, inside in ((2, 700), (5, 0)):  # within the content of the third image, and before the first header
        with tarfile.open(paths[i]) as tar:
            cut = tar.getmembers()[4].offset + inside
        paths[i].write_bytes(paths[i].read_bytes()[:cut])
    return shards


REASONS = {
    "train-000.tar:broken": "not an image",
    "train-000.tar:unlabelled": "cls: expected a class from 0 to 2, found none",
    "train-001.tar:pathless": "no image",
    "train-001.tar:many": "cls: expected a class from 0 to 2, got '3'",
    "train-003.tar:text": "cls: expected a class from 0 to 2, got 'cat'",
    "train-003.tar:negative": "cls: expected a class from 0 to 2, got '-1'",
    "train-002.tar": "expected a whole tar file: unexpected end of data",
    "train-005.tar": "expected a whole tar file: empty header",  # cut where a header would begin
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("evaluation", [False, True])
def test_samples_that_cannot_be_read_are_named_and_keep_their_place(damaged_shards, workers, evaluation):
    changes = {"workers": workers} | ({"val_path": damaged_shards.path} if evaluation else {})
    found = open_data(damaged_shards.model_copy(update=changes), 3)
    batches = list(found.val.evaluation(5, ONE) if evaluation else found.train.training(0, 0, 0, 5, ONE))
    # 4 whole shards, 3 added images, and the torn shards up to the last complete sample
    if evaluation:
        assert (
            sum(len(b.labels) if b.valid is None else int(b.valid.sum()) for b in batches)
            == 4 * 5 + 3 + 2 + 1
        )
    else:
        batches += list(found.train.training(0, 1, 0, 5, ONE)) + list(found.train.training(0, 2, 0, 5, ONE))
        assert {len(b.labels) for b in batches} == {5}
    failures = [failure for b in batches for failure in b.failures]
    assert {name for name, _ in failures} == set(REASONS)
    for name, reason in failures:
        assert reason.startswith(REASONS[name])
    assert sum(0 if b.valid is None else int((~b.valid).sum()) for b in batches) == len(failures)
    for batch in batches:
        assert 0 <= batch.labels.min() <= batch.labels.max() < 3
        assert batch.valid is None or not batch.images[~batch.valid].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shards_go_on_exactly_from_anywhere(damaged_shards, workers):
    """In 45 steps of 3 images each worker reads its shards several times."""
    source = open_data(damaged_shards.model_copy(update={"workers": workers, "train_samples": 135}), 3).train
    whole = list(source.training(4, 1, 0, 3, ONE))
    assert sum(b.valid is not None for b in whole) > 10
    for start in (1, 2, 3, 8, 17, 30, 44) if workers else range(1, 45):
        rest = list(source.training(4, 1, start, 3, ONE))
        assert len(rest) == 45 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
            assert (a.valid is None and b.valid is None) or torch.equal(a.valid, b.valid)
            assert a.failures == b.failures


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lane_without_a_sample_says_one_clear_line(shards, workers):
    for i in range(6):
        path = Path(shards.path.replace("{000..005}", f"00{i}"))
        path.write_bytes(b"" if i % 2 else path.read_bytes()[:700])
    source = open_data(shards.model_copy(update={"workers": workers}), 3).train
    with pytest.raises(
        DataError, match=r"no samples with an image and a class in \[.*tar: expected a whole tar file"
    ) as caught:
        list(source.training(0, 0, 0, 5, ONE))
    assert "\n" not in str(caught.value)
    with tarfile.open(shards.val_path.replace("{000..002}", "003"), "w"):
        pass
    source = open_data(
        shards.model_copy(update={"val_path": shards.val_path.replace("{000..002}", "003")}), 3
    ).val
    with pytest.raises(DataError, match="no samples with an image and a class"):
        source.sample(4)
    assert list(source.evaluation(4, ONE)) == []


def test_a_shard_that_cannot_be_opened_is_named(shards):
    source = open_data(shards, 3).train
    Path(source.urls[2]).unlink()
    failures = {name: reason for b in source.training(0, 0, 0, 5, ONE) for name, reason in b.failures}
    assert list(failures) == ["train-002.tar"]
    assert failures["train-002.tar"].startswith("expected a whole tar file: [Errno 2] No such file")


def test_names_that_are_not_text(shards):
    pack(Path(shards.path.replace("{000..005}", "000")), {"\udcff.jpg": b"", "\udcff.cls": b"0"})
    source = open_data(shards.model_copy(update={"train_samples": 31}), 3).train
    ((name, _),) = (failure for b in source.training(0, 0, 0, 31, ONE) for failure in b.failures)
    assert name == "train-000.tar:\\xff"


def test_torn_shards_count_against_max_corrupt(damaged_shards, tmp_path):
    options = (
        "model.name=coda_s_cifar10",
        "model.out_channels=[4, 3]",
        "data.kind=webdataset",
        f"data.path={damaged_shards.path}",
        f"data.val_path={damaged_shards.val_path}",
        "data.classes=3",
        "data.resize=20",
        "data.size=16",
        "data.workers=0",
        "data.train_samples=40",
        "batch_size=5",
        "epochs=1",
    )
    assert run(tmp_path / "a", *options, "data.max_corrupt=8")["unreadable"] > 5
    with pytest.raises(
        TrainingError, match=r"at most 1 images that cannot be read \(data.max_corrupt\), got"
    ):
        run(tmp_path / "b", *options, "data.max_corrupt=1")


# -- shards of bad will
# ------------------------------------------------------------------------------------------------------------


def entry(name, content=b"", kind=tarfile.REGTYPE, size=None, link="", pax=None):
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname, made.pax_headers = (
        kind,
        len(content) if size is None else size,
        link,
        pax or {},
    )
    return made, content


def shard_of(path, *entries, mode="w", format=tarfile.PAX_FORMAT):
    """A tar file of these headers and contents, whether or not they match."""
    with tarfile.open(path, mode, format=format) as tar:
        for made, content in entries:
            tar.addfile(made, io.BytesIO(content) if content else None)
    return path


def sample(name, label=0, image=None):
    return entry(f"{name}.jpg", picture(90, (20, 20)) if image is None else image), entry(
        f"{name}.cls", b"%d" % label
    )


def read(path, classes=3):
    """The samples of a shard, as (name, label, or why it cannot be read). Asserts that nothing is written."""
    before = sorted(path.parent.rglob("*"))
    found = []
    for item in shards_module._shard(str(path), classes):
        _, _, valid, failures = decode_all([item], Preprocessing(3, 20, 16), None)
        found.append(
            (item.name.removeprefix(f"{path.name}:"), item.label if bool(valid.all()) else failures[0][1])
        )
    assert sorted(path.parent.rglob("*")) == before
    return found


GOOD = sample("good", 2)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (sample("../../up", 1), [("../../up", 1)]),  # the path is only a name
        (sample("/etc/passwd", 1), [("/etc/passwd", 1)]),
        (
            (entry("a.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), entry("a.cls", b"1")),
            [("a", "no image")],
        ),
        (
            (*sample("a", 1), entry("b.jpg", kind=tarfile.LNKTYPE, link="a.jpg"), entry("b.cls", b"1")),
            [("a", 1), ("b", "no image")],
        ),
        ((entry("a.jpg", kind=tarfile.CHRTYPE), entry("a.cls", b"1")), [("a", "no image")]),
        ((entry("a.jpg", kind=tarfile.BLKTYPE), entry("a.cls", kind=tarfile.FIFOTYPE)), []),
        ((entry("a.jpg", kind=tarfile.DIRTYPE), entry("a.cls", b"1")), [("a", "no image")]),
        ((entry("a.jpg", kind=b"Z"), entry("a.cls", b"1")), [("a", "no image")]),  # an unknown type
        ((*sample("a", 1), *sample("a", 0)), [("a", 1), ("a", 0)]),  # two samples with the same name
        # two images and one class
        ((GOOD[0], *GOOD), [("good", "cls: expected a class from 0 to 2, found none"), ("good", 2)]),
        ((GOOD[0], GOOD[1], GOOD[1]), [("good", 2), ("good", "no image")]),
        ((entry("A.JPG", GOOD[0][1]), entry("A.CLS", b"1")), [("A", 1)]),
        (
            (entry("A.jpg", GOOD[0][1]), entry("a.cls", b"1")),
            [("A", "cls: expected a class from 0 to 2, found none"), ("a", "no image")],
        ),
        ((GOOD[0], entry("good.png", b"torn"), GOOD[1]), [("good", 2)]),  # jpg has priority
        ((entry("a.jpg"), entry("a.cls", b"1")), [("a", "not an image")]),  # empty files
        (
            (
                entry(""),
                entry("."),
                entry(".."),
                entry(".jpg", b"x"),
                entry("a/", b"x"),
                entry("noending", b"x"),
            ),
            [],
        ),
        (sample("\udcff\x1b[2J", 1), [("\\xff\x1b[2J", 1)]),
        (sample("n" * 3000 + "/x", 1), [("n" * 3000 + "/x", 1)]),
        (
            (
                entry(
                    "a.jpg",
                    GOOD[0][1],
                    pax={"comment": "\x00" * 99, "GNU.sparse.major": "x", "path": "b.jpg"},
                ),
                entry("b.cls", b"1"),
            ),
            [("b", 1)],
        ),
        (
            (
                entry("inside.tar", b"ustar" * 500),
                entry("inside.tar.jpg", b"ustar" * 500),
                entry("inside.tar.cls", b"0"),
            ),
            [],
        ),
        (
            (entry("a.cls", b"9" * 5000), entry("a.jpg", GOOD[0][1])),
            [("a", f"cls: expected a class from 0 to 2, got {'9' * 20!r}")],
        ),
        # digits of other scripts are digits
        ((entry("a.cls", "\u0661".encode()), entry("a.jpg", GOOD[0][1])), [("a", 1)]),
    ],
    ids=lambda value: value[0][0].name[:20] + value[0][0].type.decode() if isinstance(value, tuple) else "",
)
def test_entries_of_bad_will(tmp_path, entries, expected):
    """Whatever the name and the type of an entry, nothing is written, no link is followed, and the later
    entries are read.
    """
    path = shard_of(tmp_path / "t.tar", *entries, *sample("last", 0))
    found = read(path)
    assert found[-1] == ("last", 0)
    assert [name for name, _ in found[:-1]] == [name for name, _ in expected]
    for (_, got), (_, wanted) in zip(found, expected, strict=False):
        assert got == wanted or str(got).startswith(str(wanted))


@pytest.mark.parametrize(("ending", "most"), [("jpg", 2**28), ("cls", 2**20)])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch, ending, most, mode):
    """This also holds if compression makes them a few bytes. The later entries are read."""
    monkeypatch.setattr(shards_module, "LARGEST", 2**21)
    size = min(most, 2**21) + 1
    other = entry("a.cls", b"1") if ending == "jpg" else GOOD[0]
    path = shard_of(
        tmp_path / "t.tar",
        entry(f"a.{ending}", bytes(size)),
        (other[0], other[1]),
        *sample("last"),
        mode=mode,
    )
    reads = []
    plain = tarfile.ExFileObject.read
    monkeypatch.setattr(
        tarfile.ExFileObject, "read", lambda self, *a: reads.append(plain(self, *a)) or reads[-1]
    )
    found = dict(read(path))
    assert (
        found["a"] == f"{ending}: expected a file of at most {size - 1} bytes without holes, got {size} bytes"
    )
    assert found["last"] == 0
    assert max(map(len, reads)) < size


def test_a_file_that_claims_more_than_there_is(tmp_path):
    """A header claims terabytes. The rest of the shard is lost and reported once, and is not searched block
    by block for hours.
    """
    path = shard_of(tmp_path / "t.tar", *sample("first", 1), *sample("torn", 1))
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    # the last sample may continue after an entry that is not part of a sample
    for name, samples in (("huge.jpg", ["first", "torn"]), ("huge.txt", ["first"])):
        made = tarfile.TarInfo(name)
        made.size = 10**13
        path.write_bytes(whole + made.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        assert read(path) == [
            *((key, 1) for key in samples),
            ("t.tar", "expected a whole tar file: unexpected end of data"),
        ]


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_names_and_attributes_that_are_too_large(tmp_path, kind):
    """tarfile alone would read them into memory completely."""
    import gzip

    made = tarfile.TarInfo("x")
    made.type, made.size = kind, 2**30
    with gzip.open(tmp_path / "t.tar", "wb", 1) as file:
        file.write(made.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2**20))  # the rest need not exist
    ((name, reason),) = read(tmp_path / "t.tar")
    assert name == "t.tar"
    assert (
        reason
        == "expected a whole tar file: expected a name or attributes of at most 1048576 bytes, got 1073741824"
    )


@pytest.mark.parametrize("size", [10**12, 1000])
@pytest.mark.parametrize("version", ["old", "0.1", "1.0"])
def test_files_with_holes(tmp_path, version, size):
    """A sparse file of a few bytes may represent terabytes, which tarfile alone would allocate."""
    if version == "old":
        made = tarfile.TarInfo("a.jpg")
        made.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(made.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"00000000000\0" * 2
        header[483:495] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b"%06o\0 " % sum(bytes(header[:148]) + b" " * 8 + bytes(header[156:512]))
        rest = shard_of(tmp_path / "rest.tar", entry("a.cls", b"1"), *sample("last")).read_bytes()
        path = tmp_path / "t.tar"
        path.write_bytes(bytes(header) + rest)
    else:
        pax = (
            {"GNU.sparse.size": str(size), "GNU.sparse.map": "0,0"}
            if version == "0.1"
            else {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": "a.jpg",
                "GNU.sparse.realsize": str(size),
            }
        )
        content = b"" if version == "0.1" else b"1\n0\n0\n".ljust(512, b"\0")
        path = shard_of(
            tmp_path / "t.tar", entry("a.jpg", content, pax=pax), entry("a.cls", b"1"), *sample("last")
        )
    found = dict(read(path))
    assert found["a"] == f"jpg: expected a file of at most {2**28} bytes without holes, got {size} bytes"
    assert found["last"] == 0


def test_headers_of_headers_of_headers(tmp_path):
    """tarfile reads nested headers recursively. Beyond Python's recursion limit the rest of the shard is lost
    and reported.
    """
    made = tarfile.TarInfo("x")
    made.type, made.size = tarfile.XHDTYPE, 12
    block = made.tobuf(tarfile.USTAR_FORMAT) + b"12 comment=\n".ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(block * 3000)
    ((name, reason),) = read(tmp_path / "t.tar")
    assert name == "t.tar"
    assert reason.startswith("expected a whole tar file: ")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_shards_that_are_no_files(tmp_path, kind):
    path = tmp_path / "t-0.tar"
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: os.symlink(p, p)}[kind](path)
    with pytest.raises(DataError, match="found 0; missing: .*t-0.tar"):
        shards_module.Shards(str(tmp_path / "t-{0..0}.tar"), None, 0, 3)
    ((name, reason),) = read(path)  # which is reported as the shard itself
    assert name == "t-0.tar"
    assert reason.startswith("expected a whole tar file: ")


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..999999999999}.tar",
        "x-{" + "0" * 25 + "..9}.tar",
        "{a,b}" * 25,
        "{a,{b,c}}" * 20,
        "{0..9}" * 7,
        "x{1..1000001}",
    ],
)
def test_patterns_of_more_shards_than_anyone_has(pattern):
    """The pattern is refused before its braces are expanded to a list."""
    with pytest.raises(DataError, match="expected a pattern of at most 1000000 shards"):
        shards_module.Shards(pattern, None, 0, 3)


def test_patterns_are_counted_as_they_expand():
    from braceexpand import braceexpand

    for pattern in ("x-{000..146}.tar", "{a,b}-{0..9}.tar", "x.tar", "{a,b,c}", "{{a,b},c}-{1..3}"):
        assert (
            len(list(braceexpand(pattern)))
            <= shards_module._count(pattern)
            <= 2 * len(list(braceexpand(pattern)))
        )


@pytest.mark.parametrize("scheme", ["pipe", "PIPE", "Pipe"])
def test_no_spelling_runs_commands(tmp_path, scheme):
    with pytest.raises(DataError, match="a recipe must not run commands"):
        shards_module.Shards(f"{scheme}:touch {tmp_path}/ran #://", None, 0, 3)
    assert not list(tmp_path.iterdir())
