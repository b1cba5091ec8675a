"""Draw docs/how_it_works.png: the norms, and one prediction split into its contributions, for a small network
that is trained on digits (half a minute on a CPU).

    python tools/draw_how_it_works.py
"""

from pathlib import Path

import numpy as np
import torch

import coda_fast
from coda_fast import demo, plot

TARGET = Path(__file__).resolve().parent.parent / "docs" / "how_it_works.png"


def main() -> None:
    torch.manual_seed(0)
    data = demo.digits()
    model = coda_fast.create_model("coda_xs_digits", class_names=data.class_names)
    demo.train(model, data, epochs=20)
    image = data.test_images[torch.nonzero(data.test_labels == 3)[0]]
    e = model.explain(image)
    target = int(e.target)

    figure = plot.new_figure(width=11.5, height=3.0)
    axes = figure.subplots(1, 5, width_ratios=[1.5, 1, 1, 1, 1])
    length = np.linspace(0, 4, 400)
    axes[0].plot(length, length**2 / (1 + length**2), color="#0072B2", label="squash")
    axes[0].plot(length, np.ones_like(length), color="#D55E00", linestyle="--", label="l2")
    axes[0].set_ylim(0, 1.1)
    axes[0].set_xlabel("|w|, the length of the weight computed", fontsize=8)
    axes[0].set_title("|s(q) w|, the length of the weight applied", fontsize=8)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    axes[0].tick_params(labelsize=7)
    plot.show_image(axes[1], image[0], "x")
    weight, map_ = e.dynamic_weight[0, 0], e.contribution_map[0, 0]
    for axis, values, title in (
        (axes[2], weight[0], f"row {target} of W(x), for x"),
        (axes[3], weight[1], f"row {target} of W(x), for 1 - x"),
    ):
        plot.show_map(axis, values, plot.symmetric_scale(weight), title)
    artist = plot.show_map(axes[4], map_, plot.symmetric_scale(map_), f"contributions to class {target}")
    axes[4].set_xlabel(plot.proof(e, 0, 0, model.logit_bias), fontsize=6)
    plot.colour_bar(figure, artist, axes[4], "logits per pixel", location="right")
    plot.save_figure(figure, TARGET, dpi=130)
    print(TARGET)


if __name__ == "__main__":
    main()
