"""Which channels make a decision, and which pictures excite them: compared with loops and known pictures."""

import itertools
import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import coda_fast
from coda_fast import channels, cli, plot
from coda_fast.channels import Strongest, channel_figure, leading, strongest
from coda_fast.data.digits import digits
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.photographs import example_photographs
from coda_fast.data.sources import Arrays, Folder

SIZE = 32
STEM = dict(stem_options={"widths": [8, 8], "strides": [2, 2]}, at=1)
LONG = "Abyssinian wildcat, Felis libyca, of the Egyptian highlands $x^2$"


def hybrid(image_channels=3, stem="convolutions", **options):
    torch.manual_seed(0)
    options = dict(temperature=10, image_size=SIZE) | (STEM if stem == "convolutions" else {}) | options
    widths = [6, 3], [4, 4], [3, 1], [1, 1]
    return coda_fast.HybridCoDANet(stem, *widths, image_channels=image_channels, **options).eval()


def cam():
    torch.manual_seed(0)
    return coda_fast.CAMNet("convolutions", num_classes=3, temperature=64, image_size=SIZE, **STEM).eval()


def signed(channels=3, **options):
    """A network whose features have both signs."""
    torch.manual_seed(0)
    return hybrid(channels, nn.Conv2d(channels, 4, 5, 2, 2), **options)


def run(*arguments):
    """Run the command line, and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["channels", *map(str, arguments)])
    return stop.value.code or 0


def by_hand(model, images, channel, sign, count):
    """(value, picture, row, column) of the largest values of a channel, one for each picture."""
    found = []
    with torch.no_grad():
        for number, image in enumerate(images):
            values = sign * model.stem(image[None])[0, channel]
            best = max(
                ((float(values[i, j]), number, i, j) for i, j in np.ndindex(*values.shape)),
                key=lambda entry: entry[0],
            )
            found += [best] if best[0] > 0 else []
    return sorted(found, key=lambda entry: -entry[0])[:count]


@pytest.mark.parametrize("make", [hybrid, cam, signed])
def test_strongest_is_what_a_loop_finds(make):
    """Also if batches are incomplete, and with fewer pictures that excite a channel than are asked for."""
    model, images = make(), torch.rand(11, 3, SIZE, SIZE)
    found = strongest(model, iter(images.split(4)), count=5)
    assert found.values.shape == (2, model.stem.channels, 5)
    assert (found.size, found.seen, found.skipped) == ((SIZE, SIZE), 11, {})
    for half, sign in enumerate((1, -1)):
        for channel in range(model.stem.channels):
            expected = by_hand(model, images, channel, sign, 5)
            values, places = found.values[half, channel], found.places[half, channel].tolist()
            assert [[place[0], *place[2:]] for place in places if place[0] >= 0] == [
                list(entry[1:]) for entry in expected
            ]
            assert torch.allclose(values[: len(expected)], torch.tensor([e[0] for e in expected]), rtol=1e-5)
            assert (values[len(expected) :] == 0).all()
            assert places[len(expected) :] == [[-1] * 4] * (5 - len(expected))
    assert found.names == {int(i): str(int(i)) for i in found.places[..., 0].unique() if i >= 0}
    assert bool(found.values[1].any()) == model.signed == (make is signed)


def test_unsigned_features_have_no_negative_values():
    """The network takes negative features as zero, and so their pictures are none that excite it."""
    images = torch.rand(5, 3, SIZE, SIZE)
    whole, part = (strongest(signed(signed=yes), [images], count=3) for yes in (True, False))
    assert whole.values[1].any()
    assert not part.values[1].any()
    assert torch.equal(part.values[0], whole.values[0])
    with pytest.raises(
        ValueError, match=r"of the stem Conv2d with .* got those of the stem Conv2d \(signed\)"
    ):
        whole.check(signed(signed=False))


def test_strongest_of_some_channels_with_classes():
    model, images, labels = signed(), torch.rand(9, 3, SIZE, SIZE), torch.arange(9) % 3
    whole = strongest(model, [(images, labels)], count=4)
    part = strongest(model, [(images[:5], labels[:5]), (images[5:], labels[5:])], channels=[3, 1], count=2)
    assert part.channels.tolist() == [3, 1]
    assert torch.equal(part.places, whole.places[:, [3, 1], :2])
    assert torch.equal(part.places[..., 1], part.places[..., 0] % 3)


def test_equal_pictures_come_in_the_order_of_the_set():
    images = torch.rand(1, 3, SIZE, SIZE).expand(7, -1, -1, -1)
    for size in (1, 3, 7):
        found = strongest(signed(), images.split(size), count=3)
        assert (found.places[..., 0] == torch.arange(3)).all()


def test_strongest_leaves_the_network_as_it_was():
    model = hybrid(frozen=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strongest(model, [torch.rand(4, 3, SIZE, SIZE)])
    assert model.training
    assert model.stem.network.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_strongest_of_files(tmp_path):
    """Unreadable files do not shift the numbers of the others."""
    names = [f"{i}.png" for i in range(6)]
    pixels = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    for name, picture in zip(names, pixels, strict=True):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"nothing")
    model = hybrid()
    source = Folder([(str(tmp_path / name), i) for i, name in enumerate(names)], model.transform)
    labels = []
    found = strongest(
        model, source, batch_size=4, progress=lambda steps, label: labels.append(label) or steps
    )
    assert labels == ["reading"]
    assert list(found.skipped) == [str(tmp_path / "1.png")]
    assert found.seen == 5
    assert torch.equal(found.places[..., 1], found.places[..., 0])  # the class of a picture is its number
    assert found.names[0] == str(tmp_path / "0.png")
    kept = [0, *range(2, 6)]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    again = strongest(model, Arrays(images[kept], torch.tensor(kept)))
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.places[..., 1:], found.places[..., 1:])
    figure = channel_figure(model, model.explain(images[:1] / 255), found, source)
    assert _texts(figure)
    (tmp_path / found.names[int(found.places[0, 0, 0, 0])]).unlink()
    with pytest.raises(ImageError, match="could be read before"):
        channel_figure(model, model.explain(images[:1] / 255), found, source, count=8)
    for name in names:
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no readable image among 6: .*0\.png"):
        strongest(model, source)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(channels=[8]), ValueError, "channels: expected classes from 0 to 7, got 8 to 8"),
        (dict(channels=[0.5]), TypeError, "channels: expected integers"),
        (dict(count=0), ValueError, "count: expected a positive int, got 0"),
        (dict(batch_size=0), ValueError, "batch_size: expected a positive int, got 0"),
        (dict(pictures=[torch.zeros(1, 1, 8, 8)]), ValueError, r"images: expected \[N, 3, H, W\]"),
        (dict(pictures=[torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)]), DataError, "images of one size"),
        (dict(pictures=[torch.full((1, 3, 8, 8), np.nan)]), ValueError, "expected finite features"),
        (dict(pictures=[]), DataError, "no readable image among 0"),
        (dict(model=nn.Conv2d(3, 3, 1)), TypeError, "expected a coda_fast.Network, got a Conv2d"),
        (
            dict(model=coda_fast.create_model("coda_xs_digits")),
            ValueError,
            "model: expected a hybrid network with a stem, got a CoDANet",
        ),
    ],
    ids=str,
)
def test_strongest_refuses(change, error, message):
    arguments = dict(model=hybrid(), pictures=[torch.rand(2, 3, 8, 8)]) | change
    with pytest.raises(error, match=message):
        strongest(**arguments)


def test_save_and_load(tmp_path):
    model, path = signed(), tmp_path / "found.safetensors"
    source = Arrays(torch.randint(256, (9, 3, SIZE, SIZE), dtype=torch.uint8), torch.arange(9))
    found = strongest(model, source, count=3)
    found.save(path)
    again = Strongest.load(path, model, source)
    for name in ("channels", "values", "places"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    for name in ("names", "size", "seen", "stem", "data", "skipped"):
        assert getattr(again, name) == getattr(found, name)
    others = signed(), signed(mean=0.5)
    with torch.no_grad():
        others[0].stem.network.weight[0, 0, 0, 0] += 1e-3
    for other in (*others, hybrid()):  # other weights, another normalisation, another network
        with pytest.raises(ValueError, match=f"^{path}: expected strongest pictures of the stem ") as refused:
            Strongest.load(path, other)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=f"^{path}: expected strongest pictures of the set "):
        Strongest.load(path, model, Arrays(source.images[:8], source.labels[:8]))
    with pytest.raises(ValueError, match="got a CoDANet"):
        Strongest.load(path, coda_fast.create_model("coda_xs_digits"))


def test_load_refuses_other_and_damaged_files(tmp_path):
    model, path = signed(), tmp_path / "found.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Strongest.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Strongest.load(path)
    model.explain(torch.rand(1, 3, SIZE, SIZE)).save(path)
    with pytest.raises(ValueError, match="expected a file of Strongest.save, got another: format"):
        Strongest.load(path)
    found = strongest(model, [torch.rand(4, 3, SIZE, SIZE)], count=2)
    tensors = dict(channels=found.channels, values=found.values, places=found.places)
    facts = dict(names=found.names, size=found.size, seen=4, stem=found.stem, data=None, skipped={})

    def write(**changes):
        stored = json.dumps(facts | {name: value for name, value in changes.items() if name in facts})
        chosen = tensors | {name: value for name, value in changes.items() if name in tensors}
        save_file(
            {name: tensor.clone() for name, tensor in chosen.items()},
            path,
            {"format": "coda_fast.Strongest", "facts": stored},
        )

    write()
    Strongest.load(path, model)
    for changes in (
        dict(places=found.places + 9),
        dict(places=found.places.float()),
        dict(places=found.places[..., :3]),
        dict(values=found.values[:, :1]),
        dict(channels=found.channels[:1]),
        dict(names={}),
        dict(size=[SIZE]),
        dict(size=[SIZE, -1]),
        dict(seen="x"),
        dict(seen=1),
    ):
        write(**changes)
        with pytest.raises(ValueError, match="expected a file of Strongest.save, got another"):
            Strongest.load(path, model)


@pytest.mark.parametrize("make", [hybrid, cam, signed])
def test_leading_adds_up(make):
    """Exactly, and also in the numbers that are printed."""
    model, images = make(), torch.rand(2, 3, SIZE, SIZE)
    e = model.explain(images, [[0, 1], [2, 0]])
    for image, k, count in itertools.product(range(2), range(2), (1, 3, 99)):
        found = leading(e, image, k, count)
        each = e.channel_contributions[image, k].double()
        assert [term.channel for term in found.terms] == each.abs().argsort(descending=True)[:count].tolist()
        for term in found.terms:
            assert term.contribution == pytest.approx(float(each[term.channel]), abs=1e-6)
            assert term.share == pytest.approx(abs(term.contribution) / float(each.abs().sum()), abs=1e-6)
            halves = e.contributions[image, k].sum((-2, -1)).chunk(2) if e.signed else (each, 0 * each)
            assert term.sign == (1 if abs(halves[0][term.channel]) >= abs(halves[1][term.channel]) else -1)
        logit = float(e.logits[image, e.target[image, k]])
        assert found.logit == logit
        assert found.bias + sum(t.contribution for t in found.terms) + found.rest == pytest.approx(
            logit, abs=1e-12
        )
        assert found.others == max(0, model.stem.channels - count)
        assert found.others or abs(found.rest) < 1e-5
        *terms, total = found.amounts()
        digits = len(total.partition(".")[2])
        assert round(sum(map(float, terms)) - float(total), digits) == 0
        assert float(total) == pytest.approx(logit, abs=0.51 * 10**-digits)
        assert float(terms[1]) == pytest.approx(found.terms[0].contribution, rel=0.1)


def test_leading_refuses():
    model = hybrid()
    e = model.explain(torch.rand(1, 3, SIZE, SIZE), layer=1)
    with pytest.raises(ValueError, match=r"features of a network with a stem, got that of layer 1"):
        leading(e)
    without = coda_fast.create_model("coda_xs_digits").explain(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="got that of a network without one"):
        leading(without)
    with pytest.raises(IndexError):
        leading(model.explain(torch.rand(1, 3, SIZE, SIZE)), image=1)


def _texts(figure):
    """The texts that are drawn, and their boxes in pixels."""
    figure.draw_without_rendering()
    hidden = set()  # labels of ticks beyond the ends of a scale, which are not drawn
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        beyond = [tick for tick in axes.yaxis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden |= {label for tick in beyond for label in (tick.label1, tick.label2)}
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text not in hidden]
    shown = [text for text in shown if text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def _crops(figure):
    """The arrays of all pictures, by rows from the top; those of a row from the left."""
    found = [(a.get_position(), a.images[-1].get_array()) for a in figure.axes if len(a.images)]
    return [array for place, array in sorted(found, key=lambda entry: (-round(entry[0].y1, 3), entry[0].x0))]


def test_figure_shows_what_it_says():
    """The maps, crops and numbers of a network with small receptive fields."""
    model = signed(class_names=["a", "b", "c"])
    images = torch.rand(6, 3, SIZE, SIZE)
    found, e = strongest(model, [(images, torch.arange(6) % 3)], count=4), model.explain(images[:2])
    figure = channel_figure(model, e, found, images, image=1, count=2, examples=3)
    sums, texts = leading(e, 1, count=2), [text for text, _ in _texts(figure)]
    picture, whole, *rows = _crops(figure)
    assert np.allclose(picture, images[1].permute(1, 2, 0))
    assert np.allclose(whole, e.pixel_map[1, 0])
    for place, term in enumerate(sums.terms):
        first, second = e.contributions[1, 0].chunk(2)
        alone, here, *crops = rows[5 * place : 5 * place + 5]
        own = (first + second)[term.channel]
        assert np.allclose(alone, e.placement.interpolate(own, (SIZE, SIZE)))
        half = int(term.sign < 0)
        acting = (first, second)[half][term.channel] * (1 if term.contribution > 0 else -1)
        where = divmod(int(acting.argmax()), acting.shape[1])
        assert np.allclose(here, _box(images[1], e.placement, where))
        with torch.no_grad():
            assert (
                f"{float(model.stem(images[1:2])[0, term.channel][where]):#.3g}\n" in "\n".join(texts) + "\n"
            )
        for s, crop in enumerate(crops):
            index, label, *cell = found.places[half, term.channel, s].tolist()
            assert np.allclose(crop, _box(images[index], e.placement, cell))
            assert f"{term.sign * float(found.values[half, term.channel, s]):#.3g}" in texts
            assert "abc"[label] in texts
        amount = sums.amounts()[1 + place]
        words = f"channel {term.channel} ({'+-'[half]})\n{amount} logits\n{term.share:.1%} of all"
        assert words in texts
    first, second = (f"channel {term.channel}" for term in sums.terms)
    names = ["bias", first, second, "2 other channels", "logit"]
    pairs = [text for pair in zip(names, sums.amounts(), strict=True) for text in pair]
    start = texts.index("bias")
    assert texts[start : start + len(pairs)] == pairs
    told = " ".join(texts)
    assert "Exact: the contributions of all channels and the bias add up to the logit" in told
    assert "pictures only show what excites it" in told
    assert "receptive fields of 5 x 5 pixels" in told
    assert f"pictures that excite it most, of {len(images)}" in texts


def _box(image, placement, cell):
    top, left, bottom, right = placement.box(*cell, tuple(image.shape[1:]))
    return image[:, top:bottom, left:right].permute(1, 2, 0)


def test_crops_of_large_receptive_fields_are_a_few_strides_wide():
    """They lie around the centre, but in the picture; the frame in the map is that of the crop."""
    model, images = hybrid(), torch.rand(3, 3, SIZE, SIZE)
    found, e = strongest(model, [images]), model.explain(images[:1])
    assert e.placement.field == (19, 19)
    found.places[0, :, :2, 2:] = torch.tensor([[0, 7], [7, 0]])  # cells in corners
    figure = channel_figure(model, e, found, images, count=1, examples=2)
    _, _, _, _, first, second = _crops(figure)
    term = leading(e, count=1).terms[0]
    for s, crop in enumerate((first, second)):
        index, _, *cell = found.places[0, term.channel, s].tolist()
        rows, columns = (min(max(round(4 * i - 7.5), 0), SIZE - 16) for i in cell)
        part = images[index, :, rows : rows + 16, columns : columns + 16]
        assert np.allclose(crop, part.permute(1, 2, 0))
    told = " ".join(text for text, _ in _texts(figure))
    assert "16 x 16 pixels around the centres of the receptive fields, which are 19 x 19" in told
    (frame,) = (line for axes in figure.axes[3:4] for line in axes.lines)
    assert max(frame.get_xdata()) - min(frame.get_xdata()) == 16


@pytest.mark.parametrize(
    ("size", "image_channels", "count", "examples"),
    [
        ((32, 32), 3, 6, 5),
        ((24, 120), 1, 4, 3),
        ((24, 120), 3, 6, 1),
        ((120, 24), 1, 1, 1),
        ((120, 24), 3, 2, 5),
    ],
    ids=str,
)
def test_no_text_overlaps_another(size, image_channels, count, examples):
    model = hybrid(image_channels, class_names=[LONG, "W" * 99, "short"])
    images = torch.rand(4, image_channels, *size)
    found, e = strongest(model, [(images, torch.tensor([0, 1, 2, -1]))]), model.explain(images[:1])
    figure = channel_figure(model, e, found, images, count=count, examples=examples)
    texts = _texts(figure)
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    page = figure.bbox
    for text, box in texts:
        assert page.padded(1).containsx(box.x0), text
        assert page.padded(1).containsx(box.x1), text
        assert page.padded(1).containsy(box.y0), text
        assert page.padded(1).containsy(box.y1), text
    places = [axes.get_window_extent() for axes in figure.axes]
    for one, other in itertools.combinations(places, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    for text, box in texts:
        inside = [place for place in places if box.padded(-1).overlaps(place.padded(-1))]
        assert not inside, text


def test_figure_over_the_original_picture():
    """The maps lie in the place of the crop that the network saw."""
    model = cam()
    path = example_photographs()[0].path
    view = plot.View.of(Image.open(path), model.transform)
    image = model.transform(path)[None]
    e = model.explain(image)
    figure = channel_figure(model, e, strongest(model, [image]), image, count=1, view=view)
    left, top, right, bottom = view.box
    for axes in (figure.axes[1], figure.axes[3]):
        assert axes.images[-1].get_extent() == [left, right, bottom, top]
    frame = figure.axes[3].lines[-1]
    assert left <= min(frame.get_xdata())
    assert max(frame.get_xdata()) <= right + 1e-6


def test_figure_refuses():
    model, images = hybrid(), torch.rand(3, 3, SIZE, SIZE)
    found, e = strongest(model, [images]), model.explain(images[:1])
    with pytest.raises(ValueError, match="strongest: expected strongest pictures of the stem"):
        channel_figure(signed(), e, found, images)
    with pytest.raises(ValueError, match="explanation: expected one by convolutions, stage 1"):
        channel_figure(model, signed().explain(images[:1]), found, images)
    with pytest.raises(ValueError, match="of channels that strongest has"):
        channel_figure(model, e, strongest(model, [images], channels=[0]), images)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(hybrid(image_size=8, image_channels=1, class_names=[f"digit {i}" for i in range(3)]), path)
    return path


@pytest.fixture
def data(tmp_path):
    """A folder of digits, and one of them that is not in it."""
    (images, labels), kept = (digits()[1].images, digits()[1].labels), 0
    for image, label in zip(images[:40], labels[:40].tolist(), strict=True):
        if label < 3:
            folder = tmp_path / "set" / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{kept}.png")
            kept += 1
    Image.fromarray(images[41, 0].numpy()).save(tmp_path / "own.png")
    return tmp_path / "set"


def test_command(checkpoint, data, tmp_path, capsys, monkeypatch):
    output, image = tmp_path / "new" / "folder", tmp_path / "own.png"
    options = "--checkpoint", checkpoint, "--data", data, "--output", output
    assert run(image, *options, "--count", 2) == 0
    assert sorted(path.name for path in output.iterdir()) == ["own_channels.png", "strongest.safetensors"]
    Image.open(output / "own_channels.png").verify()
    (line,) = capsys.readouterr().out.splitlines()
    model = coda_fast.load(checkpoint).eval()
    found = leading(model.explain(model.transform(image)[None]), count=2)
    bias, *terms, rest, logit = found.amounts()
    parts = ", ".join(f"channel {term.channel} {a}" for term, a in zip(found.terms, terms, strict=True))
    assert "own.png: digit " in line
    assert f": bias {bias}, {parts}, 6 others {rest}: logit {logit} -> {output}" in line

    def again(*args, **kwargs):
        raise AssertionError("the pass must not be repeated")

    monkeypatch.setattr(channels, "strongest", again)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "other.png").write_bytes(image.read_bytes())
    assert run(tmp_path / "more", *options, "--target", "digit 2", "--count", 1) == 0
    assert "digit 2: bias" in capsys.readouterr().out
    assert (output / "deep" / "other_channels.png").exists()


def test_command_refuses_what_was_found_for_another(checkpoint, data, tmp_path, capsys):
    options = tmp_path / "own.png", "--checkpoint", checkpoint, "--output", tmp_path / "out"
    assert run(*options, "--data", data) == 0
    (tmp_path / "out" / "own_channels.png").unlink()
    capsys.readouterr()
    assert run(*options, "--data", data, "--limit", 3) == 2
    _one_line(capsys, "strongest.safetensors: expected strongest pictures of the set ", "another --output")
    names = [f"digit {i}" for i in range(3)]
    other = hybrid(image_size=8, image_channels=1, class_names=names, mean=0.5)
    coda_fast.save(other, checkpoint)
    assert run(*options, "--data", data) == 2
    _one_line(capsys, "strongest.safetensors: expected strongest pictures of the stem ", "another --output")
    (tmp_path / "out" / "strongest.safetensors").write_bytes(b"nothing")
    assert run(*options, "--data", data) == 2
    _one_line(capsys, "strongest.safetensors: not a safetensors file")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["strongest.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "coda_xs_digits"], "expected a hybrid network with a stem, got a CoDANet"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors: no such checkpoint"),
        (["--data", "nowhere"], "data: expected 'digits', an .npz file or a folder"),
        (["--data", "digits"], "data: the model has classes 0 to 2"),
        (["--target", "cat"], "--target: expected a class (digit 0, digit 1, digit 2)"),
        (["--count", "0"], "--count"),
        (["--limit", "0"], "--limit"),
        (["--device", "warp"], "--device: 'warp' cannot be used here"),
        (["missing.png"], "missing.png: no such file"),
        (["net.safetensors"], "net.safetensors: not an image"),
        (["--output", "set"], "output: expected a folder outside of"),
        (["--output", "own.png"], "output: expected a folder at"),
    ],
    ids=str,
)
def test_command_refuses(checkpoint, data, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    defaults = "--checkpoint", checkpoint, "--data", data, "--output", tmp_path / "out"
    assert run("own.png", *defaults, *options) == 2
    _one_line(capsys, message)
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"


def test_command_needs_a_set(checkpoint, capsys):
    assert run("own.png", "--checkpoint", checkpoint) == 2
    _one_line(capsys, "--data")


def _one_line(capsys, *messages):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(message in lines[0] for message in messages), lines
