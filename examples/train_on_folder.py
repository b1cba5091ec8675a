"""Train a network on your own pictures: ``python examples/train_on_folder.py FOLDER --output runs/mine``.

FOLDER has ``train/`` and ``val/``, each with a folder of pictures for every class. As in ``coda-fast train``,
a recipe of the package is changed by ``key=value``, and a stopped run is resumed when the same command is
given again.
"""

import argparse
from pathlib import Path

from coda_fast import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default="coda_runs/mine")
    parser.add_argument("--size", type=int, default=64, help="side of the squares that the network sees")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("changes", nargs="*", help="further keys of the recipe, such as optimizer.lr=1e-3")
    options = parser.parse_intermixed_args()

    recipe = train.load_recipe(
        "cifar10-xs",  # a small network that a CPU can train; "coda-fast train" lists the others
        [
            "name=mine",
            "data.kind=folder",
            f"data.path={options.folder}",
            f"data.resize={options.size}",
            f"data.size={options.size}",
            "data.pad=0",
            f"epochs={options.epochs}",
            *options.changes,
        ],
    )
    last = train.run(recipe, options.output, resume="auto")
    print(", ".join(f"{key} {value:.4g}" for key, value in last.items() if isinstance(value, float)))
    print(f"explain a picture: coda-fast explain PICTURE --checkpoint {options.output}/model.safetensors")


if __name__ == "__main__":
    main()
