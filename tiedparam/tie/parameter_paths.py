"""Where the layers and Parameters of a model lie: looked up once, for one tie or for many."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.util.errors import describe, key_of
from tiedparam.util.torch_private import lists_in_tables, parameters_of


class Places:
    """The paths of a model's layers, and who holds which Parameter.

    Args:
        root: the model.

    What is noted stays right while layers of the model are tied: their paths stay, and
    Parameters that other layers hold are left alone.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._paths: dict[nn.Module, str] = {}
        self._kinds: dict[Callable[[nn.Module], bool], list[nn.Module]] = {}
        self._holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for path, module in root.named_modules():
            self._paths[module] = path
            for name, parameter in parameters_of(module).items():
                if parameter is not None:
                    self._holders.setdefault(parameter, []).append((module, name))

    def modules_that(self, are: Callable[[nn.Module], bool]) -> list[nn.Module]:
        """All modules of the model of some kind, such as wrappers: tying makes none of these."""
        if are not in self._kinds:
            self._kinds[are] = [module for module in self._paths if are(module)]
        return self._kinds[are]

    def path_of(self, module: nn.Module) -> str | None:
        """Where a module lies in the model; None if it does not."""
        if module not in self._paths and isinstance(module, parametrize.ParametrizationList):
            for layer, path in self._paths.items():  # of a tie that was made since
                for name, values in lists_in_tables(layer).items():
                    if values is module:
                        self._paths[module] = key_of(path, f"parametrizations.{name}")
                        return self._paths[module]
        return self._paths.get(module)

    def describe(self, layer: nn.Module, tensor_name: str) -> str:
        """Name a tensor by its path in the model, or by its layer if it is not in there."""
        path = self.path_of(layer)
        if path is None:
            return describe(layer, tensor_name)
        return f"'{path}.{tensor_name}'" if path else f"'{tensor_name}'"

    def other_holders(
        self, layer: nn.Module, tensor_name: str, parameter: nn.Parameter
    ) -> Iterator[tuple[nn.Module, str]]:
        """Where else in the model this Parameter stands."""
        for module, name in self._holders.get(parameter, ()):
            if not (module is layer and name == tensor_name):
                yield module, name
