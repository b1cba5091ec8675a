"""One way to read a picture, for training, evaluation, explanation and service alike (docs/data.md).

``decode`` makes pixels of a file, ``preprocessing`` what a network takes of them, ``listing`` says which
files are pictures and of which class. ``sources`` and ``shards`` give batches of sets, ``arrays`` and
``digits`` read those that lie in few files; ``workers`` decode them beside the program.
"""

from coda_fast.data.decode import decode
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing

__all__ = ["DataError", "ImageError", "Preprocessing", "decode"]
