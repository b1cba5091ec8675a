"""For tests that train hybrid networks: options of small ones, pictures, and runs that are interrupted."""

import io

import numpy as np
import pytest
from PIL import Image
from support_train import assert_same, checkpoint_at, losses, run

from coda_fast import registry
from coda_fast.hybrid import CAMNet
from coda_fast.train import loop

OPTIONS = "{widths: [4, 6], strides: [1, 2]}"
HYBRID = (
    "model.name=coda_hybrid",
    "model.stem=convolutions",
    "model.stem_weights=fresh",
    "model.at=0",
    f"model.stem_options={OPTIONS}",
    "model.temperature=4",
    "batch_size=32",
)
NONE = tuple(f"model.{key}=null" for key in ("out_channels", "ranks", "kernel_sizes", "strides"))
CNN = (
    f"model.name={next(name for name, model in registry.models().items() if model.network is CAMNet)}",
    "model.stem=convolutions",
    f"model.stem_options={OPTIONS}",
    "model.temperature=16",
    "batch_size=32",
    *NONE,
)


def coloured_digits(folder):
    """Options for digits in colours, 160 to train with and 64 to validate with."""
    from sklearn.datasets import load_digits

    digits, path = load_digits(), folder / "digits.npz"
    grey = (digits.images * 255 / 16).astype(np.uint8)[:224]
    images, labels = np.stack([grey, np.roll(grey, 1, 1), 255 - grey], -1), digits.target[:224]
    parts = {"train": slice(160), "test": slice(160, 224)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    np.savez(path, **arrays, **{f"{name}_labels": labels[part] for name, part in parts.items()})
    return ("data.kind=npz", f"data.path={path}")


def pictures(root, split, count=6, side=(14, 12)):
    """Write noise in two classes."""
    rng = np.random.default_rng(len(split))
    for name in ("ant", "bee"):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(buffer, "PNG")
            (folder / f"{number:03d}.png").write_bytes(buffer.getvalue())


def folder_options(path, **options):
    values = dict(kind="folder", path=path, resize=8, size=8, workers=0) | options
    return (
        *(f"data.{key}={value}" for key, value in values.items()),
        "model.out_channels=[4, 2]",
        "batch_size=4",
    )


class Interrupted(Exception):
    """An exception that a test raises in the middle of a run."""


def interrupted(output, update, *options):
    """Run until before an update, as if the process were killed then."""
    step = loop.Trainer.step

    def dying(self, batch):
        if self.state.updates == update:
            raise Interrupted
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", dying)
        with pytest.raises(Interrupted):
            run(output, *options)


def assert_resumes_exactly(folder, *options):
    """Assert that a run that is interrupted in its second epoch ends as an undisturbed one, bit for bit."""
    options = (*options, "checkpoint.every_steps=3")
    run(folder / "whole", *options)
    interrupted(folder / "broken", 8, *options)
    run(folder / "broken", *options, resume="auto")
    assert_ended_alike(folder / "whole", folder / "broken")


def assert_ended_alike(one, two):
    assert_same(checkpoint_at(one), checkpoint_at(two))
    assert losses(one) == losses(two)
    for row, other in zip(*(checkpoint_at(path)["history"] for path in (one, two)), strict=True):
        assert {k: v for k, v in row.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }
