"""Every kernel that is launched anywhere, Triton's or Gluon's, compiles for Hopper: the list is read from the source, so a new kernel must
be added here."""

from __future__ import annotations

import ast
from pathlib import Path

import thresher

ROOT = Path(thresher.__file__).parent

LAUNCHES = """
from importlib import import_module
from types import SimpleNamespace
import torch
from thresher.cache import IndexKeyCache, LatentCache, pack_keys
from thresher.cache.block_means import BlockMeans
from thresher.cache.device import count_visible
from thresher.ops.index_score import triton as index_score
from thresher.ops.keep_best import triton as keep_best
from thresher.ops.merge import triton as merge
from thresher.ops.pool_keys import triton as pool_keys
from thresher.ops.quantize import triton as quantize, triton_step
from thresher.ops.route_heads import triton as route_heads
from thresher.ops.score_select import triton as score_select
from thresher.ops.select import triton as select
from thresher.ops.sparse_attend import flash_mla_kernels, triton as sparse_attend
from thresher.ops.to_slots import triton as to_slots
from thresher.distributed import packed
from thresher.distributed.symmetric import SymmetricMemory, size_of
from thresher.types import IndexQuery, PartialAttention

zeros, half = torch.zeros(8, dtype=torch.int64), torch.bfloat16
values, scales = torch.zeros(2048, 128).to(torch.float8_e4m3fn), torch.ones(2048)
keys = pack_keys([(values, scales)])
query = IndexQuery(torch.zeros(8, 64, 128).to(torch.float8_e4m3fn), torch.zeros(8, 64), zeros, zeros)
count_visible(query, keys)
index_score.index_score(query.q, query.weights, values, scales, zeros, zeros)
index_score.paged_index_score(query, keys, width=2048)
index_score.gathered_index_score(query, keys, torch.zeros(8, 256, dtype=torch.int64))
index_score.block_index_score(query, keys, torch.zeros(8, 16, dtype=torch.int32), 128)
select.select_blocks(torch.empty(8, 16), 8, query, keys, 128)
for rows, width in ((8, 8192), (8, 131072), (70, 32768)):
    requests = torch.zeros(rows, dtype=torch.int64)
    select.select_topk_slots(torch.empty(rows, width), 2048, keys.page_table, requests, 64)
to_slots.to_slots(torch.empty(8, 2048, dtype=torch.int32), keys.page_table, zeros, 64)
keep_best.keep_best(torch.empty(2, 8, 2048), torch.empty(2, 8, 2048, dtype=torch.int32), 1, 2048)
means = pool_keys.pool_keys(values, scales, 128)
short = pack_keys([(values[:64], scales[:64])])  # a table of one page
BlockMeans(8, pool_keys.grow_means).update(short)
pool_keys.paged_partial_means(short, zeros[:1], zeros[:1], 8)
pool_keys.partial_means(values, scales, 128, zeros)
route_heads.head_mass(query, [means], keys, 128)
route_heads.routed_query(query, [(values, scales)], keys, 1, 8)
route_heads.route_heads(torch.zeros(8, 64), 8)
slots = torch.zeros(8, 2048, dtype=torch.int32)
sparse_attend.sparse_attend(torch.zeros(8, 32, 128, dtype=half), *[torch.zeros(4096, 8, 128, dtype=half)] * 2, slots, 0.1)
sparse_attend.sparse_attend_mla_fp8(torch.zeros(8, 128, 576, dtype=half), LatentCache(33).data, slots, 0.1)
flash_mla_kernels.inside(slots, 2112)
flash_mla_kernels.as_part(torch.zeros(8, 128, 512, dtype=half), torch.zeros(8, 128))
merge.merge_stacked(torch.zeros(2, 8, 128, 512), torch.zeros(2, 8, 128))
ranks = SymmetricMemory(0, torch.zeros(size_of(2, 2**20), dtype=torch.uint8), [0, 0], 2**20)
ranks.gather(torch.zeros(2**16))
for num in (1, 8):
    ranks.merge_heads(PartialAttention(torch.zeros(num, 4, 512), torch.zeros(num, 4)), [2, 2])
ranks.merge_heads(PartialAttention(torch.zeros(600, 4, 64), torch.zeros(600, 4)), [2, 2])
ranks.merge_shares(sparse_attend.Shares(torch.zeros(600, 2, 4, 64), *torch.zeros(2, 600, 2, 4)), [2, 2])
packed.merge_packed(packed.pack(sparse_attend.Shares(torch.zeros(8, 2, 4, 64), *torch.zeros(2, 8, 2, 4)), 2).view(2, 8, 2, 66), 64)
received = ranks.send_heads(torch.zeros(8, 4, 576, dtype=half), [4, 4])
received()
to_slots.to_slots(torch.empty(8, 2048, dtype=torch.int32), keys.page_table, zeros, 64, received.sent)
x = torch.zeros(8, 128, dtype=half)
quantize.quantize_fp8(x)
quantize.store_index_keys(IndexKeyCache(2, 128).pages, zeros, x, zeros, 1e4, 64, "half")
quantize.quantize_queries(x[:, None].repeat(1, 64, 1), torch.zeros(8, 64), zeros, 1e4, 64, "half")
latent, rope = torch.zeros(8, 512, dtype=half), torch.zeros(8, 64, dtype=half)
quantize.store_latents(LatentCache(2).data, zeros, latent, rope, zeros)
caches, parts = (IndexKeyCache(2, 128).pages, LatentCache(2).data), (x, latent, rope, x[:, None].repeat(1, 64, 1), torch.zeros(8, 64))
triton_step.store_step(*caches, zeros, *parts, zeros, 1e4, 64, "half")
# What a GPU of compute capability 9.0 takes instead.
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
for module in (index_score, sparse_attend):
    module._hopper = lambda *args, name=module.__package__: import_module(name + ".gluon")
few = IndexQuery(query.q[:, :32], query.weights[:, :32], zeros, zeros)
for some in (query, few):
    index_score.index_score(some.q, some.weights, values, scales, zeros, zeros)
sparse_attend.sparse_attend_mla_fp8(torch.zeros(8, 128, 576, dtype=half), LatentCache(33).data, slots, 0.1)
long = pack_keys([(torch.zeros(32768, 128).to(torch.float8_e4m3fn), torch.ones(32768))])
import_module("thresher.cuda.launch").launch = lambda *arguments: None  # not Triton's
for some in (query, few):
    score_select.score_select(some, long, 2048)
"""


def names_in(tree: ast.AST) -> set[str]:
    """Names a piece of code mentions, bare or behind a dot."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def kernels(folder: Path) -> tuple[set[str], set[str]]:
    """``(functions under @triton.jit or @gluon.jit that no other one mentions, names launched as name[grid](...))`` in a folder."""
    jitted: list[str] = []
    mentioned: set[str] = set()
    launched = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in names_in(decorator) for decorator in node.decorator_list):
                jitted.append(node.name)
                mentioned |= set().union(*(names_in(line) for line in node.body)) - {node.name}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched |= names_in(node.func.value)
    entries = [name for name in jitted if name not in mentioned]
    assert len(entries) == len(set(entries)), "two kernels have one name"
    return set(entries), launched & set(jitted)


def test_every_kernel_compiles_for_hopper(compile_for_hopper):
    entries, launched = kernels(ROOT)
    assert entries == launched, "a kernel that nothing launches, or a helper that is launched"
    made = compile_for_hopper(LAUNCHES)
    assert {kernel.name for kernel in made} == entries
    assert all(".target sm_90" in kernel.ptx for kernel in made)


def test_a_kernel_in_no_launch_is_seen(tmp_path):
    (tmp_path / "a.py").write_text(
        "@triton.jit\ndef helper(x): return x\n@triton.jit\ndef one(p): helper(p)\n"
        "@triton.jit(do_not_specialize=['n'])\ndef two(n): helper(n)\nmodule.one[(1,)](p)\n"
    )
    (tmp_path / "gluon.py").write_text("@gluon.jit\ndef part(x): return x\n@gluon.jit\ndef three(p): gl.warp_specialize([(part, (p,))])\n")
    assert kernels(tmp_path) == ({"one", "two", "three"}, {"one"})
