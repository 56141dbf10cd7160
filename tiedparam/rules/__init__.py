"""The laws of the library, one per file: mathematics only.

Uses `laws`, and nothing else of the library.
The classes are public; importing one registers its name. ``docs/make_signatures.py`` writes
the list, so a new law is one file, called as the law is, and a run of that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# begin: by python docs/make_signatures.py
if TYPE_CHECKING:
    from tiedparam.rules.bank import Bank
    from tiedparam.rules.block_circulant import BlockCirculant
    from tiedparam.rules.centrosymmetric import Centrosymmetric
    from tiedparam.rules.channel_shared import ChannelShared
    from tiedparam.rules.circulant import Circulant
    from tiedparam.rules.cluster import Cluster
    from tiedparam.rules.copy import Copy
    from tiedparam.rules.fixed import Fixed
    from tiedparam.rules.flip_sym import FlipSym
    from tiedparam.rules.group_conv import GroupConv
    from tiedparam.rules.hankel import Hankel
    from tiedparam.rules.hashed import Hashed
    from tiedparam.rules.head_share import HeadShare
    from tiedparam.rules.hypercomplex import Hypercomplex
    from tiedparam.rules.index import Index
    from tiedparam.rules.joint import Joint
    from tiedparam.rules.kernel_symmetry import KernelSymmetry
    from tiedparam.rules.masked import Masked
    from tiedparam.rules.orbit import Orbit
    from tiedparam.rules.persymmetric import Persymmetric
    from tiedparam.rules.repeat import Repeat
    from tiedparam.rules.reverse_complement import ReverseComplement
    from tiedparam.rules.row_repeat import RowRepeat
    from tiedparam.rules.scaled_copy import ScaledCopy
    from tiedparam.rules.set_equivariant import SetEquivariant
    from tiedparam.rules.shared_delta import SharedDelta
    from tiedparam.rules.skew import Skew
    from tiedparam.rules.squared_copy import SquaredCopy
    from tiedparam.rules.symmetric import Symmetric
    from tiedparam.rules.toeplitz import Toeplitz
    from tiedparam.rules.transposed_copy import TransposedCopy
    from tiedparam.rules.within import Within

__all__ = [
    "Bank",
    "BlockCirculant",
    "Centrosymmetric",
    "ChannelShared",
    "Circulant",
    "Cluster",
    "Copy",
    "Fixed",
    "FlipSym",
    "GroupConv",
    "Hankel",
    "Hashed",
    "HeadShare",
    "Hypercomplex",
    "Index",
    "Joint",
    "KernelSymmetry",
    "Masked",
    "Orbit",
    "Persymmetric",
    "Repeat",
    "ReverseComplement",
    "RowRepeat",
    "ScaledCopy",
    "SetEquivariant",
    "SharedDelta",
    "Skew",
    "SquaredCopy",
    "Symmetric",
    "Toeplitz",
    "TransposedCopy",
    "Within",
]

CLASSES = {
    "bank": "Bank",
    "block_circulant": "BlockCirculant",
    "centrosymmetric": "Centrosymmetric",
    "channel_shared": "ChannelShared",
    "circulant": "Circulant",
    "cluster": "Cluster",
    "copy": "Copy",
    "fixed": "Fixed",
    "flip_sym": "FlipSym",
    "group_conv": "GroupConv",
    "hankel": "Hankel",
    "hashed": "Hashed",
    "head_share": "HeadShare",
    "hypercomplex": "Hypercomplex",
    "index": "Index",
    "joint": "Joint",
    "kernel_symmetry": "KernelSymmetry",
    "masked": "Masked",
    "orbit": "Orbit",
    "persymmetric": "Persymmetric",
    "repeat": "Repeat",
    "reverse_complement": "ReverseComplement",
    "row_repeat": "RowRepeat",
    "scaled_copy": "ScaledCopy",
    "set_equivariant": "SetEquivariant",
    "shared_delta": "SharedDelta",
    "skew": "Skew",
    "squared_copy": "SquaredCopy",
    "symmetric": "Symmetric",
    "toeplitz": "Toeplitz",
    "transposed_copy": "TransposedCopy",
    "within": "Within",
}
"""By name, which is the name of the file too, the class of each law."""
# end

_FILES = {kind: name for name, kind in CLASSES.items()}


# A law is imported when it is first asked for: a program uses few of them.
def __getattr__(kind: str) -> Any:
    if kind not in _FILES:
        raise AttributeError(f"module 'tiedparam.rules' has no attribute {kind!r}")
    value = globals()[kind] = getattr(import_module(f"tiedparam.rules.{_FILES[kind]}"), kind)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
