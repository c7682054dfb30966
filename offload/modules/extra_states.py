"""What modules keep beside parameters and buffers (`torch.nn.Module.get_extra_state`), as one thing that commits
track."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

#: The name under which it is tracked.
NAME: Final = "extra states of modules"


class ExtraStates:
    """The extra states of one model's modules, by the modules' names; false where no module has one."""

    def __init__(self, model: nn.Module) -> None:
        plain = nn.Module.get_extra_state
        self._modules = {
            name: module for name, module in model.named_modules() if type(module).get_extra_state is not plain
        }

    def __bool__(self) -> bool:
        return bool(self._modules)

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return {name: module.get_extra_state() for name, module in self._modules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each module its own back."""
        for name, module in self._modules.items():
            module.set_extra_state(state_dict[name])
