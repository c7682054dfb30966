"""A frozen base stays where it is: read out of the checkpoint's files, never written, named by commits."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_base import (
    FrozenBase,
    batch,
    of_base,
    on_meta,
    plain_and_file,
    prepared,
    same,
    settings,
    sgd,
    sources_of,
    train,
)
from rich.console import Console
from safetensors.torch import load_file, save_file

import offload
from offload.checkpoint.verify import verify_run
from offload.config_loading import load_config
from offload.store.adoption import give_sources, page_model
from offload.store.page_store import PageStore
from pagemem.sources.source_reader import bounce_bytes
from pagemem.units import KiB, parse_bytes

MEMORIES: dict[str, dict[str, Any]] = {
    "half on ssd": {},
    "all in RAM": {"ram": "4MiB"},
    "three tiers": {"ram": "1MiB", "device": "512KiB"},
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_frozen_base_is_bit_equal_and_never_written(tmp_path: Path, memory: str) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path, **MEMORIES[memory]), path)
    with optimizer.engine as engine:
        assert engine.stats().bytes_written == 0 and engine.stats().bytes_read < 8192  # of the head at most
        for steps in (range(3), range(3, 6)):
            assert train(model, optimizer, steps) == train(plain, sgd(plain.parameters()), steps) or steps.start
            engine.save()
        base = of_base(optimizer)
        assert base and all(tensor.origin is not None and tensor.copy is None for tensor in base)
        assert all(part.master is None and part.states is None for unit in engine.debug.store.index.units
                   if not unit.trained for part in unit.slices)  # fmt: skip


def test_losses_and_head_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path), path)
    with optimizer.engine:
        assert train(model, optimizer, range(6)) == train(plain, sgd(plain.parameters()), range(6))
        assert same(plain, model)


@pytest.mark.parametrize(("in_file", "moves"), [(torch.float16, False), (torch.float32, True), (torch.float64, True)])
def test_a_base_in_another_dtype_is_converted_as_torch_does(tmp_path: Path, in_file: torch.dtype, moves: bool) -> None:
    """One that has more bytes than its parameters is read once, and then from pages."""
    plain, path = plain_and_file(tmp_path / "checkpoint")
    generator = torch.Generator().manual_seed(1)
    wide = {
        name: torch.randn(value.shape, generator=generator).to(in_file) for name, value in plain.state_dict().items()
    }
    save_file(wide, path)
    plain.load_state_dict(wide)
    model, optimizer = prepared(settings(tmp_path), path)
    with optimizer.engine as engine:
        assert train(model, optimizer, range(5)) == train(plain, sgd(plain.parameters()), range(5))
        assert same(plain, model)
        assert {tensor.origin is None for tensor in of_base(optimizer)} == {moves}
        engine.save()


@pytest.mark.parametrize("memory", ["half on ssd", "three tiers"])
def test_what_a_module_writes_through_a_view_counts(tmp_path: Path, memory: str) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path, **MEMORIES[memory]), path)
    own = sgd(plain.parameters())
    with optimizer.engine as engine:
        for step, factor in ((0, None), (1, 0.5), (2, None), (3, 2.0), (4, None)):
            plain.scale_by = model.scale_by = factor  # type: ignore[assignment]
            assert train(model, optimizer, [step]) == train(plain, own, [step])
        assert same(plain, model)
        engine.save()
        torch.manual_seed(0)
        assert engine.resume() is not None and same(plain, model)


@pytest.mark.parametrize(("ram", "chunk_bytes"), [("640KiB", 32 * KiB), ("64MiB", 248 * KiB)])
def test_buffers_for_a_file_are_within_the_budget(tmp_path: Path, ram: str, chunk_bytes: int) -> None:
    """1/64 of it for four threads, where that is more than half a page each."""
    plain, path = plain_and_file(tmp_path / "checkpoint")
    model, optimizer = prepared(settings(tmp_path, ram=ram), path)
    with optimizer.engine as engine:
        store = engine.debug.store
        assert store.sources.reader.chunk_bytes == chunk_bytes
        larger_bytes = 4 * bounce_bytes(chunk_bytes) if ram == "64MiB" else 0
        assert store.mover.arena.n_bytes + larger_bytes <= parse_bytes(ram)
        assert train(model, optimizer, range(2)) == train(plain, sgd(plain.parameters()), range(2))


def test_lock_free_updates_leave_a_base_alone(tmp_path: Path) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    update = {"mode": "lock-free", "max_staleness": 0, "exact_steps": 0}
    for ram in ("896KiB", "4MiB"):
        model, optimizer = prepared(settings(tmp_path / ram, ram=ram) | {"update": update}, path)
        with optimizer.engine:
            own = copy.deepcopy(plain)
            assert train(model, optimizer, range(5)) == train(own, sgd(own.parameters()), range(5))
            assert all(tensor.origin is not None for tensor in of_base(optimizer))


def test_a_full_fine_tune_reads_the_checkpoint_and_then_pages(tmp_path: Path) -> None:
    def trained() -> FrozenBase:
        return FrozenBase().float().requires_grad_(True)  # type: ignore[return-value]

    torch.manual_seed(1)
    plain = trained()
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    config = settings(tmp_path, ram="1MiB")
    model = on_meta(trained)
    page_model(PageStore(load_config(config)), model, sources_of(model, path))
    _, optimizer = offload.prepare(model, sgd, config)
    own = sgd(plain.parameters())
    with optimizer.engine:
        for step in range(4):
            x, y = batch(step)
            losses = [m(x.float(), y) for m in (plain, model)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
            for one in (own, optimizer):
                one.step()
                one.zero_grad()
        assert same(plain, model) and all(tensor.origin is None for tensor in of_base(optimizer))
    assert all(torch.equal(v, load_file(path)[k]) for k, v in load_file(path).items())


@pytest.mark.parametrize("with_values", [True, False])
def test_a_run_goes_on_from_a_commit_that_names_files(tmp_path: Path, with_values: bool) -> None:
    _, path = plain_and_file(tmp_path / "checkpoint")
    config = settings(tmp_path)
    model, optimizer = prepared(config, path)
    with optimizer.engine as engine:
        train(model, optimizer, range(3))
        engine.save("three")
        written = engine.stats().bytes_written
        later = train(model, optimizer, range(3, 6))
        values = {name: value.clone() for name, value in model.state_dict().items()}
    assert written < sum(tensor.n_bytes for tensor in of_base(optimizer)) / 4
    report = verify_run(tmp_path / "pages", paths=[], commit=None, console=Console(quiet=True))
    assert not report.faults and any("files of others" in note or "file of others" in note for note in report.notes)
    model, optimizer = prepared(config, path if with_values else None)
    with optimizer.engine as engine:
        assert engine.resume("three") is not None
        assert train(model, optimizer, range(3, 6)) == later
        engine.export(tmp_path / "exported")
        exported = load_file(tmp_path / "exported" / "model.safetensors")
        assert exported.keys() == values.keys()
        assert all(torch.equal(value, exported[name]) for name, value in values.items())
        assert all(tensor.origin is not None for tensor in of_base(optimizer))


def test_a_commit_whose_files_are_gone_says_where_they_were(tmp_path: Path) -> None:
    _, path = plain_and_file(tmp_path / "checkpoint")
    config = settings(tmp_path)
    model, optimizer = prepared(config, path)
    with optimizer.engine as engine:
        train(model, optimizer, range(2))
        engine.save()
    os.rename(tmp_path / "checkpoint", tmp_path / "elsewhere")
    model, optimizer = prepared(config, None)
    wanted = f"were left in {path}.*offload.from_pretrained"
    with optimizer.engine as engine, pytest.raises(offload.CommitError, match=wanted):
        engine.resume()
    assert verify_run(tmp_path / "pages", paths=[], commit=None, console=Console(quiet=True)).faults
    # A model that was built from where they are now has them.
    model, optimizer = prepared(config, tmp_path / "elsewhere" / "model.safetensors")
    with optimizer.engine as engine:
        assert engine.resume() is not None
        train(model, optimizer, range(2, 4))


def test_another_checkpoint_of_the_same_shapes_is_not_taken(tmp_path: Path) -> None:
    _, path = plain_and_file(tmp_path / "checkpoint")
    config = settings(tmp_path)
    model, optimizer = prepared(config, path)
    with optimizer.engine as engine:
        train(model, optimizer, range(2))
        engine.save()
    torch.manual_seed(4)
    save_file(FrozenBase().state_dict(), path)
    model, optimizer = prepared(config, path)
    with optimizer.engine as engine, pytest.raises(offload.CommitError, match="another file"):
        engine.resume()


@pytest.mark.parametrize("memory", ["half on ssd", "three tiers"])
def test_parameters_without_values_are_refused_until_they_are_written(tmp_path: Path, memory: str) -> None:
    plain, _ = plain_and_file(tmp_path / "checkpoint")
    model = on_meta()
    _, optimizer = offload.prepare(model, sgd, settings(tmp_path, **MEMORIES[memory]))
    with optimizer.engine as engine:
        for use in (lambda: model(*batch(0)), model.state_dict, engine.save, lambda: model.norm.weight + 1):
            with pytest.raises(RuntimeError, match="no values yet, the model was built on meta; load_weights"):
                use()
        assert engine.stats().bytes_written == 0
        with torch.no_grad():
            model.norm.weight.data.fill_(1.0)
            model.norm.bias[:5] = 0.0
            with pytest.raises(RuntimeError, match=r"norm\.bias: no values yet"):
                model.norm.bias.sum()
            model.norm.bias[5:] = 0.0
            torch.nn.init.normal_(model.head.weight)
            model.head.bias.data.normal_()
        assert bool((model.norm.bias == 0).all()) and bool((model.norm.weight == 1).all())
        model.load_state_dict(plain.state_dict())
        own = sgd(plain.parameters())
        assert train(model, optimizer, range(3)) == train(plain, own, range(3)) and same(plain, model)


def test_a_model_on_meta_is_as_it_was_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("too late")

    model = on_meta()
    model.norm.weight.kept = "attribute"  # type: ignore[union-attr]
    before = {name: (id(parameter), parameter.shape) for name, parameter in model.named_parameters()}
    monkeypatch.setattr("offload.assembly.parts.make_updater", fails)
    with pytest.raises(RuntimeError, match="too late"):
        offload.prepare(model, sgd, settings(tmp_path))
    after = dict(model.named_parameters())
    assert before == {name: (id(parameter), parameter.shape) for name, parameter in after.items()}
    assert all(type(p) is torch.nn.Parameter and p.is_meta for p in after.values())
    assert after["norm.weight"].kept == "attribute" and after["head.bias"].requires_grad
    assert not after["norm.weight"].requires_grad


@pytest.mark.parametrize("memory", ["half on ssd", "three tiers"])
def test_parameters_in_pages_take_values_of_files(tmp_path: Path, memory: str) -> None:
    plain, path = plain_and_file(tmp_path / "checkpoint")
    torch.manual_seed(9)
    model, optimizer = offload.prepare(FrozenBase(), sgd, settings(tmp_path, **MEMORIES[memory]))
    with optimizer.engine as engine:
        store = engine.debug.store
        train(model, optimizer, range(2))
        view = model.norm.weight.detach()
        left = give_sources(store, sources_of(model, path))
        assert any(parameter is model.norm.weight for parameter in left)
        del view
        left = give_sources(store, sources_of(model, path))
        # What is at home on the device stays there.
        assert [parameter is model.head.weight for parameter in left] == [True, False][
            : 2 * engine.stats().device_units
        ]
        with torch.no_grad():
            for parameter in left:
                parameter.copy_(plain.head.weight if parameter is model.head.weight else plain.head.bias)
        assert same(plain, model)
        own = sgd(plain.parameters())
        own.load_state_dict(optimizer.state_dict())
        assert train(model, optimizer, range(2, 5)) == train(plain, own, range(2, 5)) and same(plain, model)
        assert all(tensor.origin is not None for tensor in of_base(optimizer))


def test_modules_added_to_a_base_do_not_move_it(tmp_path: Path) -> None:
    """As adapters do: the units of the base are made anew with other neighbours, by reference."""
    plain, path = plain_and_file(tmp_path / "checkpoint")
    config = settings(tmp_path)
    model = on_meta()
    store = PageStore(load_config(config))
    page_model(store, model, sources_of(model, path))
    torch.manual_seed(5)
    for one in (plain, model):
        torch.manual_seed(5)
        one.base[1].adapter = torch.nn.Linear(8, 8)  # type: ignore[index,union-attr]
        one.base[2].weight.requires_grad_(True)  # type: ignore[index,union-attr]
        one.base[2].weight.requires_grad_(False)  # type: ignore[index,union-attr]
        one.norm.bias.requires_grad_(True)  # type: ignore[union-attr]
    _, optimizer = offload.prepare(
        model, lambda ps: torch.optim.SGD([p for p in ps if p.requires_grad], 0.1, fused=True), config
    )
    with optimizer.engine as engine:
        assert engine.debug.store is store
        frozen = [unit for unit in store.index.units if not unit.trained]
        assert frozen and all(unit.parameters.origin is not None for unit in frozen)
        assert {slot.name for unit in store.index.units if unit.trained for slot in unit.slots} == {
            "norm.bias", "head.weight", "head.bias", "base.1.adapter.weight", "base.1.adapter.bias"
        }  # fmt: skip
        assert same(plain, model)


def test_a_base_in_fp32_is_computed_in_bf16_by_reference(tmp_path: Path) -> None:
    def wide() -> FrozenBase:
        return FrozenBase().float()  # type: ignore[return-value]

    torch.manual_seed(2)
    plain = wide()
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    config = settings(tmp_path, ram="2MiB") | {"model": {"dtype": "bf16"}}
    model = on_meta(wide)
    page_model(PageStore(load_config(config)), model, sources_of(model, path))
    _, optimizer = offload.prepare(model, sgd, config)
    with optimizer.engine as engine:
        assert all(tensor.origin is not None for tensor in of_base(optimizer))
        plain.to(torch.bfloat16)
        assert same(plain, model)
        assert engine.stats().bytes_read > 0
