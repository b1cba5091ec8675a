"""Pictures whose pixels are known."""

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from coda_fast import create_model, plot


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
    """Red wanted -> red; dark wanted (weight on 1 - x) -> black; no weight -> grey; alpha follows positive contribution."""
    weight = torch.zeros(6, 2, 2)
    weight[0, 0, 0] = 2.0  # red
    weight[4, 0, 0] = weight[5, 0, 0] = 1.0  # no green, no blue
    weight[3:, 0, 1] = 1.0  # dark
    weight[:3, 1, 0] = -5.0  # negative weights want nothing
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


@pytest.mark.parametrize(("weight", "contribution"), [((16, 4, 4), (4, 4)), ((6, 4, 4), (3, 4)), ((1, 6, 4, 4), (4, 4))])
def test_weight_rgba_refuses(weight, contribution):
    with pytest.raises(ValueError, match="expected"):
        plot.weight_rgba(torch.zeros(weight), torch.zeros(contribution))


def test_map_colours(tmp_path):
    """Positive red, negative blue, zero white, saturated at the scale."""
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
    scales = {axes.images[0].get_clim() for axes in figure.axes if axes.images and axes.images[0].get_cmap().name == "bwr"}
    assert len(scales) == 1, "all maps share one scale"
    low, high = scales.pop()
    assert low == -high
    path = tmp_path / "figure.png"
    plot.save_figure(figure, path)
    assert Image.open(path).size[0] > 600
    plot.save_figure(figure, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()[:1000]


def test_explanation_figure_names_the_true_class():
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    explanation = model.explain(images, [[0], [1]])
    figure = plot.explanation_figure(images, explanation, 0.0, list("abcdefghij"), [9, 1])
    assert [axes.get_title() for axes in figure.axes][:6:3] == ["image: j", "image: b"]
    figure = plot.explanation_figure(images, explanation, 0.0, ["a$x^$", "black-footed ferret, Mustela", *"cdefghij"], [0, 1])
    assert [axes.get_title() for axes in figure.axes][:6:3] == ["image: a$x^$", "image: black-footed ferret\u2026"]
    plot.render(figure)  # no formula
    with pytest.raises(ValueError, match="labels: expected 2, one for each image, got 3"):
        plot.explanation_figure(images, explanation, 0.0, None, [1, 2, 3])


def test_explanation_figure_refuses_strangers():
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    for explanation in (model.explain(images[:1]), model.explain(torch.rand(2, 1, 9, 8))):
        with pytest.raises(ValueError, match="explanation: expected maps of these images"):
            plot.explanation_figure(images, explanation, model.logit_bias)


def test_explanation_of_a_layer():
    """The maps of what enters it, without the weight, which is a picture of pixels only."""
    model = create_model("coda_xs_digits")
    images = torch.rand(2, 1, 8, 8)
    figure = plot.explanation_figure(images, model.explain(images, layer=2), model.logit_bias)
    assert [len(axes.images) for axes in figure.axes[:4]] == [1] * 4
    assert figure.axes[1].images[0].get_array().shape == (4, 4)
    plot.render(figure)


@pytest.fixture
def fresh(monkeypatch):
    """No character was found missing yet."""
    monkeypatch.setattr(plot, "_LOST", set())


def test_names_in_scripts_that_the_default_font_lacks(fresh):
    """Drawn by a font that has them: no warning, and ink where the name is."""
    if importlib.util.find_spec("matplotlib_fontja") is None:  # importing it would make its font that of all figures
        pytest.skip("needs the package with a Japanese font")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text, families, files = plot.drawable("\u732b \u3042 cat")
        assert text == "\u732b \u3042 cat"
        assert len(families) == 2
        assert files[0].endswith("ipaexg.ttf")
        assert plot.drawable("\u00dcn\u00efc\u00f6d\u00e9")[1:] == (families[:1], [])
        pictures = []
        for name in ("\u732b\u732b", "\u72ac\u72ac"):  # cat, dog: another picture each, not one box for all
            model = create_model("coda_xs_digits", class_names=[name] * 10)
            images = torch.zeros(1, 1, 8, 8)
            pictures.append(plot.render(model.explain(images).plot(), dpi=60))
    assert pictures[0] != pictures[1]


def test_characters_that_no_font_has(fresh):
    """An empty box each, one warning for all of them, none the second time."""
    with pytest.warns(UserWarning, match=r"no installed font has \U0001fae0 \(U\+1FAE0\) \U0001faf6 \(U\+1FAF6\), drawn as") as caught:
        text, families, files = plot.drawable("a \U0001faf6\U0001fae0 b")
    assert len(caught) == 1
    assert (text, len(families), files) == ("a \u25a1\u25a1 b", 1, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.drawable("\U0001faf6")


def test_names_of_bad_will(fresh):
    """Formulas, control characters, lines: drawn as they are, or visibly replaced."""
    assert plot.drawable("a\nb\tc\x00")[0] == "a b c\ufffd"
    names = ["$", "$x^2$", "a\nb", "\x00", "\\frac{", "x" * 200, "", " ", "\u05e9\u05dc\u05d5\u05dd", "%s{}"]
    model = create_model("coda_xs_digits", class_names=names)
    figure = model.explain(torch.rand(1, 1, 8, 8), [list(range(10))]).plot()
    plot.render(figure, dpi=50)
    titles = [axes.get_title().rpartition(":")[0] for axes in figure.axes[1:11]]
    assert titles[:5] == ["$", "$x^2$", "a b", "\ufffd", "\\frac{"]


def test_failed_figure_leaves_nothing(tmp_path):
    figure = plot.new_figure(1, 1)
    with pytest.raises(ValueError, match="xyz"):
        plot.save_figure(figure, tmp_path / "figure.xyz")
    assert list(tmp_path.iterdir()) == []
