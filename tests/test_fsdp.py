"""Gates under FSDP2: alphas are spread over processes, and priors come to what one process comes to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fsdp import KINDS, network, trained
from tests.ranks import run_ranks


@pytest.mark.slow
def test_priors_under_fsdp_do_what_they_do_in_one_process(tmp_path: Path) -> None:
    count = 3
    assert run_ranks("tests.fsdp", count, tmp_path) == [0] * count
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(other == told[0] for other in told)  # to the last bit
    for name, options in KINDS.items():
        for attached in (False, True):
            alone = trained(network(), options, lambda x: x, attached=attached)
            found = told[0][f"{name}, {attached}"]
            assert found["frozen"] == alone["frozen"], name
            assert found["share"] == alone["share"]
            assert found["alphas"] == pytest.approx(alone["alphas"], rel=1e-9, abs=1e-12)
    for verb in ("summary", "collapse", "save", "calibrate"):
        assert "is sharded over processes" in told[0][verb]
        assert "whole_state" in told[0][verb]
    assert told[0]["off"] < 1e-12
    assert told[0]["collapsed"]
