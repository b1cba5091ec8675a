"""Compare the network's own explanation with other attribution methods on the same images:

    python examples/compare_methods.py                 # or --checkpoint FILE, of another network for digits

There are two measures, and higher is better in both. Localisation: the share of a map's positive
contributions on the scan of the explained class, in an image of four scans (chance is 0.25). Removal: the
mean probability of the class while its least important pixels are set to zero. The other methods are
captum's.
"""

import argparse

import torch

import coda_fast
from coda_fast import baselines, demo
from coda_fast.evaluation import localisation, pixel_removal

METHODS = ("Ours", "IxG", "IntGrad", "GCam", "Grad")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="coda_xs_digits")
    parser.add_argument("--grids", type=int, default=50, help="how many images of four scans are drawn")
    parser.add_argument("--images", type=int, default=50, help="how many images lose their pixels")
    options = parser.parse_args()

    model, data = coda_fast.pretrained.load(options.checkpoint).eval(), demo.digits()
    images, labels = data.test_images, data.test_labels
    with torch.no_grad():
        logits = model(images)
    print(f"{'method':8} {'localisation':>13} {'removal':>8}")
    for name in METHODS:
        method = baselines.create(name, model)
        found = localisation(model, images, labels, method, side=2, grids=options.grids, logits=logits)
        curves = pixel_removal(
            model, images[: options.images], labels[: options.images], method, order="least"
        )
        print(f"{name:8} {found.summary()['mean']:13.3f} {float(curves.area().mean()):8.3f}")


if __name__ == "__main__":
    main()
