import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import PageTable
from thresher.errors import ThresherError

OPS = st.lists(st.tuples(st.sampled_from(["append", "rollback", "free"]), st.integers(0, 2), st.integers(0, 20)), max_size=25)


class ListModel:
    """What a page table must do, written with lists of (request, position) and nothing clever."""

    def __init__(self, requests: int, pages: int, size: int) -> None:
        self.size, self.free, self.pages, self.length = size, set(range(pages)), [[] for _ in range(requests)], [0] * requests

    def grow(self, request: int, count: int) -> list[int] | None:
        slots, taken = [], []
        for position in range(self.length[request], self.length[request] + count):
            if position // self.size == len(self.pages[request]) + len(taken):
                if not self.free - set(taken):
                    return None
                taken.append(min(self.free - set(taken)))
            slots.append((self.pages[request] + taken)[position // self.size] * self.size + position % self.size)
        self.free -= set(taken)
        self.pages[request] += taken
        self.length[request] += count
        return slots

    def cut(self, request: int, length: int) -> None:
        self.length[request] = length
        while (len(self.pages[request]) - 1) * self.size >= length and self.pages[request]:
            self.free.add(self.pages[request].pop())


@settings(max_examples=120, deadline=None)
@given(OPS, st.integers(1, 5), st.integers(0, 9))
def test_any_sequence_matches_the_list_model(ops, size, num_pages):
    table, model = PageTable(3, num_pages, size), ListModel(3, num_pages, size)
    for op, request, number in ops:
        if op == "append":
            want = model.grow(request, number)
            before = table.table, table.lengths
            if want is None:
                with pytest.raises(ThresherError, match=rf"needs \d+ more pages; got {len(model.free)} free"):
                    table.append(request, number)
                assert table.table is before[0]
                assert table.lengths is before[1]
            else:
                assert table.append(request, number).tolist() == want
        elif op == "rollback":
            length = min(number, model.length[request])
            model.cut(request, length)
            table.rollback(request, length)
        else:
            model.cut(request, 0)
            table.free(request)
        assert table.lengths.tolist() == model.length
        assert table.num_free == len(model.free)
        for row, pages in enumerate(model.pages):
            held = table.table[row].tolist()
            assert held == pages + [-1] * (len(held) - len(pages))
            want = [pages[p // size] * size + p % size for p in range(model.length[row])]
            assert table.slots(row, torch.arange(model.length[row])).tolist() == want
    owned = [page for pages in model.pages for page in pages]
    assert len(owned) == len(set(owned))


def test_handed_out_tensors_are_never_written():
    table = PageTable(2, 4, 2)
    table.append(0, 3)
    pages, lengths = table.table, table.lengths
    kept = pages.clone(), lengths.clone()
    table.append(1, 4)
    table.rollback(0, 1)
    assert torch.equal(pages, kept[0])
    assert torch.equal(lengths, kept[1])
    assert pages.dtype == torch.int32
    assert lengths.dtype == torch.int64


def test_smallest_free_page_is_reused_first():
    table = PageTable(2, 4, 1)
    table.append(0, 4)
    table.rollback(0, 1)
    assert table.append(1, 2).tolist() == [1, 2]
    table.free(0)
    assert table.append(1, 1).tolist() == [0]


def test_slots_keep_shape_and_padding():
    table = PageTable(1, 3, 4)
    table.append(0, 9)
    got = table.slots(0, torch.tensor([[8, -1], [0, 5]], dtype=torch.int32))
    assert got.dtype == torch.int64
    assert got.tolist() == [[8, -1], [0, 5]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t.append(3, 1), "request must lie in"),
        (lambda t: t.append(-1, 1), "request must lie in"),
        (lambda t: t.append(0, -1), "num_tokens must be at least 0"),
        (lambda t: t.append(0, 100), "needs 25 more pages; got 1 free of 2"),
        (lambda t: t.rollback(0, 5), r"rollback length must lie in \[0, 4\]"),
        (lambda t: t.slots(0, torch.tensor([4])), r"must lie in \[0, 4\)"),
        (lambda t: t.slots(0, torch.tensor([-2])), r"must lie in \[0, 4\)"),
        (lambda t: t.slots(1, torch.tensor([0])), r"must lie in \[0, 0\)"),
    ],
)
def test_bad_calls_give_one_line(call, words):
    table = PageTable(3, 2, 4)
    table.append(0, 4)
    with pytest.raises(ThresherError, match=words) as caught:
        call(table)
    assert "\n" not in str(caught.value)
