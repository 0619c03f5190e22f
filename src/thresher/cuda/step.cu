// A step of decoding: every key of each query is scored and the topk best are selected, in one launch. See ops/score_select/cuda.py. HISA
// takes two launches: of block means, whose keys are blocks, and of the tokens in the blocks chosen (ops/hisa_select/cuda.py).
//
// The tiles of 64 keys of all queries, one after the other, are shared out evenly, so many before each query for what it costs beside: a
// thread block has a run of them and keeps their scores in its shared memory. A query's tiles may lie in several blocks, its parts. All blocks
// are at work at once, so they can wait for one another.
// 1. Four warps fetch tiles through the copy engine, since one alone would be late; four groups of four warps take turns at multiplying them,
//    and count scores in bins.
// 2. The parts of a query add up their bins. What lies above the bin of the topk-th best is taken; the pairs (score, key) in it are told to
//    all parts, and each finds the cut, a pair of which there is one. Scores are read once: what they are sought for is kept as a mask of keys.
// 3. Each part writes what it takes behind what the parts before it take, in the order of keys. A block seeks the cuts of all its queries before
//    it waits for the first, so that queries which share blocks do not wait for one another in a row; teams of its warps take queries each.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

#include <common.cuh>

constexpr u32 KEYS = 64, STAGES = 8, GROUPS = 4, WARPS = 4;  // of a tile, of the ring, that take turns, of each
constexpr u32 THREADS = GROUPS * WARPS * 32;                 // that multiply and select; FETCHERS warps more fetch
constexpr u32 FETCHERS = 4, TEAMS = 2, EXTRA = 12;           // teams at most; what a query more costs a block, in tiles
constexpr u32 BINS = 2048, MOST = 2048, FEW = 64;      // of scores; pairs that are told to all; that are compared with one another
constexpr u32 ABSENT = 0x7fffabcdu;                          // bits of a scale whose page is not there: a NaN that no cache holds
constexpr u32 MAX_QUERIES = 1024;
// Behind a query's bins: how many keys have no score, how often parts have arrived, how many pairs found no slot, how many parts have left.
constexpr u32 LOST = BINS, ARRIVED = BINS + 1, PAIRS = BINS + 2, LEFT = BINS + 3, TOLD = BINS + 4;
constexpr u32 MAX_PARTS = 256;            // a multiprocessor has one at most
constexpr u32 MASKED = 1 << 17;           // as `masked` below at most
constexpr u64 SELECTABLE = (u64)1 << 32;  // the least pair that can be selected
constexpr u32 FORCED = 0xfffffffe;        // the rank of a block that is chosen whatever its score, above every number's

// What is selected: tokens; blocks of them by their means, the first and a query's own always; tokens of the blocks chosen.
enum Stage { TOKENS, BLOCKS, IN_BLOCKS };

struct Step {
  TileMap tiles;               // of the pages' keys
  const unsigned char* pages;  // page_bytes each: 64 keys, then their scales
  const unsigned char* q;      // rows q_row apart, heads q_head
  const float* weights;        // rows w_row apart
  const long long *owners, *positions, *lengths;
  const int* table;  // rows table_row apart
  int* indices;      // [queries, width]
  long long* taken;  // [queries]
  float* beside;     // null, or [queries, width]
  u32* told;         // [queries, TOLD], zeros before and after: see there
  u64* words;        // [queries, blocks], zeros before and after: see word_of
  u64* pairs;        // [queries, 2 MOST], zeros before and after: as many slots for each part, and what finds none there
  u32* spilt;        // null, or orders of all tiles that the table has room for and those EXTRA, and their mask: see `held`, `masked`
  const int* blocks;        // IN_BLOCKS: [queries, most_blocks], ascending
  const long long* chosen;  // and how many each query has, its own the last of them
  u32 num_queries, num_heads, table_tiles, num_requests, num_pages, topk;
  u32 page_bytes, q_row, q_head, w_row, table_row;
  u32 held, masked;  // keys of a block, of whose orders and of whose mask shared memory has room
  u32 width;         // of a row of indices
  u32 row_tiles;     // of a query at most; table_tiles are those of a request's tokens
  u32 block_size, most_blocks;
};

// What a block knows of a query, of which it has a part.
struct Sought {
  u32 taken, above;                       // how many are selected; how many this part takes for certain
  u32 want : 12, inside : 12, known : 1;  // which largest of how many pairs the cut is
  u64 low, high;                          // the cut lies from `low` on and below `high`
};

template <u32 DIM, u32 HEADS>
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
  } teams[TEAMS];
  u32 postponed;
  alignas(16) u32 orders[4];  // of the block's keys: see rank_of
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
// How many keys are scored for it. Of BLOCKS those before its own, which needs no score.
template <Stage STAGE>
__device__ __forceinline__ u32 end_of(const Step& c, u32 query) {
  long long chosen = STAGE == IN_BLOCKS ? c.chosen[query] : 0;
  u32 tokens = tokens_of(c, query);
  if (STAGE == TOKENS || tokens == 0) return tokens;
  if (STAGE == BLOCKS) return min((tokens - 1) / c.block_size, c.row_tiles * KEYS);
  return chosen > 0 ? ((u32)chosen - 1) * c.block_size + (tokens - 1) % c.block_size + 1 : 0;
}

// `order_of` for any score: 1 for NaN, which ranks below every number, 0 for -inf, which is never selected. And back, NaN as Hopper makes it.
__device__ __forceinline__ u32 rank_of(float score) {
  if (score != score) return 1;
  return __float_as_uint(score) == 0xff800000u ? 0 : order_of(score);
}
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

// Add this block's bins to those of all parts, and clear them.
template <class Work>
__device__ __forceinline__ void tell_bins(u32* told, Work& work) {
#pragma unroll
  for (u32 at = 0; at < BINS; at += THREADS) {
    u32 bin = at + threadIdx.x, count = work.bins[bin];
    if (count) atomicAdd(&told[bin], count), work.bins[bin] = 0;
  }
  if (threadIdx.x == 0 && work.bins[LOST]) atomicAdd(&told[LOST], work.bins[LOST]), work.bins[LOST] = 0;
}

// Orders of a part: the first in shared memory, those that it has no room for in device memory; of whole tiles.
struct Orders {
  u32 *near, *far;
  u32 room;
  __device__ __forceinline__ u32 operator[](u32 at) const {
    if (at < room) return near[at];
    return far[at];
  }
  __device__ __forceinline__ void put(u32 at, u32 order) const {
    if (at < room)
      near[at] = order;
    else
      far[at] = order;
  }
};

// A run of tiles: those of one query after another.
struct Run {
  u32 each, begin, stop;          // tiles of a block, and this block's
  u32 query = 0, at, upto, from;  // at hand: tiles at .. upto - 1 of all; the first of the query's

  template <class Work>
  __device__ __forceinline__ Run(const Step& c, const Work& work) {
    u32 total = work.first[c.num_queries];
    each = max((total + gridDim.x - 1) / gridDim.x, 1u);
    begin = min(blockIdx.x * each, total), stop = min(begin + each, total);
    at = upto = from = begin;
  }
  template <class Work>  // of the tiles at hand
  __device__ __forceinline__ Orders orders(const Step& c, Work& work) const {
    u32 from = (at - begin) * KEYS;
    return {work.orders + from, c.spilt + (u64)at * KEYS, c.held > from ? c.held - from : 0};
  }
  template <class Work>
  __device__ __forceinline__ u32* masks(const Step& c, Work& work) const {
    u64 all = (u64)c.num_queries * (c.row_tiles + EXTRA) * KEYS;
    return each * KEYS <= c.masked ? work.masks + (at - begin) * (KEYS / 32) : c.spilt + all + (u64)at * (KEYS / 32);
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

#include <step_score.cuh>
#include <step_select.cuh>

template <u32 DIM, u32 HEADS, Stage STAGE>
__device__ __forceinline__ void step(const Step& c) {
  Workspace<DIM, HEADS>& work = *(Workspace<DIM, HEADS>*)aligned_memory<1024>();
  for (u32 query = threadIdx.x; query < c.num_queries; query += blockDim.x) {
    u32 end = end_of<STAGE>(c, query);
    work.first[query + 1] = end > 0 ? (end + KEYS - 1) / KEYS + EXTRA : 0, work.last[query] = (end + KEYS - 1) % KEYS;
  }
  if (threadIdx.x == 0) {
    for (u32 slot = 0; slot < STAGES; slot++) begin_barrier(&work.full[slot], 1), begin_barrier(&work.empty[slot], WARPS);
    fence_for_copies();
    work.first[0] = 0;
  }
  __syncthreads();
  if (warp_of() == 0) {
    u32 carried = 0;
    for (u32 base = 0; base < c.num_queries; base += 32) {
      u32 query = base + lane_of(), tiles = query < c.num_queries ? work.first[query + 1] : 0;
      tiles = sum_upto(tiles);
      if (query < c.num_queries) work.first[query + 1] = carried + tiles;
      carried += __shfl_sync(EVERY, tiles, 31);
    }
  }
  __syncthreads();
  if (warp_of() >= GROUPS * WARPS) {
    fetch_tiles<DIM, HEADS, STAGE>(c, work, warp_of() - GROUPS * WARPS);
    return;
  }
  Scorer<DIM, HEADS, STAGE>{c, work}.run();
  Selecting<DIM, HEADS, STAGE>{c, work}.run();
  for (u32 query = blockIdx.x; query < c.num_queries; query += gridDim.x) {
    if (work.first[query] < work.first[query + 1]) continue;
    u32 own = STAGE == BLOCKS && tokens_of(c, query) > 0;  // the first block is the query's own
    if (threadIdx.x == 0) c.taken[query] = own;
    for (u32 at = threadIdx.x; at < c.width; at += THREADS) leave_out(c, query, at);
    if (own && threadIdx.x == 0) c.indices[(u64)query * c.width] = 0;
  }
}

#ifdef STEP_DIM  // of the one kernel that is asked for
extern "C" __global__ void __launch_bounds__(640, 1) kernel(const __grid_constant__ Step c) { step<STEP_DIM, STEP_HEADS, (Stage)STEP_STAGE>(c); }
#endif
