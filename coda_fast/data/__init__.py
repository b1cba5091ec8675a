"""Reading pictures, in the same way for training, evaluation, explanation and serving (docs/data.md).

``decode`` reads the pixels of a file, ``preprocessing`` resizes and crops them for a network, ``listing``
finds the files that are pictures, with their classes. ``sources`` and ``shards`` give batches of data sets,
``arrays`` and ``digits`` read data sets that are stored in a few files, and ``workers`` decodes pictures in
other processes.
"""

from coda_fast.data.decode import decode
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing

__all__ = ["DataError", "ImageError", "Preprocessing", "decode"]
