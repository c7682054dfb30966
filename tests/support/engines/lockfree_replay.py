"""What an engine in lock-free mode did, step by step, and the same again in plain PyTorch.

The order in which the updater and the training thread get on is not the same in two runs; what they computed must
follow from it exactly. `History` records it: which steps' gradients each version was made of, and which version each
step used. `Replay` does the same steps with a torch optimizer for each parameter, knowing nothing of pages or threads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from parity import Factory, schedule
from torch import Tensor, nn
from updater_gates import UpdaterGates

from optim.unit import Unit

Batch = tuple[Tensor, Tensor]
#: More than any run here has.
MOST_STEPS = 1 << 20


class History:
    """Records an engine through its gates, from its first step on. Checks the bound at every first use.

    Attributes:
        parameters: names of each unit's parameters, by the unit's name.
        published: last step of each version of a unit, in order.
        used: for each step and each unit used in it, the last step whose update it saw.
        later: for each step and each forward pass after its first, counted from 1, the same of units that have adopted
            more since.
        exact: for each step, the units that had to have seen all.
    """

    def __init__(self, gates: UpdaterGates, max_staleness: int, model: nn.Module) -> None:
        updater = gates.updater
        units = [unit for unit in updater._index.units if unit.trained]
        self.parameters = {unit.name: [slot.name for slot in unit.slots if slot.group >= 0] for unit in units}
        # What is updated on time has a version of every step.
        self.published: dict[str, Sequence[int]] = {
            unit.name: [] if unit in updater._channels else range(1, MOST_STEPS) for unit in units
        }
        self.used: list[dict[str, int]] = [{}]
        self.later: list[dict[int, dict[str, int]]] = [{}]
        self.exact: list[set[str]] = [set()]
        seen: dict[str, int] = {}
        passes = _counted_passes(model)
        before_use, step = updater.before_use, updater.step

        def published(point: str, unit: Unit) -> None:
            if point == "published":
                versions = self.published[unit.name]
                assert isinstance(versions, list)
                versions.append(updater._channels[unit].clock.applied)

        def used(unit: Unit) -> None:
            channel = updater._channels.get(unit)
            if channel is not None and unit.name not in self.used[-1] and not updater._bound.allowed(unit):
                self.exact[-1].add(unit.name)
            before_use(unit)
            if channel is not None and unit.name not in self.used[-1]:
                clock = channel.clock
                assert 0 <= clock.adopted <= clock.applied <= clock.produced
                assert clock.staleness <= max_staleness, (
                    f"{unit.name} misses {clock.staleness} steps, {max_staleness} may be"
                )
                self.used[-1][unit.name] = seen[unit.name] = clock.adopted
            elif channel is not None and seen[unit.name] != channel.clock.adopted:
                self.later[-1].setdefault(passes[0], {})[unit.name] = seen[unit.name] = channel.clock.adopted
            if channel is None and unit.trained and unit.name not in self.used[-1]:
                self.exact[-1].add(unit.name)
                self.used[-1][unit.name] = max(slot.steps for slot in unit.slots)

        def stepped() -> None:
            step()
            self.used.append({})
            self.later.append({})
            passes[0] = 0
            self.exact.append(set())

        gates.on_pass = published
        updater.before_use = used  # type: ignore[method-assign]
        updater.step = stepped  # type: ignore[method-assign]


def _counted_passes(model: nn.Module) -> list[int]:
    """A list of one number, which counts forward passes."""
    passes = [0]

    def begin_pass(_module: nn.Module, _args: object) -> None:
        passes[0] += 1

    model.register_forward_pre_hook(begin_pass)
    return passes


@dataclass
class _Given:
    """One parameter's gradient of one step, with that step's factor and learning rate, and how far ahead it asks to
    be."""

    gradient: Tensor
    coefficient: Tensor | None
    lr: float
    lookahead_steps: int


@dataclass
class _UnitReplay:
    """A unit's updates so far, and the gradients of all its steps."""

    names: list[str]
    versions: Iterator[int]
    applied: int = 0
    given: list[dict[str, _Given]] = field(default_factory=list)


class Replay:
    """The steps of a history, done again.

    Args:
        plain: the model as it was before the engine had it, in fp32.
        factory: what makes its torch optimizer.
        clip_norm: of the engine.
        dtype: in which the model computes; updates are made in fp32.
        constant_lr: whether the run was without `parity.schedule`.
    """

    def __init__(
        self,
        plain: nn.Module,
        factory: Factory,
        history: History,
        *,
        clip_norm: float | None = None,
        dtype: torch.dtype = torch.float32,
        constant_lr: bool = False,
    ) -> None:
        self.plain = plain
        self._clip_norm = clip_norm
        self._used, self._later = history.used, history.later
        self._exact = history.exact
        self._units = {
            name: _UnitReplay(names, iter(history.published[name])) for name, names in history.parameters.items()
        }
        self._template = factory(plain.parameters())
        self._schedule = None if constant_lr else schedule(self._template)
        names = {parameter: name for name, parameter in plain.named_parameters()}
        self._masters: dict[str, nn.Parameter] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._groups: dict[str, int] = {}
        self._ahead: dict[str, tuple[float, ...]] = {}
        for number, group in enumerate(self._template.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                master = nn.Parameter(parameter.detach().clone())
                name = names[parameter]
                self._masters[name], self._groups[name] = master, number
                self._optimizers[name] = type(self._template)([{"params": [master], **options}])  # type: ignore[call-arg]
        plain.to(dtype)

    def run(self, steps: Iterable[Sequence[Batch]]) -> list[Tensor]:
        """Do every step, each with its micro-batches; returns all losses."""
        losses = []
        for number, micro_batches in enumerate(steps):
            for name, last in self._used[number].items():
                self._advance(self._units[name], last)
            for made, batch in enumerate(micro_batches, 1):
                for name, last in self._later[number].get(made, {}).items():
                    self._advance(self._units[name], last)
                loss = self.plain(*batch)
                (loss / len(micro_batches)).backward()
                losses.append(loss.detach())
            self._take_gradients(self._exact[number])
        for unit in self._units.values():
            self._advance(unit, len(unit.given))
        return losses

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The states of each parameter that has any."""
        return {name: dict(optimizer.state[self._masters[name]]) for name, optimizer in self._optimizers.items()}

    def _take_gradients(self, exact: set[str]) -> None:
        parameters = {
            name: p for name, p in self.plain.named_parameters() if p.grad is not None and name in self._masters
        }
        coefficient = None
        if self._clip_norm is not None:
            total = torch.nn.utils.get_total_norm([p.grad.float() for p in parameters.values() if p.grad is not None])
            coefficient = torch.clamp(self._clip_norm / (total + 1e-6), max=1.0)
        for unit_name, unit in self._units.items():
            given: dict[str, _Given] = {}
            for name in unit.names:
                if name in parameters:
                    gradient = parameters[name].grad
                    assert gradient is not None
                    group = self._template.param_groups[self._groups[name]]
                    further = 0 if unit_name in exact or group.get("nesterov") else 1
                    given[name] = _Given(gradient, coefficient, group["lr"], len(unit.given) - unit.applied + further)
            if given:
                unit.given.append(given)
        for parameter in self.plain.parameters():
            parameter.grad = None
        self._template.step()
        if self._schedule is not None:
            self._schedule.step()

    def _advance(self, unit: _UnitReplay, last: int) -> None:
        """Make a unit's updates, version by version as the engine did, up to step ``last``; the model then has them."""
        while unit.applied < last:
            following = next(unit.versions)
            for name in unit.names:
                parts = [given[name] for given in unit.given[unit.applied : following] if name in given]
                if parts:
                    self._update(name, parts)
            unit.applied = following
        assert unit.applied == last, f"the version of step {last} was never published"

    def _update(self, name: str, parts: list[_Given]) -> None:
        master, optimizer = self._masters[name], self._optimizers[name]
        if len(parts) == 1:
            mean = parts[0].gradient.float()
            mean = mean if parts[0].coefficient is None else mean * parts[0].coefficient
        else:
            scaled = [p.gradient if p.coefficient is None else p.gradient.clone().mul_(p.coefficient) for p in parts]
            total = scaled[0].clone()
            for later in scaled[1:]:
                total.add_(later)
            mean = total.float() * (1 / len(parts))
        momentum = _Momentum(optimizer, master)
        if name in self._ahead:
            momentum.move(self._ahead.pop(name), back=True)
        master.grad = mean
        lookahead_steps = sum(part.lookahead_steps for part in parts) / len(parts)
        lrs = [part.lr for part in parts]
        *first, last = lrs if isinstance(optimizer, torch.optim.SGD) else [_merged(lrs)]
        group = optimizer.param_groups[0]
        for lr in first:
            group["lr"] = lr
            optimizer.step()
        if last == 0:
            lookahead_steps = 0
        at_once = not group.get("nesterov", False)
        further, decay = (last * (1 + momentum.decays(lookahead_steps)) if at_once else last), group["weight_decay"]
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        group.update(lr=further, weight_decay=decay * (last / further) if decoupled and lookahead_steps else decay)
        optimizer.step()
        group.update(lr=last, weight_decay=decay)
        if lookahead_steps:
            self._ahead[name] = momentum.reach(lookahead_steps)
            if not at_once:
                momentum.move(self._ahead[name], back=False)
        with torch.no_grad():
            self.plain.get_parameter(name).copy_(master)


def _merged(lrs: Sequence[float]) -> float:
    return lrs[0] if len(lrs) == 1 else math.fsum(lrs) / len(lrs) * len(lrs) ** 0.25


class _Momentum:
    """Moves a parameter as far as an optimizer's momentum alone would take it."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        self._group, self._state, self._parameter = optimizer.param_groups[0], optimizer.state[parameter], parameter

    def decays(self, n_steps: float) -> float:
        """What momentum alone makes of one step in so many."""
        group = self._group
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        whole = math.floor(n_steps)
        return math.fsum(beta**k for k in range(1, whole + 1)) + (n_steps - whole) * beta ** (whole + 1)

    def reach(self, n_steps: float) -> tuple[float, ...]:
        """Learning rate times the decays of so many steps and, for Adam, the corrections of both moments."""
        group = self._group
        if "betas" not in group:
            return (group["lr"] * self.decays(n_steps),)
        (beta1, beta2), made = group["betas"], float(self._state["step"])
        reach = group["lr"] * self.decays(n_steps)
        root = math.sqrt(1 - beta2**made)
        return reach * root / (1 - beta1**made), self._group["eps"] * root

    @torch.no_grad()
    def move(self, reach: tuple[float, ...], *, back: bool) -> None:
        """There or back."""
        sign = 1 if back else -1
        if len(reach) == 1:
            self._parameter.add_(self._state["momentum_buffer"], alpha=sign * reach[0])
        else:
            width = self._state["exp_avg_sq"].sqrt().add_(reach[1])
            self._parameter.addcdiv_(self._state["exp_avg"], width, value=sign * reach[0])


def assert_replayed(replay: Replay, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The engine's parameters, buffers and optimizer states are those of the replay, bit for bit."""
    ours = model.state_dict()
    for name, value in replay.plain.state_dict().items():
        assert torch.equal(value, ours[name]), f"{name} differs"
    order = [name for group in optimizer.param_groups for name in _names(model, group["params"])]
    found = optimizer.state_dict()["state"]
    expected = {name: state for name, state in replay.states().items() if state}
    assert {order[number] for number in found} == set(expected), "not the same parameters have states"
    for number, state in found.items():
        for name, value in expected[order[number]].items():
            assert torch.equal(value, state[name]), f"{name} of {order[number]} differs"


def _names(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    known = defaultdict(str, {id(parameter): name for name, parameter in model.named_parameters()})
    return [known[id(parameter)] for parameter in parameters]
