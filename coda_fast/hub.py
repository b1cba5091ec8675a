"""CoDA-Nets with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of huggingface_hub. Local
folders need no network connection.

>>> import tempfile, coda_fast
>>> from coda_fast.hub import HubCoDANet
>>> with tempfile.TemporaryDirectory() as folder:
...     HubCoDANet.from_model(coda_fast.create_model("coda_xs_digits")).save_pretrained(folder)
...     HubCoDANet.from_pretrained(folder).num_classes
Loading weights from local directory
10
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coda_fast import checkpoints, registry
from coda_fast.dynamic_linear import need_network
from coda_fast.hybrid import HybridCoDANet
from coda_fast.models import CoDANet

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError(
        f"coda_fast.hub needs huggingface_hub: pip install 'coda-fast[hub]' ({error})"
    ) from error


class _Hub(CoDANet, PyTorchModelHubMixin):
    """What networks for the hub share. List this class before that of the network among the bases."""

    _network: type[CoDANet]

    def __init__(self, *args: Any, dtype: torch.dtype | str | None = None, **options: Any):
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not (found is None and dtype is None) and not isinstance(found, torch.dtype):
            raise ValueError(f"dtype: expected a floating-point dtype, by name or not, got {dtype!r}")
        super().__init__(*args, dtype=found, **options)

    @classmethod
    def from_model(cls, model: nn.Module) -> Any:
        """``model`` (such a network, or a wrapper of one) with these methods; the two share their parameters.

        Raises:
            TypeError, ValueError: as ``coda_fast.save``.
        """
        model = need_network(model, kind=cls._network)
        if registry.class_of(model) is not cls._network:
            raise TypeError(
                f"model: expected a {cls._network.__name__} for {cls.__name__}, got a {type(model).__name__}"
            )
        config, state = checkpoints.describe(model)
        twin = cls(**config, device="meta")
        twin.load_state_dict(state, assign=True)
        return twin.train(model.training)

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoints.save(self, save_directory / "model.safetensors")
        config = self.config() | {"dtype": str(self.layers[0].weight.dtype).removeprefix("torch.")}
        with checkpoints.atomic_path(save_directory / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **options: Any) -> Any:
        if "out_channels" not in options or ("stem" in options) != (cls._network is HybridCoDANet):
            raise checkpoints.CheckpointError(
                f"{model_id}: expected a config.json with the arguments of {cls._network.__name__}, got "
                f"{sorted(options)}"
            )
        return super()._from_pretrained(model_id=model_id, strict=strict, **options)


_ABOUT = dict(library_name="coda_fast", pipeline_tag="image-classification")


class HubCoDANet(_Hub, paper_url="https://arxiv.org/abs/2104.00032", **_ABOUT):
    """A CoDANet with the methods of ``huggingface_hub.PyTorchModelHubMixin``.

    A folder holds ``config.json`` (the arguments of ``CoDANet`` and the dtype) and ``model.safetensors``,
    which ``coda_fast.load`` reads too. ``from_pretrained`` takes a folder or the name of a repository, and
    arguments of ``CoDANet`` that replace the stored ones.

    Args:
        *args: as for ``CoDANet``.
        dtype: as for ``CoDANet``, or the name of a dtype such as "float32".
        **options: as for ``CoDANet``.

    Raises:
        ValueError: ``dtype`` is not a dtype, or as ``CoDANet``. ImportError: safetensors is not installed.
        CheckpointError: the folder has no configuration of a CoDANet.
    """

    _network = CoDANet


class HubHybridCoDANet(_Hub, HybridCoDANet, paper_url="https://arxiv.org/abs/2109.13004", **_ABOUT):
    """A HybridCoDANet with the same methods, arguments and errors as ``HubCoDANet``. The folder holds the
    weights of the stem, too.
    """

    _network = HybridCoDANet
