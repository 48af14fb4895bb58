"""The attention back end on the kernels: steps of every kind."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.attention_triton import TritonAttention
from neuron.engine.kernels import KernelUnsupported

from tests.kernels.attention.harness import PlainTorch, attend, build, check
from tests.kernels.cases import AttentionCase


def test_mixed_step_of_decodes_whole_prompts_and_chunks(device: torch.device) -> None:
    chunks = [(1, 70), (1, 1), (40, 40), (1, 33), (7, 600), (90, 140)]
    check(build(device, chunks, num_decodes=2, dtype=torch.bfloat16))


def test_a_request_gets_the_same_bits_in_any_batch(device: torch.device) -> None:
    """Decodes and chunks: neighbours change the batch, the longest context and the launch, never the result."""
    alone = build(device, [(1, 500)], num_decodes=1, dtype=torch.bfloat16)
    crowd = build(device, [(1, 500), (1, 900), (1, 3)], num_decodes=3, dtype=torch.bfloat16)
    crowd.q[0], crowd.k[0], crowd.v[0] = alone.q[0], alone.k[0], alone.v[0]
    for page in range(32):
        crowd.kv[crowd.batch.page_tables[0, page]] = alone.kv[alone.batch.page_tables[0, page]]
    assert torch.equal(attend(alone)[0], attend(crowd)[0])

    alone = build(device, [(20, 600)], dtype=torch.bfloat16)
    crowd = build(device, [(20, 600), (150, 150)], dtype=torch.bfloat16)
    crowd.q[:20], crowd.k[:20], crowd.v[:20] = alone.q, alone.k, alone.v
    for page in range(38):
        crowd.kv[crowd.batch.page_tables[0, page]] = alone.kv[alone.batch.page_tables[0, page]]
    assert torch.equal(attend(alone), attend(crowd)[:20])


def test_query_rows_may_be_views_of_packed_qkv(device: torch.device) -> None:
    case = build(device, [(1, 70), (30, 45)], num_decodes=1)
    expected = case.expected()
    total, heads, dim = case.q.shape
    packed = torch.cat([case.q.flatten(1), case.k.flatten(1), case.v.flatten(1)], dim=1)
    q, k, v = packed.split([heads * dim, case.num_kv_heads * dim, case.num_kv_heads * dim], dim=1)
    case.q = q.view(total, heads, dim)
    case.k = k.view(total, case.num_kv_heads, dim)
    case.v = v.view(total, case.num_kv_heads, dim)
    torch.testing.assert_close(attend(case).cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [260, 512, 20])
def test_unsupported_head_sizes_are_refused_by_number(device: torch.device, head_dim: int) -> None:
    case = build(device, [(1, 3)], num_decodes=1, head_dim=head_dim)
    with pytest.raises(KernelUnsupported, match=str(head_dim)):
        attend(case)


@pytest.mark.parametrize("window", [None, 9])
def test_a_plugin_gets_the_chunks_of_a_mixed_step_and_our_kernel_the_decodes(
    device: torch.device, window: int | None
) -> None:
    if device.type != "cpu":
        pytest.skip("the stand-in works on the CPU")
    case = AttentionCase([(1, 30), (1, 7), (11, 40), (20, 20)], num_decodes=2)
    case.kv.nan_to_num_(0.0)  # the stand-in multiplies what it masks
    backend = TritonAttention()
    backend.prefill_plugin = plugin = PlainTorch()
    backend.prepare(case.batch)
    actual = backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)
    torch.testing.assert_close(actual.double(), case.expected(window=window), rtol=0, atol=1e-5)
    assert (plugin.steps, plugin.calls) == (1, 1)
    backend.attend(case.q, case.kv, case.batch, scale=case.scale, sliding_window=window, soft_cap=5.0)
    assert plugin.calls == 1  # what libraries treat each in their way stays with us
