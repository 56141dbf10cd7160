"""How a tensor of a layer is laid out, so that laws can be stated in channels and not in axes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from tiedparam.util.errors import Reason
from tiedparam.util.torch_private import AnyConvolution


@dataclass(frozen=True)
class Layout:
    """Shape of a tied tensor and how its axes map to the canonical ``V[o, c, x]``.

    ``o`` runs over all outputs, ``c`` over the inputs within a group, ``x`` over the
    kernel positions. Linear and ordinary convolution weights are canonical already; a
    transposed convolution stores ``W[in, out/g, *kernel]`` and is rearranged.

    Attributes:
        shape: the tensor's own shape.
        groups: the convolution's groups, 1 for every other layer.
        transposed: whether it is the weight of a transposed convolution, or of another layer
            that stores ``W[in, out]``.
        layer_groups: the groups of the layer that holds the tensor. A bias has none of its own,
            and a law may want to treat it as its layer's filters are treated.
        stride: of the convolution whose weight it is; empty for every other tensor.
        dilation: likewise.

    Example:
        >>> layout = tp.Layout((4, 6, 3), transposed=True)  # of ConvTranspose1d(4, 6, 3)
        >>> layout.canonical_shape
        (6, 4, 3)
        >>> layout.canonical(torch.zeros(4, 6, 3)).shape
        torch.Size([6, 4, 3])
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    # not a matter of the axes
    layer_groups: int = field(default=1, compare=False, repr=False)
    stride: tuple[int, ...] = field(default=(), compare=False, repr=False)
    dilation: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, layer: nn.Module, tensor_name: str, shape: tuple[int, ...]) -> Layout:
        """The layout of ``layer``'s tensor ``tensor_name``, which has shape ``shape``."""
        if isinstance(layer, AnyConvolution):
            if tensor_name == "weight":
                groups, steps = layer.groups, (tuple(layer.stride), tuple(layer.dilation))
                return cls(tuple(shape), groups, layer.transposed, groups, *steps)
            return cls(tuple(shape), layer_groups=layer.groups)
        if tensor_name == "weight" and _stores_inputs_first(layer):
            return cls(tuple(shape), transposed=True)
        return cls(tuple(shape))

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Shape of the canonical layout: ``(out, in per group, *kernel)``."""
        if not self.transposed:
            return self.shape
        inputs, out_per_group, *kernel = self.shape
        return (out_per_group * self.groups, inputs // self.groups, *kernel)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The axes after the channels; empty for a Linear weight."""
        return self.shape[2:]

    def why_empty(self) -> Reason | None:
        """Why there is nothing to tie, or None."""
        if 0 not in self.shape:
            return None
        return Reason(f"the tensor {self.shape} is empty.", "Tie a layer that has weights.")

    def canonical(self, weight: Tensor) -> Tensor:
        """``weight`` as ``V[o, c, x]``; a view where strides allow it."""
        if not self.transposed:
            return weight
        inputs, out_per_group, *kernel = self.shape
        blocks = weight.reshape(self.groups, inputs // self.groups, out_per_group, *kernel)
        return blocks.transpose(1, 2).reshape(self.canonical_shape)

    def native(self, canonical: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        if not self.transposed:
            return canonical.reshape(self.shape)
        outputs, in_per_group, *kernel = self.canonical_shape
        blocks = canonical.reshape(self.groups, outputs // self.groups, in_per_group, *kernel)
        return blocks.transpose(1, 2).reshape(self.shape)


def why_no_matrix(layout: Layout) -> Reason | None:
    """Why a law of matrices does not fit a tensor of this layout, or None."""
    axes = len(layout.shape)
    if axes == 2:
        return None
    return Reason(
        f"the law is one of matrices, and the tensor {layout.shape} has {axes} "
        f"{'axis' if axes == 1 else 'axes'}.",
        "Tie a matrix, such as the weight of a Linear layer.",
    )


def _stores_inputs_first(layer: nn.Module) -> bool:
    """GPT-2's Conv1D, of transformers, is a Linear that stores ``W[in, out]``.

    Known by its name, since transformers need not be installed; and so is what stands for it
    where a model is made from a file.
    """
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(layer).__mro__)
    return not _INPUTS_FIRST.isdisjoint(names)


_INPUTS_FIRST = frozenset(
    {"transformers.pytorch_utils.Conv1D", "tiedparam.cli.model_from_file.InputsFirst"}
)


# What a layer says of the size of its weight: read by people, and by those who resize it.
_SIZES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
}


def declared_shape(layer: nn.Module, tensor_name: str) -> tuple[int, ...] | None:
    """The shape that the layer's attributes give its tensor; None where they do not tell."""
    names = _sizes(layer) if tensor_name == "weight" else None
    return tuple(getattr(layer, name) for name in names) if names is not None else None


def declare_shape(layer: nn.Module, tensor_name: str, shape: tuple[int, ...]) -> None:
    """Let the layer's attributes say the shape that its tensor has now."""
    names = _sizes(layer) if tensor_name == "weight" else None
    if names is not None and len(shape) == len(names):
        for name, size in zip(names, shape, strict=True):
            setattr(layer, name, size)


def _sizes(layer: nn.Module) -> tuple[str, str] | None:
    return next((names for kind, names in _SIZES.items() if isinstance(layer, kind)), None)
