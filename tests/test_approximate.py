"""Least squares: covariances in a stream, brain-surgeon removal, refits with and without a skip, and edits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.algebra.covariance import Covariance
from linearize.algebra.regression import balanced, conditional, fit, rank_losses, square_root
from linearize.algebra.removal import removal_order
from linearize.errors import DataError
from linearize.families.channels.apply import write_edit
from linearize.families.channels.collect import observe
from linearize.families.channels.editable import obstacle_to_refit
from linearize.families.channels.fit import curve_of
from linearize.families.option import SiteChoice

I, C, O, R = 6, 20, 5, 3000  # noqa: E741


@pytest.fixture
def rows() -> dict[str, Tensor]:
    x = torch.randn(R, I, dtype=torch.float64)
    h = nn.functional.gelu(x @ torch.randn(I, C, dtype=torch.float64) + 0.3)
    weight, bias = torch.randn(O, C, dtype=torch.float64), torch.randn(O, dtype=torch.float64)
    root = square_root(torch.cov(torch.randn(O, 50, dtype=torch.float64)))
    return {"x": x, "h": h, "weight": weight, "bias": bias, "y": h @ weight.t() + bias, "root": root}


def covariance(*parts: Tensor) -> Covariance:
    found = Covariance(sum(part.shape[1] for part in parts))
    for chunk in torch.cat(parts, 1).split(700):
        found.update(chunk)
    return found


def error(rows: dict[str, Tensor], predicted: Tensor) -> float:
    return float(((rows["y"] - predicted) @ rows["root"]).square().sum(1).mean())


def test_a_stream_gives_the_covariance_of_the_whole_weights_and_large_means_included() -> None:
    x = torch.randn(500, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 1e5
    weights = torch.rand(500, dtype=torch.float64)
    found = Covariance(4)
    for some, w in zip(x.split(130), weights.split(130), strict=True):
        found.update(some, w)
    expected = torch.cov(x.t(), correction=0, aweights=weights)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-8, atol=1e-9)
    assert found.count == 500


@pytest.mark.parametrize("keep", [15, 7, 1])
def test_the_refit_is_that_of_least_squares(rows: dict[str, Tensor], keep: int) -> None:
    found = covariance(rows["x"], rows["h"])
    chosen = torch.randperm(C)[:keep].sort().values
    options: Any = {"inputs": I, "keep": chosen, "root": rows["root"], "ridge": 1e-12}
    fitted = fit(found.covariance, found.mean, rows["weight"], rows["bias"], **options)
    features = torch.cat((rows["h"][:, chosen], torch.ones(R, 1, dtype=torch.float64)), 1)
    expected = features @ torch.linalg.lstsq(features, rows["y"]).solution
    predicted = rows["h"][:, chosen] @ fitted.weight.t() + fitted.bias
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)
    assert fitted.loss == pytest.approx(error(rows, predicted), rel=1e-6)
    full = fit(found.covariance, found.mean, rows["weight"], rows["bias"], rank=None, **options)
    with_x = torch.cat((rows["x"], features), 1)
    expected = with_x @ torch.linalg.lstsq(with_x, rows["y"]).solution
    predicted = rows["h"][:, chosen] @ full.weight.t() + rows["x"] @ full.right.t() @ full.left.t() + full.bias
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def test_a_skip_of_lower_rank_is_the_best_of_its_rank(rows: dict[str, Tensor]) -> None:
    found = covariance(rows["x"], rows["h"])
    keep = torch.arange(0, C, 3)
    gone = torch.tensor([c for c in range(C) if c not in keep.tolist()])
    order, widths = torch.cat((gone, keep)), (C - 2, len(keep), 1)
    least, values = rank_losses(found.covariance, rows["weight"], order, widths, I, rows["root"], 1e-12)[len(keep)]
    losses = []
    for rank in range(O + 1):
        options: Any = {"inputs": I, "keep": keep, "root": rows["root"], "ridge": 1e-12}
        fitted = fit(found.covariance, found.mean, rows["weight"], rows["bias"], rank=rank, **options)
        predicted = rows["h"][:, keep] @ fitted.weight.t() + rows["x"] @ fitted.right.t() @ fitted.left.t()
        assert fitted.left.shape == (O, rank)
        torch.testing.assert_close(fitted.left.norm(dim=0), fitted.right.norm(dim=1))  # so that Adam can train them
        losses.append(error(rows, predicted + fitted.bias))
        assert losses[-1] == pytest.approx(least + float(values[rank:].sum()), rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    # no other skip of rank 1 is better: a local search from the found one does not improve it
    fitted = fit(found.covariance, found.mean, rows["weight"], rows["bias"], rank=1, **options)
    left, right = fitted.left.clone().requires_grad_(), fitted.right.clone().requires_grad_()
    kept = torch.cat((rows["h"][:, keep], torch.ones(R, 1, dtype=torch.float64)), 1)
    rest = rows["y"] - rows["x"] @ right.t() @ left.t()
    rest = rest - kept @ torch.linalg.lstsq(kept, rest).solution
    loss = (rest @ rows["root"]).square().sum(1).mean()
    gradient = torch.autograd.grad(loss, (left, right))
    assert max(float(g.abs().max()) for g in gradient) < 1e-6 * float(loss.detach()) + 1e-6


def test_balancing_changes_no_product() -> None:
    left, right = torch.randn(5, 3).double() * torch.tensor([1e3, 1.0, 0.0]), torch.randn(3, 4).double() * 1e-3
    one, other = balanced(left, right)
    torch.testing.assert_close(one @ other, left @ right)
    torch.testing.assert_close(one.norm(dim=0)[:2], other.norm(dim=1)[:2])
    assert torch.equal(other[2], right[2])  # nothing meets it: left alone


@pytest.mark.parametrize("group", [1, 4])
def test_removal_updates_exactly_what_a_new_fit_would_find(rows: dict[str, Tensor], group: int) -> None:
    found = covariance(rows["h"])
    scaled = rows["root"] @ rows["weight"]
    removal = removal_order(found.covariance, scaled, group=group, ridge=1e-12)
    channels = C // group
    assert sorted(removal.order.tolist()) == list(range(channels))
    assert (removal.loss.diff() >= -1e-9).all()
    for keep in (0, 1, channels // 2, channels):
        kept = (removal.keep(keep)[:, None] * group + torch.arange(group)).flatten()
        gone = [i for i in range(C) if i not in kept.tolist()]
        left = conditional(found.covariance, kept, torch.tensor(gone, dtype=torch.int64), 1e-12)
        expected = float((scaled[:, gone] @ left * scaled[:, gone]).sum())
        assert float(removal.loss[channels - keep]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_removal_takes_copies_and_dead_channels_first_at_no_cost() -> None:
    h = torch.randn(500, 8, dtype=torch.float64)
    h[:, 3] = h[:, 5] + 2 * h[:, 1]
    h[:, 6] = 0
    removal = removal_order(covariance(h).covariance, torch.randn(4, 8, dtype=torch.float64), ridge=1e-9)
    first = set(removal.order[:2].tolist())
    assert 6 in first
    assert len(first & {1, 3, 5}) == 1
    assert float(removal.loss[2]) < 1e-6 * float(removal.loss[3])


class Gated(nn.Module):
    """A gated unit in two maps, or in one."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.up = nn.Linear(6, 48) if packed else nn.Linear(6, 24)
        if not packed:
            self.gate = nn.Linear(6, 24, bias=False)
        self.act, self.down = nn.SiLU(), nn.Linear(24, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            g, u = self.up(x).chunk(2, -1)
        else:
            g, u = self.gate(x), self.up(x)
        return self.down(self.act(g) * u)


def norm() -> nn.Module:
    layer = nn.BatchNorm2d(16)
    layer.running_mean = torch.randn(16)
    layer.running_var = torch.rand(16) + 0.5
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 5)), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(), nn.Linear(32, 8, bias=False)), (7, 6)),
    "wide": (lambda: nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 5)), (12,)),
    "pointwise": (lambda: nn.Sequential(nn.Conv2d(6, 16, 1), norm(), nn.ReLU(), nn.Conv2d(16, 5, 1)), (6, 5, 5)),
    "3x3 to 1x1": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(16, 5, 1)),
                   (3, 8, 8)),
    "strided to 1x1": (lambda: nn.Sequential(nn.Conv2d(3, 16, (3, 5), (2, 3), (2, 4), 2), nn.GELU(),
                                             nn.Conv2d(16, 5, 1)), (3, 9, 9)),
    "unit": (lambda: Gated(False), (6,)),
    "packed": (lambda: Gated(True), (6,)),
}  # fmt: skip
SPATIAL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(16, 5, 3, padding=1)),
            (3, 8, 8)),
    "3x3 strided": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1), nn.GELU(),
                                          nn.Conv2d(16, 5, (1, 5), 2, padding=(0, 2))), (3, 20, 20)),
    "strided": (lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 5, 3, stride=2)), (3, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MODELS, *SPATIAL])
@pytest.mark.parametrize("rank", [0, 3, "full"])
def test_an_edit_computes_its_fit_and_collapses_to_it(name: str, rank: int | str) -> None:
    if name == "strided" and rank:
        pytest.skip("a consumer whose middle tap is off its position gets no skip")
    build, shape = {**MODELS, **SPATIAL}[name]
    model = build().double().eval()
    data = [torch.randn(80, *shape, dtype=torch.float64) for _ in range(3)]
    gated = linearize.convert(model, data[0])
    ((site, found),) = observe(gated, data, progress=False, sensitivity=False).items()
    curve = curve_of(gated, found)
    curve.ridge = 1e-9
    full = curve.largest_rank
    assert (full > 0) is (name != "strided")
    channels = curve.channels
    chosen = SiteChoice(site, channels // 4, full if rank == "full" else int(rank))
    edit = curve.edit(gated, chosen)
    edited = copy.deepcopy(gated)
    write_edit(edited, edit)
    x = torch.cat(data)
    with torch.no_grad():
        loss = float((edited(x) - model(x)).movedim(-3 if x.dim() == 4 else -1, -1).square().sum(-1).mean())
    spatial = name in SPATIAL  # there the statistics come from a sample of positions
    assert loss == pytest.approx(edit.loss, rel=0.3 if spatial else 1e-4, abs=1e-9)
    assert int(linearize.gates(edited)[site].linear.sum()) == channels - channels // 4
    for when in ("cheaper", "always"):
        small = linearize.collapse(edited, when=when)
        assert linearize.verify(edited, small, x).max_error < 1e-12
    if rank == "full":
        dropped = curve.edit(gated, SiteChoice(site, channels // 4)).loss
        assert edit.loss <= dropped * (1 + 1e-6)


def test_behind_a_pooling_the_consumer_has_rows_of_its_own() -> None:
    layers = nn.Conv2d(4, 24, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 5, 1)
    model = nn.Sequential(*layers).double().eval()
    data = [torch.randn(60, 4, 5, 5, dtype=torch.float64) for _ in range(4)]
    gated = linearize.convert(model, data[0])
    found = observe(gated, data, progress=False)["1"]
    assert (found.inputs, found.rows.count) == (0, 240)
    edit = curve_of(gated, found).edit(gated, SiteChoice("1", 12))
    write_edit(gated, edit)
    small = linearize.collapse(gated)
    assert linearize.verify(gated, small, data[0]).max_error < 1e-12


def test_a_pooling_before_a_spatial_consumer_leaves_no_skip() -> None:
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 5, 3, padding=1)
    data = [torch.randn(20, 3, 12, 12) for _ in range(4)]
    gated = linearize.convert(nn.Sequential(*layers).eval(), data[0])
    found = observe(gated, data, progress=False)["1"]
    assert found.inputs == 0
    assert found.rows.count == 80 * 36


def test_dropping_alone_leaves_ordinary_layers() -> None:
    for name in ("mlp", "unit", "packed"):
        build, shape = MODELS[name]
        gated = linearize.convert(build(), torch.randn(2, *shape))
        data = [torch.randn(200, *shape)]
        ((site, found),) = observe(gated, data, progress=False).items()
        write_edit(gated, curve_of(gated, found).edit(gated, SiteChoice(site, 8)))
        small = linearize.collapse(gated)
        kinds = {type(module).__name__ for module in small.modules()}
        assert kinds <= {"Sequential", "Linear", "GELU", "SiLU", "Gated"}


def test_sensitivity_is_the_cost_of_an_error_in_the_output() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3), nn.Linear(3, 6)).double()
    data = [torch.randn(400, 4, dtype=torch.float64) for _ in range(20)]
    gated = linearize.convert(model, data[0])
    found = observe(gated, data, progress=False)["1"]
    last: Any = model[3]
    x = torch.cat(data)
    energy = model(x).square().sum(1).mean()
    expected = (last.weight.t() @ last.weight / energy).detach()
    torch.testing.assert_close(found.metric, expected, rtol=0.1, atol=0.02 * float(expected.max()))


def test_padding_is_left_out_and_several_passes_find_the_same() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 4)
            self.act, self.act2, self.last = nn.GELU(), nn.GELU(), nn.Linear(4, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.last(self.act2(self.down(self.act(self.up(self.embed(input_ids))))))

    gated = linearize.convert(Encoder(), {"input_ids": torch.zeros(2, 5, dtype=torch.int64)})
    ids = torch.randint(1, 9, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [2], [4]])).long()
    padded = observe(gated, [{"input_ids": ids, "attention_mask": mask}], sensitivity=False, progress=False)
    apart = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate((7, 2, 4))]
    plain = observe(gated, apart, sensitivity=False, progress=False, memory=1.0)
    assert set(padded) == set(plain) == {"act", "act2"}
    for name, found in padded.items():
        assert found.rows.count == 13
        torch.testing.assert_close(found.rows.covariance, plain[name].rows.covariance)


def test_the_model_is_left_alone_and_bad_data_is_named() -> None:
    model = linearize.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))
    x = torch.randn(9, 4)
    before = model(x)
    model.train()
    observe(model, [x], progress=False)
    assert model.training
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match=r"^1: .*batch 1"):
        observe(model, [torch.randn(9, 4), x], progress=False)
    with pytest.raises(DataError, match="no batches"):
        observe(model, [], progress=False)


def test_what_cannot_be_refitted_says_why() -> None:
    hooked = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)))
    gated = linearize.convert(hooked, torch.randn(1, 4))
    why = obstacle_to_refit(gated, linearize.gates(gated)["1"].site)
    assert why is not None
    assert "computed" in why
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    gated = linearize.convert(depthwise, torch.randn(1, 3, 8, 8))
    assert "groups" in (obstacle_to_refit(gated, linearize.gates(gated)["1"].site) or "")
