"""Backends and precisions give the same loss curves."""

import pytest
import torch
from support_train import checkpoint_at, losses, run

# In float32 (unit rounding 6e-8) the curves of two backends may differ by FLOOR * GROWTH ** u after u updates
# of Adam, relatively. Measured: 1e-7, one unit in the last place of the loss, over 84 updates.
FLOOR, GROWTH = 1e-6, 1.03
SMALL = ("log.every=1", "batch_size=16", "epochs=1")


def curve(output, *overrides):
    run(output, *SMALL, *overrides)
    return losses(output)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return curve(tmp_path_factory.mktemp("reference"), "model.backend=reference")


def assert_alike(found, expected):
    assert found
    for update, loss in found.items():
        assert loss == pytest.approx(expected[update], rel=FLOOR * GROWTH**update), update


def test_factored_learns_as_the_definition(reference, tmp_path):
    assert_alike(curve(tmp_path, "model.backend=factored"), reference)


@pytest.mark.slow
def test_triton_learns_as_the_definition(reference, tmp_path, monkeypatch):
    """Only a few steps, because on a CPU the kernels run in Triton's interpreter."""
    pytest.importorskip("triton")
    from coda_fast.train.loop import Trainer

    class Enough(Exception):
        pass

    step = Trainer.step

    def few(self, batch):
        if self.state.updates == 4:
            raise Enough
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", few)
    with pytest.raises(Enough):
        run(tmp_path, *SMALL, "model.backend=triton")
    found = losses(tmp_path)
    assert len(found) == 4
    assert_alike(found, reference)


def test_float64_keeps_backends_together_to_its_own_rounding(tmp_path):
    ends = []
    for backend in ("reference", "factored"):
        run(tmp_path / backend, f"model.backend={backend}", "precision=float64")
        ends.append(checkpoint_at(tmp_path / backend))
    # there are two decoders
    assert any(not torch.equal(tensor, ends[1]["model"][name]) for name, tensor in ends[0]["model"].items())
    for name, tensor in ends[0]["model"].items():
        torch.testing.assert_close(tensor, ends[1]["model"][name], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_bfloat16_trains_to_the_same_accuracy(tmp_path):
    """The accuracies differ by at most 0.5 %, two of the 450 test images. Both are well above that of a
    linear classifier (95 %).
    """
    options = (
        "model.out_channels=[8, 16, 10]",
        "model.ranks=[16, 32, 32]",
        "model.kernel_sizes=[3, 3, 3]",
        "model.strides=[1, 2, 1]",
    )
    found = [
        run(tmp_path / p, *options, "epochs=12", f"precision={p}")["val_accuracy"]
        for p in ("float32", "bfloat16")
    ]
    assert min(found) > 0.96
    assert abs(found[0] - found[1]) <= 0.005
