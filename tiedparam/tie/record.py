"""The list of parametrizations of a tied tensor: the rule, and what is stacked on it.

What cannot compute on top of a tie is refused, not registered.

torch's ``weight_norm`` and ``orthogonal`` register themselves unchecked, on the ground that
they may choose what is stored. On a tie, which stores its free values, they would leave a
layer that raises at every use.

The list also holds the free values, whose marks for the optimizer guard it hands on when they
are copied, or replaced by ``load_state_dict(assign=True)``.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.coded import data_of
from tiedparam.laws.rule import Rule
from tiedparam.tie.marks import carry_marks
from tiedparam.tie.reading import Reading
from tiedparam.tie.split import Split
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import effective, original_key, through


class TiedList(parametrize.ParametrizationList):
    """The parametrizations of a tied tensor, and all that is known of the tie.

    It is where torch keeps them, so it is copied, pickled and freed with the layer.

    Attributes:
        kept: what is kept of the weight for inference.
        computing: how the layer computes with it, if not densely.
        residual_at_tying: how far the weight was from the law then; None if unknown.
        reading: how other layers are read, for a law that does.
        split: how ranks share the tensor, under tensor parallelism.
    """

    kept: Any = None
    computing: Any = None
    residual_at_tying: float | None = None
    reading: Reading | None = None
    split: Split | None = None

    def append(self, module: nn.Module) -> TiedList:
        """Stack a parametrization on the tie.

        Raises:
            TieError: if it cannot compute a tensor of the same shape and dtype from the tied
                one. Nothing was changed then.
        """
        name = type(module).__name__.removeprefix("_")
        place = f"cannot stack {name} on the tie '{self[0]}'"
        remedy = "Call remove_tie first, or stack one that computes from the finished tensor."
        training = module.training
        with torch.no_grad():
            tied = self()
            try:
                result = module.eval()(tied)
            except Exception as error:
                raised = f"{type(error).__name__}: {error}"
                fact = f"computing from the tied tensor it raised {raised}."
                raise TieError(place, fact, remedy) from error
            finally:
                module.train(training)
        if (
            not isinstance(result, Tensor)
            or result.shape != tied.shape
            or result.dtype != tied.dtype
        ):
            fact = "it returns another shape or dtype than the tied tensor's."
            raise TieError(place, fact, remedy)
        super().append(module)
        return self

    def forward(self) -> Tensor:
        """What torch's own gives, without looking for each number as an attribute."""
        originals = self._parameters.values()
        if self.split is not None:
            return self._in_parts(self.split)
        if len(originals) != self.ntensors or self.is_tensor:
            return super().forward()  # a replica of nn.DataParallel, say
        if self.reading is None:
            return through(self, *originals)  # type: ignore[arg-type]
        # by the tables: this runs at every call
        law, *stacked = self._modules.values()
        weight = self.own_reading().compute(law, originals)  # type: ignore[arg-type]
        for module in stacked:
            weight = module(weight)
        return weight

    def _in_parts(self, split: Split) -> Tensor:
        """The tensor, of which every rank computes its part."""
        _, *stacked = self._modules.values()
        sources = self.own_reading().present(self.law) if self.reading is not None else ()
        weight = split.weight(self._parameters.values(), sources)
        for module in stacked:
            weight = module(weight)
        return weight

    def tied(self) -> Tensor:
        """What the tie gives, before anything that is stacked on it."""
        free = self._parameters.values()
        if self.reading is None:
            return self[0](*free)  # type: ignore[no-any-return]
        return self.own_reading().compute(self.law, free)  # type: ignore[arg-type]

    @property
    def law(self) -> Any:
        """The rule; by the table, since this is asked at every call."""
        return self._modules["0"]

    def own_reading(self) -> Reading:
        """How other layers are read by this very list, which a shallow clone may have made (S43).

        Raises:
            TieError: if the sources in the clone are not known.
        """
        reading: Reading = self.reading  # type: ignore[assignment]
        if not reading.serves(self):
            reading = self.reading = reading.of_clone(self, self.law)
        return reading

    def take_first(self) -> nn.Parameter:
        """Take the first of the free values away; the others move up."""
        first, *rest = self._parameters.values()
        self._store(rest)
        return first  # type: ignore[return-value]

    def put_first(self, value: nn.Parameter) -> None:
        """Put a free value before the others."""
        self._store([value, *self._parameters.values()])

    def _store(self, values: list[nn.Parameter | None]) -> None:
        self._parameters.clear()
        self._parameters.update({f"original{i}": value for i, value in enumerate(values)})
        self.ntensors: int = len(values)

    @property
    def original(self) -> TiedList:  # type: ignore[override]
        """All free values as one thing, which PEFT's ``target_parameters`` thaws and freezes."""
        return self

    def __copy__(self) -> TiedList:
        replica: TiedList = type(self).__new__(type(self))
        replica.__dict__.update(self.__dict__)
        if self.reading is not None:
            replica.reading = self.reading.serving(replica)
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedList:
        replica: TiedList = type(self).__new__(type(self))
        memo[id(self)] = replica
        state = {key: value for key, value in self.__dict__.items() if key != "reading"}
        replica.__dict__.update(copy.deepcopy(state, memo))
        if self.reading is not None:
            watches = copy.deepcopy(self.reading.watches, memo)
            replica.reading = self.reading.copied(replica, watches, memo)
        carry_marks(self._parameters, replica._parameters)
        return replica

    def __repr__(self) -> str:
        # as torch shows it; the list has nothing to add
        return nn.Module.__repr__(self) if self.reading is not None else super().__repr__()

    def extra_repr(self) -> str:
        """Which layers are read."""
        if self.reading is None:
            return ""
        if not self.reading.serves(self):
            return "reads a source that is looked for in this clone"
        return self.reading.shown(self.law)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self._parameters.copy()
        super()._load_from_state_dict(*args, **kwargs)
        carry_marks(before, self._parameters)

    def _get_name(self) -> str:
        return "ParametrizationList"  # repr: to a reader it is torch's


class Tie:
    """One rule on one tensor of one layer, with all that belongs to it.

    Made by `tiedparam.tie.lookup` for whoever asks. What must live as long as the tie lies in the
    layer's `TiedList`; that cannot know its layer, since shallow copies of a layer share it.

    Attributes:
        layer: the tied layer.
        tensor_name: which of its tensors.
        values: torch's list of its parametrizations, with the free values.
    """

    __slots__ = ("layer", "tensor_name", "values")

    def __init__(
        self, layer: nn.Module, tensor_name: str, values: parametrize.ParametrizationList
    ) -> None:
        self.layer: nn.Module = layer
        self.tensor_name: str = tensor_name
        self.values: parametrize.ParametrizationList = values

    @property
    def rule(self) -> Rule:
        """The law."""
        return cast(Rule, self.values[0])

    @property
    def free(self) -> list[nn.Parameter]:
        """The Parameters that the tensor is computed from; none for a copy."""
        return [getattr(self.values, f"original{i}") for i in range(self.values.ntensors)]

    def keys(self, prefix: str = "", count: int | None = None) -> list[str]:
        """The state-dict keys of the free values, or of the first ``count`` if there were so many.

        Args:
            prefix: what the keys of the layer begin with.
            count: how many.
        """
        numbers = range(self.values.ntensors if count is None else count)
        path = prefix.removesuffix(".")
        return [original_key(path, self.tensor_name, number) for number in numbers]

    def data(self, prefix: str = "") -> dict[str, Tensor]:
        """What the law holds that is data, by the keys that a state dict has for it.

        Args:
            prefix: what the keys of the layer begin with.
        """
        path = f"{prefix}parametrizations.{self.tensor_name}.0."
        return {path + name: value for name, value in data_of(self.rule).items()}

    def weight(self) -> Tensor:
        """The tensor that the layer computes with."""
        return effective(self.layer, self.tensor_name)

    def tied(self) -> Tensor:
        """What the tie gives, before anything that is stacked on it."""
        values = self.values
        return values.tied() if isinstance(values, TiedList) else self.rule(*self.free)

    @property
    def is_stacked(self) -> bool:
        """Whether another parametrization works on what the tie gives."""
        return len(self.values) > 1

    def describe(self, root: nn.Module | None = None) -> str:
        """The tensor, as messages name it."""
        return describe(self.layer, self.tensor_name, root)

    @property
    def record(self) -> TiedList:
        """The list, where it is ours: not that of a rule that was given to torch directly."""
        return cast(TiedList, self.values)

    @property
    def residual_at_tying(self) -> float | None:
        """How far the weight was from the law when `register_tie` tied it; None if unknown."""
        return cast("float | None", self.values.__dict__.get("residual_at_tying"))

    @residual_at_tying.setter
    def residual_at_tying(self, residual: float | None) -> None:
        self.values.__dict__["residual_at_tying"] = residual

    @property
    def kept(self) -> Any:
        """What is kept of the weight for inference; None for a rule given to torch directly."""
        return self.values.__dict__.get("kept")

    @property
    def reading(self) -> Reading | None:
        """How other layers are read, for a law that does."""
        return self.values.__dict__.get("reading")

    @property
    def computing(self) -> Any:
        """How the layer computes with the tensor, if not densely."""
        return self.values.__dict__.get("computing")


def make_record(parametrizations: parametrize.ParametrizationList) -> TiedList:
    """Make torch's list the record of a tie, which also checks what is stacked on it."""
    parametrizations.__class__ = TiedList
    return cast(TiedList, parametrizations)
