"""Which arguments of a timm model a file may give: what the model takes, of its type, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from linearize import zoo
from linearize.errors import UsageError
from linearize.zoo.timm_arguments import _known, check_arguments

timm = pytest.importorskip("timm")

TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("test_vit", {"img_size": (32, 64), "depth": 1, "mlp_ratio": 2, "class_token": False, "global_pool": "avg"}),
    ("test_resnet", {"layers": (1, 1, 1, 1), "act_layer": "silu", "norm_layer": "batchnorm", "zero_init_last": False}),
    ("test_efficientnet", {"bn_eps": 0.01, "bn_momentum": 0.5, "in_chans": 1}),  # popped from **kwargs
    ("test_byobnet", {"in_chans": 1, "drop_path_rate": 0.1}),
    ("test_maxvit", {"transformer_dim_head": 8, "img_size": 64}),  # fields of a part of its configuration
    ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 48, "num_heads": 2}),  # fields of its configuration
    ("test_convnext", {"kernel_sizes": 3, "patch_size": 2}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("test_vit", {"layers": (1, 1)}),  # of another model
    ("test_resnet", {"patch_size": 3}),
    ("test_vit", {"forward": 1}),
    ("test_vit", {"state_dict": "x"}),  # of a function of the same file
    ("test_vit", {"depth": True}),
    ("test_vit", {"depth": "x"}),
    ("test_vit", {"qkv_bias": 3}),
    ("test_vit", {"embed_dim": {"a": 1}}),
    ("test_vit", {"block_fn": "exec"}),  # a class, never a text
    ("test_resnet", {"block": "x"}),
    ("test_resnet", {"cardinality": [1, 2]}),
    ("test_vit", {"checkpoint_path": "x"}),
    ("test_vit", {"cache_dir": "x"}),
    ("test_vit", {"pretrained_cfg": {"file": "x"}}),
    ("test_vit", {"features_only": True, "feature_cfg": {"feature_cls": "fx"}}),
    ("test_vit", {"depth": 10**7}),
    ("test_resnet", {"block_args": {"checkpoint_path": "x"}}),
]


@pytest.mark.parametrize(("name", "arguments"), TAKEN)
def test_what_a_model_takes(name: str, arguments: dict[str, Any]) -> None:
    assert check_arguments(name, arguments) is arguments
    with_tag = zoo.create(f"timm:{name}", **arguments)
    recipe = zoo.recipe(with_tag)
    assert recipe is not None
    assert recipe["kwargs"].keys() == arguments.keys()


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_what_it_does_not_take(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{name}: found "):
        zoo.skeleton({"library": "timm", "name": name, "kwargs": arguments})


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "test_vit", "model_args": {"layers": [1, 1]}},
        {"architecture": "test_vit", "model_args": {"checkpoint_path": "x"}},
        {"architecture": "test_vit", "extra": {"model_args": {"depth": 1}}},
        {"architecture": "no_model", "model_args": {"depth": 1}},
    ],
)
def test_arguments_that_transformers_passes_on(config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    recipe = {"library": "transformers", "class": "TimmWrapperModel", "config_class": "TimmWrapperConfig"}
    with pytest.raises(UsageError, match=r"found the argument|model_args|architecture"):
        zoo.skeleton({**recipe, "config": {"num_classes": 5, **config}})
    good = {"num_classes": 5, "architecture": "test_vit", "model_args": {"depth": 1}}
    assert len(zoo.skeleton({**recipe, "config": good}).timm_model.blocks) == 1  # type: ignore[union-attr, arg-type]


def test_every_model_is_known_by_its_own_code() -> None:
    names = timm.list_models()
    assert len(names) > 300
    without = [name for name in names if "in_chans" not in (_known(name) or {})]
    assert not without
    kept = [len(_known(name) or {}) for name in names]
    assert max(kept) < 150  # the control: no list of everything
