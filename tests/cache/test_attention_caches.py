import math
import struct

import pytest
import torch

from thresher.cache import KVCache, LatentCache, PageTable
from thresher.errors import ThresherError


def bf16_bytes(x: torch.Tensor) -> bytes:
    """The upper halves of fp32 values that bf16 holds exactly."""
    return b"".join(struct.pack("<f", v)[2:] for v in x.tolist())


def test_fp8_latents_byte_for_byte():
    torch.manual_seed(0)
    latent = torch.randn(3, 512) * torch.tensor([1.0, 50.0, 1e-3]).unsqueeze(1)
    rope = torch.randn(3, 64).bfloat16().float()
    cache = LatentCache(2, page_size=4)
    slots = torch.tensor([6, 0, 3])
    cache.store(slots, latent, rope)
    assert cache.bytes_per_token == 656
    raw = cache.data.reshape(8, 656)
    for row, slot in enumerate(slots.tolist()):
        record = bytes(raw[slot].tolist())
        scales = struct.unpack("<4f", record[512:528])
        for group, scale in enumerate(scales):
            part = latent[row, group * 128 : (group + 1) * 128].double()
            assert scale / 2 < part.abs().max().item() / 448 <= scale
            assert math.frexp(scale)[0] == 0.5
            values = torch.tensor(list(record[group * 128 : (group + 1) * 128]), dtype=torch.uint8).view(torch.float8_e4m3fn).double()
            # Half an e4m3 step: 2**-4 of a normal value, 2**-10 near zero.
            assert ((values * scale - part).abs() <= torch.maximum(part.abs() / 16, torch.tensor(scale * 2**-10))).all()
        assert record[528:] == bf16_bytes(rope[row])
    assert raw[[1, 2, 4, 5, 7]].count_nonzero() == 0


def test_load_is_what_was_stored():
    torch.manual_seed(1)
    # Exact in e4m3 under one scale per group, and in bf16.
    latent = torch.randint(-8, 9, (5, 512)).float()
    latent[:, ::128] = 448.0
    rope = torch.randn(5, 64).bfloat16()
    for fp8, width in ((True, 656), (False, 1152)):
        cache, table = LatentCache(3, 2, fp8), PageTable(1, 3, 2)
        slots = table.append(0, 5)
        cache.store(slots, latent.bfloat16(), rope)
        assert cache.data.shape == (3, 2, 1, width)
        back = torch.tensor([4, 0, 0, 2])
        assert torch.equal(cache.load(slots[back]), torch.cat((latent, rope.float()), 1)[back])


def test_bf16_latents_byte_for_byte():
    latent, rope = torch.randn(1, 512).bfloat16(), torch.randn(1, 64).bfloat16()
    cache = LatentCache(1, 2, fp8=False)
    cache.store(torch.tensor([1]), latent, rope)
    assert bytes(cache.data[0, 1, 0].tolist()) == bf16_bytes(latent[0].float()) + bf16_bytes(rope[0].float())


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("where", ["latent", "rope"])
def test_latents_that_are_not_finite_are_refused(fp8, where):
    cache = LatentCache(1, 4, fp8)
    parts = {"latent": torch.ones(2, 512), "rope": torch.ones(2, 64)}
    parts[where][1, 3] = float("nan")
    with pytest.raises(ThresherError, match="latents must be finite"):
        cache.store(torch.tensor([0, 1]), **parts)
    assert cache.data.count_nonzero() == 0


def test_kv_by_slot():
    cache, table = KVCache(3, 2, 4, 6, torch.float32, page_size=2), PageTable(2, 3, 2)
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    table.append(1, 1)
    slots = table.append(0, 3)
    cache.store(slots, k, v)
    assert cache.k.shape == (6, 2, 4)
    assert slots.tolist() == [2, 3, 4]
    assert torch.equal(cache.k[2:5], k)
    assert torch.equal(cache.v[2:5], v)
    assert cache.k[[0, 1, 5]].count_nonzero() == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: KVCache(1, 2, 4, 4).store(torch.tensor([0]), torch.ones(1, 2, 4), torch.ones(1, 2, 5)), r"v must be \[1, 2, 4\]"),
        (lambda: KVCache(1, 2, 4, 4).store(torch.tensor([64]), torch.ones(1, 2, 4), torch.ones(1, 2, 4)), r"slots must lie in \[0, 64\)"),
        (lambda: KVCache(1, 0, 4, 4), "must be positive"),
        (lambda: LatentCache(1).store(torch.tensor([0]), torch.ones(1, 511), torch.ones(1, 64)), r"latent must be \[1, 512\]"),
        (lambda: LatentCache(1).load(torch.tensor([-1])), "slots must lie in"),
        (lambda: LatentCache(1).load(torch.tensor([0], dtype=torch.int32)), "slots must be int64"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    with pytest.raises(ThresherError, match=words):
        call()
