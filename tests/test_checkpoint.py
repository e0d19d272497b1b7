"""Saving and loading: the same model again, in a new process; and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linearize import zoo
from linearize.checkpoint import load, save
from linearize.errors import CheckpointError
from linearize.gating.gate import ChannelGate
from linearize.sites.record import Record, record_of, set_record
from linearize.storage import tensorfile
from linearize.surgery.specs import replace_module, spec_of
from tests.processors import assert_same_outputs, assert_same_tensors, moved
from tests.test_zoo import TIMM, TRANSFORMERS, assert_same_function

timm = pytest.importorskip("timm")
ROOT = Path(__file__).parents[1]  # a new process finds the helpers of the tests here


def gate(model: nn.Module, path: str, channels: int) -> None:
    """Put a gate with random coefficients at a path of the model, half of its channels linear."""
    module = ChannelGate(model.get_submodule(path), channels)
    with torch.no_grad():
        module.alpha.uniform_(0.1, 0.9)
        module.slope.normal_()
        module.intercept.normal_()
    module.linearize_(torch.arange(channels) % 2 == 0)
    replace_module(model, path, module)


def replaced(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, on the record."""
    replace_module(model, path, module)
    record = record_of(model) or Record()
    record.steps.append({"path": path, "module": spec_of(module)})
    set_record(model, record)


class Net(nn.Module):
    """A model that no zoo knows: tied weights, a table in an attribute, a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.act = nn.ReLU()
        self.rnn = nn.GRU(4, 4)
        self.table = [torch.arange(4.0)]
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.rnn(self.second(self.act(self.first(x))) * self.scale + self.table[0])[0]
        return y


@pytest.mark.parametrize("name", TIMM)
def test_round_trip_of_timm_models(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    save(model, tmp_path / "m.safetensors")
    assert_same_function(model, load(tmp_path / "m.safetensors"))


def test_round_trip_of_a_model_that_computes_with_its_parameters_while_it_is_built(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64).eval()
    save(model, tmp_path / "m.safetensors")
    assert_same_function(model, load(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_round_trip_of_transformers_models(name: str, tmp_path: Path) -> None:
    model: Any = TRANSFORMERS[name]().train()
    model.config.use_cache = False
    save(model, tmp_path / "m.safetensors")
    loaded: Any = load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict()
    if getattr(model, "generation_config", None) is not None:
        assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert_same_function(model.eval(), loaded)


@pytest.mark.slow
def test_gated_and_rewritten_model_in_a_new_process(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit", num_classes=5).eval()
    gate(model, "blocks.0.mlp.act", 192)
    replaced(model, "blocks.1.mlp.fc1", nn.Linear(64, 10, bias=False))
    replaced(model, "blocks.1.mlp.fc2", nn.Linear(10, 64))
    args, _ = zoo.example_inputs(model)
    torch.save((args[0], moved(model)(*args)), tmp_path / "expected.pt")
    save(model, tmp_path / "m.safetensors")
    code = (
        "import sys, torch; from linearize.checkpoint import load; from tests.processors import moved, other_sums;"
        "same = other_sums(); same.__enter__();"
        "x, y = torch.load(sys.argv[2]); m = load(sys.argv[1]);"
        "assert torch.equal(moved(m)(x), y); print(type(m).__name__, m.blocks[0].mlp.act.linear.sum().item())"
    )
    files = [str(tmp_path / "m.safetensors"), str(tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VisionTransformer", "96"]
    again: Any = load(tmp_path / "m.safetensors")
    record = record_of(again)
    assert record is not None
    assert [step["path"] for step in record.steps] == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    other = copy.deepcopy(again)
    with torch.no_grad():
        other.blocks[1].mlp.fc2.weight.mul_(2)
    assert not torch.equal(other(*args), again(*args))  # control: the rewritten layer matters


def test_model_of_the_user_is_loaded_into_a_copy(tmp_path: Path) -> None:
    model: Any = Net().eval()
    gate(model, "act", 4)
    model.table[0] += 1
    model.scale *= 3
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="model=base"):
        load(tmp_path / "m.safetensors")
    base = Net()
    before = copy.deepcopy(base.state_dict())
    loaded: Any = load(tmp_path / "m.safetensors", model=base)
    x = torch.randn(3, 2, 4)
    assert_same_tensors(model, loaded)
    assert_same_outputs(model, loaded, lambda each: [each(x)])
    assert loaded.first.weight is loaded.second.weight
    assert isinstance(base.act, nn.ReLU)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert_same_outputs(model, load(tmp_path / "m.safetensors", model=loaded), lambda each: [each(x)])
    loaded(x).sum().backward()
    assert loaded.first.weight.grad is not None


def test_wrappers_are_left_out(tmp_path: Path) -> None:
    model = Net().eval()
    save(nn.DataParallel(model), tmp_path / "m.safetensors")
    x = torch.randn(3, 2, 4)
    assert_same_outputs(model, load(tmp_path / "m.safetensors", model=Net()), lambda each: [each(x)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = TRANSFORMERS["llama"]().eval().to(dtype)
    save(model, tmp_path / "m.safetensors")
    loaded: Any = load(tmp_path / "m.safetensors")
    assert loaded.lm_head.weight.dtype == dtype
    assert loaded.model.rotary_emb.inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype
    assert_same_function(model, loaded)


def test_what_was_changed_by_hand_survives(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit").eval()
    model.blocks[0].attn.scale = 0.25
    model.blocks[0].norm1.eps = 0.1
    model.head.weight.requires_grad_(False)
    model.reset_classifier(3)
    model.patch_embed.proj.bias.requires_grad_(False)
    save(model, tmp_path / "m.safetensors")
    loaded: Any = load(tmp_path / "m.safetensors")
    assert loaded.blocks[0].norm1.eps == 0.1
    assert loaded.num_classes == 3
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["patch_embed.proj.bias"]
    assert_same_function(model, loaded)


def test_a_zoo_model_that_cannot_be_rebuilt_warns(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit").eval()
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.warns(UserWarning, match=r"blocks\.0\.mlp\.act"):
        save(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.act"):
        load(tmp_path / "m.safetensors")
    assert_same_function(model, load(tmp_path / "m.safetensors", model=copy.deepcopy(model)))


def test_loaded_model_can_be_pickled_copied_trained_and_saved_over_its_own_file(tmp_path: Path) -> None:
    save(TRANSFORMERS["gpt2"](), tmp_path / "m.safetensors")
    model: Any = load(tmp_path / "m.safetensors")
    assert model.lm_head.weight is model.transformer.wte.weight
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert_same_function(model, other)
    with torch.no_grad():
        model.transformer.wte.weight += 1
    save(model, tmp_path / "m.safetensors")
    assert_same_function(model, load(tmp_path / "m.safetensors"))


# Saving what should not be saved.


def spoil(name: str) -> Any:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight = model[0].weight
    if name == "nan":
        weight.data[0, 0] = torch.nan
    elif name == "inf":
        weight.data[1, 1] = -torch.inf
    elif name == "buffer":
        model[1].running_var[0] = torch.nan
    elif name == "empty":
        model[0].weight = nn.Parameter(torch.empty(0))
    elif name == "meta":
        model[0].to("meta")
    elif name == "sparse":
        model[0].weight = nn.Parameter(torch.eye(2).to_sparse())
    elif name == "complex":
        model[0].weight = nn.Parameter(torch.eye(2, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("kind", "tensor", "clue"),
    [
        ("nan", "0.weight", "NaN or infinite"),
        ("inf", "0.weight", "NaN or infinite"),
        ("buffer", "1.running_var", "NaN or infinite"),
        ("empty", "0.weight", "no elements"),
        ("meta", "0.weight", "meta device"),
        ("sparse", "0.weight", "cannot hold"),
        ("complex", "0.weight", "cannot hold"),
    ],
)
def test_saving_bad_tensors(kind: str, tensor: str, clue: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=clue) as caught:
        save(spoil(kind), tmp_path / "m.safetensors")
    assert caught.value.where == tensor
    assert list(tmp_path.iterdir()) == []


def test_buffers_may_hold_infinities(tmp_path: Path) -> None:
    model = nn.Identity()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
    save(model, tmp_path / "m.safetensors")
    loaded: Any = load(tmp_path / "m.safetensors", model=model)
    assert loaded.mask.tolist() == [0.0, -torch.inf, torch.inf]


def test_saving_to_bad_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "folder" / "m.safetensors"):
        with pytest.raises(CheckpointError) as caught:
            save(nn.Linear(2, 2), path)
        assert caught.value.where == str(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save(nn.Linear(2, 2), path)
    old = path.read_bytes()
    whole = tensorfile._bytes
    calls = []

    def full(tensor: torch.Tensor) -> memoryview:
        calls.append(tensor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(tensor)

    monkeypatch.setattr(tensorfile, "_bytes", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(nn.Linear(2, 2), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_limit_on_file_size_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(nn.Linear(2, 2), path)
    old = path.read_bytes()
    code = (
        "import sys, torch, linearize.checkpoint as c\n"
        "try: c.save(torch.nn.Linear(1000, 1000), sys.argv[1])\n"
        "except c.CheckpointError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert "too large" in done.stdout
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "folder" / "m.safetensors")
    save(nn.Linear(2, 2), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "folder" / "m.safetensors").is_file()


# Loading what is not, or no longer, a file of ours.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    model = timm.create_model("test_vit", num_classes=5)
    gate(model, "blocks.0.mlp.act", 192)
    save(model, path)
    return path


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write header and data to a file."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def change(good: Path, path: Path, name: str, value: Any) -> Path:
    """A copy of a good file with one entry of the metadata changed."""
    header, data = split(good)
    header["__metadata__"][name] = value if isinstance(value, str) else json.dumps(value)
    return join(path, header, data)


def refuses(path: Path, clue: str, model: nn.Module | None = None) -> None:
    with pytest.raises(CheckpointError, match=clue) as caught:
        load(path, model=model)
    assert caught.value.where == str(path)
    assert caught.value.remedy


def test_good_file_loads(good: Path, tmp_path: Path) -> None:
    load(good)
    header, data = split(good)
    load(join(tmp_path / "m.safetensors", header, data))  # control: what the next tests damage is whole


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    refuses(tmp_path, "folder")
    refuses(tmp_path / "missing.safetensors", "no such file")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -50_000])
def test_truncated_files(good: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(good.read_bytes()[:keep])
    refuses(path, "truncated|start like")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    refuses(path, "not start like")
    path.write_text("hello, world, this is a text")
    refuses(path, "not start like")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)
    refuses(path, "did not write")
    path.write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    refuses(path, "not that of a safetensors file")
    path.write_bytes((10**6).to_bytes(8, "little") + b'{"a":' + b"[" * (10**6 - 5))
    refuses(path, "not that of a safetensors file")
    join(path, {"a": {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 8]}}, b"00000000")
    refuses(path, "size of 'a'")
    join(path, {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, b"")
    refuses(path, "shape of 'a'")


def test_versions(good: Path, tmp_path: Path) -> None:
    refuses(change(good, tmp_path / "m", "version", "3"), "version 3.*Upgrade")
    refuses(change(good, tmp_path / "m", "version", "one"), "version is 'one'")
    refuses(change(good, tmp_path / "m", "version", "9" * 5000), "version is")


@pytest.mark.parametrize("name", ["recipe", "steps", "aliases", "frozen", "extras", "attributes", "sites", "inputs"])
@pytest.mark.parametrize("value", ["{", "[" * 100_000, '"text"', "[1]", '{"a": 1}', "12"])
def test_damaged_metadata(good: Path, tmp_path: Path, name: str, value: str) -> None:
    path = change(good, tmp_path / "m", name, value)
    if name == "inputs" and value not in ("{", "[" * 100_000):
        load(path)  # plain data is what inputs may be
    else:
        refuses(path, "damaged|cannot be built|shares|library")


@pytest.mark.parametrize(
    ("step", "clue"),
    [
        ({"path": "blocks.9.mlp", "module": {"type": "Identity"}}, "blocks.9.mlp"),
        ({"path": "blocks.0.mlp.act", "module": {"type": "os.system", "command": "true"}}, "os.system"),
        ({"path": "blocks.0.mlp.act", "module": {"type": ["Linear"]}}, "not a name"),
        ({"path": "blocks.0.mlp.act", "module": {"type": "ChannelGate", "channels": -1}}, "ChannelGate"),
        ({"path": "blocks.0.mlp.fc1", "module": {"type": "Linear", "in_features": "x"}}, "Linear"),
        ({"path": "", "module": {"type": "Identity"}}, "damaged"),
        ({"path": 3}, "damaged"),
        (
            {
                "path": "head",
                "module": {"type": "Linear", "in_features": 64, "out_features": 6, "bias": True},
            },
            "shape",
        ),
        ({"path": "head", "module": {"type": "Identity"}}, "not expected"),
    ],
)
def test_plans_that_do_not_fit(good: Path, tmp_path: Path, step: dict[str, Any], clue: str) -> None:
    steps = json.loads(split(good)[0]["__metadata__"]["steps"])
    refuses(change(good, tmp_path / "m", "steps", [*steps, step]), clue)


def test_base_models_that_do_not_fit(good: Path, tmp_path: Path) -> None:
    refuses(good, "plan does not fit", nn.Linear(2, 2))
    refuses(good, "shape", timm.create_model("test_vit"))
    model = timm.create_model("test_vit", num_classes=5)
    gate(model, "blocks.1.mlp.act", 192)
    refuses(good, "rewritten already", model)
    model = timm.create_model("test_vit", num_classes=5)
    model.lock = os.scandir(tmp_path)
    refuses(good, "cannot be copied", model)
    model.lock.close()


def test_tensors_that_do_not_fit(good: Path, tmp_path: Path) -> None:
    header, data = split(good)
    entry = header.pop("head.bias")
    refuses(join(tmp_path / "m", header, data), "'head.bias' is missing")
    refuses(join(tmp_path / "m", header | {"more": entry, "head.bias": entry}, data), "'more' is not expected")
    wrong = entry | {"shape": [1, 5]}
    refuses(join(tmp_path / "m", header | {"head.bias": wrong}, data), r"'head.bias' is of shape \(1, 5\)")


def test_recipes_from_hostile_files(good: Path, tmp_path: Path) -> None:
    timm_recipe = {"library": "timm", "name": "test_vit", "kwargs": {"num_classes": 5}}
    for recipe, clue in [
        ({"library": "builtins", "name": "exec"}, "library"),
        (timm_recipe | {"name": "hf-hub:evil/model"}, "model name"),
        (timm_recipe | {"kwargs": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        (timm_recipe | {"kwargs": {"num_classes": 10**9}}, "far more weights|cannot be built|shape"),
        ({"library": "transformers", "class": "os:system", "config_class": "BertConfig"}, "os:system"),
    ]:
        refuses(change(good, tmp_path / "m", "recipe", recipe), clue)


def test_attributes_from_hostile_files(good: Path, tmp_path: Path) -> None:
    refuses(change(good, tmp_path / "m", "attributes", [["", "num_classes", "https://evil"]]), "damaged")
    loaded: Any = load(change(good, tmp_path / "m", "attributes", [["", "forward", 1], ["", "_modules", {}]]))
    assert "forward" not in loaded.__dict__
    assert loaded._modules


def test_nothing_is_imported_or_warned_without_need() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = "import sys, linearize.checkpoint; print(sorted({'timm', 'transformers'} & sys.modules.keys()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
