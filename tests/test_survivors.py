"""What no other test noticed when a fault was put in (benchmarks/stress/mutants.py)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.stress.mutants import MUTANTS, ROOT
from linearize.algebra.affine import Affine, apply, compose, obstacle


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (9, 10)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_map_behind_one_whose_padding_depends_on_the_size(size: tuple[int, int], stride: int) -> None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inner = Affine(noise(5, 3, 3, 3), noise(5), (stride, stride), (0, 0), (1, 1), same=True)
    outer = Affine(noise(4, 5, 1, 1), noise(4), (1, 1), (0, 0), (1, 1))
    assert obstacle(outer, inner) is None
    both = compose(outer, inner)
    x = noise(2, 3, *size)
    expected = apply(outer, apply(inner, x))
    assert both.same
    assert apply(both, x).shape == expected.shape == (2, 4, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(apply(both, x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_every_fault_can_still_be_put_in() -> None:
    """The list names text of the package; where that is gone, nothing would be tested."""
    for mutant in MUTANTS:
        text = (ROOT / "linearize" / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.file}: {mutant.old!r}"
        assert all((ROOT / "tests" / name).exists() for name in mutant.tests)
