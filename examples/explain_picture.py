"""Show which pixels of a picture speak for and against a class, and that no contribution is missing:

    python examples/explain_picture.py photo.jpg
    python examples/explain_picture.py digit.png --checkpoint coda_xs_digits    # or a file of your own

This prints the two most likely classes with their logits, the sums of their maps, and the most important
pixel of each, and writes the figure to ``--output``. ``coda-fast explain`` makes the same calls.
"""

import argparse
from pathlib import Path

import coda_fast
from coda_fast import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--checkpoint", default="coda_xs_imagenette")
    parser.add_argument("--output", type=Path, default="why.png")
    options = parser.parse_args()

    model = coda_fast.pretrained.load(options.checkpoint).eval()
    # Upright, resized and cropped as in training, in [0, 1]: [1, C, H, W]. Images are never normalised.
    image = model.transform(options.picture)[None]
    classes = model(image).topk(2).indices
    explanation = model.explain(image, target=classes)

    for k, target in enumerate(classes[0].tolist()):
        logit = float(explanation.logits[0, target])
        contributions = explanation.contribution_map[0, k]  # [H, W], in logits
        total = float(contributions.sum()) + explanation.logit_bias
        row, column = divmod(int(contributions.argmax()), contributions.shape[1])
        print(
            f"{explanation.name(target):12} logit {logit:+.5f}   map + bias {total:+.5f}   "
            f"most by the pixel in row {row}, column {column}: {float(contributions.max()):+.3f}"
        )
    plot.save_figure(explanation.plot(), options.output)
    print(f"figure {options.output}")


if __name__ == "__main__":
    main()
