"""Photographs with free licences that come with packages which are installed anyway: examples for pages and
figures, without a download.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple


class Photograph(NamedTuple):
    """A photograph on the disk.

    Attributes:
        path: the file.
        credit: what it shows, who made it and its licence, to be printed wherever it is shown.
    """

    path: Path
    credit: str


# Package, file in it, and credit. The licences are stated in skimage.data (the docstrings of its functions)
# and in sklearn/datasets/images/README.txt. That file names one author for both photographs, but its links
# lead to two authors; the credits follow the links.
_FILES = (
    ("skimage", "data/chelsea.png", "Cat: Stéfan van der Walt, CC0"),
    ("skimage", "data/coffee.png", "Cup of coffee: Rachel Michetti, CC0"),
    ("sklearn", "datasets/images/flower.jpg", "Flower: flickr.com/photos/vultilion, CC BY 2.0"),
    ("sklearn", "datasets/images/china.jpg", "Temple: flickr.com/photos/danielbuechele, CC BY 2.0"),
    ("skimage", "data/rocket.jpg", "Rocket: SpaceX, public domain"),
    ("skimage", "data/astronaut.png", "Astronaut: NASA, public domain"),
)


def example_photographs() -> list[Photograph]:
    """Those of the photographs that are here: two come with scikit-learn (``coda-fast[cli]``), the others
    with scikit-image (``coda-fast[evaluation]``). Neither package is imported.
    """
    found = []
    for package, file, credit in _FILES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / file).is_file():
                found.append(Photograph(path, credit))
                break
    return found
