from __future__ import annotations

import math

import pytest
import torch
from neuron.checkpoint.rope import RopeScaling, yarn_attention_factor
from neuron.engine.layers.rotary import (
    RotaryEmbedding,
    gather_angles,
    inverse_frequencies,
    rotate,
    split_and_rotate,
)


def rotated_by_hand(x: list[float], position: int, theta: float) -> list[float]:
    """The rotation of each pair (i, i + D/2), written out."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def test_each_pair_is_rotated_by_its_angle() -> None:
    embedding = RotaryEmbedding(RopeScaling(theta=100.0), head_dim=8)
    positions = torch.tensor([0, 3, 17])
    step = embedding.at(positions, 18, torch.float32)
    assert step.cos is not None and step.signed_sin is not None
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, step.cos, step.signed_sin)
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            expected = rotated_by_hand(x[token, head].tolist(), position, 100.0)
            torch.testing.assert_close(out[token, head], torch.tensor(expected), atol=1e-5, rtol=0)


def test_N1_partial_rotation_leaves_the_rest_of_a_head_alone() -> None:
    """N1: only the first quarter of each head rotates when the checkpoint says so."""
    embedding = RotaryEmbedding(RopeScaling(partial_rotary_factor=0.25), head_dim=16)
    assert embedding.rotary_dim == 4
    step = embedding.at(torch.tensor([5]), 6, torch.float32)
    assert step.cos is not None and step.signed_sin is not None
    x = torch.randn(1, 3, 16)
    out = rotate(x, step.cos, step.signed_sin)
    assert torch.equal(out[..., 4:], x[..., 4:])
    expected = rotated_by_hand(x[0, 1, :4].tolist(), 5, 10_000.0)
    torch.testing.assert_close(out[0, 1, :4], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_table_grows_with_the_positions_and_keeps_its_values() -> None:
    embedding = RotaryEmbedding(RopeScaling(), head_dim=4)
    cpu = torch.device("cpu")
    short = embedding.reserve(10, cpu)
    assert embedding.reserve(short.shape[0], cpu) is short
    long = embedding.reserve(short.shape[0] + 1, cpu)
    assert long.shape[0] > short.shape[0]
    assert torch.equal(long[: short.shape[0]], short)
    assert long.dtype == torch.float32


def test_angles_are_exact_far_out() -> None:
    """In float32 an angle of position 60,000 is still good to a few thousandths; in bfloat16 it would be noise."""
    embedding = RotaryEmbedding(RopeScaling(theta=1e6), head_dim=128)
    table = embedding.reserve(65536, torch.device("cpu"))
    frequency = 1e6 ** (-2 * 5 / 128)
    assert table[60_000, 5].item() == pytest.approx(math.cos(60_000 * frequency), abs=5e-3)
    cos, signed_sin = gather_angles(table, torch.tensor([60_000]), torch.float32)
    assert cos[0, 0, 5] == cos[0, 0, 69]
    assert signed_sin[0, 0, 5] == -signed_sin[0, 0, 69]


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(RopeScaling(), 16)
    torch.testing.assert_close(inverse_frequencies(RopeScaling(rope_type="linear", factor=4.0), 16), plain / 4)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = inverse_frequencies(RopeScaling(theta=500_000.0), 128)
    scaling = RopeScaling(
        rope_type="llama3",
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    scaled = inverse_frequencies(scaling, 128)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and not (short | long).all()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~(short | long)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain = inverse_frequencies(RopeScaling(theta=1e6), 128)
    scaling = RopeScaling(rope_type="yarn", theta=1e6, factor=4.0, original_max_positions=32768)
    scaled = inverse_frequencies(scaling, 128)
    torch.testing.assert_close(scaled[:8], plain[:8])
    torch.testing.assert_close(scaled[-8:], plain[-8:] / 4)
    assert ((scaled <= plain) & (scaled >= plain / 4 * 0.999)).all()
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0


def test_the_attention_factor_scales_cosines_and_sines() -> None:
    table = RotaryEmbedding(RopeScaling(attention_factor=1.5), head_dim=8).reserve(4, torch.device("cpu"))
    assert table[0].tolist() == [1.5] * 4 + [0.0] * 4


def test_values_are_neither_normalised_nor_rotated() -> None:
    num_heads, num_kv_heads, head_dim = 4, 2, 8
    qkv = torch.randn(3, (num_heads + 2 * num_kv_heads) * head_dim)
    step = RotaryEmbedding(RopeScaling(), head_dim).at(torch.tensor([0, 1, 9]), 10, torch.float32)
    q, k, v = split_and_rotate(
        qkv, step, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, qk_norm=None
    )
    assert (q.shape, k.shape, v.shape) == ((3, 4, 8), (3, 2, 8), (3, 2, 8))
    heads = qkv.view(3, 8, 8)
    assert torch.equal(v, heads[:, 6:])
    torch.testing.assert_close(q[0], heads[0, :4])  # position 0 turns nothing
    torch.testing.assert_close(k.norm(dim=-1), heads[:, 4:6].norm(dim=-1))
    assert not torch.allclose(q[2], heads[2, :4])
