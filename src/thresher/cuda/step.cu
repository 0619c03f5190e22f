// A step of decoding: every key of each query is scored and the topk best are selected, in one launch. See ops/score_select/cuda.py.
//
// The tiles of 64 keys of all queries, one after the other, are shared out evenly: a thread block has a run of them and keeps their scores in
// its shared memory. A query's tiles may lie in several blocks, its parts. All blocks are at work at once, so they can wait for one another.
// 1. One warp fetches tiles through the copy engine; two groups of four warps take turns at multiplying them, and count scores in bins.
// 2. The parts of a query add up their bins. What lies above the bin of the topk-th best is taken; the pairs (score, key) in it are told to
//    all parts, and each finds the cut, a pair of which there is one.
// 3. Each part writes what it takes behind what the parts before it take, in the order of keys. A block seeks the cuts of all its queries before
//    it waits for the first, so that queries which share blocks do not wait for one another in a row.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

#include <bins.cuh>

constexpr u32 KEYS = 64, STAGES = 8, GROUPS = 2, WARPS = 4;  // of a tile, of the ring, that take turns, of each
constexpr u32 THREADS = GROUPS * WARPS * 32;                 // that multiply and select; one warp more fetches
constexpr u32 BINS = SCORE_BINS, MOST = 4096, NEAR = 256;    // of scores; pairs that are told to all; that are compared with one another
constexpr u32 ABSENT = 0x7fffabcdu;                          // bits of a scale whose page is not there: a NaN that no cache holds
constexpr u32 MAX_QUERIES = 1024;
// What a part notes of a query: how many it takes above what is sought; how many can be selected; which largest of how many pairs the cut is;
// how often it has arrived.
enum Note { ABOVE, TOTAL, WANT, INSIDE, ARRIVED, NOTES = 8 };

struct Step {
  TileMap tiles;               // of the pages' keys
  const unsigned char* pages;  // page_bytes each: 64 keys, then their scales
  const unsigned char* q;      // rows q_row apart, heads q_head
  const float* weights;        // rows w_row apart
  const long long *owners, *positions, *lengths;
  const int* table;  // rows table_row apart
  int* indices;      // [queries, topk]
  long long* taken;  // [queries]
  float* beside;     // null, or [queries, topk]
  u32* told;         // [queries, BINS + 2], zeros: bins, how often parts have arrived, how many pairs were told
  u32* notes;        // [queries, blocks, NOTES]: of each part, see Note
  u64* pairs;        // [queries, MOST]
  u32* spilt;        // null, or as many orders as the table has room for, where shared memory has no room for a block's
  u32 num_queries, num_heads, table_tiles, num_requests, num_pages, topk;
  u32 page_bytes, q_row, q_head, w_row, table_row;
  u32 held;  // orders that shared memory has room for
};

template <u32 DIM, u32 HEADS>
struct Workspace {  // begins at a multiple of 1024
  union {
    unsigned char tiles[STAGES][KEYS * DIM];
    u64 near[MOST];  // once all tiles are scored
  };
  unsigned char query[HEADS * DIM];
  float scales[STAGES][KEYS];
  u64 full[STAGES], empty[STAGES];
  u64 cut, range[2][GROUPS * WARPS], small[NEAR];
  u32 bins[BINS];
  u32 first[MAX_QUERIES + 1];  // tiles before each query
  u32 warps[GROUPS * WARPS], bin, before, inside, num;
  u32 orders[1];  // of the block's keys: see order_of; 0 for one that cannot be selected
};

// What a query sees: how many keys, of which request.
struct Seen {
  u32 end;
  long long owner;
};
__device__ __forceinline__ Seen look(const Step& c, u32 query) {
  long long owner = c.owners[query];
  if (owner < 0 || owner >= c.num_requests) return {0, 0};
  long long held = min(max(c.lengths[owner], 0ll), (long long)c.table_tiles * KEYS);
  return {(u32)(min(max(c.positions[query], -1ll), held - 1) + 1), owner};
}

// A number that is larger for what ranks higher: 1 for NaN, which ranks below every number; -inf, which is never selected, has 0.
__device__ __forceinline__ u32 order_of(float score) {
  u32 bits = __float_as_uint(score + 0.0f);  // -0.0 becomes 0.0
  if (score != score) return 1;
  return bits == 0xff800000u ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(u32 order) {
  return __uint_as_float(order == 1 ? 0x7fc00000u : order & 0x80000000u ? order & 0x7fffffffu : ~order);
}
__device__ __forceinline__ void meet_all() { meet(1, THREADS); }

// Of each thread's number: the sum of those of threads before it, and of all.
template <class Work>
__device__ __forceinline__ u32 scan(u32 value, Work& work, u32& total) {
  u32 upto = value;
  for (u32 step = 1; step < 32; step *= 2) {
    u32 other = __shfl_up_sync(EVERY, upto, step);
    if (lane_of() >= step) upto += other;
  }
  meet_all();  // nobody reads the last scan's any more
  if (lane_of() == 31) work.warps[warp_of()] = upto;
  meet_all();
  u32 before = 0;
  total = 0;
  for (u32 warp = 0; warp < GROUPS * WARPS; warp++) before += warp < warp_of() ? work.warps[warp] : 0, total += work.warps[warp];
  return before + upto - value;
}

// Which of bins the `want`-th from above lies in (work.bin), how many lie in those above (work.before), and how many in it (work.inside).
// `own` of them, descending, are this thread's, and `count(n)` is the n-th's number. Returns how many there are.
template <class Work, class Count>
__device__ __forceinline__ u32 find_bin(u32 want, u32 bins, u32 own, Work& work, const Count& count) {
  u32 last = bins - 1 - threadIdx.x * own, sum = 0, total;
  for (u32 at = 0; at < own; at++) sum += count(last - at);
  u32 before = scan(sum, work, total);
  if (before < want && want <= before + sum) {
    u32 bin = last, inside;
    while (before + (inside = count(bin)) < want) before += inside, bin--;
    work.bin = bin, work.before = before, work.inside = inside;
  }
  meet_all();
  return total;
}

// The `want`-th largest of the first `num` of work.near, which are distinct.
template <class Work>
__device__ __forceinline__ u64 nth_largest(u32 want, u32 num, Work& work) {
  u64 low = ~0ull, high = 0;
  for (u32 at = threadIdx.x; at < num; at += THREADS) low = min(low, work.near[at]), high = max(high, work.near[at]);
  for (u32 step = 16; step; step /= 2) low = min(low, __shfl_xor_sync(EVERY, low, step)), high = max(high, __shfl_xor_sync(EVERY, high, step));
  if (lane_of() == 0) work.range[0][warp_of()] = low, work.range[1][warp_of()] = high;
  meet_all();
  for (u32 warp = 0; warp < GROUPS * WARPS; warp++) low = min(low, work.range[0][warp]), high = max(high, work.range[1][warp]);
  u32 inside = num;
  while (inside > NEAR) {
    u32 shift = max(64 - __clzll(high - low) - 8, 0);
    work.bins[threadIdx.x] = 0;
    meet_all();
    for (u32 at = threadIdx.x; at < num; at += THREADS) {
      u64 pair = work.near[at];
      if (pair >= low && pair <= high) atomicAdd(&work.bins[(pair - low) >> shift], 1u);
    }
    meet_all();
    find_bin(want, THREADS, 1, work, [&](u32 bin) { return work.bins[bin]; });
    low += (u64)work.bin << shift, high = min(high, low + ((u64)1 << shift) - 1);
    want -= work.before, inside = work.inside;
    meet_all();
  }
  if (threadIdx.x == 0) work.num = 0;
  meet_all();
  for (u32 at = threadIdx.x; at < num; at += THREADS) {
    u64 pair = work.near[at];
    if (pair >= low && pair <= high) work.small[atomicAdd(&work.num, 1u)] = pair;
  }
  meet_all();
  if (threadIdx.x < inside) {
    u32 rank = 0;
    for (u32 at = 0; at < inside; at++) rank += work.small[at] >= work.small[threadIdx.x];
    if (rank == want) work.cut = work.small[threadIdx.x];
  }
  meet_all();
  return work.cut;
}

// Add this block's bins to those of all parts.
template <class Work>
__device__ __forceinline__ void tell_bins(u32* told, const Work& work) {
  for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS)
    if (work.bins[bin]) atomicAdd(&told[bin], work.bins[bin]);
}

// A run of tiles: those of one query after another.
struct Run {
  u32 each, begin, stop;  // tiles of a block, and this block's
  u32 query = 0, at, upto;  // at hand: tiles at .. upto - 1 of all

  template <class Work>
  __device__ __forceinline__ Run(const Step& c, const Work& work) {
    u32 total = work.first[c.num_queries];
    each = max((total + gridDim.x - 1) / gridDim.x, 1u);
    begin = min(blockIdx.x * each, total), stop = min(begin + each, total);
    at = upto = begin;
  }
  template <class Work>  // of the tiles at hand
  __device__ __forceinline__ u32* orders(const Step& c, Work& work) const {
    return each * KEYS <= c.held ? work.orders + (at - begin) * KEYS : c.spilt + (u64)at * KEYS;
  }
  template <class Work>
  __device__ __forceinline__ bool next(const Work& work) {
    at = upto;
    if (at >= stop) return false;
    while (work.first[query + 1] <= at) query++;
    upto = min(stop, work.first[query + 1]);
    return true;
  }
};

template <u32 DIM, u32 HEADS>
__device__ __forceinline__ void fetch_tiles(const Step& c, Workspace<DIM, HEADS>& work) {
  u32 turn = 0;
  Run run(c, work);
  while (run.next(work)) {
    const int* table = c.table + look(c, run.query).owner * c.table_row - work.first[run.query];
    int ahead = 0;
    for (u32 tile = run.at; tile < run.upto; tile++, turn++) {
      if ((tile - run.at) % 32 == 0) ahead = tile + lane_of() < run.upto ? table[(long long)tile + lane_of()] : 0;
      int page = __shfl_sync(EVERY, ahead, (tile - run.at) % 32);
      bool there = (u32)page < c.num_pages;
      u32 slot = turn % STAGES;
      await(&work.empty[slot], turn / STAGES % 2 ^ 1);
      if (!there) {
        work.scales[slot][lane_of()] = work.scales[slot][lane_of() + 32] = __uint_as_float(ABSENT);
        fence_for_matrix_unit();  // the copy engine brings other scales to this place later
      }
      __syncwarp();  // all have seen the slot empty before it is filled
      if (lane_of() == 0) {
        u32 from = there ? page : 0;
        expect(&work.full[slot], KEYS * DIM + (there ? KEYS * 4 : 0));
        fetch_tile(work.tiles[slot], c.tiles, from, &work.full[slot]);
        if (there) fetch_bytes(work.scales[slot], c.pages + (u64)from * c.page_bytes + KEYS * DIM, KEYS * 4, &work.full[slot]);
      }
    }
  }
}

template <u32 DIM, u32 HEADS>
struct Scorer {
  const Step& c;
  Workspace<DIM, HEADS>& work;
  u32 turn = 0;
  float weights[HEADS / 4];  // half of those of heads 8 j + lane % 4 * 2 and the next

  // The query's heads into shared memory, zeros where there is none, and its weights.
  __device__ __forceinline__ void begin(u32 query) {
    constexpr u32 PIECES = DIM / 16;
    for (u32 piece = threadIdx.x; piece < HEADS * PIECES; piece += THREADS) {
      u32 head = piece / PIECES;
      Four values = {0, 0, 0, 0};
      if (head < c.num_heads) values = *(const Four*)(c.q + (u64)query * c.q_row + (u64)head * c.q_head + piece % PIECES * 16);
      *(Four*)(work.query + swizzled<DIM>(head, piece % PIECES)) = values;
    }
    fence_for_matrix_unit();
#pragma unroll
    for (u32 at = 0; at < HEADS / 4; at++) {
      u32 head = at / 2 * 8 + lane_of() % 4 * 2 + at % 2;
      weights[at] = head < c.num_heads ? mul(c.weights[(u64)query * c.w_row + head], 0.5f) : 0.0f;
    }
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) work.bins[bin] = 0;
  }

  // The score of one of a thread's two keys, in the order of index_score/triton.py: heads onto the sums of their classes modulo 8, ascending;
  // two of them; lanes two apart, and one.
  __device__ __forceinline__ float total(const float (&dots)[HEADS / 2], u32 key) const {
    float sums[2];
#pragma unroll
    for (u32 at = 0; at < HEADS / 4; at++) {
      float dot = dots[at / 2 * 4 + key * 2 + at % 2], twice = add_two(dot, fabsf(dot));
      sums[at % 2] = at < 2 ? mul(twice, weights[at]) : fmaf(twice, weights[at], sums[at % 2]);
    }
    float sum = add_two(sums[0], sums[1]);
    sum = add_two(sum, __shfl_xor_sync(EVERY, sum, 2));
    return add_two(sum, __shfl_xor_sync(EVERY, sum, 1));
  }

  // Score a tile, whose keys are `first` and on of the query's and have their places in `orders`.
  __device__ __forceinline__ void take(u32 first, u32 end, u32* orders) {
    u32 slot = turn % STAGES;
    await(&work.full[slot], turn / STAGES % 2);
    float dots[HEADS / 2];
    multiply<DIM>(dots, work.tiles[slot], work.query);
    await_products(dots);
    u32 own = lane_of() % 4, key = warp_of() % WARPS * 16 + lane_of() / 4 + own % 2 * 8;
    float scale = work.scales[slot][key], low = total(dots, 0), high = total(dots, 1);
    // Times the scale and + 0.0 in one: (sum + 0.0) * scale has the same bits, since no scale is negative.
    u32 order = first + key < end && __float_as_uint(scale) != ABSENT ? order_of(fmaf(own % 2 ? high : low, scale, 0.0f)) : 0;
    if (own < 2) {
      orders[key] = order;
      if (order) atomicAdd(&work.bins[score_bin(order)], 1u);
    }
    __syncwarp();
    if (lane_of() == 0) arrive(&work.empty[slot]);
  }

  __device__ __forceinline__ void run() {
    Run run(c, work);
    while (run.next(work)) {
      begin(run.query);
      meet_all();
      u32 end = look(c, run.query).end, *orders = run.orders(c, work);
      for (u32 tile = run.at; tile < run.upto; tile++, turn++)
        if (turn % GROUPS == warp_of() / WARPS) take((tile - work.first[run.query]) * KEYS, end, orders + (tile - run.at) * KEYS);
      meet_all();
      u32* told = c.told + (u64)run.query * (BINS + 2);
      tell_bins(told, work);
      meet_all();
      if (threadIdx.x == 0) arrive_for_all(&told[BINS]);
    }
  }
};

// The selection of one query, by one of its parts.
template <u32 DIM, u32 HEADS>
struct Part {
  const Step& c;
  Workspace<DIM, HEADS>& work;
  u32 query, part, parts, first, num;  // the part's keys, `num` from `first` of the query's on
  const u32* orders;
  u32 arrived = 1;
  // What is sought lies in `bin`, and its pair shifted by `shift` is `prefix`.
  u32 bin = 0, shift = 64;
  u64 prefix = 0;

  __device__ __forceinline__ u32* told() const { return c.told + (u64)query * (BINS + 2); }
  __device__ __forceinline__ u64 pair_of(u32 order, u32 at) const { return (u64)order << 32 | ~(first + at); }
  __device__ __forceinline__ void await_parts() {
    if (threadIdx.x == 0) await_all(&told()[BINS], arrived * parts);
    meet_all();
  }
  __device__ __forceinline__ void arrive_parts() {
    meet_all();
    if (threadIdx.x == 0) arrive_for_all(&told()[BINS]);
    arrived++;
  }
  __device__ __forceinline__ void meet_parts() {
    arrive_parts();
    await_parts();
  }
  __device__ __forceinline__ u32* notes(u32 of) const { return c.notes + ((u64)query * gridDim.x + of) * NOTES; }
  // 1 above what is sought for now, 0 within it, -1 below.
  __device__ __forceinline__ int side(u32 order, u32 at) const {
    u32 mine = score_bin(order);
    if (!order || mine != bin) return order && mine > bin ? 1 : -1;
    if (shift == 64) return 0;
    u64 high = pair_of(order, at) >> shift;
    return high == prefix ? 0 : high > prefix ? 1 : -1;
  }
  // Calls use(order, place, which of the keys) for each of a warp's keys, all lanes together; each warp has keys that stand together.
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
    u32 share = (num / 32 + GROUPS * WARPS - 1) / (GROUPS * WARPS) * 32, begin = warp_of() * share;
    for (u32 at = begin + lane_of(); at < begin + share; at += 32) use(at < num ? orders[at] : 0, at);
  }

  // Bins of the next 11 bits of the pairs within, when they are too many to be told to all.
  __device__ __forceinline__ void divide() {
    u32 from = shift, width = min(from, 11u);
    meet_parts();
    for (u32 at = threadIdx.x; at < BINS; at += THREADS) {
      work.bins[at] = 0;
      if (part == 0) told()[at] = 0;
    }
    meet_parts();
    for (u32 at = threadIdx.x; at < num; at += THREADS)
      if (side(orders[at], at) == 0) atomicAdd(&work.bins[pair_of(orders[at], at) >> (from - width) & ((1u << width) - 1)], 1u);
    meet_all();
    tell_bins(told(), work);
    meet_parts();
  }

  // The bin that the `want`-th is in, of those that all parts have added up.
  __device__ __forceinline__ u32 find_told_bin(u32 want) {
#pragma unroll
    for (u32 at = 0; at < BINS; at += THREADS) work.bins[at + threadIdx.x] = fresh(&told()[at + threadIdx.x]);
    meet_all();
    return find_bin(want, BINS, BINS / THREADS, work, [&](u32 at) { return work.bins[at]; });
  }

  // Find where the cut is and tell the others what this part has there. Only where a bin holds too many is anybody waited for once all are
  // scored.
  __device__ __forceinline__ void seek() {
    await_parts();
    u32 total = find_told_bin(c.topk), want = 0, inside = 0;
    if (total > c.topk) {
      want = c.topk - work.before;
      bin = work.bin, inside = work.inside;
      while (inside > MOST) {
        divide();
        find_told_bin(want);
        u32 width = min(shift, 11u);
        prefix = shift == 64 ? work.bin : prefix << width | work.bin;
        shift -= width, want -= work.before, inside = work.inside;
      }
    }
    tell(inside == 0);
    if (threadIdx.x == 0) notes(part)[TOTAL] = total, notes(part)[WANT] = want, notes(part)[INSIDE] = inside, notes(part)[ARRIVED] = arrived + 1;
    arrive_parts();
  }

  // Once all parts have told, take what is theirs.
  __device__ __forceinline__ void take() {
    u32 total = fresh(&notes(part)[TOTAL]), want = fresh(&notes(part)[WANT]), inside = fresh(&notes(part)[INSIDE]);
    arrived = fresh(&notes(part)[ARRIVED]);
    await_parts();
    u64 cut = (u64)1 << 32;  // all that can be selected
    if (inside > 0) {
      for (u32 at = threadIdx.x; at < inside; at += THREADS) work.near[at] = fresh(&c.pairs[(u64)query * MOST + at]);
      meet_all();
      cut = nth_largest(want, inside, work);
    }
    write(cut, min(total, c.topk), inside);
  }

  // How many this part takes for certain; and, unless all are taken, the pairs within what is sought.
  __device__ __forceinline__ void tell(bool all) {
    constexpr u32 BITS = 13;  // for those within, MOST at most
    u32 mine = 0, total;
    auto where = [&](u32 order, u32 at) { return all ? (order ? 1 : -1) : side(order, at); };
    each([&](u32 order, u32 at) {
      int side = where(order, at);
      mine += __popc(__ballot_sync(EVERY, side == 1)) << BITS | __popc(__ballot_sync(EVERY, side == 0));
    });
    u32 to = scan(lane_of() == 0 ? mine : 0, work, total) & ((1u << BITS) - 1);
    if (threadIdx.x == 0) {
      notes(part)[ABOVE] = total >> BITS;
      u32 within = total & ((1u << BITS) - 1);
      work.num = within ? atomicAdd(&told()[BINS + 1], within) : 0;
    }
    meet_all();
    to = __shfl_sync(EVERY, to, 0) + work.num;
    if (!(mine & ((1u << BITS) - 1))) return;
    each([&](u32 order, u32 at) {
      bool within = where(order, at) == 0;
      u32 those = __ballot_sync(EVERY, within);
      if (within) c.pairs[(u64)query * MOST + to + __popc(those & ((1u << lane_of()) - 1))] = pair_of(order, at);
      to += __popc(those);
    });
  }

  // The part's keys from the cut on, ascending, behind those that the parts before it take: above, and `inside` pairs that were told to all.
  __device__ __forceinline__ void write(u64 cut, u32 taken, u32 inside) {
    u32 before = 0, ahead, mine = 0, own;
    if (part > 0) {
      for (u32 at = threadIdx.x; at < part; at += THREADS) before += fresh(&notes(at)[ABOVE]);
      for (u32 at = threadIdx.x; at < inside; at += THREADS) before += work.near[at] >= cut && ~(u32)work.near[at] < first;
    }
    scan(before, work, ahead);
    each([&](u32 order, u32 at) { mine += __popc(__ballot_sync(EVERY, order && pair_of(order, at) >= cut)); });
    u32 to = __shfl_sync(EVERY, ahead + scan(lane_of() == 0 ? mine : 0, work, own), 0);
    each([&](u32 order, u32 at) {
      bool keep = order && pair_of(order, at) >= cut;
      u32 kept = __ballot_sync(EVERY, keep);
      u64 place = (u64)query * c.topk + to + __popc(kept & ((1u << lane_of()) - 1));
      if (keep) c.indices[place] = first + at;
      if (keep && c.beside) c.beside[place] = score_of(order);
      to += __popc(kept);
    });
    if (part + 1 < parts) return;
    if (threadIdx.x == 0) c.taken[query] = taken;
    for (u32 at = taken + threadIdx.x; at < c.topk; at += THREADS) leave_out(c, query, at);
  }
  __device__ __forceinline__ static void leave_out(const Step& c, u32 query, u32 at) {
    c.indices[(u64)query * c.topk + at] = -1;
    if (c.beside) c.beside[(u64)query * c.topk + at] = __uint_as_float(0xff800000u);
  }
};

// Calls use(part) for each query that the block has a part of.
template <u32 DIM, u32 HEADS, class Use>
__device__ __forceinline__ void each_part(const Step& c, Workspace<DIM, HEADS>& work, const Use& use) {
  Run run(c, work);
  while (run.next(work)) {
    u32 before = work.first[run.query], behind = work.first[run.query + 1], first = before / run.each;
    use(Part<DIM, HEADS>{
        c, work, run.query, blockIdx.x - first, (behind - 1) / run.each - first + 1, (run.at - before) * KEYS, (run.upto - run.at) * KEYS,
        run.orders(c, work)});
  }
}

template <u32 DIM, u32 HEADS>
__device__ __forceinline__ void step(const Step& c) {
  Workspace<DIM, HEADS>& work = *(Workspace<DIM, HEADS>*)aligned_memory<1024>();
  for (u32 query = threadIdx.x; query < c.num_queries; query += blockDim.x) work.first[query + 1] = (look(c, query).end + KEYS - 1) / KEYS;
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
      for (u32 step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(EVERY, tiles, step);
        if (lane_of() >= step) tiles += other;
      }
      if (query < c.num_queries) work.first[query + 1] = carried + tiles;
      carried += __shfl_sync(EVERY, tiles, 31);
    }
  }
  __syncthreads();
  if (warp_of() >= GROUPS * WARPS) {
    fetch_tiles<DIM, HEADS>(c, work);
    return;
  }
  Scorer<DIM, HEADS>{c, work}.run();
  each_part<DIM, HEADS>(c, work, [](auto part) { part.seek(); });
  each_part<DIM, HEADS>(c, work, [](auto part) { part.take(); });
  for (u32 query = blockIdx.x; query < c.num_queries; query += gridDim.x) {
    if (work.first[query] < work.first[query + 1]) continue;
    if (threadIdx.x == 0) c.taken[query] = 0;
    for (u32 at = threadIdx.x; at < c.topk; at += THREADS) Part<DIM, HEADS>::leave_out(c, query, at);
  }
}

#define STEP(dim, heads)                                                                                      \
  extern "C" __global__ void __launch_bounds__(288, 1) step_##dim##_##heads(const __grid_constant__ Step c) { \
    step<dim, heads>(c);                                                                                      \
  }
STEP(128, 16)
STEP(128, 32)
STEP(128, 64)
STEP(64, 16)
STEP(64, 32)
STEP(64, 64)
