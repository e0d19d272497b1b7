"""Files whose layers do not fit each other, or that say two things of one site, are refused when they are loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from benchmarks.stress.file_mutations import joined, split
from linearize.errors import CheckpointError
from linearize.gating.gate import gates
from linearize.storage.trial import check_runs
from linearize.zoo.building import NO_LIMIT, Limit

Change = Callable[[dict[str, Any]], None]


class Net(nn.Module):
    """Two convolutions with norms of different widths, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one, self.act_one = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU()
        self.two, self.norm_two, self.act_two = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.GELU()
        self.up, self.act, self.down = nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)
        self.again, self.act_again, self.back = nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)
        self.parts = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_two(self.norm_two(self.two(self.act_one(self.norm_one(self.one(x))))))
        x = x.mean((2, 3))
        x = x + self.down(self.act(self.up(x)))
        x = x.view(len(x), self.parts, -1).flatten(1)
        y: Tensor = x + self.back(self.act_again(self.again(x)))
        return y


X = torch.ones(2, 3, 4, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The gated and the collapsed network, in a file each."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    gated = linearize.convert(Net().eval(), X)
    for number, gate in enumerate(gates(gated).values()):
        gate.linearize_(torch.arange(gate.channels) < 4)
        with torch.no_grad():  # some on their way: what is left of such a gate knows its channels
            gate.alpha[5:7] = 0.25 * (number + 1)
    linearize.save(gated, folder / "gated")
    with pytest.warns(UserWarning, match="alpha between 0 and 1"):
        linearize.save(linearize.collapse(gated, when="always"), folder / "collapsed")
    return {path.name: path for path in folder.iterdir()}


def _forged(source: Path, target: Path, change: Change) -> Path:
    """The file with something else in its metadata."""
    header, data = split(source.read_bytes())
    told = {name: json.loads(header["__metadata__"][name]) for name in ("steps", "sites", "inputs", "attributes")}
    before = copy.deepcopy(told)
    change(told)
    assert told != before
    header["__metadata__"].update({name: json.dumps(value) for name, value in told.items()})
    target.write_bytes(joined(header, data))
    return target


def _sites(told: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """A site in both of its places: the list, and its gate."""
    gate = next(step["module"]["site"] for step in told["steps"] if step["path"] == path)
    return [gate, next(site for site in told["sites"] if site["name"] == path)]


def _step(told: dict[str, Any], path: str, kind: str) -> dict[str, Any]:
    """The description of a layer of a kind at a path."""
    found: dict[str, Any] = next(
        step["module"] for step in told["steps"] if step["path"] == path and step["module"]["type"] == kind
    )
    return found


def _narrower(told: dict[str, Any]) -> None:
    _step(told, "act", "PartialActivation")["keep"] = 10  # around what knows 20 channels


def _dilated(told: dict[str, Any]) -> None:
    _step(told, "one", "Conv2d")["dilation"] = [1, 1, 1]


def _another_consumer(told: dict[str, Any]) -> None:
    _sites(told, "act")[0]["consumers"][0]["module"] = "back"


def _in_the_list_alone(told: dict[str, Any]) -> None:
    _sites(told, "act")[1]["consumers"][0]["module"] = "back"


def _of_another_norm(told: dict[str, Any]) -> None:
    for site in _sites(told, "act_one"):
        site["folds"][0]["mean"] = "norm_two.running_mean"


def _gone_from_the_list(told: dict[str, Any]) -> None:
    told["sites"] = [site for site in told["sites"] if site["name"] != "act"]


def _attributes(*attributes: Any) -> Change:
    return lambda told: told["attributes"].extend(attributes)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("collapsed", _dilated, "of 3 numbers"),
        ("collapsed", _narrower, r"do not fit each other \(RuntimeError"),
        ("gated", _another_consumer, "not what the list of sites says"),
        ("gated", _in_the_list_alone, "not what the list of sites says"),
        ("gated", _gone_from_the_list, "not what the list of sites says"),
        ("gated", _of_another_norm, "are of the sizes"),
        ("gated", _attributes(["", "parts", 5]), "do not fit each other"),
        ("gated", _attributes(["", "parts", 2], ["", "parts", 4]), "an attribute is there twice"),
    ],
)
def test_what_contradicts_itself(name: str, change: Change, told: str, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        linearize.load(_forged(files[name], tmp_path / "forged", change), model=Net())


def _of_other_images(told: dict[str, Any]) -> None:
    told["inputs"]["__tuple__"][0]["__tuple__"][0]["__tensor__"][0] = [2, 5, 4, 4]


def test_an_attribute_of_another_value_may_stand(files: dict[str, Path], tmp_path: Path) -> None:
    found: Any = linearize.load(_forged(files["gated"], tmp_path / "x", _attributes(["", "parts", 2])), model=Net())
    assert found.parts == 2
    assert found(X).shape == (2, 8)


def _without_inputs(told: dict[str, Any]) -> None:
    told["inputs"] = None


@pytest.mark.parametrize("change", [_of_other_images, _without_inputs])
@pytest.mark.parametrize("name", ["gated", "collapsed"])
def test_inputs_that_no_model_of_this_kind_takes_prove_nothing(
    name: str, change: Change, files: dict[str, Path], tmp_path: Path
) -> None:
    """The base does not run on them either: the file is loaded, and is the same function."""
    found = linearize.load(_forged(files[name], tmp_path / "forged", change), model=Net())
    torch.testing.assert_close(found(X), linearize.load(files[name], model=Net())(X), rtol=1e-5, atol=1e-6)


def test_what_a_forward_keeps_has_no_place_in_a_fresh_model(tmp_path: Path) -> None:
    """Nor has an activation whose channel axis nobody knows any channels; both are saved and loaded."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
            self.slope = nn.Parameter(torch.full((1,), 0.2))
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(nn.functional.prelu(x.reshape(-1), self.slope).view_as(x))
            self.kept.append(h.detach().mean())
            y: Tensor = self.down(torch.relu(h))
            return y

    torch.manual_seed(0)
    x, model = torch.randn(5, 4), Keeps().eval()
    gated: Any = linearize.convert(model, x)
    expected = gated(x)
    assert len(gated.kept) == 1
    linearize.save(gated, tmp_path / "model")
    sites = json.loads(split((tmp_path / "model").read_bytes())[0]["__metadata__"]["sites"])
    assert 0 in [site["channels"] for site in sites]
    found: Any = linearize.load(tmp_path / "model", model=Keeps())
    assert found.kept == []
    torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-6)


class Reads(nn.Module):
    """Its forward reads a value, and leaves something on it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(width, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.down(self.up(x))
        return y * 2 if self.up.bias[0].item() > 1e9 else y


def test_what_no_run_can_tell_is_not_said() -> None:
    inputs: Any = ((torch.empty(3, 4, device="meta"),), {})
    good, bad = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Sequential(nn.Linear(4, 8), nn.Linear(7, 4))
    made: list[nn.Module] = []

    def base(model: nn.Module) -> Callable[[], nn.Module]:
        return lambda: made.append(model) or model  # type: ignore[func-returns-value]

    reads = Reads()
    check_runs("x", reads, inputs, base(Reads()), NO_LIMIT)  # neither runs without values
    assert reads.calls == made[0].calls == 0
    check_runs("x", bad, inputs, base(bad), NO_LIMIT)
    check_runs("x", good, inputs, base(bad), NO_LIMIT)
    assert len(made) == 2  # the base is made only where it is needed
    check_runs("x", bad, None, base(good), NO_LIMIT)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        check_runs("x", bad, inputs, base(good), NO_LIMIT)


def test_a_trial_has_an_end() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.weight * x[0]
            for _ in range(len(x)):
                y = y + 1
            return y

    inputs: Any = ((torch.empty(2**40, device="meta"),), {})
    with pytest.raises(AssertionError, match="no base"):  # the control: a model that does not run asks for its base
        check_runs("x", nn.Linear(3, 3), inputs, _no_base, Limit.of_file(2, 10, 10))
    check_runs("x", Loops(), inputs, _no_base, Limit.of_file(2, 10, 10))


def _no_base() -> nn.Module:
    raise AssertionError("no base is asked for")
