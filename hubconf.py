"""Entry points for torch.hub: ``torch.hub.load(FOLDER_OR_REPOSITORY, "coda_s_cifar10", num_classes=100)``,
one for each named model.
"""

import sys
from pathlib import Path

dependencies = ["torch", "numpy"]

# torch.hub puts the repository on the path, and only while it reads this file
_kernels = str(Path(__file__).resolve().parent / "kernels")
sys.path.insert(0, _kernels)
try:
    import coda_fast
    import coda_kernels  # noqa: F401  (coda_fast asks for it later)
finally:
    sys.path.remove(_kernels)


def _entry_point(name):
    def create(**options):
        return coda_fast.create_model(name, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"``coda_fast.create_model({name!r}, **options)``: fresh weights, or those of the package with "
        "``pretrained=True``."
    )
    return create


globals().update({_name: _entry_point(_name) for _name in coda_fast.list_models()})
