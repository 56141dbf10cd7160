"""An installed tiedparam works: run by `.ci/run` in an environment that has only the wheel."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.resources import files
from pathlib import Path

import torch

import tiedparam as tp


def main() -> None:
    """Tie, train, save, load and untie every example of every rule."""
    where = Path(tp.__file__).resolve()
    assert where.is_relative_to(Path(sys.prefix).resolve()), f"imported from {where}"
    assert tp.__version__ == importlib.metadata.version("tiedparam")
    assert files("tiedparam").joinpath("py.typed").is_file()
    count = 0
    for rule_class in tp.available_rules().values():
        for example in rule_class.examples():
            model = example.build()
            layer = model.get_submodule(example.path)
            tp.register_tie(layer, rule_class, example.tensor_name, root=model, **example.options)
            rule = tp.get_tie(layer, example.tensor_name)
            optimizer = torch.optim.Adam(model.parameters())
            loss = getattr(layer, example.tensor_name).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            weight = getattr(layer, example.tensor_name).detach()
            symmetries = list(rule.symmetries(weight))
            assert symmetries
            # where the values are solved for, up to rounding
            is_fitted = rule.bilinear or (rule.reads_layers and rule.free_count > 0)
            same = torch.allclose if is_fitted else torch.equal
            assert all(same(other, weight) for other in symmetries)
            model.load_state_dict(tp.dense_state_dict(model))
            model.load_state_dict(model.state_dict())
            tp.remove_tie(layer, example.tensor_name, optimizer=optimizer)
            assert same(getattr(layer, example.tensor_name), weight)
            count += 1
    assert count >= len(tp.available_rules()) > 0
    print(f"smoke test: tiedparam {tp.__version__} from {where.parent}, {count} examples")


if __name__ == "__main__":
    main()
