"""The Triton kernels of fused_qkvbfg, in the corrected interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

from hwfuse import _state, _variants
from hwfuse.ops import fused_qkvbfg as spec
from hwfuse.testing import compare
from hwfuse.testing._interpreter import interpreted
from hwfuse_reference.torch_ops.fused_qkvbfg import fused_qkvbfg as reference
from hwfuse_triton import fused_qkvbfg as shared


def assert_right(arguments, wave=32):
    """Compare with the reference as parity does."""
    with interpreted():
        found = shared.fused_qkvbfg(**arguments, wave=wave)
    for name, x, y in zip(spec.COMPARE, found, reference(**arguments), strict=True):
        assert x.is_contiguous()
        assert compare.compare(spec.COMPARE[name], x, y, {}) is None


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("m", [1, 5, 33])
def test_projections_of_channels_that_fill_no_tile_are_masked(m, wave):
    """520 channels are no multiple of any tile's, nor of their halves or quarters."""
    assert_right(spec.make_inputs(m=m, hidden_size=520, num_heads=2, head_dim=24), wave)


@pytest.mark.parametrize("m", [3, 20, 40])
def test_projections_in_halves_and_quarters_add_up_those_alone(m):
    """A tile of two halves of the channels also has their cross products: they must not count."""
    assert_right(spec.make_inputs(m=m, hidden_size=1024, num_heads=1, head_dim=32))


def test_gates_of_a_wide_low_rank_add_up_its_parts():
    """More than 128 ranks take several steps, the last of them partly filled."""
    assert_right(spec.make_inputs(m=3, hidden_size=64, num_heads=1, head_dim=160))


@pytest.mark.parametrize("name", ["x", "w_qkvbfg", "w_fg"])
def test_projections_of_odd_strides_read_each_row_where_it_is(name):
    """A row stride without a factor of 16 bytes, in one tensor alone."""
    arguments = spec.make_inputs(m=3, hidden_size=96, num_heads=2, head_dim=16)
    wide = torch.nn.functional.pad(arguments[name], (0, 3))
    arguments[name] = wide[..., : arguments[name].shape[-1]]
    assert arguments[name].stride(-2) % 8 == 3
    assert_right(arguments)


def test_projections_of_more_tokens_than_a_tile_are_right_on_amd():
    """Several tiles of tokens, for the products and for the gates."""
    assert_right(spec.make_inputs(m=130, hidden_size=96, num_heads=1, head_dim=64), wave=64)


@pytest.mark.parametrize("rows", [100, 20_000])
def test_tiles_change_where_the_variants_say(rows):
    """The thresholds by m that `explain` shows are those that run."""
    for name, wave in (("cuda/triton", 32), ("rocm/triton", 64)):
        declared = _variants.read(_state.registry().implementations("fused_qkvbfg")[name])
        for m in range(1, 65 if wave == 32 else 200):
            variant = next(v for v, fact in declared.items() if fact.holds({"m": m}))
            _, rest = shared.tiles(m, rows, 2, wave)
            assert rest.sides == 1 or rest.warps == 4  # see `Tile`
            assert variant == ("one token" if rest.block_m == 1 else f"{rest.block_m} tokens")


def test_projections_without_tokens_launch_nothing():
    """M = 0: an accelerator refuses an empty grid, so it must never be asked."""
    found = shared.fused_qkvbfg(**spec.make_inputs(m=0, hidden_size=64))
    assert [tuple(x.shape) for x in found] == [(0, 3336), (2, 0, 1024)]
