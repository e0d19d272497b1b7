"""Hostile variants of a file or a text of ours: bytes flipped, pieces moved, values of its description replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

__all__ = ["mutated_file", "mutated_json", "split"]

Path = tuple[Any, ...]

KEYS = (
    "auto_map", "attribute_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "backbone", "backbone_config", "cache_dir", "checkpoint_path", "custom_code", "device", "dtype", "model_args",
    "model_type", "name", "pretrained", "pretrained_cfg", "quantization_config", "trust_remote_code", "use_kernels",
    "use_pretrained_backbone", "use_timm_backbone", "name_or_path", "per_layer_config", "to_dict", "__class__",
    "sub_configs", "forward", "img_size", "image_size", "num_labels", "num_hidden_layers", "depth", "id2label",
    "generation", "calls", "concrete", "site", "place",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1000, 65_537, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-30, 1e300,
    float("nan"), float("inf"), -float("inf"), "", "x", "relu", "gelu", "class", "__init__", "forward", "eval",
    "float64", "load", "evil.pth", "./evil.pth", "../evil.pth", "/etc/passwd", "evil", "evil--evil.Evil", "owner/repo",
    "owner/repo--evil.Evil", "https://localhost:1/x", "hf-hub:owner/repo", "local-dir:evil", "file:///etc/passwd",
    "flash_attention_2", "owner/kernels", "a\0b", "\ud800", "é" * 10, "a" * 100_000, [], {}, [[]], [1], ["x", 1],
    {"a": 1},
    {"a": "auto_map"}, {"foo": "auto_map"}, {"model_type": "bert"}, {"AutoConfig": "owner/repo--evil.Evil"},
    {"checkpoint_path": "evil.pth"}, {"__tuple__": [1]}, {"__tensor__": [[2, 3], "float32"]},
    {"__tensor__": [[2**62, 2**62], "float32"]}, {"__tensor__": [[-1], "load"]},
)  # fmt: skip
WHOLE = (
    {"library": "builtins", "name": "exec"},
    {"library": "timm", "name": "hf-hub:owner/repo", "kwargs": {}},
    {"library": "timm", "name": "test_vit", "kwargs": {"checkpoint_path": "evil.pth"}},
    {"library": "timm", "name": "test_vit", "kwargs": {"img_size": 10**6}},
    {"library": "timm", "name": "test_vit", "kwargs": {"depth": 10**7}},
    {"library": "timm", "name": "test_vit", "kwargs": {"embed_dim": 2**20}},
    {"library": "transformers", "class": "os:system", "config_class": "BertConfig", "config": {}},
    {"library": "transformers", "class": "TimmWrapperModel", "config_class": "TimmWrapperConfig",
     "config": {"architecture": "test_vit", "model_args": {"checkpoint_path": "evil.pth"}}},
    {"library": "transformers", "class": "DetrModel", "config_class": "DetrConfig",
     "config": {"backbone": "owner/repo", "use_timm_backbone": False}},
    {"library": "transformers", "class": "CLIPModel", "config_class": "CLIPConfig",
     "config": {"text_config": {"attribute_map": {"foo": "auto_map"}, "foo": {"AutoConfig": "owner/repo--evil.Evil"}}}},
    {"library": "transformers", "class": "BertForSequenceClassification", "config_class": "BertConfig",
     "config": {"num_labels": 10**9}},
    {"library": "transformers", "class": "BertModel", "config_class": "BertConfig",
     "config": {"max_position_embeddings": 10**9}},
    {"library": "transformers", "class": "LlamaModel", "config_class": "LlamaConfig",
     "config": {"num_hidden_layers": 10**6, "hidden_size": 2, "num_attention_heads": 1, "vocab_size": 3}},
    {"library": "transformers", "class": "GPTNeoModel", "config_class": "GPTNeoConfig",
     "config": {"max_position_embeddings": 30_000, "num_layers": 24, "attention_types": [[["global", "local"], 12]]}},
    {"library": "transformers", "class": "EncoderDecoderModel", "config_class": "EncoderDecoderConfig",
     "config": {"encoder": {"model_type": "bert", "_name_or_path": "owner/repo"}, "decoder": {"model_type": "evil"}}},
    {"library": "transformers", "class": "BertModel", "config_class": "BertConfig",
     "config": {"attribute_map": {"x": "_attn_implementation_internal"}, "x": "owner/kernels"}},
)  # fmt: skip
"""Recipes that reach for code, files, the network, or for far more memory than there is in any file."""


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a .safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """A .safetensors file of a header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def mutated_file(raw: bytes, other: bytes, random: Random) -> tuple[bytes, str]:
    """A hostile variant of a file, and what kind of change was made."""
    kind = random.choices(("bytes", "header", "metadata", "steps", "recipe"), (15, 15, 45, 15, 10))[0]
    if kind == "bytes":
        return _bytes(raw, other, random), kind
    header, data = split(raw)
    texts = header.get("__metadata__", {})
    if kind == "header":
        data = _tensors(header, data, random)
    elif kind == "recipe":
        texts["recipe"] = json.dumps(random.choice(WHOLE))
        texts["steps"] = random.choice((texts["steps"], "[]"))
    elif kind == "steps":
        steps = json.loads(texts["steps"])
        texts["steps"] = json.dumps(_steps(steps, json.loads(split(other)[0]["__metadata__"]["steps"]), random))
    else:
        for _ in range(random.choice((1, 1, 2, 4))):
            name = random.choice([*texts, "steps", "recipe", "sites"])
            texts[name] = mutated_json(texts[name], random)
    return joined(header, data), kind


def mutated_json(text: str, random: Random) -> str:
    """A text of JSON with some of its values replaced, or its letters damaged."""
    if random.random() < 0.08:
        return _letters(text, random)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):  # damaged before
        return _letters(text, random)
    places = list(_places(tree))
    try:
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            tree = _changed(tree, random.choice(places), random)
        return json.dumps(tree)
    except RecursionError:  # deeper than can be written
        return "[" * 100_000


def _places(tree: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _changed(tree: Any, path: Path, random: Random) -> Any:
    """The tree with something else at a place; as it is, where the place has gone already."""
    parent: Any = {"": tree}
    key: Any = ""
    for step in path:
        parent, key = parent[key], step
        if not isinstance(parent, (dict, list)) or (isinstance(parent, dict) and key not in parent):
            return tree
        if isinstance(parent, list) and not (isinstance(key, int) and key < len(parent)):
            return tree
    old = parent[key]
    choice = random.random()
    if choice < 0.12 and path:
        del parent[key]
    elif choice < 0.3 and isinstance(old, dict):
        old[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
    elif choice < 0.36 and isinstance(old, list) and old:
        old.extend(copy.deepcopy(old) * random.choice((1, 1, 30)))
    elif choice < 0.5 and type(old) in (int, float):
        parent[key] = random.choice((old + 1, old - 1, -old, old * 2, old * 1000, old + 0.5))
    elif choice < 0.54:
        parent[key] = _deep(old, random.choice((1, 30, 200)))
    elif choice < 0.6 and isinstance(parent, dict):
        parent[random.choice(KEYS)] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(random.choice(VALUES))
    return tree if path else parent.get("", next(iter(parent.values()), None))


def _deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _letters(text: str, random: Random) -> str:
    kind = random.randrange(4)
    at = random.randrange(len(text) + 1)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return "[" * 100_000
    if kind == 2:
        return text[:at] + random.choice('{}[]",:0123456789-eE\\') + text[at + 1 :]
    return text[:at] + "9" * 5000 + text[at:]


def _bytes(raw: bytes, other: bytes, random: Random) -> bytes:
    kind = random.randrange(5)
    if kind == 0:
        return raw[: random.randrange(len(raw))]
    if kind == 1:
        return raw + bytes(random.randrange(1, 100))
    if kind == 2:
        at, end, length = random.randrange(len(raw)), random.randrange(len(other)), random.randrange(1, 4096)
        return raw[:at] + other[end : end + length] + raw[at + length :]
    changed = bytearray(raw)
    room = int.from_bytes(raw[:8], "little") + 8 if kind == 3 else len(raw)
    for _ in range(random.choice((1, 1, 4, 40))):
        changed[random.randrange(room)] ^= 1 << random.randrange(8)
    return bytes(changed)


def _tensors(header: dict[str, Any], data: bytes, random: Random) -> bytes:
    """Change what a header says of a tensor, or add one; the data, with what was added."""
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    kind = random.randrange(7)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[random.choice(("evil", f"{name}.x", random.choice(names)))] = header.pop(name)
    elif kind == 2:
        entry["dtype"] = random.choice(("F64", "F32", "F16", "BF16", "I32", "I64", "BOOL", "U8", "U32", "C64", "X", 3))
    elif kind == 3:
        entry["shape"] = random.choice(
            ([], [0], [-1], [2**62, 2**62], entry["shape"][::-1], [1, *entry["shape"]], "x", [1.0], [10**30])
        )
    elif kind == 4:
        at = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            ([at[1], at[0]], [at[0] - 4, at[1] - 4], [0, 2**63], [at[0]], "x", at * 2)
        )
    elif kind == 5:
        other = header[random.choice(names)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    else:
        hidden = random.choice(
            ("forward", "eval", "to", "training", "_modules", "weight", "act", "config", "evil", "T")
        )
        header["extra:0"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        extras = [["extra:0", random.choice(("", name.rpartition(".")[0])), [hidden]]]
        header["__metadata__"]["extras"] = json.dumps(extras)
        return data + bytes(8)
    return data


def _steps(steps: list[Any], others: list[Any], random: Random) -> list[Any]:
    """Steps in another order, doubled, nested, of another model, or with layers that copy layers."""
    kind = random.randrange(6)
    path = random.choice(steps)["path"] if steps else "blocks.0.mlp.act"
    if kind == 0:
        return random.sample(steps, len(steps))
    if kind == 1:
        return steps + random.sample(others, min(len(others), 3))
    if kind == 2:
        return steps * random.choice((2, 50))
    if kind == 3:
        partial = {"type": "PartialActivation", "keep": random.choice((0, 1, 10**9)), "axis": random.choice((-1, 5))}
        return [*steps, *({"path": path, "module": partial},) * random.choice((1, 5, 900))]
    if kind == 4:
        return [*steps, *_doubling(path, random.choice((3, 12, 40)))]
    wide = {"type": random.choice(("MaskedActivation", "BlendedActivation")), "axis": -1}
    channels = random.choice((2**20, 2**24, 2**40))
    return [*steps, *({"path": path, "module": {**wide, "channels": channels}},) * random.choice((1, 40))]


def _doubling(path: str, rounds: int) -> list[Any]:
    """Each round copies all that the rounds before have made."""
    made: list[Any] = []
    for number in range(rounds):
        calls = [{"child": f"c{number}", "target": "activation", "index": 0, "of": 1}]
        made.append({"path": path, "module": {"type": "PartialActivation", "keep": 1, "axis": -1}})
        made.append({"path": path, "module": {"type": "Rewrite", "calls": calls}})
    return made
