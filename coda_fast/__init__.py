"""coda_fast: Convolutional Dynamic Alignment Networks, exact and fast."""

from coda_fast import data, functional, pretrained
from coda_fast._modes import explanation_mode
from coda_fast._version import __version__
from coda_fast._wrappers import unwrap
from coda_fast.backends import BackendUnavailable, backend_info
from coda_fast.checkpoints import CheckpointError, load, save
from coda_fast.compile import compile_kernels
from coda_fast.convert import Conversion, convert_conv2d
from coda_fast.explanation import Explanation
from coda_fast.export import Explainer
from coda_fast.hybrid import CAMNet, CoDAHead, HybridCoDANet
from coda_fast.models import CoDANet, create_model, list_models, register_model
from coda_fast.network import Network
from coda_fast.nn import AddInverse, DAUConv2d, SplitSigns, SumPool2d
from coda_fast.stems import register_stem

__all__ = [
    "AddInverse",
    "BackendUnavailable",
    "CAMNet",
    "CheckpointError",
    "CoDAHead",
    "CoDANet",
    "Conversion",
    "DAUConv2d",
    "Explainer",
    "Explanation",
    "HybridCoDANet",
    "Network",
    "SplitSigns",
    "SumPool2d",
    "__version__",
    "backend_info",
    "compile_kernels",
    "convert_conv2d",
    "create_model",
    "data",
    "explanation_mode",
    "functional",
    "list_models",
    "load",
    "pretrained",
    "register_model",
    "register_stem",
    "save",
    "unwrap",
]
