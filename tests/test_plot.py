"""Figures whose pixels are known."""

import dataclasses
import importlib.util
import io
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from coda_fast import CoDANet, create_model, fonts, plot
from coda_fast.data import Preprocessing
from coda_fast.train import load_recipe
from coda_fast.train.summary import curve


def test_symmetric_scale():
    assert plot.symmetric_scale(torch.zeros(3, 4)) == 1.0
    assert plot.symmetric_scale(torch.tensor([-2.0, 1.0, 2.0])) == 2.0
    spiky = torch.ones(10_000)
    spiky[0] = -1e6
    assert plot.symmetric_scale(spiky) == 1.0
    lonely = torch.zeros(10_000)
    lonely[0] = -3.0
    assert plot.symmetric_scale(lonely) == 3.0
    assert plot.symmetric_scale(torch.zeros(0)) == 1.0


def test_weight_rgba():
    """Weight on red gives red, weight on 1 - x gives black, no weight gives grey. Alpha follows the positive
    contribution.
    """
    weight = torch.zeros(6, 2, 2)
    weight[0, 0, 0] = 2.0  # red
    weight[4, 0, 0] = weight[5, 0, 0] = 1.0  # no green, no blue
    weight[3:, 0, 1] = 1.0  # dark
    weight[:3, 1, 0] = -5.0  # negative weights have no colour
    contribution = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
    picture = plot.weight_rgba(weight, contribution)
    assert picture.shape == (2, 2, 4)
    assert np.allclose(picture[0, 0], [1, 0, 0, 1], atol=0.02)
    assert np.allclose(picture[0, 1, :3], 0)
    assert 0.45 < picture[0, 1, 3] < 0.55
    assert np.allclose(picture[1, 0], [0.5, 0.5, 0.5, 0])
    assert picture[1, 1, 3] == 0
    grey = plot.weight_rgba(torch.rand(2, 3, 4), torch.rand(3, 4))
    assert grey.shape == (3, 4, 4)
    assert np.allclose(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize(
    ("weight", "contribution"), [((16, 4, 4), (4, 4)), ((6, 4, 4), (3, 4)), ((1, 6, 4, 4), (4, 4))]
)
def test_weight_rgba_refuses(weight, contribution):
    with pytest.raises(ValueError, match="expected"):
        plot.weight_rgba(torch.zeros(weight), torch.zeros(contribution))


def test_map_colours(tmp_path):
    """Positive is red, negative blue, zero white, and colours saturate at the scale."""
    figure = plot.new_figure(2, 2)
    axes = figure.subplots()
    artist = plot.show_map(axes, torch.tensor([[1.0, -1.0], [0.0, 9.0]]), 1.0)
    pixels = artist.to_rgba(artist.get_array())
    assert np.allclose(pixels[0, 0], [1, 0, 0, 1])
    assert np.allclose(pixels[0, 1], [0, 0, 1, 1])
    assert np.allclose(pixels[1, 0], [1, 1, 1, 1], atol=0.01)
    assert np.allclose(pixels[1, 1], [1, 0, 0, 1])


def test_explanation_figure(tmp_path):
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    explanation = model.explain(images, [[0, 1], [2, 3]])
    figure = plot.explanation_figure(images, explanation, model.logit_bias, list("abcdefghij"))
    texts = [axes.get_title() for axes in figure.axes]
    assert texts[0] == "image"
    assert texts[1].startswith("a: p = 0.")
    assert texts[6].startswith("d: p = 0.")
    proof = figure.axes[1].get_xlabel()
    logit = float(explanation.logits[0, 0])
    assert f"logit {logit:+.2f}" in proof
    assert f"bias {model.logit_bias:+.2f}" in proof
    scales = {
        axes.images[0].get_clim()
        for axes in figure.axes
        if axes.images and axes.images[0].get_cmap().name == "bwr"
    }
    assert len(scales) == 1, "all maps share one scale"
    low, high = scales.pop()
    assert low == -high
    path = tmp_path / "figure.png"
    plot.save_figure(figure, path)
    assert Image.open(path).size[0] > 600
    plot.save_figure(figure, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()[:1000]


CROPPED = Preprocessing(3, 20, 10)  # the middle 20 x 20 pixels of a picture of 60 x 40


def test_view():
    """The picture, its crop, and a map at the position of the crop, checked by colours that identify
    positions.
    """
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = (200, 100, 0)
    view = plot.View.of(Image.fromarray(pixels), CROPPED)
    assert view.box == (20, 10, 40, 30)
    assert view.cropped
    colours = np.zeros((10, 10, 3), np.uint8)
    colours[:5, :5], colours[:5, 5:], colours[5:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    drawn, shown = view.with_map(colours, 80), view.with_crop(colours, 80)
    # a pixel of the map covers 4 x 4 pixels of the page, and one of the picture 2 x 2
    assert drawn.shape == shown.shape == (80, 120, 3)
    assert drawn[22, 42].tolist() == [255, 0, 0]
    assert drawn[22, 78].tolist() == [0, 255, 0]
    assert drawn[58, 60].tolist() == [0, 0, 255]
    assert drawn[10, 10].tolist() == shown[10, 10].tolist() == [150] * 3
    assert shown[40, 60].tolist() == [200, 100, 0]
    whole = plot.View.of(Image.fromarray(pixels), Preprocessing(3, 20))
    assert not whole.cropped
    assert whole.with_map(colours, 80) is colours


def test_view_of_what_is_not_cropped():
    """The sides are quotients, whose last digit may be rounded."""
    for side in range(1, 300):
        assert not plot.View.of(Image.new("L", (side, side)), Preprocessing(1, 28, 28)).cropped
    assert not plot.View.of(Image.new("L", (1151, 1151)), Preprocessing(1, 300)).cropped
    assert plot.View.of(Image.new("L", (29, 28)), Preprocessing(1, 28, 28)).cropped


def test_view_of_a_large_picture_and_of_a_strip():
    view = plot.View.of(Image.new("L", (3000, 2000)), Preprocessing(1, 64, 48), most=300)
    assert view.picture.shape == (200, 300, 3)
    assert view.box == pytest.approx([x / 10 for x in Preprocessing(1, 64, 48).box(3000, 2000)])
    strip = plot.View.of(Image.new("RGB", (5000, 10)), CROPPED)
    assert strip.picture.shape == (10, 40, 3)
    assert strip.box == pytest.approx((17.5, 2.5, 22.5, 7.5))


def test_maps_lie_where_they_belong():
    """In a figure, the axes show the whole picture, and the map has the extent of the crop."""
    net = CoDANet([2], [1], [1], [1], temperature=1)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    images = CROPPED(picture)[None]
    explanation = net.explain(images, torch.tensor([[0, 1]]))
    figure = plot.explanation_figure(
        images, explanation, net.logit_bias, views=[plot.View.of(picture, CROPPED)]
    )
    shown = [axes for axes in figure.axes if axes.images][:4]
    assert [axes.get_xlim() + axes.get_ylim() for axes in shown] == [(0, 60, 40, 0)] * 4
    assert [axes.images[-1].get_extent() for axes in shown] == [[20, 40, 30, 10]] * 4
    assert np.array_equal(shown[1].images[-1].get_array(), explanation.contribution_map[0, 0].numpy())
    assert len(figure.axes) == 5


def test_explanation_figure_names_the_true_class():
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    explanation = model.explain(images, [[0], [1]])
    figure = plot.explanation_figure(images, explanation, 0.0, list("abcdefghij"), [9, 1])
    assert [axes.get_title() for axes in figure.axes][:6:3] == ["image: j", "image: b"]
    figure = plot.explanation_figure(
        images, explanation, 0.0, ["a$x^$", "black-footed ferret, Mustela", *"cdefghij"], [0, 1]
    )
    assert [axes.get_title() for axes in figure.axes][:6:3] == [
        "image: a$x^$",
        "image: black-footed ferret\u2026",
    ]
    plot.render(figure)  # must not be parsed as a formula
    with pytest.raises(ValueError, match="labels: expected 2, one for each image, got 3"):
        plot.explanation_figure(images, explanation, 0.0, None, [1, 2, 3])


def test_explanation_figure_names_the_network():
    """Below each image, with a word about one that fits no class."""
    images, model = torch.rand(2, 1, 8, 8), create_model("coda_xs_digits")
    explanation = model.explain(images, [[0], [1]])
    logits = torch.full_like(explanation.logits, -1.0)
    logits[1, 3] = 0.5
    explanation = dataclasses.replace(explanation, logits=logits)
    figure = plot.explanation_figure(images, explanation, model.logit_bias, networks=["$a\n$", "n" * 60])
    first = [axes.get_xlabel() for axes in figure.axes if axes.get_title() == "image"]
    assert first == ["fits none of the 10 classes\nexplained by $a $", f"explained by {'n' * 27}\u2026"]
    plot.render(figure)  # must not be parsed as a formula
    assert plot.explained_by(logits[0], None) == "fits none of the 10 classes"


def test_explanation_figure_refuses_strangers():
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    for explanation in (model.explain(images[:1]), model.explain(torch.rand(2, 1, 9, 8))):
        with pytest.raises(ValueError, match="explanation: expected maps of these images"):
            plot.explanation_figure(images, explanation, model.logit_bias)


def test_explanation_of_a_layer():
    """The maps of the input of a layer, without a weight panel, which needs an image."""
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    figure = plot.explanation_figure(images, model.explain(images, layer=2), model.logit_bias)
    assert [len(axes.images) for axes in figure.axes[:4]] == [1] * 4
    assert figure.axes[1].images[0].get_array().shape == (4, 4)
    plot.render(figure)


def test_explanation_of_two_channels():
    """There is no weight panel, because two channels are no colour."""
    model = CoDANet(
        [4, 3], ranks=[2, 2], kernel_sizes=[3, 1], strides=[1, 1], temperature=1, image_channels=2
    )
    figure = model.explain(torch.rand(1, 2, 8, 8), [[0, 1]]).plot()
    assert len([axes for axes in figure.axes if axes.images]) == 3
    plot.render(figure, dpi=50)


@pytest.fixture
def fresh(monkeypatch):
    """No character and no package with fonts has been looked up yet. Fonts that a test adds are removed with
    it.
    """
    monkeypatch.setattr(fonts, "_LOST", set())
    monkeypatch.setattr(fonts, "_FONTS", {})
    monkeypatch.setattr(fonts, "_PACKAGES", ())
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))


CAT = "\U000f1234"  # from a private area, which only the font of this test has


def _font(path, character=CAT, family="Cats"):
    """Write a font file with one character, a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 700)), pen.lineTo((700, 700)), pen.lineTo((700, 0)), pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord(character): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (800, 0), "cat": (800, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2(), font.setupPost()
    font.save(path)
    return str(path)


def _ink(text):
    """The sum of black in a rendered title."""
    figure = plot.new_figure(1, 1)
    plot.show_image(figure.subplots(), torch.ones(1, 4, 4), text)
    picture = np.asarray(Image.open(io.BytesIO(plot.render(figure, dpi=80))).convert("L"))[:20]
    return int((picture < 64).sum())


def test_fonts_of_packages(fresh, monkeypatch, tmp_path):
    """The font of an installed package is found without importing it, and draws characters that no other font
    has: without a warning, and as a distinct picture.
    """
    (tmp_path / "cat_fonts" / "deep").mkdir(parents=True)
    (tmp_path / "cat_fonts" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "cat_fonts" / "damaged.ttf").write_bytes(b"no font")
    file = _font(tmp_path / "cat_fonts" / "deep" / "cats.ttf")
    monkeypatch.setattr(fonts, "_PACKAGES", ("no_such_package", "cat_fonts"))
    monkeypatch.syspath_prepend(tmp_path)
    default = fonts._default_font()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, families = fonts.drawable(f"a {CAT}b")
        assert (text, families[-1], len(families)) == (f"a {CAT}b", "Cats", 2)
        assert fonts.pieces(f"a {CAT}b") == [("a ", default), (CAT, file), ("b", default)]
        assert _ink(CAT) > 1.5 * _ink("a") > 0
        assert fonts.drawable("\u00dcn\u00efc\u00f6d\u00e9")[1] == families[:1]


def test_fonts_that_came_after_matplotlib_made_its_list(fresh, monkeypatch, tmp_path):
    """A system font installed after the warning is found although matplotlib's cache does not list it."""
    file = _font(tmp_path / "cats.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "missing.ttf"), file])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.pieces(CAT) == [(CAT, file)]


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib_fontja") is None, reason="needs the package with a Japanese font"
)
def test_names_in_scripts_that_the_default_font_lacks(fresh, monkeypatch):
    """They are drawn by a font that has them: without a warning, and with different pictures for different
    names instead of boxes.
    """
    monkeypatch.setattr(fonts, "_PACKAGES", ("matplotlib_fontja",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.drawable("\u732b \u3042 cat")[0] == "\u732b \u3042 cat"
        pictures = []
        for name in ("\u732b\u732b", "\u72ac\u72ac"):  # cat, dog
            model = create_model("coda_xs_digits", class_names=[name] * 10)
            pictures.append(plot.render(model.explain(torch.zeros(1, 1, 8, 8), 0).plot(), dpi=60))
    assert pictures[0] != pictures[1]


def test_characters_that_no_font_has(fresh, monkeypatch):
    """Each is drawn as an empty box, with one warning for a figure, and none the second time."""
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    names = [f"{chr(0xF1000 + i)}{chr(0xF2000 + i)} b" for i in range(10)]
    model = create_model("coda_xs_digits", class_names=names)
    e = model.explain(torch.rand(1, 1, 8, 8), [list(range(10))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = e.plot()
        plot.render(figure, dpi=50)
    (warning,) = caught
    assert str(warning.message).startswith(
        "figures: no installed font has \U000f1000 (U+F1000) \U000f1001 (U+F1001) "
    )
    assert " ..., drawn as \u25a1; install one, such as " in str(warning.message)
    assert [axes.get_title().rpartition(":")[0] for axes in figure.axes[1:11]] == ["\u25a1\u25a1 b"] * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.render(e.plot(), dpi=50)


def test_names_of_bad_will(fresh):
    """Formulas, control characters and line breaks are drawn as text or visibly replaced. Characters that
    reverse the direction of text are left out.
    """
    assert fonts.drawable("a\nb\tc\x00\ud800")[0] == "a b c\ufffd\ufffd"
    assert (
        fonts.drawable("\u202ea\u200eb\ufeff\u200dc\ufe0f")[0].replace("\u200d", "").replace("\ufe0f", "")
        == "abc"
    )
    names = ["$", "$x^2$", "a\nb", "\x00", "\\frac{", "x" * 200, "", " ", "\u05e9\u05dc\u05d5\u05dd", "%s{}"]
    model = create_model("coda_xs_digits", class_names=names)
    figure = model.explain(torch.rand(1, 1, 8, 8), [list(range(10))]).plot()
    plot.render(figure, dpi=50)
    titles = [axes.get_title().rpartition(":")[0] for axes in figure.axes[1:11]]
    assert titles[:6] == ["$", "$x^2$", "a b", "\ufffd", "\\frac{", "x" * 19 + "\u2026"]


def test_names_of_wide_characters_take_no_more_room():
    assert plot._shortened("x" * 20, 20) == "x" * 20
    assert plot._shortened("\u732b" * 10, 20) == "\u732b" * 10
    assert plot._shortened("\u732b" * 11, 20) == "\u732b" * 9 + "\u2026"
    assert plot._shortened("", 20) == ""


def test_curves_of_runs_with_names_of_bad_will():
    """Matplotlib would read dollar signs as a formula, and fail after the training."""
    recipe = load_recipe("digits-s", ["name='a $x^$ b'"])
    history = [{"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.5}]
    figure = curve(history, recipe)
    assert figure.get_suptitle().startswith("a $x^$ b: ")
    plot.render(figure, dpi=50)


def test_failed_figure_leaves_nothing(tmp_path):
    figure = plot.new_figure(1, 1)
    with pytest.raises(ValueError, match="xyz"):
        plot.save_figure(figure, tmp_path / "figure.xyz")
    assert list(tmp_path.iterdir()) == []
