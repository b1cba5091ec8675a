"""The attribution methods that the CoDA-Nets paper compares with (arXiv:2104.00032, section 4.3), through one
interface; most are computed by captum.

Every method explains the image through the model's own encoder, and its map is summed over the channels of
the image. A CoDA-Net has no non-linearity that captum knows, so that on it DeepLIFT equals Input x Gradient
and guided backpropagation equals the gradient, up to rounding. Show these as one method. A hybrid network has
the non-linearities of its stem, on which they differ.

To add a method, write one function with the decorator ``baseline``, in the file of its family or in your own
code. Names, settings, checks, the command line and the documentation then include it.
"""

# imported in the order of ``METHODS``
from coda_fast.baselines import ours, perturbations, gradients  # noqa: F401, I001
from coda_fast.baselines._attribution import Attribution, attribute, create
from coda_fast.baselines._registry import METHODS, REVISION, TWINS, Setting, baseline, twins_on

__all__ = [
    "METHODS",
    "REVISION",
    "TWINS",
    "Attribution",
    "Setting",
    "attribute",
    "baseline",
    "create",
    "twins_on",
]
