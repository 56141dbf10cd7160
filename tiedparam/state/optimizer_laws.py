"""Which optimizers follow a tie, and how each entry of their state does: one table.

It goes by the class, not by what the state is called: LARS has a ``momentum_buffer``, Muon has
one, and neither is that of SGD (S41). Torch's own optimizers are entered by the same
`register_optimizer` as those of users; the tests compare the trajectories of each with
the dense run, and the table in the documentation is printed from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from torch import optim
from torch.optim import Optimizer

from tiedparam.util.errors import Reason
from tiedparam.util.torch_private import without_hooks

Kind = Literal[
    "gradient",
    "gradient magnitude",
    "squared gradient",
    "weight",
    "weight magnitude",
    "scalar",
    "zeros",
]
"""How an entry of the state follows a tie; see `register_optimizer`."""
MAGNITUDES: tuple[Kind, ...] = ("gradient magnitude", "squared gradient", "weight magnitude")
"""The kinds whose entries have no sign."""


@dataclass(frozen=True)
class OptimizerLaw:
    """What is known of one class of optimizers.

    Attributes:
        state: the kind of each entry of a parameter's state.
        coupled_decay: the options of a group that are rates of decay added to the gradient.
        decoupled_if: the option that, if true, takes the decay out of the gradient.
        normalized: whether steps are the same if all gradients are scaled.
        refused: why its state is not moved, or None.
        even_fresh: whether it is refused before its first step, too.
        joint: whether its state is that of all of its parameters together.
    """

    state: Mapping[str, Kind] = field(default_factory=dict)
    coupled_decay: tuple[str, ...] = ()
    decoupled_if: str | None = None
    normalized: bool = True
    refused: Reason | None = None
    even_fresh: bool = False
    joint: bool = False

    def rates(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The rates of coupled decay that act in a group."""
        if self.decoupled_if is not None and group.get(self.decoupled_if):
            return {}
        return {name: group[name] for name in self.coupled_decay if _acts(group.get(name))}

    def parameter_shaped(self) -> set[str]:
        """The entries that have the shape of their parameter."""
        return {name for name, kind in self.state.items() if kind != "scalar"}


def _acts(rate: Any) -> bool:
    return rate is not None and bool(rate != 0)


_LAWS: dict[type[Optimizer], OptimizerLaw] = {}


def register_optimizer(
    optimizer_class: type[Optimizer],
    state: Mapping[str, Kind],
    *,
    coupled_decay: str | Iterable[str],
    decoupled_if: str | None = None,
) -> None:
    """Say how the state of an optimizer of your own follows a tie, so that it can be moved.

    The update must be made entry by entry: what it does to one entry of a parameter may depend
    on the gradients, the values and the state of that entry alone. With ``B`` the expansion,
    ``m`` the multiplicity of a free value and ``s`` an entry of the state, the kinds are:

    ========================  ===============  ================  =============================
    kind                      tying            untying           for example
    ========================  ===============  ================  =============================
    ``"gradient"``            ``Bᵀs``          ``B(s / m)``      ``exp_avg``
    ``"gradient magnitude"``  ``|B|ᵀs``        ``|B|(s / m)``    Adamax's ``exp_inf``
    ``"squared gradient"``    ``m |B|ᵀs``      ``|B|(s / m²)``   ``exp_avg_sq``
    ``"weight"``              ``Bᵀs / m``      ``B s``           averaged weights, unit steps
    ``"weight magnitude"``    ``|B|ᵀs / m``    ``|B| s``         ``step_size``, squared steps
    ``"scalar"``              as it is         as it is          ``step``
    ``"zeros"``               zeros            zeros             what may start anew
    ========================  ===============  ================  =============================

    Compare a tied run with a dense one before you rely on it.

    Args:
        optimizer_class: the class; of its subclasses, those that leave the update as it is.
        state: the kind of every entry that ``optimizer.state[parameter]`` may hold. An entry
            that is not named here makes the move raise.
        coupled_decay: the options that are rates of decay added to the gradient, as Adam's
            ``"weight_decay"`` is; ``()`` if there is none, as in AdamW.
        decoupled_if: the option that, if true, takes the decay out of the gradient.

    Raises:
        TypeError: if the class is not an optimizer's, or a kind is none of the above.
        ValueError: if it is a class of ``torch.optim``, whose laws are tested.

    Example:
        >>> class Signs(torch.optim.Optimizer):  # steps by the sign of an averaged gradient
        ...     def __init__(self, parameters): super().__init__(parameters, {})
        >>> tp.register_optimizer(Signs, {"mean": "gradient"}, coupled_decay=())
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> optimizer = Signs(layer.parameters())
        >>> _ = tp.register_tie(layer, "flip_sym", optimizer=optimizer)
        >>> [tuple(value.shape) for value in optimizer.param_groups[0]["params"]]
        [(5, 2)]
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"register_optimizer takes a class of optimizers, not {optimizer_class!r}")
    if optimizer_class in _TORCHS_OWN:
        raise ValueError(
            f"the law of torch.optim.{optimizer_class.__name__} is known. Register a class of "
            "your own."
        )
    for name, kind in state.items():
        if kind not in get_args(Kind):
            raise TypeError(
                f"the state '{name}' cannot follow a tie as {kind!r}. Choose one of "
                f"{', '.join(map(repr, get_args(Kind)))}."
            )
    names = (coupled_decay,) if isinstance(coupled_decay, str) else tuple(coupled_decay)
    # a copy: the caller may change its dictionary later
    _LAWS[optimizer_class] = OptimizerLaw(MappingProxyType(dict(state)), names, decoupled_if)


def known_optimizers() -> dict[type[Optimizer], OptimizerLaw]:
    """The table: every class whose law is known."""
    return dict(_LAWS)


# Finding the law of an optimizer ------------------------------------------------------------

# Wrappers hand everything to the optimizer within; by module and class, since importing them
# would import their frameworks.
_WRAPPERS = frozenset(
    {
        ("accelerate.optimizer", "AcceleratedOptimizer"),
        ("lightning.fabric.wrappers", "_FabricOptimizer"),
        ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
        ("lightning_fabric.wrappers", "_FabricOptimizer"),
        ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
    }
)
# what may be overridden without a change of the update; so may Python's own, as __init__
_HARMLESS = frozenset({"add_param_group", "load_state_dict", "state_dict", "zero_grad"})


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps: Lightning's and accelerate's wrappers are opened."""
    while any((c.__module__, c.__name__) in _WRAPPERS for c in type(optimizer).__mro__):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def law_of(optimizer: Optimizer) -> OptimizerLaw | Reason:
    """The law of an optimizer's class, or of the class whose update it inherits unchanged.

    Returns:
        The law; or the reason, if its update is not known.
    """
    kind = type(optimizer)
    known = _nearest_known(kind)
    if known is None:
        return Reason(f"how the {kind.__name__} makes its steps is not known.")
    for derived in kind.__mro__[: kind.__mro__.index(known)]:
        for name in vars(derived).keys() - _HARMLESS:
            if not name.startswith("__") and _is_overridden(derived, known, name):
                return Reason(
                    f"the {kind.__name__} overrides {name} of {known.__name__}, and how it makes "
                    "its steps is not known."
                )
    return _LAWS[known]


def parameter_shaped_state(optimizer: Optimizer) -> set[str]:
    """The entries of state that must have the shape of their parameter, as far as is known."""
    known = _nearest_known(type(optimizer))
    return _LAWS[known].parameter_shaped() if known is not None else set()


def kind_of_state(optimizer: Optimizer, name: str) -> Kind | None:
    """How an entry of the state follows a tie, or None if that is not known."""
    known = _nearest_known(type(unwrapped(optimizer)))
    return _LAWS[known].state.get(name) if known is not None else None


def why_no_steps(optimizer: Optimizer) -> Reason | None:
    """Why an optimizer should not step free values at all; None if it may."""
    known = _nearest_known(type(optimizer))
    return _LAWS[known].refused if known is not None and _LAWS[known].even_fresh else None


def _nearest_known(kind: type) -> type[Optimizer] | None:
    return next((c for c in kind.__mro__ if c in _LAWS), None)


def _is_overridden(derived: type, known: type, name: str) -> bool:
    """Whether a subclass replaces something that the update of ``known`` may be made in."""
    return hasattr(known, name) and without_hooks(getattr(derived, name)) is not without_hooks(
        getattr(known, name)
    )


# Torch's own --------------------------------------------------------------------------------

_ADAM: dict[str, Kind] = {
    "step": "scalar",
    "exp_avg": "gradient",
    "exp_avg_sq": "squared gradient",
    "max_exp_avg_sq": "squared gradient",
}
_TORCHS_OWN: dict[type[Optimizer], OptimizerLaw] = {
    optim.SGD: OptimizerLaw({"momentum_buffer": "gradient"}, ("weight_decay",), normalized=False),
    optim.Adam: OptimizerLaw(_ADAM, ("weight_decay",), "decoupled_weight_decay"),
    optim.AdamW: OptimizerLaw(_ADAM),
    optim.NAdam: OptimizerLaw(
        {
            "step": "scalar",
            "mu_product": "scalar",
            "exp_avg": "gradient",
            "exp_avg_sq": "squared gradient",
        },
        ("weight_decay",),
        "decoupled_weight_decay",
    ),
    # its first steps, five with the default betas, are those of SGD
    optim.RAdam: OptimizerLaw(
        {"step": "scalar", "exp_avg": "gradient", "exp_avg_sq": "squared gradient"},
        ("weight_decay",),
        "decoupled_weight_decay",
    ),
    optim.Adamax: OptimizerLaw(
        {"step": "scalar", "exp_avg": "gradient", "exp_inf": "gradient magnitude"},
        ("weight_decay",),
    ),
    optim.RMSprop: OptimizerLaw(
        {
            "step": "scalar",
            "square_avg": "squared gradient",
            "grad_avg": "gradient",
            "momentum_buffer": "weight",  # it holds steps, which are normalized already
        },
        ("weight_decay",),
    ),
    optim.Adagrad: OptimizerLaw({"step": "scalar", "sum": "squared gradient"}, ("weight_decay",)),
    optim.Adadelta: OptimizerLaw(
        {
            "step": "scalar",
            "square_avg": "squared gradient",
            "acc_delta": "weight magnitude",  # squared steps
        },
        ("weight_decay",),
    ),
    # lambd is a decay that is added to the gradient, by another name
    optim.ASGD: OptimizerLaw(
        {"step": "scalar", "eta": "scalar", "mu": "scalar", "ax": "weight"},
        ("weight_decay", "lambd"),
        normalized=False,
    ),
    optim.Rprop: OptimizerLaw(
        {"step": "scalar", "prev": "gradient", "step_size": "weight magnitude"}
    ),
    optim.Adafactor: OptimizerLaw(
        refused=Reason(
            "Adafactor keeps the second moments of rows and columns, and the free values have "
            "other rows and columns."
        )
    ),
    optim.LBFGS: OptimizerLaw(
        refused=Reason("LBFGS holds one history for all of its parameters, which cannot follow."),
        joint=True,
    ),
    optim.SparseAdam: OptimizerLaw(
        refused=Reason(
            "SparseAdam takes sparse gradients only, and those of a tied weight are dense.",
            "Leave the tensor as it is, or build another optimizer after tying.",
        ),
        even_fresh=True,
    ),
}
if hasattr(optim, "Muon"):  # since torch 2.9
    _TORCHS_OWN[optim.Muon] = OptimizerLaw(
        refused=Reason(
            "Muon orthogonalizes the weight matrix, and the free values are not that matrix.",
            "Build Muon after tying, from the matrices that are not tied (tiedparam.owner tells "
            "which), and another optimizer from the free values.",
        ),
        even_fresh=True,
    )
_LAWS.update(_TORCHS_OWN)
