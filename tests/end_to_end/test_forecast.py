"""`offload plan` against the engine: the same ops, units and pages, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from offload.cli import main
from offload.config import Config, ConfigError, load_config
from offload.cpu_attention import AttentionOfCpu
from offload.fit import Room, Taken, advice, taken_by
from offload.forecast import Forecast, Question, fit_rows, forecast, forecast_rows
from offload.kernels import CostMode, RatedKernels
from offload.launch import factory_of
from offload.live_storages import Holder, LiveStorages
from offload.rates import Rates, rates_of
from offload.rehearsal import RehearsalError, rehearsed
from pagemem.errors import BudgetError
from scheduler.durations import MEASURED_STEPS
from scheduler.plan import Plan
from scheduler.simulator import simulate
from scheduler.walk import Machine

HERE = __name__
PAGE_BYTES = 64 << 10
ROWS, TOKENS = 2, 16
EXAMPLE = Path(__file__).parents[2] / "examples" / "byte_gpt.toml"
#: Slow enough for the plan to matter: a step computes for about as long as its moves take.
RATES = Rates(flops=2e9, ram=2e9, ssd_read=4e8, ssd_write=4e8)
STEPS = 4


# ---- models that configurations of these tests name --------------------------------------------------------------------


class Block(nn.Module):
    """A layer whose weight is also used cut in two, through views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        first, second = self.up.weight.chunk(2)
        bias = self.up.bias.chunk(2)
        h = self.norm(x)
        hidden = torch.cat([nn.functional.linear(h, first, bias[0]), nn.functional.linear(h, second, bias[1])], -1)
        return x + self.down(hidden.relu())


class Viewed(nn.Module):
    """A tied language model of such blocks, some recomputed in backward."""

    def __init__(self, width: int = 64, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        hidden = self.tokens(x)
        for block in self.blocks:
            if self.recompute:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        logits = nn.functional.linear(hidden, self.tokens.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


class Looking(nn.Module):
    """Its forward depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Asks for a number."""
        hidden: Tensor = self.layer(torch.ones(4, 16))
        return hidden.sum() if float(hidden.detach().sum()) > 0 else -hidden.sum()


def gpt_config(folder: Path, ram: int, *, model: str = "offload.recipe:byte_gpt", dtype: str = "fp32", **sections: Any) -> Config:
    """A small GPT, or another model."""
    arguments = {"d_model": 96, "n_layer": 3, "n_head": 4, "seq": TOKENS} if model == "offload.recipe:byte_gpt" else {}
    arguments |= sections.pop("arguments", {})
    return load_config(
        {
            "memory": {"ram": ram, "page": PAGE_BYTES},
            "ssd": {"paths": [str(folder / "pages")]},
            "model": {"factory": model, "arguments": arguments, "dtype": dtype},
            "train": {"steps": 1, "batch": ROWS, "seq": TOKENS},
            **sections,
        }
    )


def trained(config: Config, steps: int = STEPS) -> tuple[offload.MemoryReport, int, Plan]:
    """What a real engine reports after some steps; the page-file pages when it was made; and its plan."""
    assert config.model is not None
    torch.manual_seed(1)
    with offload.deferred_init(config):
        model = factory_of("model", config.model.factory, config.model.arguments)()
    with offload.initialize(model, config) as engine:
        start = engine._store.mover.ssd.used_frames
        for _ in range(steps):
            for _ in range(config.update.accumulation):
                x = torch.randint(0, 256, (ROWS, TOKENS))
                engine.backward(engine(x, x))
            engine.optimizer.step()
        engine._store.driver.quiesce()
        plan = engine._store.driver.plan
        assert plan is not None and engine.stats().deviations == 0
        return engine.memory_report(), start, plan


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "clipped": {"update": {"clip_norm": 1.0}},
    "accumulated": {"update": {"accumulation": 2}},
    "at the step": {"update": {"start": "step"}},
    "sgd": {"optimizer": {"name": "sgd"}},
    "tied": {"arguments": {"tied": True}},
    "views": {"model": f"{HERE}:Viewed"},
    "recomputed": {"model": f"{HERE}:Viewed", "arguments": {"recompute": True}},
    "commits": {"commit": {"every_steps": 100, "keep": 3}},
}


LITTLE_RAM = 2 << 20


@pytest.mark.parametrize("ram", [LITTLE_RAM, 64 << 20], ids=["little RAM", "much RAM"])
@pytest.mark.parametrize("case", CASES)
def test_ops_and_pages_are_those_of_the_engine(case: str, ram: int, tmp_path: Path) -> None:
    """RAM to the page. What a plan never stores needs no room on the SSD, and what it stores depends on the times it was made with."""
    config = gpt_config(tmp_path, ram, **CASES[case])
    report, start_pages, plan = trained(config)
    found = forecast(config, RATES)
    host, ssd = report.tiers["host"], report.tiers["ssd"]
    assert found.page_bytes == report.page_bytes and found.start.ssd_pages == start_pages
    assert found.ops == plan.ops_per_step
    assert found.step.host_pages == host.planned_peak_pages == host.peak_pages
    assert found.step.host_bytes <= ram
    ssd_pages = (found.commit if case == "commits" else found.step).ssd_pages
    assert ssd_pages == pytest.approx(ssd.planned_peak_pages, rel=0.02 if ram == LITTLE_RAM else 0.0)
    if case != "commits":
        assert ssd.peak_pages == ssd.planned_peak_pages


def test_the_ops_and_their_accesses_are_those_of_the_engine(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 2 << 20, model=f"{HERE}:Viewed")
    _, _, plan = trained(config)
    assert config.model is not None
    with rehearsed(factory_of("model", config.model.factory, {}), config, CostMode(RatedKernels(1e9, 1e9)), (1e9, 1e9)) as engine:
        engine.rehearse(ROWS, TOKENS)
        assert engine.trace.keys == plan.keys[: plan.ops_per_step]
        longest = max(op.until - index for index, op in enumerate(engine.trace.ops))
        assert longest > 0  # The views of a weight that outlive their op have been seen.
        assert engine.stats().deviations == 0 and engine.stats().planned_steps == 1


@pytest.mark.parametrize("n_pages", [24, 36, 56])
def test_a_simulated_plan_moves_the_bytes_that_the_engine_moves(n_pages: int, tmp_path: Path) -> None:
    config = gpt_config(tmp_path, n_pages * PAGE_BYTES)
    assert config.model is not None
    torch.manual_seed(1)
    model = factory_of("model", config.model.factory, config.model.arguments)()
    x = torch.randint(0, 256, (ROWS, TOKENS))
    with offload.initialize(model, config) as engine:
        store = engine._store

        def train(steps: int) -> None:
            for _ in range(steps):
                engine.backward(engine(x, x))
                engine.step()

        train(3 + MEASURED_STEPS)  # The plan is made anew then, with the times of these steps.
        plan, trace = store.driver.plan, store.driver._trace
        assert plan is not None
        train(plan.n_steps)
        store.mover.settle()
        before = engine.stats()
        train(2 * plan.n_steps)
        store.mover.settle()
        moved = engine.stats().since(before)
        machine = Machine(store.mover.n_shared_frames, store.page_bytes, 1e9, 1e9)
        done = simulate(plan, trace, {t.id: t.n_bytes for t in store.mover.tensors.values()}, machine)
        assert moved.deviations == 0 and done.steady
        # Where a plan does not close, the driver stores what is in the wrong place only when its frames are wanted.
        share = 0.0 if plan.closed else 0.01
        assert moved.bytes_read / moved.steps == pytest.approx(done.read_bytes, rel=share, abs=0.01)
        assert moved.bytes_written / moved.steps == pytest.approx(done.written_bytes, rel=share, abs=0.01)


# ---- the forecast by itself --------------------------------------------------------------------------------------------


def test_pages_do_not_depend_on_the_rates(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 2 << 20)
    slow, fast = (forecast(config, Rates(flops, flops, 4e8, 4e8)) for flops in (2e7, 2e12))
    assert (slow.start, slow.step, slow.commit) == (fast.start, fast.step, fast.commit)
    assert slow.limiting == "compute" and fast.limiting in ("ssd_read", "ssd_write")
    assert slow.step_s > fast.step_s >= fast.read_bytes / 4e8
    assert sum(fast.waits_s.values()) > 0
    assert not (tmp_path / "pages").exists()


SGD: dict[str, Any] = {
    "weight_decay": 0.0, "momentum": 0.0, "lr": 1.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False,
}  # fmt: skip


def test_flops_of_a_linear_layer_and_bytes_of_the_rest() -> None:
    with torch.device("meta"), CostMode(RatedKernels(100.0, 10.0)) as cost:
        layer = nn.Linear(8, 4, bias=False)
        x, begun = torch.empty(5, 8), cost.seconds
        hidden = layer(x)
        assert cost.seconds == pytest.approx(begun + 2 * 5 * 8 * 4 / 100.0)
        begun = cost.seconds
        hidden.view(20).relu()
        assert cost.seconds == pytest.approx(begun + 2 * 20 * 4 / 10.0)
        begun = cost.seconds
        torch.ops.aten._fused_sgd_([torch.empty(6)], [torch.empty(6)], [], **SGD)
        assert cost.seconds == pytest.approx(begun + 2 * 2 * 6 * 4 / 10.0)


def test_with_the_ram_from_which_nothing_moves_nothing_moves_and_with_a_page_less_something_does(tmp_path: Path) -> None:
    resident = forecast(gpt_config(tmp_path, 64 << 20), RATES).resident_ram_bytes
    enough, less = (forecast(gpt_config(tmp_path, ram), RATES) for ram in (resident, resident - PAGE_BYTES))
    assert enough.resident_ram_bytes == resident
    assert (enough.read_bytes, enough.written_bytes) == (0.0, 0.0) and enough.step.host_bytes <= resident
    assert less.read_bytes > 0


def test_the_smallest_budget_is_forecast_and_one_byte_less_is_refused(tmp_path: Path) -> None:
    smallest = forecast(gpt_config(tmp_path, 2 << 20), RATES).smallest_ram_bytes
    found = forecast(gpt_config(tmp_path, smallest), RATES)
    assert found.ram_bytes == smallest and found.step.host_bytes <= smallest and found.read_bytes > 0
    with pytest.raises(BudgetError, match=f"set memory.ram to at least {smallest}$") as caught:
        forecast(gpt_config(tmp_path, smallest - 1), RATES)
    assert caught.value.smallest_bytes == smallest


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"update": {"mode": "lock-free"}}, 'update.mode is "lock-free": plan knows "exact" only'),
        ({"memory": {"ram": 2 << 20, "activations": 0}}, "memory.activations is set"),
        ({"model": None, "train": None}, "plan needs the sections model, train as well"),
    ],
)
def test_what_is_not_forecast_is_refused(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    raw = gpt_config(tmp_path, 2 << 20).model_dump()
    config = load_config({name: value for name, value in {**raw, **sections}.items() if value is not None})
    with pytest.raises(ConfigError, match=f"^{said}"):
        forecast(config, RATES)


def test_a_model_that_looks_at_values_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="^the model's step cannot be performed without values, on torch's meta device: "):
        forecast(gpt_config(tmp_path, 2 << 20, model=f"{HERE}:Looking"), RATES)


def test_rates_are_given_assumed_or_measured(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 2 << 20)
    assert rates_of(config, flops=1.0, ram=2.0, ssd_read=3.0, ssd_write=4.0) == Rates(1.0, 2.0, 3.0, 4.0)
    assert rates_of(config, flops=1.0, ram=2.0) == Rates(1.0, 2.0, 1.5e9, 1.5e9)
    limited = gpt_config(tmp_path, 2 << 20, ssd={"paths": [str(tmp_path / "pages")], "limit_mb_per_s": 250.0})
    assert rates_of(limited, flops=1.0, ram=2.0, ssd_write=3.0) == Rates(1.0, 2.0, 2.5e8, 3.0)
    assert rates_of(config) == Rates(None, None, 1.5e9, 1.5e9)
    half = rates_of(config, flops=1.0)
    assert half.flops == 1.0 and half.ram is not None and half.ram > 0
    with pytest.raises(ConfigError, match="^--ssd-read is 0; it must be a number above 0$"):
        rates_of(config, ssd_read=0.0)


def test_rehearsing_leaves_random_numbers_files_and_modes_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    forecast(gpt_config(tmp_path, 2 << 20), RATES)
    assert torch.equal(torch.rand(3), expected)
    assert torch.empty(1).device.type == "cpu" and list(tmp_path.iterdir()) == []


# ---- memory of the process, and what fits ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "bf16", "clipped", "tied", "views", "recomputed"])
def test_tensors_outside_of_the_pages_are_those_of_a_real_step(case: str, tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM, **CASES[case])
    assert config.model is not None
    with offload.deferred_init(config):
        model = factory_of("model", config.model.factory, config.model.arguments)()
    now = peak = 0

    def changed(_holder: Holder, more_bytes: int) -> None:
        nonlocal now, peak
        now += more_bytes
        peak = max(peak, now)

    with offload.initialize(model, config) as engine:
        x = torch.randint(0, 256, (ROWS, TOKENS))
        with LiveStorages(changed):
            for _ in range(STEPS):
                engine.backward(engine(x, x))
                engine.optimizer.step()
    found = forecast(config, RATES)
    assert found.tensor_bytes == pytest.approx(peak, rel=0.02)
    assert found.process_bytes > found.tensor_bytes + found.step.host_pages * PAGE_BYTES + (50 << 20)


def test_attention_is_one_kernel_as_on_a_cpu() -> None:
    def kernels(device: str) -> list[str]:
        with torch.device(device), AttentionOfCpu(), Kernels() as seen:
            query = torch.zeros(2, 4, 16, 8, requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
        return [name for name in seen.names if "attention" in name or "mm" in name]

    assert kernels("meta") == kernels("cpu") == [
        "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    ]  # fmt: skip


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which kernels are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One kernel."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_rates_kernels_are_timed_here(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    found = forecast(config, rates_of(config))
    assert (found.rates.flops, found.rates.ram) == (None, None) and found.kernels_timed > 20 and found.kernels_rated == 0
    assert found.step_s >= found.compute_s > 0
    assert f"{found.kernels_timed} kernels timed here in " in dict(forecast_rows(found))["at these rates"]


def test_what_does_not_fit_says_what_to_change(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, 64 << 20, commit={"every_steps": 10, "keep": 3})
    taken, mib = Taken(100 << 20, 50 << 20), 1 << 20
    assert advice(config, Room(100 * mib, 50 * mib), taken, 10 * mib, mib) == ()
    assert advice(config, Room(98 * mib, 50 * mib), taken, 10 * mib, mib) == ("set memory.ram to 8388608 (8.0 MiB) or less",)
    far = advice(config, Room(50 * mib, 49 * mib), taken, 10 * mib, mib)
    assert far[0].startswith("lower memory.ram (the smallest that works is 1048576) is not enough by itself: 50.0 MiB are missing")
    assert "memory.activations" in far[1] and "train.batch" in far[1]
    assert far[2] == "free 1.0 MiB in the file systems of ssd.paths, name another disk there or keep fewer commits (commit.keep)"


def test_this_machine_is_what_a_run_is_to_fit_in_unless_another_is_given(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    here = forecast(config, RATES)
    assert here.fit.fits and here.fit.room.disk_bytes > 1 << 30 and here.fit.taken.ram_bytes == here.process_bytes
    assert here.fit.taken.disk_bytes == here.step.ssd_bytes
    other = forecast(config, RATES, Question(Room(1 << 20, 1 << 40))).fit
    assert not other.fits and other.advice and dict(fit_rows(other))["fits"].startswith("no: RAM ")
    committing = forecast(gpt_config(tmp_path, LITTLE_RAM, commit={"every_s": 60}), RATES)
    assert committing.fit.taken.disk_bytes == committing.commit.ssd_bytes > committing.step.ssd_bytes


def test_a_run_that_goes_on_has_nothing_in_ram_at_first_and_its_export_is_as_large_as_forecast(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM, commit={"every_steps": 100, "keep": 1}, dtype="bf16")
    found = forecast(config, RATES)
    for going_on in (False, True):
        assert config.model is not None
        with offload.deferred_init(config):
            model = factory_of("model", config.model.factory, config.model.arguments)()
        with offload.initialize(model, config) as engine:
            if going_on:
                engine.resume()
                assert engine._store.mover.host.used_frames == found.resume.host_pages == 0
                assert engine._store.mover.ssd.used_frames <= found.resume.ssd_pages
                continue
            for _ in range(2):
                x = torch.randint(0, 256, (ROWS, TOKENS))
                engine.backward(engine(x, x))
                engine.step()
            engine.save("last")
    assert main(["export", str(tmp_path / "pages"), "--to", str(tmp_path / "weights")]) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "weights").glob("*.safetensors"))
    assert written == pytest.approx(found.export_bytes, rel=0.02)


def test_the_largest_batch_fits_and_one_row_more_does_not(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    taken = forecast(config, RATES).fit.taken
    room = Room(taken.ram_bytes + (16 << 20), taken.disk_bytes)
    found = forecast(config, RATES, Question(room, largest=True))
    largest = found.fit.largest_batch
    assert largest is not None and largest > ROWS and config.train is not None
    for rows, fits in ((largest, True), (largest + 1, False)):
        larger = config.model_copy(update={"train": config.train.model_copy(update={"batch": rows})})
        assert (taken_by(larger, found.base_bytes).ram_bytes <= room.ram_bytes) == fits


def test_the_largest_depth_is_what_memory_and_disk_allow(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, LITTLE_RAM)
    taken = forecast(config, RATES).fit.taken
    much = 1 << 40
    by_disk = forecast(config, RATES, Question(Room(much, 2 * taken.disk_bytes), largest=True)).fit
    assert by_disk.depth_argument == "n_layer" and by_disk.largest_depth is not None and 6 <= by_disk.largest_depth <= 9
    none = forecast(config, RATES, Question(Room(1, 1), largest=True)).fit
    assert (none.largest_batch, none.largest_depth) == (0, 0)
    unnamed = forecast(gpt_config(tmp_path, LITTLE_RAM, model=f"{HERE}:Viewed"), RATES, Question(Room(much, much), largest=True)).fit
    assert (unnamed.depth_argument, unnamed.largest_depth) == ("", None)
    with pytest.raises(ConfigError, match="--depth width: model.arguments has"):
        forecast(config, RATES, Question(depth="width"))


# ---- the command -------------------------------------------------------------------------------------------------------

SHRUNK = [
    "--set", 'model.arguments={"d_model": 96, "n_layer": 3, "n_head": 4, "seq": 16}', "--set", "train.seq=16", "--set", "train.batch=2",
    "--set", f"memory.page={PAGE_BYTES}", "--ram", "2MiB", "--flops", "2e9", "--ram-speed", "2000", "--ssd-read", "400", "--ssd-write", "400",
]  # fmt: skip


def test_json_is_one_object_of_what_the_forecast_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLE), *SHRUNK, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    found: Forecast = forecast(gpt_config(tmp_path, 2 << 20), RATES)
    assert said["ram_bytes"] == 2 << 20 and said["parameters"] == found.parameters
    assert said["rates"] == {"flops": 2e9, "ram": 2e9, "ssd_read": 4e8, "ssd_write": 4e8}
    assert said["step"]["ssd_pages"] == found.step.ssd_pages and said["step"]["host_bytes"] == found.step.host_bytes
    assert said["read_bytes_per_parameter"] == pytest.approx(said["read_bytes"] / said["parameters"])


def test_the_table_says_it_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", str(EXAMPLE), *SHRUNK]) == 0
    text = capsys.readouterr().out
    found = forecast(gpt_config(tmp_path, 2 << 20), RATES)
    said = dict(forecast_rows(found))
    assert said["limited by"] == "compute"
    assert said["step"].startswith(f"RAM {found.step.host_pages} pages, ") and f"SSD {found.step.ssd_pages} pages, " in said["step"]
    for what in said:
        assert what in text


def test_a_budget_that_is_too_small_is_one_line_with_the_one_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLE), *SHRUNK, "--ram", "128KiB"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("offload: error: memory.ram is 131072 bytes") and "set memory.ram to at least" in error and error.count("\n") == 1
