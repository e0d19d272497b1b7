"""A family of one's own goes all the way: found, offered, chosen, written into a plan, carried out, saved, loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.families.family import Context, Family, Layers, Replayed
from linearize.families.option import Group, Option, SiteChoice
from linearize.families.registry import FAMILIES, family_of, register
from linearize.gating.gate import ChannelGate, gates
from linearize.plan import Form, Plan, SitePlan, added_form
from linearize.planning.surveying import Wanted, survey
from linearize.running.passes import Collector, Moment
from linearize.sites.record import Record, record_of, set_record
from linearize.surgery.specs import build, replace_module


class Loudness:
    """Mean square of what a gate gives."""

    kind, gradients, memory, finite = "loudness", False, 8.0, True

    def __init__(self, name: str, gate: ChannelGate) -> None:
        self.name, self.gate, self.total, self.count = name, gate, 0.0, 0

    def attach(self, now: Moment) -> Iterator[Any]:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            self.total += float(output.detach().double().square().sum())
            self.count += output.numel()

        yield self.gate.register_forward_hook(see)

    def take(self, now: Moment) -> None:
        pass

    def merge(self, other: Any) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


class Silences(Family):
    """A site whose activation gives nothing but zeros."""

    name = "silences"
    forms = (Form("silent", lambda keep, rank: "silent"),)

    def find(self, context: Context) -> dict[str, Loudness]:
        return {name: Loudness(name, gate) for name, gate in gates(context.gated).items()}

    def collectors(self, context: Context, places: Mapping[str, Loudness]) -> Sequence[Collector]:
        return list(places.values())

    def options(self, context: Context, places: Mapping[str, Loudness], groups: Sequence[Group]) -> list[Group]:
        made = []
        for group in groups:
            seen = places[group.sites[0]]
            silent = SiteChoice(seen.name, 0, form="silent")
            option = Option((silent,), 1e-9 * seen.total / seen.count, group.stay.flops, group.stay.params, 0.0)
            made.append(replace(group, options=(*group.options, option)))
        return made

    def layers(self, model: nn.Module, places: Any, group: Group, option: Option) -> Layers:
        return Layers({}, "silent")

    def apply(
        self, model: nn.Module, context: Context, places: Any, choices: Mapping[str, SiteChoice], keep: Any
    ) -> None:
        record = record_of(model) or Record()
        steps = list(record.steps)
        for name in choices:
            gate = gates(model)[name]
            path = next(path for path, module in model.named_modules() if module is gate)
            spec = {"type": "MaskedActivation", "channels": gate.channels, "axis": gate.axis}
            layer: Any = build(spec, gate.activation)
            layer.linear.fill_(True)
            layer.slope.zero_(), layer.intercept.zero_()
            replace_module(model, path, layer)
            steps.append({"path": path, "module": spec})
        sites = tuple(replace(s, ungated="silent") if s.name in choices else s for s in record.sites)
        set_record(model, Record(sites, steps, record.inputs))

    def replay(self, places: Any, site: SitePlan, gate: ChannelGate | None) -> Replayed | None:
        return Replayed(SiteChoice(site.site, 0, form="silent"))


@pytest.fixture
def silences() -> Iterator[None]:
    from linearize.families import registry

    before = list(registry.FAMILIES)
    register(Silences())
    yield
    registry.FAMILIES[:] = before


@pytest.mark.usefixtures("silences")
def test_a_new_family_needs_no_edit_elsewhere(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    data = [torch.randn(32, 6) for _ in range(4)]
    options: dict[str, Any] = {"rounds": 0, "progress": False, "cache": False}
    result = linearize.compress(model, data, activations=0.5, search=0, **options)
    forms = {site.site: site.form for site in result.plan.sites}
    assert "silent" in forms.values()
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert any("silent" in told for told in (result.report.options or {}).values())
    x = data[0]
    assert not torch.allclose(result.model(x), model(x), atol=1e-3)  # the choice really was carried out
    hidden = dict(result.model.named_modules())[next(name for name, form in forms.items() if form == "silent")]
    assert float(hidden(torch.randn(2, 16)).abs().max()) == 0

    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    again = linearize.compress(model, data, plan=plan, **options)
    assert torch.equal(again.model(x), result.model(x))

    linearize.save(result.model, tmp_path / "m.safetensors")
    loaded = linearize.load(tmp_path / "m.safetensors", model=model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), result.model.buffers(), strict=True))
    torch.testing.assert_close(loaded(x), result.model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("silences")
def test_options_of_a_new_family_are_timed_beside_the_others() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3)).eval()
    data = [torch.randn(64, 6) for _ in range(4)]
    wanted = Wanted("latency", rounds=3)
    found = survey(model, linearize.convert(model, data[0]), data, data[0], wanted, progress=False)
    told = {choice.form: option.latency for g in found.groups for option in g.options for choice in option.choices}
    assert told["silent"] is not None
    assert 0 < told["silent"] < 1


def test_forms_belong_to_one_family() -> None:
    forms = [form.name for family in FAMILIES for form in family.forms]
    assert len(forms) == len(set(forms))
    assert all(family_of(form.name) is family for family in FAMILIES for form in family.forms)
    assert all(added_form(name) is not None for name in forms)
    assert family_of("merged") is FAMILIES[0]


def test_the_planner_knows_no_form_of_a_family() -> None:
    """No name of a family's form stands in the planner, nor in the command line or the report."""
    forms = {form.name for family in FAMILIES for form in family.forms}
    root = Path(linearize.__file__).parent
    for room in ("planning", "cli", "report", "collapse.py", "compress.py", "compression.py"):
        files = [root / room] if room.endswith(".py") else (root / room).rglob("*.py")
        for file in files:
            text = file.read_text(encoding="utf-8")
            elements = {"line"} if file.name == "svg.py" else set()  # of a picture
            assert not [form for form in forms - elements if f'"{form}"' in text], file
