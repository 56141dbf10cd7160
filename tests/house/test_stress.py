"""Random sequences of everything that can be done to a tied model.

After each step the laws hold to the bit and the output is that of a stock model with the
effective weights, or a documented error was raised and nothing had changed. CI runs 2,000
sequences, always the same ones. More, and random ones:

    TIEDPARAM_SEQUENCES=20000 python -m pytest tests/house/test_stress.py -n 2
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tiedparam as tp

LAYERS = ["0", "1", "3", "4"]
LAWS = {
    "0": [("flip_sym", {}), ("channel_shared", {"over": "in"}), ("row_repeat", {}),
          ("copy", {"source": "1"}), ("flip_sym", {"cache": True})],
    "1": [("squared_copy", {"source": "0"}), ("channel_shared", {"over": "all"}),
          ("channel_shared", {"over": "out", "compute": "reduced"}), ("flip_sym", {}),
          ("flip_sym", {"cache": True})],
    "3": [("row_repeat", {}), ("row_repeat", {"groups": 2}), ("flip_sym", {}),
          ("copy", {"source": "4", "fn": torch.t}), ("channel_shared", {"over": "groups"})],
    "4": [("flip_sym", {}), ("squared_copy", {"source": "3"}), ("row_repeat", {}),
          ("flip_sym", {"cache": True})],
}  # fmt: skip
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
IMAGE = torch.randn(3, 2, 1, 2, generator=torch.Generator().manual_seed(0))


def stock_model():
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(4, 4), nn.Linear(4, 4, bias=False),
    )  # fmt: skip


TWIN = stock_model()  # loaded anew for each comparison


def bits(tensor):
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return (str(plain.dtype), tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes())


class TiedModel(RuleBasedStateMachine):
    """A model, its optimizer, and what was saved of it."""

    @initialize(seed=st.integers(0, 2**16), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def start(self, seed, optimizer):
        torch.manual_seed(seed)
        self.model = stock_model()
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.optimizer = self.make_optimizer(self.model.parameters())
        self.saved = []

    # What may be done ---------------------------------------------------------------------

    @rule(
        path=st.sampled_from(LAYERS),
        law=st.integers(0, 4),
        init=st.sampled_from(["project", "project", "rescale", "exact"]),
        moves=st.booleans(),
    )
    def tie(self, path, law, init, moves):
        laws = LAWS[path]
        name, options = laws[law % len(laws)]
        with self.refusal_changes_nothing():
            tp.register_tie(
                self.model.get_submodule(path), name, init=init, root=self.model,
                optimizer=self.optimizer if moves else None, **options,
            )  # fmt: skip
            self.follow(moves)

    @rule(path=st.sampled_from(LAYERS), moves=st.booleans())
    def untie(self, path, moves):
        with self.refusal_changes_nothing():
            tp.remove_tie(
                self.model.get_submodule(path), optimizer=self.optimizer if moves else None
            )
            self.follow(moves)

    @rule(path=st.sampled_from(LAYERS))
    def remove_with_torch(self, path):
        layer = self.model.get_submodule(path)
        if parametrize.is_parametrized(layer, "weight"):
            weight = layer.weight.detach().clone()
            parametrize.remove_parametrizations(layer, "weight")
            if not self.model.training:
                assert torch.equal(layer.weight, weight)
            self.follow(False)

    @rule(path=st.sampled_from(LAYERS))
    def stack_spectral_norm(self, path):
        layer = self.model.get_submodule(path)
        if tp.is_tied(layer) and len(layer.parametrizations.weight) == 1:
            parametrizations.spectral_norm(layer, "weight")

    @rule(path=st.sampled_from(LAYERS), kind=st.sampled_from(["weight_norm", "orthogonal"]))
    def stack_what_cannot_compute(self, path, kind):
        layer = self.model.get_submodule(path)
        if tp.is_tied(layer):
            with self.refusal_changes_nothing(expected=True):
                getattr(parametrizations, kind)(layer, "weight")

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.model.train(mode)

    @rule()
    def step(self):
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        self.optimizer.zero_grad()
        self.output().float().square().mean().backward()
        before = [bits(p) for p in self.model.parameters()]
        try:
            self.optimizer.step()
        except tp.TieError as error:
            if "still holds" not in str(error):
                raise
            assert before == [bits(p) for p in self.model.parameters()]
            self.follow(False)

    @rule(freeze=st.booleans(), path=st.sampled_from(["", *LAYERS]))
    def freeze(self, freeze, path):
        self.model.get_submodule(path).requires_grad_(not freeze)

    @rule(dense=st.booleans())
    def save(self, dense):
        state = tp.dense_state_dict(self.model) if dense else self.model.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved.append(buffer.getvalue())

    @precondition(lambda self: getattr(self, "saved", None))
    @rule(data=st.data(), strict=st.booleans(), assign=st.booleans())
    def load(self, data, strict, assign):
        state = torch.load(io.BytesIO(data.draw(st.sampled_from(self.saved))))
        before = self.tied_bits()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tp.TieWarning)
                self.model.load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            # torch names what is missing or unexpected in the layers that fitted; ours did not
            if not self.unchanged_as_said(before, str(error)):
                raise
        if assign:
            # entries that were not in the file keep their dtype beside those that were assigned,
            # in plain torch as well, and such a model computes nothing
            self.model.to(next(self.model.parameters()).dtype)
        self.follow(not assign)

    @rule(values=st.sampled_from(["lawful", "random", "NaN", "misshapen"]),
          path=st.sampled_from(LAYERS), project=st.booleans())  # fmt: skip
    def assign(self, values, path, project):
        layer = self.model.get_submodule(path)
        if not tp.is_tied(layer):
            return
        with torch.no_grad():
            value = layer.weight.detach().clone()
        if values == "lawful":
            value = value * 2
        elif values == "random":
            value = torch.randn_like(value)
        elif values == "misshapen":
            value = value[:1]
        elif not project:
            value[0, 0] = float("nan")
        with self.refusal_changes_nothing():
            tp.assign_(layer, value, project=project)

    @rule(path=st.sampled_from(LAYERS), how=st.sampled_from(["init_", "reset", "apply"]))
    def initialise(self, path, how):
        layer = self.model.get_submodule(path)
        with self.refusal_changes_nothing():
            if how == "init_":
                tp.init_(layer, nn.init.xavier_normal_)
            elif how == "reset":
                layer.reset_parameters()
            else:
                self.model.apply(lambda m: getattr(m, "reset_parameters", lambda: None)())

    @rule(path=st.sampled_from(LAYERS))
    def write_in_place(self, path):
        layer = self.model.get_submodule(path)
        if tp.is_tied(layer):
            before = self.fingerprint()
            with pytest.raises(tp.TieError, match="would be lost"), torch.no_grad():
                layer.weight.mul_(2)
            assert self.fingerprint() == before

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def replace_by_a_copy(self, how):
        if how == "deepcopy":
            twin = copy.deepcopy(self.model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        before = self.fingerprint()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert self.fingerprint() == before  # they share nothing
        with torch.no_grad():
            for mine, other in zip(self.model.parameters(), twin.parameters(), strict=True):
                other.copy_(mine)
        self.model = twin
        self.follow(False)

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def cast(self, dtype):
        self.model.to(dtype)
        self.follow(False)

    @rule()
    def freeze_for_inference(self):
        self.model.eval()
        with torch.no_grad():
            expected = self.output()
            with tp.frozen(self.model):
                # a frozen weight is contiguous: a product with it may round in another order
                self.assert_close(self.output(), expected)
                if any(tp.is_tied(module) for module in self.model):
                    with self.refusal_changes_nothing(expected=True):
                        self.model.train()
                    assert not self.model.training

    @rule()
    def dictionaries_there_and_back(self):
        if any(len(values) > 1 for values in self.parametrizations()):
            return
        tied = self.model.state_dict()
        dense = tp.untie_state_dict(self.model, tied)
        stock = stock_model().to(next(self.model.parameters()).dtype)
        stock.load_state_dict(dense)
        back = tp.tie_state_dict(self.model, dense)
        assert sorted(back) == sorted(tied)
        for key, value in tied.items():
            torch.testing.assert_close(back[key], value, rtol=0, atol=0)

    # What must hold ------------------------------------------------------------------------

    @invariant()
    def the_laws_hold_to_the_bit(self):
        if not hasattr(self, "model"):
            return
        mode = self.model.training
        self.model.eval()  # in training mode a spectrally normed source changes at every read
        for layer in self.model.modules():
            if tp.is_tied(layer, recurse=False):
                tie = tp.get_tie(layer)
                with torch.no_grad():
                    weight = tie(
                        *tie.read(), *layer.parametrizations.weight.parameters(recurse=False)
                    )
                    for symmetric in tie.symmetries(weight):
                        assert weight.isnan().any() or torch.equal(symmetric, weight)
        self.model.train(mode)

    @invariant()
    def the_output_is_that_of_a_stock_model(self):
        if not hasattr(self, "model"):
            return
        mode = self.model.training
        self.model.eval()  # in training mode spectral_norm changes at every read
        with torch.no_grad():
            dense = tp.dense_state_dict(self.model)
            twin = TWIN.to(next(iter(dense.values())).dtype)
            twin.load_state_dict(dense)
            self.assert_close(self.output(), twin(IMAGE.to(twin[0].weight.dtype)))
        for module, stock in zip(self.model, twin, strict=True):
            assert isinstance(module, type(stock))
            assert (
                tp.is_tied(module)
                or type(module) is type(stock)
                or len(module.parametrizations.weight)
            )
        self.model.train(mode)

    # Helpers -------------------------------------------------------------------------------

    def output(self):
        return self.model(IMAGE.to(next(self.model.parameters()).dtype))

    @staticmethod
    def assert_close(output, expected):
        coarse = output.dtype is torch.bfloat16
        tolerance = {"rtol": 5e-2, "atol": 5e-2} if coarse else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(output, expected, equal_nan=True, **tolerance)

    def parametrizations(self):
        return [
            layer.parametrizations.weight
            for layer in self.model
            if parametrize.is_parametrized(layer, "weight")
        ]

    def follow(self, moved):
        """A new optimizer, where the old one does not hold the model's parameters."""
        if not moved:
            self.optimizer = self.make_optimizer(self.model.parameters())
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in self.model.parameters()} <= held

    def tied_bits(self):
        return {
            path: [bits(p) for p in self.model.get_submodule(path).parametrizations.parameters()]
            for path in LAYERS
            if tp.is_tied(self.model.get_submodule(path))
        }

    def unchanged_as_said(self, before, message):
        """Whether tied tensors that the message complains of are as they were."""
        named = [path for path in before if f"'{path}.weight" in message]
        after = self.tied_bits()
        return all(before[path] == after[path] for path in named)

    def fingerprint(self):
        optimizer = self.optimizer
        index = {id(p): i for i, p in enumerate(self.model.parameters())}
        return (
            [(name, type(module)) for name, module in self.model.named_modules()],
            [(name, bits(p), p.requires_grad) for name, p in self.model.named_parameters()],
            # in training mode every read of a spectrally normed weight changes its buffers
            [(n, bits(b)) for n, b in self.model.named_buffers() if not self.model.training],
            list(self.model.state_dict()),
            [[index.get(id(p)) for p in g["params"]] for g in optimizer.param_groups],
            sorted(
                (
                    (index.get(id(p), -1), key, bits(value) if torch.is_tensor(value) else value)
                    for p, state in optimizer.state.items()
                    for key, value in state.items()
                ),
                key=str,
            ),
        )

    def refusal_changes_nothing(self, *, expected=False):
        return _Refusal(self, expected)


class _Refusal:
    def __init__(self, machine, expected):
        self.machine, self.expected = machine, expected

    def __enter__(self):
        self.before = self.machine.fingerprint()

    def __exit__(self, kind, error, trace):
        if kind is None:
            assert not self.expected, "this should have been refused"
            return False
        if not issubclass(kind, tp.TieError):
            return False
        assert self.machine.fingerprint() == self.before
        return True


SHARES = 8
SEQUENCES = int(os.environ.get("TIEDPARAM_SEQUENCES", "2000"))


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_any_sequence_of_operations_keeps_the_promises(share):
    class Share(TiedModel):
        """Its name is part of what hypothesis draws from: every share has its own sequences."""

    Share.__name__ = Share.__qualname__ = f"TiedModel{share}"
    run_state_machine_as_test(
        Share,
        settings=settings(
            max_examples=-(-SEQUENCES // SHARES),
            stateful_step_count=15,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            derandomize="TIEDPARAM_SEQUENCES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
