# mypy: disable-error-code="no-untyped-def"
"""How persistent programs share the scores of a prefill: runs of units (block of queries, tile of 64 keys) with as many tiles to score."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from thresher.ops.index_score.gluon_tiles import KEYS

SWITCH = gl.constexpr(7)  # tiles that could be scored while a program shares out its work and goes over to another block
COUNTED = gl.constexpr(1024)  # blocks, at most, whose tiles are counted


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _boundary(program, each, more, units, unit, seen, upto):
    """The unit at which a program's run begins: as many tiles are seen before it as runs before have.

    ``unit``: the first of each block that is seen, of ``seen``, and of ``upto`` up to the block's end.
    """
    past = program * each + gl.minimum(program, more) - (upto - seen)
    first = gl.sum(gl.where((past >= 0) & (past < seen), unit + past, 0), 0)
    return gl.where(program == 0, 0, gl.where(program == gl.num_programs(0), units, first))


@gluon.jit
def share(blocks, tiles, low, high, num_queries, BLOCK: gl.constexpr, PAGED: gl.constexpr):
    """This program's run of the units (block, tile): ``first, last``. Every unit has one program, whatever is in memory.

    Runs have the same number of tiles that a block's last row sees if its request is long enough; what it does not see costs little. Whole
    blocks go to programs where those are hardly longer. Of more than ``COUNTED`` blocks all tiles are counted alike.
    """
    LINE: gl.constexpr = gl.BlockedLayout([COUNTED // 128], [32], [4], [0])
    program, programs, units = gl.program_id(0), gl.num_programs(0), blocks * tiles
    each, more = units // programs, units % programs
    whole = (blocks + programs - 1) // programs
    first = gl.minimum(program * whole, blocks) * tiles
    last = gl.minimum((program + 1) * whole, blocks) * tiles
    if whole * tiles > each + SWITCH:
        first, last = program * each + gl.minimum(program, more), (program + 1) * each + gl.minimum(program + 1, more)
        if blocks <= COUNTED:
            block = gl.arange(0, COUNTED, layout=LINE)
            here = block < blocks
            row = gl.minimum(block * BLOCK + BLOCK - 1, num_queries - 1)
            end = gl.load(high + row, mask=here, other=0) + (1 if PAGED else 0)
            end = gl.minimum(gl.maximum(end, 0), tiles * KEYS).to(gl.int32)
            start = end * 0
            if not PAGED:
                start = gl.minimum(gl.maximum(gl.load(low + row, mask=here, other=0), 0), end).to(gl.int32)
            begin = start // KEYS
            seen = gl.where(here & (start < end), (end + KEYS - 1) // KEYS - begin, 0)
            upto = gl.associative_scan(seen, 0, _add)
            total = gl.sum(seen, 0)
            if total >= programs:
                each, more = total // programs, total % programs
                first = _boundary(program, each, more, units, block * tiles + begin, seen, upto)
                last = _boundary(program + 1, each, more, units, block * tiles + begin, seen, upto)
    return first, last
