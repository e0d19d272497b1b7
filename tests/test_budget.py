"""compress to a budget: the choice, what comes out, what cannot be met, what cannot be used."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.compress import compress
from linearize.cost import Cost
from linearize.errors import DataError, TrainingError, UsageError
from linearize.families.family import Context
from linearize.families.option import MEASURES, Group, Option, SiteChoice
from linearize.plan import Plan
from linearize.planning import settle as settling
from linearize.planning.budget import SERVED, Budget
from linearize.planning.carry_out import site_choices
from linearize.planning.knapsack import Choice, choose, uniform
from linearize.planning.search import searched, unscaled
from linearize.planning.settle import Settled
from linearize.planning.survey import Survey
from linearize.planning.surveying import Wanted, survey
from linearize.planning.timing.table import LatencyTable, cache_file
from linearize.training.path import PlannedPath
from tests.processors import assert_same_outputs, assert_same_tensors
from tests.toys import QUIET

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def data() -> Batches:
    x = torch.randn(20, 32, 8)
    return [(batch, (batch[:, 0] * batch[:, 1] > 0).long()) for batch in x]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 48), nn.ReLU(),
                         nn.Linear(48, 2))  # fmt: skip


def inputs(data: Batches) -> list[Tensor]:
    return [x for x, _ in data]


# The choice


def group(name: str, *pairs: tuple[float, float]) -> Group:
    return Group((name,), tuple(Option((SiteChoice(name, i),), v, c, c, c, c) for i, (v, c) in enumerate(pairs)))


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index in range(4):
        pairs = torch.rand(5, 2, generator=generator).mul(50).round().tolist()
        groups.append(group(f"g{index}", (0.0, 60.0), *((v, c) for v, c in pairs)))
    for budget in (60.0, 120.0, 200.0, 240.0):
        everything = itertools.product(*(g.options for g in groups))
        losses = [sum(o.loss for o in some) for some in everything if sum(o.flops for o in some) <= budget]
        found = choose(groups, "flops", budget)
        assert found.reachable is bool(losses)
        if losses:
            assert found.loss == min(losses)
            assert found.cost <= budget


@pytest.mark.parametrize("limit", [3, 10, 100])
def test_a_limited_search_keeps_to_the_budget_and_beats_every_uniform_choice(limit: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        groups = []
        for index in range(8):
            falls = torch.rand(9, generator=generator).cumsum(0).tolist()
            groups.append(group(f"g{index}", (0.0, 9.0), *((v, 8.0 - i) for i, v in enumerate(falls))))
        for budget in (10.0, 30.0, 55.0):
            found, same = choose(groups, "params", budget, limit=limit), uniform(groups, "params", budget)
            assert found.cost <= budget
            assert same is not None
            assert found.loss <= same.loss


def test_an_unreachable_budget_gives_the_cheapest() -> None:
    found = choose([group("a", (0, 9), (2, 5)), group("b", (0, 9), (3, 7))], "flops", 11)
    assert (found.reachable, found.cost, found.loss) == (False, 12.0, 5.0)


# What comes out


@pytest.mark.parametrize("measure", ["flops", "params", "activations"])
@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.25])
@pytest.mark.slow
def test_the_budget_is_met_and_the_model_verified(
    model: nn.Module, data: Batches, measure: str, fraction: float
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(model, inputs(data), **{measure: fraction}, **QUIET)  # type: ignore[arg-type]
    outcome, report = result.report.outcome, result.report
    assert outcome is not None
    assert outcome.met
    assert outcome.reached is not None
    assert outcome.reached <= fraction
    least = compress(model, inputs(data), **{measure: fraction}, search=0, **QUIET).report.outcome  # type: ignore[arg-type]
    assert least is not None
    assert least.uniform_loss is None or least.loss <= least.uniform_loss
    if measure == "flops":
        assert report.after.flops <= fraction * report.before.flops
    if measure == "params":
        assert report.after.parameters <= fraction * report.before.parameters
    assert report.verification
    assert linearize.gates(result.model) == {}
    assert not result.model.training
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "reached" in str(report)
    json.dumps(report.to_dict())


def units_left(plan: Plan, total: int) -> float:
    return 1 - sum(len(site.linear) for site in plan.sites) / total


@pytest.mark.slow
def test_a_budget_in_units_is_no_worse_than_other_plans_of_as_many_units(data: Batches) -> None:
    """Refits and skips are options there, too: a line for each channel loses a multiple of that."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 16), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4)
    )
    x = torch.randn(500, 8)

    def distance(small: nn.Module) -> float:
        with torch.no_grad():
            return float((small(x) - model(x)).square().sum() / model(x).square().sum())

    for fraction in (0.7, 0.4):
        by_flops = compress(model, inputs(data), flops=fraction, **QUIET)
        left = units_left(by_flops.plan, 112)
        result = compress(model, inputs(data), activations=left, **QUIET)
        assert units_left(result.plan, 112) <= left
        assert result.report.outcome is not None
        assert result.report.outcome.met
        assert distance(result.model) <= 1.1 * distance(by_flops.model)
        lines = linearize.convert(model, x)
        linearize.calibrate(lines, inputs(data), progress=False)
        for name, gate in linearize.gates(lines).items():
            kept = next(gate.channels - len(site.linear) for site in result.plan.sites if site.site == name)
            gate.linearize_(torch.arange(gate.channels) >= kept)
        assert distance(result.model) < 0.5 * distance(lines)


def test_equal_widths_and_stock_layers_hold_for_budgets_in_units(data: Batches) -> None:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)]
    model = nn.Sequential(*layers)
    result = compress(model, inputs(data), activations=0.5, uniform=True, **QUIET)
    assert {len(site.linear) for site in result.plan.sites} == {16}
    result = compress(model, inputs(data), activations=0.5, stock=True, **QUIET)
    assert [(m.in_features, m.out_features) for m in result.model.modules() if isinstance(m, nn.Linear)] == [
        (8, 16), (16, 8)
    ] * 3  # fmt: skip
    result = compress(model, inputs(data), activations=0.5, uniform=["0.*", "1.*"], **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met


def test_units_inside_shared_maps_and_without_maps(data: Batches) -> None:
    """Inverted residuals, whose sites go together, and an activation behind an addition, which only has lines."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
                                      nn.ReLU6(), nn.Conv2d(16, 3, 1))  # fmt: skip
            self.act, self.head = nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x + self.body(x)).mean((2, 3)))

    torch.manual_seed(0)
    images = [torch.randn(8, 3, 6, 6) for _ in range(6)]
    seen = set()
    for fraction in (0.9, 0.6, 0.3, 0.05):
        result = compress(Net().eval(), images, activations=fraction, sequential=fraction == 0.6, **QUIET)
        assert result.report.outcome is not None
        assert result.report.outcome.met
        assert result.report.verification
        seen |= {site.form for site in result.plan.sites}
    assert seen > {"unchanged"}


def test_more_budget_means_less_loss_and_the_loss_is_real(data: Batches) -> None:
    """Predicted losses hold the ridge's share, so that they err on the safe side, and by little where losses count."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 96), nn.GELU(), nn.Linear(96, 8))
    seen, fresh = torch.cat(inputs(data)), torch.randn(4000, 8)
    losses = []
    for fraction in (0.8, 0.5, 0.25, 0.1):
        result = compress(model, inputs(data), flops=fraction, **QUIET)
        with torch.no_grad():
            real, other = (
                float((result.model(x) - model(x)).square().sum() / model(x).square().sum()) for x in (seen, fresh)
            )
        assert result.report.outcome is not None
        predicted = result.report.outcome.loss
        assert (0.9 if real > 1e-2 else 0.6) < real / predicted < 1.02
        assert real / 1.02 < other < 2 * real  # on data that nothing was fitted to
        losses.append(real)
    assert losses == sorted(losses)
    assert losses[-1] > 100 * losses[0]


def test_better_than_dropping_channels_by_size(data: Batches) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 96), nn.GELU(), nn.Linear(96, 8))
    up, down = model[0], model[2]
    result = compress(model, inputs(data), flops=0.25, **QUIET)
    size = up.weight.norm(dim=1) * down.weight.norm(dim=0)  # type: ignore[operator]
    keep = size.topk(24).indices
    x = torch.randn(500, 8)
    with torch.no_grad():
        pruned = nn.functional.gelu(up(x))[:, keep] @ down.weight[:, keep].t() + down.bias  # type: ignore[index, operator]
        y = model(x)
        errors = [float((found - y).square().mean()) for found in (result.model(x), pruned)]
    assert errors[0] < 0.5 * errors[1]


def test_the_whole_budget_changes_nothing(model: nn.Module, data: Batches) -> None:
    result = compress(model, inputs(data), flops=1.0, **QUIET)
    x = data[0][0]
    assert torch.equal(result.model(x), model(x))


@pytest.mark.usefixtures("timed_by_flops")
def test_a_latency_budget_uses_measured_times(data: Batches, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64))
    batches = [torch.randn(64, 64) for _ in range(20)]
    file = tmp_path / "latency.json"
    result = compress(model, batches, speedup=2, rounds=5, progress=False, cache=file, batch_sizes=[64])
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.measure == "latency"
    assert outcome.asked == 0.5
    assert outcome.reached is not None
    assert outcome.met
    assert 0.3 < outcome.reached <= 0.5
    stored = json.loads(file.read_text())
    assert stored
    assert all(0 < value < 10 for value in stored.values())
    assert result.report.timing is not None


def test_a_damaged_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latency.json"
    file.write_text("[1, 2")
    assert LatencyTable.open(file).entries == {}
    LatencyTable(tmp_path / "latency.json" / "below a file", {"a": 1.0}).save()
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    assert cache_file() == file


def test_a_dry_run_only_plans(model: nn.Module, data: Batches) -> None:
    result = compress(model, inputs(data), flops=0.5, dry_run=True, **QUIET)
    assert result.model is model
    assert result.report.outcome is not None
    assert result.report.outcome.met is None
    assert 0.3 < result.report.outcome.predicted <= 0.5
    assert "predicted" in str(result.report)
    assert any(site.dropped for site in result.plan.sites)
    assert any("loss" in table for table in result.report.options.values())


def test_a_plan_is_data_and_can_be_replayed(model: nn.Module, data: Batches) -> None:
    first = compress(model, inputs(data), flops=0.4, **QUIET)
    plan = Plan.from_json(first.plan.to_json())
    assert plan == first.plan
    again = compress(model, inputs(data), plan=plan, **QUIET)
    x = data[0][0]
    torch.testing.assert_close(again.model(x), first.model(x), rtol=1e-4, atol=1e-5)
    dry = compress(model, inputs(data), flops=0.4, dry_run=True, **QUIET).plan
    assert [site.linear for site in dry.sites] == [site.linear for site in plan.sites]
    other = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))
    with pytest.raises(UsageError, match=r"64 channels in the plan and 9 here|not in the model"):
        compress(other, inputs(data), plan=plan, **QUIET)


def test_what_cannot_be_met_is_said_and_the_nearest_given(model: nn.Module, data: Batches) -> None:
    result = compress(model, inputs(data), flops=0.001, **QUIET)
    outcome = result.report.outcome
    assert outcome is not None
    assert outcome.met is False
    assert outcome.reached == pytest.approx(outcome.least, rel=0.05)
    assert "NOT MET" in str(result.report)
    dry = compress(model, inputs(data), flops=0.001, dry_run=True, **QUIET)
    assert "CANNOT BE MET" in str(dry.report)


def test_the_same_seed_gives_the_same_model(model: nn.Module, data: Batches) -> None:
    state = torch.get_rng_state()
    results = [compress(model, inputs(data), flops=0.5, seed=4, **QUIET).model for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True))


def test_sequential_refits_what_lies_behind_a_compressed_site(model: nn.Module, data: Batches) -> None:
    one, other = (compress(model, inputs(data), flops=0.4, sequential=s, **QUIET) for s in (False, True))
    assert [s.linear for s in one.plan.sites] == [s.linear for s in other.plan.sites]
    assert other.report.verification
    assert not torch.equal(one.model(data[0][0]), other.model(data[0][0]))


def test_the_search_leaves_out_a_kind_of_options_whose_losses_are_wrong() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU(),
                          nn.Conv2d(24, 3, 1), nn.Flatten(), nn.Linear(3 * 36, 4)).eval()  # fmt: skip
    images = [torch.randn(16, 3, 6, 6) for _ in range(8)]
    gated = linearize.convert(model, images[0])
    found = survey(model, gated, images, images[0], Wanted("flops"), progress=False)
    wrong = [
        replace(g, options=tuple(replace(o, loss=1e-9) if o.choices[0].replaces else o for o in g.options))
        for g in found.groups
    ]
    found = replace(found, groups=wrong)
    budget = 0.6 * found.total - found.fixed
    lines: list[str] = []
    for trials, blocks in ((0, True), (1, False)):
        around = searched(found, budget, images, trials=trials, say=lines.append)
        choice = unscaled(choose(around.groups, "flops", budget), found)
        assert any(c.replaces for c in site_choices(choice).values()) is blocks
        assert choice.cost <= budget
    assert any("without blocks" in line for line in lines)


def test_a_search_with_the_real_loss_is_no_worse_and_keeps_the_budget(data: Batches) -> None:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.Tanh()) for _ in range(3)]
    model, lines = nn.Sequential(*blocks), list[str]()
    options: dict[str, Any] = {**QUIET, "progress": lines.append}
    one = compress(model, inputs(data), params=0.3, search=0, **QUIET)
    other = compress(model, inputs(data), params=0.3, search=12, **options)
    x = torch.cat(inputs(data))
    with torch.no_grad():
        errors = [float((result.model(x) - model(x)).square().mean()) for result in (one, other)]
    assert errors[1] <= errors[0] * 1.05  # the search sees a part of these batches
    assert other.report.outcome is not None
    assert other.report.outcome.met
    assert any("search" in line for line in lines)


def test_uniform_widths(data: Batches) -> None:
    blocks = [nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(3)]
    model = nn.Sequential(*blocks)
    with torch.no_grad():
        blocks[1][2].weight.mul_(1e-3)  # type: ignore[operator]
    free = compress(model, inputs(data), params=0.5, **QUIET)
    tied = compress(model, inputs(data), params=0.5, uniform=True, **QUIET)
    widths = {name: len(site.linear) for name, site in ((s.site, s) for s in free.plan.sites)}
    assert len(set(widths.values())) > 1
    assert len({len(site.linear) for site in tied.plan.sites}) == 1
    some = compress(model, inputs(data), params=0.5, uniform=["[02]*"], **QUIET)
    assert len(some.plan["0.1"].linear) == len(some.plan["2.1"].linear)


# Fine-tuning


@pytest.mark.parametrize("gradual", [0, 0.5, 1])
def test_fine_tuning_walks_to_the_plan(model: nn.Module, data: Batches, gradual: float) -> None:
    options = {"epochs": 3, "lr": 1e-3, "gradual": gradual}
    result = compress(model, data, flops=0.3, finetune=options, evaluate=data, **QUIET)
    assert len(result.report.history) == 3
    assert result.report.verification
    assert result.report.after.flops <= 0.3 * result.report.before.flops
    assert set(result.report.quality["accuracy"]) == {"before", "gated", "collapsed"}


def test_fine_tuning_that_spoils_the_model_is_told(model: nn.Module, data: Batches) -> None:
    def notes(lr: float) -> str:
        options = {"epochs": 2, "lr": lr, "distill_weight": 1.0}
        return " ".join(compress(model, data, flops=0.8, finetune=options, **QUIET).report.notes)

    assert "further from the original's" in notes(3.0)
    assert "further" not in notes(1e-6)


def test_without_learning_the_path_ends_in_the_closed_form(model: nn.Module, data: Batches) -> None:
    options = {"epochs": 1, "lr": 0.0, "gate_lr": 0.0, "weight_decay": 0.0, "gradual": 0.7}
    cut = compress(model, data, flops=0.3, **QUIET).model
    walked = compress(model, data, flops=0.3, finetune=options, **QUIET).model
    torch.testing.assert_close(walked(data[0][0]), cut(data[0][0]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_continues_with_its_plan(model: nn.Module, data: Batches, tmp_path: Path) -> None:
    def options(name: str, **more: Any) -> dict[str, Any]:
        return {"epochs": 3, "lr": 1e-2, "gradual": 0.6, "checkpoint_dir": tmp_path / name, **more}

    whole = compress(model, data, flops=0.4, finetune=options("whole"), **QUIET).model

    def stop(line: str) -> None:
        if "epoch 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, data, flops=0.4, finetune=options("parts"), **{**QUIET, "progress": stop})
    assert (tmp_path / "parts" / "plan.json").exists()
    again = compress(model, data, flops=0.4, finetune=options("parts", resume=True), **QUIET)
    assert len(again.report.history) == 3
    for a, b in zip(whole.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_path_ends_exactly_and_remembers_where_it_is() -> None:
    def start() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        nn.init.zeros_(net[2].bias)  # type: ignore[arg-type]
        return linearize.convert(net, torch.randn(1, 3))

    model = start()
    way = {"2.bias": torch.tensor([1.0, -2.0])}
    path = PlannedPath(model, {"1": torch.tensor([True, False, False, True])}, way, steps=4)
    for _ in range(2):
        path.step()
    assert not linearize.gates(model)["1"].linear.any()
    copy = start()
    copy.load_state_dict(model.state_dict())
    later = PlannedPath(copy, {"1": torch.tensor([True, False, False, True])}, way, steps=4)
    later.load_state_dict(path.state_dict())
    for _ in range(3):
        path.step()
        later.step()
    for end in (model, copy):
        assert linearize.gates(end)["1"].frozen.tolist() == [True, False, False, True]
        torch.testing.assert_close(end[2].bias.detach(), way["2.bias"])  # type: ignore[index]
    with pytest.raises(TrainingError, match="another plan"):
        PlannedPath(copy, {}, {}, steps=4).load_state_dict(path.state_dict())
    with pytest.raises(UsageError, match="nowhere"):
        PlannedPath(copy, {"nowhere": torch.ones(1)}, {}, steps=4)


# What cannot be used


def test_data_that_can_be_read_once_only(model: nn.Module, data: Batches) -> None:
    with pytest.raises(DataError, match="only once"):
        compress(model, iter(data), flops=0.5, **QUIET)
    with pytest.raises(DataError, match="int"):
        compress(model, 3, flops=0.5, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Tensor"):
        compress(model, torch.randn(64, 8), flops=0.5, **QUIET)
    with pytest.raises(DataError, match="no batches"):
        compress(model, [], flops=0.5, **QUIET)


def test_nan_names_the_site(model: nn.Module, data: Batches) -> None:
    x = inputs(data)
    x[3] = x[3].clone()
    x[3][0, 0] = float("nan")
    for measure in (measure for measure in MEASURES if measure not in SERVED):
        with pytest.raises(DataError, match=r"^1: .*batch 3"):
            compress(model, x, **{measure: 0.5}, **QUIET)  # type: ignore[arg-type]


def test_too_little_data_is_told_with_the_number_that_is_needed(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"8 rows for 72 features.*at least 73 samples \(there were 8\)"):
        result = compress(model, [torch.randn(8, 8)], flops=0.5, **QUIET)
    assert any("no full rank" in note for note in result.report.notes)
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_labels_missing_for_fine_tuning(model: nn.Module, data: Batches) -> None:
    with pytest.raises(DataError, match="labels"):
        compress(model, inputs(data), flops=0.5, finetune=1, **QUIET)
    result = compress(model, inputs(data), flops=0.5, finetune={"epochs": 1, "distill_weight": 1.0}, **QUIET)
    assert len(result.report.history) == 1


def test_a_loss_that_is_no_scalar(model: nn.Module, data: Batches) -> None:
    bad = {"epochs": 1, "loss": lambda output, labels: output}
    with pytest.raises(TrainingError, match="without axes"):
        compress(model, data, flops=0.5, finetune=bad, **QUIET)


def test_a_model_of_which_nothing_can_be_refitted(data: Batches) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(8, 16), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.up(x)).square()

    result = compress(Squares(), inputs(data), flops=0.5, **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met is False
    result = compress(Squares(), inputs(data), activations=0.5, **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met


# Models of libraries


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
@pytest.mark.zoo
def test_timm_models(name: str) -> None:
    zoo = pytest.importorskip("linearize.zoo")
    pytest.importorskip("timm")
    options = {"img_size": 32} if name == "test_vit" else {}
    model = zoo.create(f"timm:{name}", num_classes=5, **options).eval()
    size = 32 if name == "test_vit" else 48
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = compress(model, [torch.randn(4, 3, size, size) for _ in range(2)], flops=0.7, **QUIET)
    assert type(result.model) is type(model)
    assert result.report.verification
    assert result.report.outcome is not None
    assert result.report.outcome.met


@pytest.mark.parametrize("kind", ["Llama", "Bert", "GPT2"])
@pytest.mark.slow
def test_a_stock_model_with_a_true_config(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from linearize.zoo import stock_copy

    sizes = {
        "Llama": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "Bert": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=99, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    data = [{"input_ids": torch.randint(1, 99, (8, 32))} for _ in range(3)]
    result = compress(model, data, flops=0.8, stock=True, exclude="pooler*" if kind == "Bert" else None, **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    stock = stock_copy(result.model)
    assert type(stock) is type(model)
    stock.save_pretrained(tmp_path)  # type: ignore[operator]
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    width = again.config.n_inner if kind == "GPT2" else again.config.intermediate_size
    assert width == (128 if kind == "GPT2" else 96) - len(result.plan.sites[0].linear)
    with torch.no_grad():
        torch.testing.assert_close(again(**data[0])[0], result.model(**data[0])[0])
    free = compress(model, data, flops=0.6, exclude="pooler*" if kind == "Bert" else None, **QUIET).model
    with pytest.raises(linearize.CheckpointError, match="stock=True"):
        stock_copy(free)
    with pytest.raises(linearize.CheckpointError, match="no transformers config"):
        stock_copy(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.slow
def test_tiny_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    if kind == "llama":
        config = transformers.LlamaConfig(intermediate_size=96, num_key_value_heads=2, **shared)
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.BertConfig(intermediate_size=128, **shared)
        model = transformers.BertModel(config).eval()
    data = []
    for _ in range(3):
        mask = (torch.arange(40) < torch.randint(20, 41, (4, 1))).long()
        data.append({"input_ids": torch.randint(1, 99, (4, 40)), "attention_mask": mask})
    result = compress(model, data, flops=0.7, exclude="pooler*" if kind == "bert" else None, **QUIET)
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert result.report.verification
    linearize.save(result.model, tmp_path / "small.safetensors")
    again = linearize.load(tmp_path / "small.safetensors")
    assert_same_tensors(result.model, again)
    assert_same_outputs(result.model, again, lambda each: [each(**data[0])[0]])
    if kind == "llama":
        assert result.model.generate(**data[0], max_new_tokens=3, do_sample=False).shape == (4, 43)  # type: ignore[operator]


@pytest.mark.parametrize("bend", [lambda cost: cost**0.5, lambda cost: 0.5 + 0.5 * cost, lambda cost: cost**2])
def test_a_latency_that_was_predicted_wrongly_is_neither_missed_nor_overdone(
    bend: Callable[[float], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are made on predicted latencies, and judged by others."""
    options = tuple(
        Option((), (1 - share) ** 2, share, 0, 0, latency=share) for share in torch.linspace(1, 0, 101).tolist()
    )
    found = Survey(Context(nn.Identity(), None, [], "latency"), "latency", [Group(("a",), options)], 1.0, Cost(1, 1))

    def measured(_: Any, budget: Budget, choice: Choice, *__: Any) -> Settled:
        reached = bend(choice.cost)
        return Settled(choice, nn.Identity(), nn.Identity(), Plan(()), choice.cost, reached, reached <= budget.fraction)

    monkeypatch.setattr(settling, "_try", measured)
    settled = settling.settle(found, Budget("latency", 0.6), None, gauges={"latency": lambda _: 1.0})
    assert settled.met
    assert settled.reached >= 0.5 or bend(0.6) < 0.5  # what was predicted too high is not loosened


def test_where_the_table_of_latencies_is_wrong_a_plan_by_flops_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer "b" is promised to cost nothing in time, and costs half of it; FLOPs tell."""

    def group(name: str, latency: float) -> Group:
        def option(keep: int, loss: float) -> Option:
            return Option((SiteChoice(name, keep),), loss, keep / 20, 0, 0, latency=latency * keep / 10)

        return Group((name,), (option(10, 0.0), option(5, 1.0), option(0, 3.0)))

    found = Survey(
        Context(nn.Identity(), None, [], "latency"), "latency", [group("a", 1.0), group("b", 0.0)], 1.0, Cost(1, 1)
    )

    def measured(_: Any, budget: Budget, choice: Choice, *__: Any) -> Settled:
        reached = sum(option.flops for option in choice.options)
        return Settled(choice, nn.Identity(), nn.Identity(), Plan(()), choice.cost, reached, reached <= budget.fraction)

    monkeypatch.setattr(settling, "_try", measured)
    settled = settling.settle(found, Budget("latency", 0.5), None, gauges={"latency": lambda _: 1.0})
    assert settled.met
    assert [choice.keep for option in settled.choice.options for choice in option.choices] == [5, 5]
