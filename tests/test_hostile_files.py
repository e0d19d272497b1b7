"""Files from strangers: none of them runs code, reaches out, asks, fills the memory, or ends in a foreign error."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.checkpoint import load, save
from linearize.data.idx import read_idx
from linearize.errors import CheckpointError, DataError, LinearizeError, UsageError
from linearize.gating.gate import gates
from linearize.surgery.layers import PartialActivation
from linearize.zoo import create
from linearize.zoo.building import Limit, within_limit
from linearize.zoo.sealed import sealed

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

Forge = Callable[..., Path]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gated model of timm."""
    model = create("timm:test_vit", num_classes=10, img_size=32, in_chans=1)
    path = tmp_path_factory.mktemp("hostile") / "good.safetensors"
    save(linearize.convert(model), path)
    return path


@pytest.fixture
def forge(good: Path, tmp_path: Path) -> Forge:
    """Makes copies of the good file with other texts in the metadata."""

    def make(added: int = 0, **texts: Any) -> Path:
        raw = good.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        for number in range(added):
            header[f"extra:{number}"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
            data += bytes(8)
        for name, value in texts.items():
            header["__metadata__"][name] = value if isinstance(value, str) else json.dumps(value)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / "forged.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return make


def hf(cls: str, config_cls: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe of transformers."""
    return {"library": "transformers", "class": cls, "config_class": config_cls, "config": config, **more}


def small(**more: Any) -> dict[str, Any]:
    """Settings of a tiny BERT."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    return {**sizes, **more}


BERT, TIMM = ("BertModel", "BertConfig"), ("TimmWrapperModel", "TimmWrapperConfig")
MAPPED = {"attribute_map": {"foo": "auto_map"}}
REACHING: dict[str, dict[str, Any]] = {
    "a checkpoint": hf(*TIMM, {"architecture": "test_vit", "model_args": {"checkpoint_path": "bait.pth"}}),
    "a folder as architecture": hf(*TIMM, {"architecture": "local-dir:bait"}),
    "another name for auto_map": hf(*BERT, small(**MAPPED, foo={"AutoModel": "x"})),
    "another name in a part": hf(
        "CLIPModel", "CLIPConfig", {"text_config": {**MAPPED, "foo": {"AutoConfig": "bait--bait.Bait"}}}
    ),
    "kernels": hf(*BERT, small(attribute_map={"k": "_attn_implementation_internal"}, k="owner/kernels")),
    "a backbone of a repository": hf("DetrModel", "DetrConfig", {"backbone": "owner/repo", "use_timm_backbone": False}),
    "a backbone of a folder": hf("UperNetForSemanticSegmentation", "UperNetConfig", {"backbone": "bait"}),
    "a part of a repository": hf("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {"backbone": "owner/repo"}),
    "a path": hf(*BERT, small(index_path="/etc/passwd")),
    "a torch function as dtype": hf(*BERT, small(dtype="load")),
    "a method as setting": hf(*BERT, small(to_dict="x")),
    "an address deep inside": hf(*BERT, small(extra={"a": [{"b": "https://localhost:1/x"}]})),
    "a checkpoint of timm": {"library": "timm", "name": "test_vit", "kwargs": {"checkpoint_path": "bait.pth"}},
    "weights of timm": {"library": "timm", "name": "test_vit", "kwargs": {"pretrained_cfg": {"file": "bait.pth"}}},
}

TRAPPED = """
import builtins, json, sys, warnings
warnings.simplefilter("ignore")
import torch, linearize, timm, transformers
transformers.logging.set_verbosity_error()
from benchmarks.stress.watch import Watch
watch = Watch(*sys.argv[2:])
seen = {}
for path in sys.argv[2:]:
    watch.start()
    try:
        outcome = type(linearize.load(path)).__name__
    except linearize.LinearizeError as error:
        outcome = "refused"
    except BaseException as error:
        outcome = f"foreign {type(error).__name__}: {error}"
    seen[path] = {"outcome": outcome, **watch.stop()}
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_nothing_reaches_out(forge: Forge, tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    bait.mkdir()
    (bait / "config.json").write_text('{"architecture": "test_vit", "model_type": "bert"}', encoding="utf-8")
    (tmp_path / "bait.pth").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "bait.py").write_text("open('ran', 'w')", encoding="utf-8")
    paths = {}
    for number, (name, recipe) in enumerate(REACHING.items()):
        paths[name] = str(forge(recipe=recipe, steps=[], sites=[]).rename(tmp_path / f"{number}.safetensors"))
    root = Path(linearize.__file__).parents[1]
    command = [sys.executable, "-c", TRAPPED, "", *paths.values()]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {name: seen[path] for name, path in paths.items()} == {name: {"outcome": "refused"} for name in paths}
    assert not (tmp_path / "ran").exists()


def test_the_traps_work(tmp_path: Path) -> None:
    """The negative control: what the traps are for is caught by them."""
    code = (
        "import sys, torch; sys.path.insert(0, '.'); from benchmarks.stress.watch import Watch; watch = Watch()\n"
        "import socket, subprocess\n"
        "watch.start(); input('?'); open('plain.txt').close(); subprocess.run(['true'])\n"
        "try: socket.create_connection(('localhost', 1))\nexcept OSError: pass\n"
        "import outside\nprint(sorted(watch.stop()))"
    )
    (tmp_path / "plain.txt").touch()
    (tmp_path / "outside.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(linearize.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "['code', 'network', 'prompts', 'reads']"


def test_a_sealed_room_lets_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1", encoding="utf-8")

    def fetch() -> None:
        import socket

        socket.create_connection(("localhost", 1))

    for action in (
        lambda: (tmp_path / "x").read_text(encoding="utf-8"),
        lambda: (tmp_path / "y").write_text("1", encoding="utf-8"),
        lambda: subprocess.run([sys.executable, "--version"], check=False),
        partial(input, "Run this code? [y/N] "),
        (tmp_path / "x").unlink,
        fetch,
    ):
        with pytest.raises(UsageError, match="reaches outside"), sealed():
            action()
    with sealed():  # libraries may be read
        assert Path(torch.__file__).read_bytes()
    assert (tmp_path / "x").read_text(encoding="utf-8") == "1"  # nothing is refused outside
    assert not (tmp_path / "y").exists()


BOMBS: dict[str, dict[str, Any]] = {
    "labels": hf("BertForSequenceClassification", "BertConfig", small(num_labels=10**9)),
    "positions": hf("BertModel", "BertConfig", small(max_position_embeddings=10**9)),
    "layers": hf("BertModel", "BertConfig", small(num_hidden_layers=10**6)),
    "many layers": hf("BertModel", "BertConfig", small(num_hidden_layers=9000)),
    "masks": hf(
        "GPTNeoModel", "GPTNeoConfig",
        {"max_position_embeddings": 20_000, "num_layers": 24, "attention_types": [[["global", "local"], 12]]},
    ),
    "depth": {"library": "timm", "name": "test_vit", "kwargs": {"depth": 10**7}},
    "width": {"library": "timm", "name": "test_vit", "kwargs": {"embed_dim": 2**20}},
    "pixels": {"library": "timm", "name": "test_vit", "kwargs": {"img_size": 10**6}},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_recipes_of_bombs(name: str, forge: Forge) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, before = time.process_time(), _peak(reset=True)
        with pytest.raises(CheckpointError):
            load(forge(recipe=BOMBS[name], steps=[], sites=[]))
    assert _peak() - before < 5e8
    assert time.process_time() - start < 10


def _peak(*, reset: bool = False) -> float:
    """Bytes at the peak since the last reset; now, at a reset; always 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    name = "VmRSS:" if reset else "VmHWM:"
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0.0)


def test_memory_is_counted_before_it_is_taken() -> None:
    for make in (
        lambda: torch.zeros(2**28),
        lambda: torch.arange(2**28),
        lambda: torch.ones(2**14)[:, None] * torch.ones(2**14),
        lambda: torch.ones(2**15).repeat(2**13),
        lambda: [torch.ones(2**20) for _ in range(200)],
        lambda: [nn.BatchNorm1d(1000) for _ in range(20_000)],
        lambda: [nn.Sequential(nn.Identity()) for _ in range(1000)],
        lambda: list(torch.zeros(10**6)),
    ):
        before = _peak(reset=True)
        with pytest.raises(UsageError, match="far more"), within_limit(Limit(1e9, 900, 2**27)):
            make()
        assert _peak() - before < 3e8
    with within_limit(Limit(1e9, 900, 2**27)):
        assert torch.ones(2**20).sum() == 2**20


PARTIAL = {"type": "PartialActivation", "keep": 1, "axis": -1}


def _doubling(rounds: int) -> list[dict[str, Any]]:
    steps = []
    for number in range(rounds):
        calls = [{"child": f"c{number}", "target": "activation", "index": 0, "of": 1}]
        steps += [
            {"path": "blocks.1.mlp.act", "module": module} for module in (PARTIAL, {"type": "Rewrite", "calls": calls})
        ]
    return steps


def rewrite(**call: Any) -> list[dict[str, Any]]:
    """One step that redirects the call of an activation."""
    good = {"child": "z", "target": "act", "index": 0, "of": 1}
    return [{"path": "blocks.1.mlp", "module": {"type": "Rewrite", "calls": [{**good, **call}]}}]


def masked(channels: int, block: int = 1) -> dict[str, Any]:
    """A step that asks for buffers of so many channels."""
    return {
        "path": f"blocks.{block}.mlp.act",
        "module": {"type": "MaskedActivation", "channels": channels, "axis": -1},
    }


def linear(**more: Any) -> list[dict[str, Any]]:
    """One step that puts a linear layer in."""
    layer = {"type": "Linear", "in_features": 64, "out_features": 192, "bias": True}
    return [{"path": "blocks.1.mlp.fc1", "module": {**layer, **more}}]


STEPS: dict[str, list[dict[str, Any]]] = {
    "copies of copies": _doubling(40),
    "900 nested": [{"path": "blocks.1.mlp.act", "module": PARTIAL}] * 900,
    "a buffer of gigabytes": [masked(2**40)],
    "many large buffers": [masked(2**24, n % 2) for n in range(20)],
    "a keyword": rewrite(child="lambda"),
    "no name": rewrite(child="a b"),
    "code": rewrite(child="z(__import__('os').system('true'))"),
    "a method's name": rewrite(child="forward"),
    "a part's name": rewrite(child="fc1"),
    "a call out of range": rewrite(index=3),
    "a call before the first": rewrite(index=-1),
    "no such function": rewrite(target="relu", function="system"),
    "a place of another kind": rewrite(place={"a": 1}),
    "a method of another": rewrite(place=["__reduce_ex__", 0]),
    "a device": linear(device="cuda"),
    "a text for a number": linear(in_features="64"),
    "true for a number": linear(in_features=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_strangers(name: str, forge: Forge) -> None:
    before = _peak(reset=True)
    with pytest.raises(CheckpointError):
        load(forge(steps=STEPS[name], sites=[]))
    assert _peak() - before < 1e9


@pytest.mark.parametrize("hidden", ["forward", "eval", "to", "named_modules", "__class__", "class", "pretrained_cfg"])
def test_extras_that_would_hide_a_method(hidden: str, forge: Forge) -> None:
    with pytest.raises(CheckpointError):
        load(forge(1, extras=[["extra:0", "", [hidden]]]))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("channels",), 7), (("channels",), -1), (("axis",), 0), (("producer", "module"), "nowhere"),
        (("producer",), 3), (("producer", "total"), 191), (("producer", "stop"), 10**9),
        (("consumers", 0, "kind"), "conv2d"),
        (("consumers", 0, "start"), -3), (("folds",), [{"module": "norm", "weight": "norm.nothing"}]),
        (("order",), "x"),
        (("positions",), float("nan")), (("gated_unit",), True), (("consumers", 0, "module"), "blocks.0.norm2"),
        (("activation",), "\ud800"), (("saved",), 10**400),
    ],
)  # fmt: skip
def test_sites_that_contradict_their_layers(path: tuple[Any, ...], value: Any, good: Path, forge: Forge) -> None:
    raw = good.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    steps = json.loads(metadata["steps"])
    place = steps[0]["module"]["site"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointError):
        load(forge(steps=steps))


def test_numbers_that_change_their_kind(forge: Forge, good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name in ("head.weight", "blocks.0.mlp.act.frozen"):
        header = json.loads(raw[8 : 8 + length])
        header[name]["dtype"] = "I32" if header[name]["dtype"] == "F32" else "U8"
        text = json.dumps(header).encode()
        path = tmp_path / "kind.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        with pytest.raises(CheckpointError, match="is of torch"):
            load(path)


def test_what_a_good_file_may_still_do(good: Path, forge: Forge, tmp_path: Path) -> None:
    """The control: what the tests above forge is whole, loads, collapses, and is saved again."""
    model = load(forge())
    for gate in gates(model).values():
        gate.linearize_(torch.arange(gate.channels) % 2 == 0)
    small_one = linearize.collapse(model, when="always")
    assert any(isinstance(module, PartialActivation) for module in small_one.modules()) or small_one is not model
    save(small_one, tmp_path / "small.safetensors")
    x = torch.randn(2, 1, 32, 32)
    assert torch.allclose(load(tmp_path / "small.safetensors")(x), small_one(x), rtol=1e-5, atol=1e-6)


def test_a_header_of_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    length = 99_000_000
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(8 + length)
    before = _peak(reset=True)
    with pytest.raises(CheckpointError, match="header has 99000000 bytes"):
        load(path)
    assert _peak() - before < 1e8


def test_a_size_of_images_that_no_memory_holds(forge: Forge) -> None:
    from linearize.zoo import example_inputs

    model: Any = load(forge(attributes=[["patch_embed", "img_size", {"__tuple__": [10**7, 10**7]}]]))
    with pytest.raises(LinearizeError, match="shape"):
        example_inputs(model)


def test_attributes_without_end(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.storage import restore
    from linearize.zoo.structure import plain_attributes

    with pytest.raises(CheckpointError, match="twice"):
        load(forge(attributes=[["blocks.0.mlp.fc1", "x", 1]] * 2))
    asked: list[nn.Module] = []

    def counted(module: nn.Module) -> dict[str, Any]:
        asked.append(module)
        return plain_attributes(module)

    monkeypatch.setattr(restore, "plain_attributes", counted)
    load(forge(attributes=[["blocks.0.mlp.fc1", f"x{n}", 1] for n in range(2000)]))  # none of these has a place
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("bros", "dim_bbox", 2**25),
        ("lxmert", "visual_pos_dim", 2**25),
        ("vit", "image_size", 2**25),
        ("siglip2", "patch_size", 0),
    ],
)
def test_settings_that_ask_for_inputs_without_end(kind: str, setting: str, value: int) -> None:
    from linearize.zoo import example_inputs
    from linearize.zoo.tiny_models import tiny_models

    _, model = next(tiny_models(kind))
    config: Any = model.config
    part = next(part for part in (config, *vars(config).values()) if setting in getattr(part, "__dict__", {}))
    vars(part)[setting] = value
    before = _peak(reset=True)
    with pytest.raises(LinearizeError):
        example_inputs(model)
    assert _peak() - before < 1e9


def _idx(path: Path, dims: int, shape: tuple[int, ...], data: bytes) -> None:
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">{1 + dims}I", 0x0800 + dims, *shape) + data)


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (10**4, 300, 300), (1, 1, 2)])
def test_idx_files_that_unpack_to_gigabytes(shape: tuple[int, ...], tmp_path: Path) -> None:
    _idx(tmp_path / "train-images-idx3-ubyte.gz", 3, shape, bytes(10**6))
    before = _peak(reset=True)
    with pytest.raises(DataError, match=r"promises|holds"):
        read_idx(tmp_path)
    assert _peak() - before < 5e8


def test_images_by_decoder_not_by_name(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from linearize.data.files import _read_image

    good = image.new("RGB", (8, 8), (10, 20, 30))
    for number, name in enumerate(("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")):
        path = tmp_path / f"{number}.png"  # whatever the name says
        good.save(path, format=name)
        assert _read_image(path, (4, 4)).shape == (3, 4, 4)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(ran) (w) file closefile\n%%EOF\n"
    whole = (tmp_path / "0.png").read_bytes()
    # Behind the header: a size of 10^9 pixels, with the sum of the chunk that it then has.
    size = struct.pack(">II", 40_000, 25_000)
    bomb = (
        whole[:16]
        + size
        + whole[24:29]
        + struct.pack(">I", zlib.crc32(whole[12:16] + size + whole[24:29]))
        + whole[33:]
    )
    image.new("L", (1, 70_000)).save(tmp_path / "tall.png")
    tall = (tmp_path / "tall.png").read_bytes()
    bad = {"eps": eps, "truncated": whole[:-30], "bomb": bomb, "tall": tall, "empty": b"", "text": b"hello"}
    for name, data in bad.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            _read_image(path, (4, 4))
        assert caught.value.where == str(path)


def test_a_spec_of_code_is_a_usage_error_where_it_is_none() -> None:
    for spec in (".:x", "..a:b", "a b:c", "os:", ":x", "x:y.", "1:2"):
        with pytest.raises(UsageError):
            create(spec)


def test_digests_on_the_command_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from linearize.cli import run

    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    assert run(["verify", str(good), "--sha256"]) == 0
    assert capsys.readouterr().out == f"{digest}  {good}\n"
    assert run(["verify", str(good), digest.upper(), "--sha256"]) == 0
    other = tmp_path / "other.safetensors"
    other.write_bytes(good.read_bytes() + b"x")
    for second in (str(other), "0" * 64):
        assert run(["verify", str(good), second, "--sha256"]) == 1
    assert "not the same" in capsys.readouterr().out
    assert run(["verify", str(good), str(other), "--sha256", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"file": str(good), "sha256": digest, "same": False}
    assert run(["verify", str(tmp_path), "--sha256"]) == 2
    assert run(["verify", str(good)]) == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output_hidden_states", float("inf")),
        ("output_hidden_states", "yes"),
        ("chunk_size_feed_forward", {"model_type": "bert"}),
        ("hidden_size", "wide"),
        ("layer_norm_eps", [[1e-5], ["x"]]),
    ],
)
def test_settings_of_another_kind(setting: str, value: Any) -> None:
    """They were found at the first call only, by whatever the library says then."""
    from transformers import BertConfig

    from linearize.zoo.transformers_recipe import clean

    with pytest.raises(UsageError, match=f"'{setting}' as .*which BertConfig has"):
        clean({setting: value}, BertConfig)


def test_settings_of_every_kind_of_model_are_taken() -> None:
    """A configuration as the library writes it is refused nowhere, so that the check above shuts nobody out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from linearize.zoo.transformers_recipe import clean

    for kind in (
        "bert",
        "llama",
        "mixtral",
        "doge",
        "vit",
        "swin",
        "detr",
        "clip",
        "t5",
        "whisper",
        "deberta-v2",
        "xlnet",
    ):
        config = CONFIG_MAPPING[kind]()
        assert clean(json.loads(json.dumps(config.to_dict())), type(config))["model_type"] == config.model_type
