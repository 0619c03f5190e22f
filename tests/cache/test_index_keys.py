import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import IndexKeyCache, PageTable, load_keys, pack_keys
from thresher.errors import ThresherError

E4M3 = torch.float8_e4m3fn


def random_keys(num: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (num, dim), generator=made, dtype=torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0x80
    return values.view(E4M3), torch.rand(num, generator=made) * 3


def test_byte_offsets_of_the_132_byte_page():
    cache = IndexKeyCache(3, 128)
    values, scales = random_keys(2, 128)
    cache.store(torch.tensor([2 * 64 + 5, 63]), values, scales)
    raw = bytes(cache.pages.flatten().tolist())
    assert len(raw) == 3 * 64 * 132
    page = 2 * 64 * 132
    assert raw[page + 5 * 128 : page + 6 * 128] == bytes(values[0].view(torch.uint8).tolist())
    assert raw[page + 64 * 128 + 5 * 4 : page + 64 * 128 + 6 * 4] == struct.pack("<f", scales[0].item())
    assert raw[63 * 128 : 64 * 128] == bytes(values[1].view(torch.uint8).tolist())
    assert raw[8192 + 252 : 8192 + 256] == struct.pack("<f", scales[1].item())
    written = [*range(page + 640, page + 768), *range(page + 8212, page + 8216), *range(8064, 8192), *range(8444, 8448)]
    assert sum(raw) == sum(raw[i] for i in written)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 7, 64]), st.sampled_from([4, 12, 128]), st.lists(st.integers(0, 70), min_size=1, max_size=3), st.data())
def test_pack_then_load_gives_the_same_bits(size, dim, lengths, data):
    parts = [random_keys(n, dim, seed) for seed, n in enumerate(lengths)]
    keys = pack_keys(parts, size)
    assert keys.lengths.tolist() == lengths
    for request, (values, scales) in enumerate(parts):
        start = data.draw(st.integers(0, lengths[request]))
        end = data.draw(st.integers(start, lengths[request]))
        got_values, got_scales = load_keys(keys, request, start, end)
        assert torch.equal(got_values.view(torch.uint8), values.view(torch.uint8)[start:end])
        assert torch.equal(got_scales, scales[start:end])
    held = keys.page_table[keys.page_table >= 0].tolist()
    assert len(held) == len(set(held)) == sum(-(-n // size) for n in lengths)


def test_reused_pages_hold_the_new_keys():
    table, cache = PageTable(2, 4, 4), IndexKeyCache(4, 8, 4)
    first, second = random_keys(10, 8, 1), random_keys(9, 8, 2)
    cache.store(table.append(0, 10), *first)
    table.rollback(0, 3)
    cache.store(table.append(1, 9), *second)
    keys = cache.view(table.table, table.lengths)
    assert torch.equal(load_keys(keys, 0)[1], first[1][:3])
    assert torch.equal(load_keys(keys, 1)[0].view(torch.uint8), second[0].view(torch.uint8))


def test_loaded_keys_are_a_copy():
    keys = pack_keys([random_keys(5, 8)], 4)
    values, scales = load_keys(keys, 0)
    kept = scales.clone(), values.view(torch.uint8).clone()
    keys.pages.zero_()
    assert torch.equal(scales, kept[0])
    assert torch.equal(values.view(torch.uint8), kept[1])


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_bytes_are_refused_and_nothing_is_written(byte):
    cache = IndexKeyCache(1, 8, 4)
    values, scales = random_keys(3, 8)
    values.view(torch.uint8)[1, 6] = byte
    with pytest.raises(ThresherError, match="index keys must be finite") as caught:
        cache.store(torch.arange(3), values, scales)
    assert "\n" not in str(caught.value)
    assert cache.pages.count_nonzero() == 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused(scale):
    values, scales = random_keys(3, 8)
    scales[2] = scale
    with pytest.raises(ThresherError, match="index keys must be finite"):
        IndexKeyCache(1, 8, 4).store(torch.arange(3), values, scales)
    with pytest.raises(ThresherError, match="index keys must be finite"):
        pack_keys([(values, scales)])


def test_every_finite_byte_is_kept():
    every = torch.arange(256, dtype=torch.uint8)
    values = every[(every & 0x7F) != 0x7F][: 4 * 63].reshape(63, 4).view(E4M3)
    got, _ = load_keys(pack_keys([(values, torch.ones(63))]), 0)
    assert torch.equal(got.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c, v, s: c.store(torch.tensor([0, 1, 8]), v, s), r"slots must lie in \[0, 8\)"),
        (lambda c, v, s: c.store(torch.tensor([0, -1, 2]), v, s), "slots must lie in"),
        (lambda c, v, s: c.store(torch.tensor([0, 1]), v, s), r"values must be \[2, 8\]"),
        (lambda c, v, s: c.store(torch.arange(3), v.float(), s), "values must be float8_e4m3fn"),
        (lambda c, v, s: c.store(torch.arange(3), v, s.double()), "scales must be float32"),
        (lambda c, v, s: c.store(torch.arange(3), v[:, :4].contiguous(), s), r"values must be \[3, 8\]"),
        (lambda c, v, s: pack_keys([]), "at least one"),
        (lambda c, v, s: pack_keys([(v, s), (v[:, :4].contiguous(), s)]), "same head_dim"),
        (lambda c, v, s: load_keys(pack_keys([(v, s)]), 1), "request must lie in"),
        (lambda c, v, s: load_keys(pack_keys([(v, s)]), 0, 0, 4), "within 0..3"),
        (lambda c, v, s: load_keys(pack_keys([(v, s)]), 0, 2, 1), "within 0..3"),
        (lambda c, v, s: IndexKeyCache(1, 6), "multiple of 4"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    with pytest.raises(ThresherError, match=words) as caught:
        call(IndexKeyCache(2, 8, 4), *random_keys(3, 8))
    assert "\n" not in str(caught.value)
