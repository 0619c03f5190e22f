// A step of decoding: every key of each query is scored and the topk best are selected, in one launch. See ops/score_select/cuda.py. For HISA
// that is done twice in a launch: of block means, whose keys are blocks, and of the tokens in the blocks chosen (step_hisa.cuh).
//
// The tiles of 64 keys of all queries, one after the other, are shared out evenly, so many before each query for what it costs beside: a
// thread block has a run of them. A query's tiles may lie in several blocks, its parts. All blocks are at work at once, so they can wait for
// one another.
// 1. Two warps or four fetch tiles through the copy engine, since one alone would be late; four groups of four warps take turns at
//    multiplying them, and count scores in bins. What may be selected is kept in shared memory, as pairs (score, key): not what lies below as
//    many of a part's own as are wanted. One more warp keeps that bound; it rises as scores are counted.
// 2. The parts of a query add up their bins. What lies above the bin of the topk-th best is taken; the pairs (score, key) in it are told to
//    all parts, and each finds the cut, a pair of which there is one. What is kept is read once: what it is sought for stays as a mask of keys.
// 3. Each part writes what it takes behind what the parts before it take, in the order of keys. A block seeks the cuts of all its queries before
//    it waits for the first, so that queries which share blocks do not wait for one another in a row; teams of its warps take queries each.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

#include <common.cuh>

constexpr u32 KEYS = 64, STAGES = 8, GROUPS = 4, WARPS = 4;  // of a tile, of the ring, that take turns, of each
constexpr u32 THREADS = GROUPS * WARPS * 32, EXTRA = 24;     // that multiply and select; what a query more costs a block, in tiles
// Beside those warps, some that fetch: a place of the ring is always the same one's to fill. HISA has room for four; else one keeps a bound.
constexpr u32 FETCHERS = 2, FETCHERS_OF_HISA = 4;
static_assert(STAGES % FETCHERS == 0 && STAGES % FETCHERS_OF_HISA == 0);
constexpr u32 BINS = 2048, MOST = 2048, FEW = 64;      // of scores; pairs that are told to all; that are compared with one another
constexpr u32 ABSENT = 0x7fffabcdu;                          // bits of a scale whose page is not there: a NaN that no cache holds
constexpr u32 MAX_QUERIES = 1024;
// Behind a query's bins: how many keys have no score, how often parts have arrived, how many pairs found no slot, how many parts have left.
constexpr u32 LOST = BINS, ARRIVED = BINS + 1, PAIRS = BINS + 2, LEFT = BINS + 3, TOLD = BINS + 4;
constexpr u32 MAX_PARTS = 256;            // a multiprocessor has one at most
constexpr u32 MASKED = 1 << 17;           // as `masked` below at most
constexpr u64 SELECTABLE = (u64)1 << 32;  // the least pair that can be selected
constexpr u32 MAPPED = 1024;              // tiles of a block, IN_BLOCKS, at most
constexpr u32 FORCED = 0xfffffffe;        // the rank of a block that is chosen whatever its score, above every number's

// What is selected: tokens; blocks of them by their means, the first and a query's own always; tokens of the blocks chosen.
enum Stage { TOKENS, BLOCKS, IN_BLOCKS };

// What the launch sends to every rank beside its work, pieces of 16 bytes: see ops/send.py. It goes out while all others are at theirs. The
// launch ends when what they sent is here.
struct Sending {
  const Four* pieces;    // [tokens, row]
  const u64* addresses;  // [ranks]
  u32* turns;            // of flags
  u64 at, patience;      // where in a rank's memory [tokens, ranks, row] are, in bytes; ns that a rank is waited for
  u32 num, row, ranks, rank, first, blocks;  // pieces, 0 if there are none; of a token; the first flag, and how many: one of a thread block

  // By so many threads, of which this is one.
  template <u32 THREADS>
  __device__ __forceinline__ void send(u32 thread) const {
    constexpr u32 AHEAD = 8;  // of a thread, all read before the first is written
    u32 each = blocks * THREADS;
    if (blockIdx.x >= blocks) return;
    for (u32 start = blockIdx.x * THREADS + thread; start < num; start += AHEAD * each) {
      Four piece[AHEAD];
#pragma unroll
      for (u32 at = 0; at < AHEAD; at++)
        if (start + at * each < num) piece[at] = fresh(&pieces[start + at * each]);
      for (u32 step = 1; step <= ranks; step++) {  // from the next rank on, so that not all write to one at once
        auto there = (Four*)(addresses[(rank + step) % ranks] + this->at);
#pragma unroll
        for (u32 at = 0; at < AHEAD; at++) {
          u32 n = start + at * each;
          if (n < num) there[(n / row * ranks + rank) * (u64)row + n % row] = piece[at];
        }
      }
    }
  }
  // By a warp, once all of the block has been sent: tell the others, then wait for what their blocks of this number sent.
  __device__ __forceinline__ void meet_ranks() const {
    if (blockIdx.x >= blocks) return;
    u32 flag = first + blockIdx.x, turn = turns[flag] + 1;
    __syncwarp();
    for (u32 peer = lane_of(); peer < ranks; peer += 32)
      if (peer != rank) publish_far((u32*)addresses[peer] + flag * ranks + rank, turn);
    if (lane_of() == 0) turns[flag] = turn;
    for (u32 peer = lane_of(); peer < ranks; peer += 32)
      if (peer != rank) await_far((u32*)addresses[rank] + flag * ranks + peer, turn, patience);
  }
};

struct Step {
  TileMap tiles;               // of the pages' keys
  const unsigned char* pages;  // page_bytes each: 64 keys, then their scales
  const unsigned char* q;      // rows q_row apart, heads q_head
  const float* weights;        // rows w_row apart
  const long long *owners, *positions, *lengths;
  const int* table;  // rows table_row apart
  int *indices, *slots;  // [queries, topk], and where those are: page * KEYS + offset
  long long* taken;  // [queries]
  float* beside;     // null, or [queries, topk]
  u32* told;         // [queries, TOLD], zeros before and after: see there
  u64* words;        // [queries, blocks], zeros before and after: see word_of
  u64* pairs;        // [queries, 2 MOST], zeros before and after: as many slots for each part, and what finds none there
  u64* spilt;        // null, or pairs of all tiles that the table has room for, those EXTRA and some more, and their mask: see `held`, `masked`
  u32* ranks;        // null, or, for `beside`, of each such key its score's
  u32* blocks;       // BLOCKS, IN_BLOCKS: [queries, most_blocks - 1], zeros before and after: see Chosen
  u32 num_queries, num_heads, table_tiles, num_requests, num_pages, topk;
  u32 page_bytes, q_row, q_head, w_row, table_row;
  u32 held, masked;  // that shared memory has room for: pairs of a warp, keys of a block's mask
  u32 parts;         // of a block at most
  u32 row_tiles;     // of a query at most; table_tiles are those of a request's tokens
  u32 block_size, most_blocks;  // tokens of a block; blocks of a query, its own among them
  Sending sending;              // of IN_BLOCKS, where there are two
};

// What a block knows of a query, of which it has a part.
struct Sought {
  u32 taken, above;                       // how many are selected; how many this part takes for certain
  u32 want : 12, inside : 12, known : 1;  // which largest of how many pairs the cut is
  u32 owner;                              // whose it is
  u64 low, high;                          // the cut lies from `low` on and below `high`
};

template <u32 DIM, u32 HEADS, bool HISA>
struct Workspace {  // begins at a multiple of 1024
  union {
    unsigned char tiles[STAGES][KEYS * DIM];
    struct {  // once all tiles are scored
      u64 near[MOST];
      Sought sought[MAX_QUERIES];  // of the block's parts, one after the other
      u32 masks[MASKED / 32];
    };
  };
  unsigned char query[HEADS * DIM];
  float weights[HEADS];
  float scales[STAGES][KEYS];
  u64 full[STAGES], empty[STAGES];
  u32 bins[BINS + 1];               // and how many keys have no score
  u32 first[MAX_QUERIES + 1];       // tiles before each query and those EXTRA
  unsigned char last[MAX_QUERIES];  // of each query's last tile, the last key that it sees
  u32 warps[GROUPS * WARPS], befores[GROUPS * WARPS];
  struct Team {  // of warps that select for one part
    u64 cut, small[FEW];
    u32 bin, above, inside, num, base, last;
    unsigned short within[MAX_PARTS];  // how many pairs each part told
  } teams[2];
  u32 postponed;
  // HISA: first and last of IN_BLOCKS, while those above are of BLOCKS, and each query's own block.
  static constexpr u32 OTHERS = HISA ? MAX_QUERIES : 0;
  u32 first_in[OTHERS + 1], own[OTHERS + 1];
  u32 begins_in, in_begins_in;      // the query that the block's first tile is of; of IN_BLOCKS
  u32 tiles_in[HISA ? MAPPED : 1];  // IN_BLOCKS: which of its request's each tile is
  unsigned char last_in[OTHERS + 4];
  u64 bound;                                   // the part's, and above it the number of its turn: see Bound
  alignas(16) u32 starts[1][GROUPS * WARPS];  // of parts, and one more: how many pairs each warp kept before; then those pairs
};

// How many tokens a query sees. Its owner is mostly of its own number: then one load need not wait for another.
__device__ __forceinline__ u32 tokens_of(const Step& c, u32 query) {
  u32 likely = min(query, c.num_requests - 1);
  long long owner = c.owners[query], position = c.positions[query], length = c.num_requests > 0 ? c.lengths[likely] : 0;
  if (owner < 0 || owner >= c.num_requests) return 0;
  if (owner != likely) length = c.lengths[owner];
  long long held = min(max(length, 0ll), (long long)c.table_tiles * KEYS);
  return (u32)(min(max(position, -1ll), held - 1) + 1);
}
// Tells how many tiles a query has whose keys end there, and EXTRA, where `first` will say how many there are before the next.
__device__ __forceinline__ void put_end(u32* first, unsigned char* last, u32 query, u32 end) {
  first[query + 1] = end > 0 ? (end + KEYS - 1) / KEYS + EXTRA : 0, last[query] = (end + KEYS - 1) % KEYS;
}
// Tiles of a block, of `total`, and the first of them.
__device__ __forceinline__ u32 share_of(u32 total) { return max((total + gridDim.x - 1) / gridDim.x, 1u); }
__device__ __forceinline__ u32 begin_of(u32 total) { return min(blockIdx.x * share_of(total), total); }
// By a warp: tiles before each query, and which query the block's first tile is of. Not each thread should look through the queries for that.
__device__ __forceinline__ void add_up(u32* first, u32& begins_in, u32 num) {
  u32 carried = 0;
  for (u32 base = 0; base < num; base += 32) {
    u32 query = base + lane_of(), tiles = query < num ? first[query + 1] : 0;
    tiles = sum_upto(tiles);
    if (query < num) first[query + 1] = carried + tiles;
    carried += __shfl_sync(EVERY, tiles, 31);
  }
  if (lane_of() == 0) first[0] = 0, begins_in = 0;
  if (num == 1) return;
  __syncwarp();
  u32 begin = begin_of(carried);
  for (u32 query = lane_of(); query < num; query += 32)
    if (first[query] <= begin && begin < first[query + 1]) begins_in = query;
}

// A score by its rank (see rank_of), NaN as Hopper makes it.
__device__ __forceinline__ float score_of(u32 rank) { return rank == 1 ? __uint_as_float(0x7fffffffu) : number_of(rank); }

// Bins of orders, ascending: 32 for each power of two from 2**-16 to 2**16, of either sign. The outer ones hold what lies beyond.
constexpr u32 HALF = BINS / 2, GRAIN = 18, SMALLEST = (127 - 16) * 32;  // bits of an order that a bin leaves open; the size where bins begin
__device__ __forceinline__ u32 score_bin(u32 order) {
  bool negative = order < 0x80000000u;
  u32 size = (negative ? ~order : order) & 0x7fffffffu;
  u32 place = min(max((int)(size >> GRAIN) - (int)SMALLEST, 0), (int)HALF - 1);
  return negative ? HALF - 1 - place : HALF + place;
}
// The least order in a bin.
__device__ __forceinline__ u32 first_order(u32 bin) {
  if (bin > HALF) return 0x80000000u | (bin - HALF + SMALLEST) << GRAIN;
  if (bin == HALF) return 0x80000000u;
  return bin == 0 ? 1 : 0x80000000u - ((HALF - bin + SMALLEST) << GRAIN);
}

__device__ __forceinline__ void meet_all() { meet(1, THREADS); }

// Add this block's bins to those of all parts, and clear them. Of a part's `keys` those that are not kept, but for a score below the bound
// and so below the cut, count in the lowest bin: the cut is in none below the bound's.
template <class Work>
__device__ __forceinline__ void tell_bins(u32* told, Work& work, u32 keys) {
  if (threadIdx.x == 0) work.bins[0] += keys - work.bins[LOST];
#pragma unroll
  for (u32 at = 0; at < BINS; at += THREADS) {
    u32 bin = at + threadIdx.x, count = work.bins[bin];
    if (count) atomicAdd(&told[bin], count), work.bins[bin] = 0;
  }
  if (threadIdx.x == 0 && work.bins[LOST]) atomicAdd(&told[LOST], work.bins[LOST]), work.bins[LOST] = 0;
}

// The pairs that a warp keeps: the first in shared memory, those that it has no room for in device memory.
struct Pairs {
  u64 *near, *far;
  u32 room;
  __device__ __forceinline__ u64 operator[](u32 at) const {
    if (at < room) return near[at];
    return far[at];
  }
  __device__ __forceinline__ void put(u32 at, u64 pair) const {
    if (at < room)
      near[at] = pair;
    else
      far[at] = pair;
  }
};

// A run of tiles: those of one query after another.
struct Run {
  u32 each, begin, stop;          // tiles of a block, and this block's
  u32 query, at, upto, from;      // at hand: tiles at .. upto - 1 of all; the first of the query's

  template <class Work>
  __device__ __forceinline__ Run(const Step& c, const Work& work) {
    u32 total = work.first[c.num_queries];
    each = share_of(total), begin = begin_of(total), stop = min(begin + each, total);
    query = work.begins_in, at = upto = from = begin;
  }
  template <class Work>  // one of those that multiply; of 16 keys of every fourth tile
  __device__ __forceinline__ Pairs pairs(const Step& c, Work& work, u32 warp) const {
    u64* near = (u64*)work.starts[c.parts + 1] + warp * c.held;
    return {near, c.spilt + ((u64)begin + blockIdx.x * (GROUPS - 1)) * KEYS + warp * ((each + GROUPS - 1) / GROUPS * (KEYS / WARPS)), c.held};
  }
  __device__ __forceinline__ bool near_masks(const Step& c) const { return each * KEYS <= c.masked; }
  template <class Work>  // of the tiles at hand
  __device__ __forceinline__ u32* masks(const Step& c, Work& work) const {
    u64 all = ((u64)c.num_queries * (c.row_tiles + EXTRA) + gridDim.x * (GROUPS - 1)) * KEYS;
    return near_masks(c) ? work.masks + (at - begin) * (KEYS / 32) : (u32*)(c.spilt + all) + (u64)at * (KEYS / 32);
  }
  __device__ __forceinline__ u32* ranks(const Step& c) const { return c.ranks ? c.ranks + (u64)at * KEYS : nullptr; }
  template <class Work>  // how many keys the query has
  __device__ __forceinline__ u32 end(const Work& work) const {
    return (work.first[query + 1] - from - 1) * KEYS + work.last[query] + 1;
  }
  template <class Work>
  __device__ __forceinline__ bool next(const Work& work) {
    at = upto;
    if (at >= stop) return false;
    while (work.first[query + 1] <= at) query++;
    from = work.first[query] + EXTRA, at = max(at, from), upto = min(stop, work.first[query + 1]);
    return at < stop;
  }
};

// The blocks that a query's keys are in, IN_BLOCKS: those chosen, ascending, and its own. Each that was chosen is told by a word that is not
// zero, one more than its number; NONE stands for a block too few, as where means have scores of -inf.
constexpr u32 NONE = 0xffffffff;
struct Chosen {
  const u32* words = nullptr;
  u32 block_size = 1, count = 0, own = 0;

  template <class Work>
  __device__ __forceinline__ Chosen(const Step& c, const Work& work, Stage stage, u32 query, u32 end) {
    if (stage != IN_BLOCKS) return;
    words = c.blocks + (u64)query * (c.most_blocks - 1);
    block_size = c.block_size, count = (end - 1) / block_size + 1, own = work.own[query];
  }
  // Which of its request's tiles one of the query's is, as soon as that is known; NONE where there is none.
  __device__ __forceinline__ u32 tile_of(u32 tile) const {
    u32 each = block_size / KEYS, at = tile / each;
    u32 word = at + 1 == count ? own + 1 : await_word(&words[at]);
    return word == NONE ? NONE : (word - 1) * each + tile % each;
  }
};

#include <step_score.cuh>
#include <step_select.cuh>

// Rows of queries that have no tiles: all that they see is selected. By a warp.
template <class Work>
__device__ __forceinline__ void take_whole(const Step& c, const Work& work) {
  for (u32 query = blockIdx.x; query < c.num_queries; query += gridDim.x) {
    if (work.first[query] < work.first[query + 1]) continue;
    u32 end = tokens_of(c, query), taken = 0;
    for (u32 base = 0; base < end; base += 32 * KEYS) {
      u32 tile = base / KEYS + lane_of(), page = tile * KEYS < end ? c.table[c.owners[query] * c.table_row + tile] : NONE;
      for (u32 pages = __ballot_sync(EVERY, page < c.num_pages); pages; pages &= pages - 1) {
        u32 lane = __ffs(pages) - 1, first = base + lane * KEYS, num = min(end - first, KEYS), slot = __shfl_sync(EVERY, page, lane) * KEYS;
        for (u32 at = lane_of(); at < num; at += 32) put_taken(c, query, taken + at, first + at, slot + at);
        taken += num;
      }
    }
    if (lane_of() == 0) c.taken[query] = taken;
    for (u32 at = taken + lane_of(); at < c.topk; at += 32) leave_out(c, query, at);
  }
}

// What all is waited for with is begun by a warp while the launch before may still be at work, which may write what it brings to the L2 cache.
__device__ __forceinline__ void fetch_first(const Step& c) {
  u64 word = (u64)(blockIdx.x * 32 + lane_of()) * 32;
  if (lane_of() == 0) fetch_map(c.tiles);
  if (word < (u64)c.num_requests * c.table_row) fetch_line(c.table + word);
}

template <class Work>
__device__ __forceinline__ void begin_barriers(Work& work) {
  for (u32 slot = 0; slot < STAGES; slot++) begin_barrier(&work.full[slot], 1), begin_barrier(&work.empty[slot], WARPS);
  fence_for_copies();
}

// TEAMS: at most, 1 or 2. Where there is one query, one is known when it is compiled: that is half a microsecond less.
template <u32 DIM, u32 HEADS, u32 TEAMS>
__device__ __forceinline__ void step(const Step& c) {
  auto& work = *(Workspace<DIM, HEADS, false>*)aligned_memory<1024>();
  if (warp_of() == 0) fetch_first(c);
  overlap_launches();
  for (u32 query = threadIdx.x; query < c.num_queries; query += blockDim.x) {
    u32 end = tokens_of(c, query);
    put_end(work.first, work.last, query, end <= c.topk && !c.beside ? 0 : end);  // that few need no scores
  }
  for (u32 bin = threadIdx.x; bin <= BINS; bin += blockDim.x) work.bins[bin] = 0;
  if (threadIdx.x == 0) begin_barriers(work), work.bound = 0;
  __syncthreads();
  if (warp_of() == 0) add_up(work.first, work.begins_in, c.num_queries);
  __syncthreads();
  u32 turn = 0;
  Bound bound{work.bound};
  if (warp_of() == GROUPS * WARPS + FETCHERS) {
    c.sending.send<32>(lane_of());
    take_whole(c, work);
    bound.keep(work.bins, c.topk);
    c.sending.meet_ranks();  // what was sent has come by now, so that nobody waits for it
    return;
  }
  if (warp_of() >= GROUPS * WARPS) {
    fetch_tiles<TOKENS>(c, work, warp_of() - GROUPS * WARPS, turn);
    return;
  }
  Scorer<DIM, HEADS, TOKENS>{c, work, turn}.run();
  if (threadIdx.x == 0) bound.end();
  Selecting<DIM, HEADS, TOKENS, TEAMS>{c, work}.run();
}

#include <step_hisa.cuh>

// The one kernel that is asked for.
#if defined STEP_DIM && STEP_HISA
extern "C" __global__ void __launch_bounds__(640, 1) select_in_blocks(const __grid_constant__ Hisa h) {
  hisa<STEP_DIM, STEP_HEADS, STEP_TEAMS>(h);
}
#elif defined STEP_DIM
extern "C" __global__ void __launch_bounds__(608, 1) select_tokens(const __grid_constant__ Step c) {
  step<STEP_DIM, STEP_HEADS, STEP_TEAMS>(c);
}
#endif
