"""One way to read a picture, for training, evaluation, explanation and service alike (docs/data.md).

``decode`` reads the pixels of a file, ``preprocessing`` resizes and crops them for a network, ``listing``
says which files are pictures and of which class. ``sources`` and ``shards`` give batches of data sets,
``arrays`` and ``digits`` read data sets that are stored in a few files; ``workers`` decode pictures in other
processes.
"""

from coda_fast.data.decode import decode
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing

__all__ = ["DataError", "ImageError", "Preprocessing", "decode"]
