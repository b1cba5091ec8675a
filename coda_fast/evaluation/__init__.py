"""Metrics of explanations, for any model and any attribution method: those of arXiv:2104.00032, section 4.3,
and the completeness error.
"""

from coda_fast.evaluation.completeness import completeness_error
from coda_fast.evaluation.localisation import Localisation, confident_images, draw_grids, localisation
from coda_fast.evaluation.removal import Removal, pixel_removal

__all__ = [
    "Localisation",
    "Removal",
    "completeness_error",
    "confident_images",
    "draw_grids",
    "localisation",
    "pixel_removal",
]
