"""PEFT: LoRA adapters on tied layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

X = torch.linspace(-1, 1, 40).reshape(5, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def base(rule) -> Net:
    torch.manual_seed(0)
    model = Net()
    options = {"source": model.first} if rule == "copy" else {}
    tp.register_tie(model.second, rule, root=model, **options)
    return model


def adapted(rule: str):
    config = peft.LoraConfig(r=2, target_modules=["second"], init_lora_weights=False)
    model = peft.get_peft_model(base(rule), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


rules = pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "copy"])


@pytest.mark.feature(
    "Libraries", "PEFT: LoRA adapters on a tied layer, trained, saved, loaded", needs="peft"
)
@rules
def test_adapters_train_and_the_tie_stays(rule, tmp_path):
    model = adapted(rule)
    plain = base(rule)
    assert not torch.allclose(model(X), plain(X))
    with model.disable_adapter():
        # the tied weights were not touched (with gradients another form may compute)
        torch.testing.assert_close(model(X), plain(X))
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(rule), tmp_path)
    torch.testing.assert_close(again(X), model(X))


@pytest.mark.feature(
    "Libraries",
    "PEFT: merging an adapter into a tied layer",
    needs="peft",
    refused="the sum breaks the law, and the adapter would be lost; untie first, then merge",
)
@pytest.mark.parametrize("merge", ["merge_adapter", "safe_merge", "merge_and_unload"])
@rules
def test_s25_merging_is_refused_and_works_after_untying(rule, merge):
    model = adapted(rule)
    expected = model(X)
    run = {
        "merge_adapter": lambda: model.merge_adapter(),
        "safe_merge": lambda: model.merge_adapter(safe_merge=True),
        "merge_and_unload": lambda: model.merge_and_unload(),
    }[merge]
    with pytest.raises(tp.TieError, match="would be lost.*or call remove_tie first"):
        run()
    torch.testing.assert_close(model(X), expected)  # nothing is merged, nothing is lost
    tp.remove_tie(model.base_model.model.second.base_layer)
    run()
    merged = model.base_model.model if merge == "merge_and_unload" else model
    torch.testing.assert_close(merged(X), expected, rtol=1e-4, atol=1e-5)
    if merge == "merge_and_unload":
        assert type(merged.second) is nn.Linear


def adapted_in_both(rule):
    """A model whose first layer has two adapters, and its tied second one of them."""
    model = peft.get_peft_model(
        base(rule),
        peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False),
    )
    model.add_adapter(
        "elsewhere", peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    )
    return model


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@rules
def test_a_refused_merge_leaves_the_layers_before_the_tied_one_as_they_were(rule, merge):
    model = adapted_in_both(rule)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(tp.TieError, match="'second.base_layer.weight' is tied.*remove_tie first"):
        getattr(model, merge)()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("active", [True, False])
def test_adapters_of_other_layers_merge_beside_a_tied_one(active):
    model = adapted_in_both("row_repeat")
    if active:
        model.set_adapter("elsewhere")
    expected = model(X)
    model.merge_adapter(None if active else ["elsewhere"])
    first = model.base_model.model.first
    assert first.merged_adapters == ["elsewhere"]
    if active:
        torch.testing.assert_close(model(X), expected)


def test_a_layer_of_which_only_the_bias_is_tied_takes_a_merge():
    model = Net()
    tp.register_tie(model.second, "row_repeat", tensor_name="bias")
    config = peft.LoraConfig(r=2, target_modules=["second"], init_lora_weights=False)
    adapted_model = peft.get_peft_model(model, config)
    expected = adapted_model(X)
    torch.testing.assert_close(adapted_model.merge_and_unload()(X), expected)


@pytest.mark.feature("Libraries", "PEFT: tying the adapter's own matrices", needs="peft")
def test_an_adapter_can_be_tied():
    model = adapted("flip_sym")
    adapter = model.base_model.model.second.lora_B["default"]
    tp.register_tie(adapter, "row_repeat", groups=2)
    model(X).sum().backward()
    assert adapter.parametrizations.weight.original0.grad is not None


def on_a_parameter(rule):
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["second.weight"], init_lora_weights=False
    )
    return peft.get_peft_model(base(rule), config)


@pytest.mark.feature(
    "Libraries",
    "PEFT: LoRA on a tied parameter (`target_parameters`)",
    needs="peft",
    limit="merging is refused, as for adapters on a tied layer; untie first",
)
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "copy", "two values"])
def test_s51_target_parameters_adapt_the_effective_weight(rule):
    model = on_a_parameter(TwoValues if rule == "two values" else rule)
    second = model.base_model.model.second.base_layer
    twin = Net()
    dense = tp.dense_state_dict(model.base_model.model)
    wrapper = model.base_model.model.second
    delta = wrapper.get_delta_weight("default").detach()
    twin.load_state_dict(
        {
            "first.weight": dense["first.weight"],
            "first.bias": dense["first.bias"],
            "second.weight": dense["second.base_layer.weight"] + delta,
            "second.bias": dense["second.base_layer.bias"],
        }
    )
    before = [p.detach().clone() for p in second.parameters()]
    torch.testing.assert_close(model(X), twin(X))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(before, second.parameters(), strict=True))
    assert len(second.parametrizations.weight) == 1  # what PEFT stacks is gone after the forward
    expected = model(X)
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(tp.TieError, match="would be lost"):
            merge()
        torch.testing.assert_close(model(X), expected)
    tp.remove_tie(second)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


class TwoValues(tp.Rule):
    """The upper rows are one value, the lower ones another: two tensors of free values."""

    law = "W[o, c] = a for o < out/2, else b"

    def free_shapes(self):
        return (1, 1), (1, 1)

    def forward(self, upper, lower):
        rows, columns = self.bound_layout.shape
        return torch.cat([v.expand(rows // 2, columns) for v in (upper, lower)])

    def symmetries(self, weight):
        yield weight.flip(1)
