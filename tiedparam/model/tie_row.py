"""What a report says of one tied tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TieRow:
    """One tied tensor.

    Attributes:
        layer: path of the layer in the model.
        tensor_name: which of its tensors.
        rule: the rule with its options, as text; a copy names its source.
        shape: of the tensor.
        dense_values: how many entries it has.
        free_values: how many numbers are stored for it.
        multiplicity: how many entries share a free value, least and most; None for a copy.
        residual: how far the tensor was from the law when it was tied; None if that is not
            known (a rule that was not put on by `register_tie`, or on the meta device).
        multiply_adds_dense: multiply-adds per position without the tie, None if unknown.
        multiply_adds_tied: the same with the tie, in training.
        positions: on how many positions the layer works for the example; None without one.
        gain_inference: how many times as fast as without the tie the layer computes without
            gradients, below 1 if it is slower: as `tune` measured it here, or by the law's costs,
            for the example or a usual batch. None for a bias, or if it is not known.
        gain_training: the same with gradients, forward and backward.
        inference_measured: whether `gain_inference` was measured.
        training_measured: whether `gain_training` was measured.
        bytes_per_value: of the stored type.
        trained: whether gradients reach what the tensor is computed from.
        form_in_vain: the form that ``compute=`` names, where it cannot serve numbers of this type
            (those made for a CPU take float32 and float64), so that the layer computes densely;
            else None.
    """

    layer: str
    tensor_name: str
    rule: str
    shape: tuple[int, ...]
    dense_values: int
    free_values: int
    multiplicity: tuple[int, int] | None
    residual: float | None
    multiply_adds_dense: int | None
    multiply_adds_tied: int | None
    positions: int | None
    gain_inference: float | None
    gain_training: float | None
    inference_measured: bool
    training_measured: bool
    bytes_per_value: int
    trained: bool
    form_in_vain: str | None = None

    @property
    def compression(self) -> float:
        """Dense by free values; infinite for a copy."""
        return self.dense_values / self.free_values if self.free_values else float("inf")
