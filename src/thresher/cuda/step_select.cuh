// A part of step.cu: the selection of a query by its parts, from scores and bins.

// Of each thread's number: the sum of those of threads before it, and of all.
template <class Work>
__device__ __forceinline__ u32 scan(u32 value, Work& work, u32& total) {
  u32 upto = sum_upto(value);
  meet_all();  // nobody reads the last scan's any more
  if (lane_of() == 31) work.warps[warp_of()] = upto;
  meet_all();
  u32 before = 0;
  total = 0;
  for (u32 warp = 0; warp < GROUPS * WARPS; warp++) before += warp < warp_of() ? work.warps[warp] : 0, total += work.warps[warp];
  return before + upto - value;
}

// `seek_bin` in the first `num` of work.bins. Begins and ends where all have met.
template <class Work>
__device__ __forceinline__ u32 find_bin(u32 want, u32 num, Work& work) {
  u32 total = seek_bin(work.bins, num, THREADS, want, work, [&](u32 sum, u32& all) { return scan(sum, work, all); });
  meet_all();
  return total;
}

// The least order in a bin.
__device__ __forceinline__ u32 first_order(u32 bin) {
  constexpr u32 HALF = BINS / 2, FROM = (127 - 16) * 32;
  if (bin > HALF) return 0x80000000u | (bin - HALF + FROM) << 18;
  if (bin == HALF) return 0x80000000u;
  return bin == 0 ? 1 : 0x80000000u - ((HALF - bin + FROM) << 18);
}

// How far pairs from `low` on and below `high` are shifted, so that there are at most 1 << bits of them.
__device__ __forceinline__ u32 shift_of(u64 low, u64 high, u32 bits) { return max(64 - __clzll(high - 1 - low) - (int)bits, 0); }

// The `want`-th largest of those `inside` pairs of the first `num` of work.near, all distinct, that lie from `low` on and below `high`.
// work.num is 0.
template <class Work>
__device__ __forceinline__ u64 nth_largest(u64 low, u64 high, u32 want, u32 inside, u32 num, Work& work) {
  constexpr u32 BITS = 9;
  static_assert(1 << BITS == THREADS);
  meet_all();
  while (inside > FEW) {
    u32 shift = shift_of(low, high, BITS);
    work.bins[threadIdx.x] = 0;
    meet_all();
    for (u32 at = threadIdx.x; at < num; at += THREADS) {
      u64 pair = work.near[at];
      if (pair >= low && pair < high) atomicAdd(&work.bins[(pair - low) >> shift], 1u);
    }
    meet_all();
    find_bin(want, THREADS, work);
    low += (u64)work.bin << shift, high = min(high, low + ((u64)1 << shift));
    want -= work.above, inside = work.inside;
  }
  for (u32 at = threadIdx.x; at < num; at += THREADS) {
    u64 pair = work.near[at];
    if (pair >= low && pair < high) work.small[atomicAdd(&work.num, 1u)] = pair;
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

// The selection of one query, by one of its parts.
template <u32 DIM, u32 HEADS>
struct Part {
  const Step& c;
  Workspace<DIM, HEADS>& work;
  u32 query, part, parts, first, num;  // the part's keys, `num` from `first` of the query's on
  const u32* orders;
  u32* masks;  // of those keys that may be taken
  u32 arrived = 1;

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

  // Bins of the pairs from `low` on and below `high`, when they are too many to be told to all. How far they are shifted for that.
  __device__ __forceinline__ u32 divide(u64 low, u64 high) {
    u32 shift = shift_of(low, high, 11);
    static_assert(BINS == 1 << 11);
    meet_parts();
    for (u32 at = threadIdx.x; at < BINS; at += THREADS) {
      work.bins[at] = 0;
      if (part == 0) told()[at] = 0;
    }
    meet_parts();
    for (u32 at = threadIdx.x; at < num; at += THREADS) {
      u64 pair = pair_of(orders[at], at);
      if (pair >= low && pair < high) atomicAdd(&work.bins[(pair - low) >> shift], 1u);
    }
    meet_all();
    tell_bins(told(), work);
    meet_parts();
    return shift;
  }

  // The bin that the `want`-th is in, of those that all parts have added up.
  __device__ __forceinline__ u32 find_told_bin(u32 want) {
#pragma unroll
    for (u32 at = 0; at < BINS; at += THREADS) work.bins[at + threadIdx.x] = fresh(&told()[at + threadIdx.x]);
    meet_all();
    return find_bin(want, BINS, work);
  }

  // Find where the cut is and tell the others what this part has there. Only where a bin holds too many is anybody waited for once all are
  // scored.
  __device__ __forceinline__ void seek(Sought& sought) {
    await_parts();
    if (threadIdx.x == 0) work.num = 0;
    u32 total = find_told_bin(c.topk), want = 0, inside = 0;
    u64 low = SELECTABLE, high = SELECTABLE;
    if (total > c.topk) {
      want = c.topk - work.above, inside = work.inside;
      low = (u64)first_order(work.bin) << 32, high = work.bin + 1 < BINS ? (u64)first_order(work.bin + 1) << 32 : ~(u64)0;
      while (inside > MOST) {
        u32 shift = divide(low, high);
        find_told_bin(want);
        low += (u64)work.bin << shift, high = min(high, low + ((u64)1 << shift));
        want -= work.above, inside = work.inside;
      }
    }
    tell(low, high);
    if (threadIdx.x == 0) sought = {total, want, inside, arrived + 1, low, high};
    arrive_parts();
  }

  // The groups of 32 keys of a warp: they stand together.
  struct Groups {
    u32 begin, stop;
  };
  __device__ __forceinline__ Groups groups() const {
    u32 all = num / 32, share = (all + GROUPS * WARPS - 1) / (GROUPS * WARPS), begin = min(warp_of() * share, all);
    return {begin, min(begin + share, all)};
  }
  // Calls use(mask, group) for each of a warp's groups, 32 of them at a time, one a lane; beyond the last with 0.
  template <class Use>
  __device__ __forceinline__ void each_mask(const Use& use) const {
    auto [begin, stop] = groups();
    for (u32 group = begin + lane_of(); group - lane_of() < stop; group += 32) use(group < stop ? masks[group] : 0, group);
  }
  template <class Use>  // of the keys in a mask
  __device__ __forceinline__ static void each_key(u32 mask, u32 group, const Use& use) {
    for (; mask; mask &= mask - 1) use(group * 32 + __ffs(mask) - 1);
  }

  // Keep a mask of the keys from `low` on. Note how many this part takes for certain, those from `high` on, and tell all parts the pairs
  // between.
  __device__ __forceinline__ void tell(u64 low, u64 high) {
    constexpr u32 TURN = 8;  // loads ahead
    u32 above = 0, within = 0;
    auto [begin, stop] = groups();
    for (u32 group = begin; group < stop; group += TURN) {
      u32 values[TURN];
#pragma unroll
      for (u32 at = 0; at < TURN; at++) values[at] = group + at < stop ? orders[(group + at) * 32 + lane_of()] : 0;
#pragma unroll
      for (u32 at = 0; at < TURN; at++) {
        u64 pair = pair_of(values[at], (group + at) * 32 + lane_of());
        u32 mask = __ballot_sync(EVERY, pair >= low), sure = __popc(__ballot_sync(EVERY, pair >= high));
        if (lane_of() == 0 && group + at < stop) masks[group + at] = mask;
        above += sure, within += __popc(mask) - sure;
      }
    }
    if (lane_of() == 0) {
      atomicAdd(&work.num, above);
      if (within) work.warps[warp_of()] = atomicAdd(&told()[BINS + 1], within);
    }
    __syncwarp();
    if (within)
      each_mask([&](u32 mask, u32 group) {
        each_key(mask, group, [&](u32 at) {
          u64 pair = pair_of(orders[at], at);
          if (pair < high) c.pairs[(u64)query * MOST + atomicAdd(&work.warps[warp_of()], 1u)] = pair;
        });
      });
    meet_all();
    if (threadIdx.x == 0) c.above[query * gridDim.x + part] = work.num;
  }

  // Once all parts have told, take what is theirs: the keys from the cut on, ascending, behind those that the parts before it take.
  __device__ __forceinline__ void take(const Sought& sought) {
    arrived = sought.arrived;
    u32 taken = min(sought.total, c.topk), inside = sought.inside, before = 0, mine = 0;
    await_parts();
    for (u32 at = threadIdx.x; at < inside; at += THREADS) work.near[at] = fresh(&c.pairs[(u64)query * MOST + at]);
    for (u32 at = threadIdx.x; at < part; at += THREADS) before += fresh(&c.above[query * gridDim.x + at]);
    if (threadIdx.x == 0) work.num = 0;
    u64 cut = SELECTABLE;
    if (inside > 0) {
      cut = nth_largest(sought.low, sought.high, sought.want, inside, inside, work);
      for (u32 at = threadIdx.x; at < inside; at += THREADS) before += work.near[at] >= cut && ~(u32)work.near[at] < first;
    }
    each_mask([&](u32 mask, u32 group) {
      u32 kept = mask;
      if (inside > 0)
        each_key(mask, group, [&](u32 at) {
          if (pair_of(orders[at], at) < cut) kept ^= 1u << at % 32;
        });
      if (kept != mask) masks[group] = kept;
      mine += __popc(kept);
    });
    mine = __reduce_add_sync(EVERY, mine), before = __reduce_add_sync(EVERY, before);
    if (lane_of() == 0) work.warps[warp_of()] = mine, work.befores[warp_of()] = before;
    meet_all();
    u32 to = 0;
    for (u32 warp = 0; warp < GROUPS * WARPS; warp++) to += work.befores[warp] + (warp < warp_of() ? work.warps[warp] : 0);
    each_mask([&](u32 mask, u32 group) {
      u32 upto = sum_upto(__popc(mask));
      u64 place = (u64)query * c.topk + to + upto - __popc(mask);
      each_key(mask, group, [&](u32 at) {
        c.indices[place] = first + at;
        if (c.beside) c.beside[place] = score_of(orders[at]);
        place++;
      });
      to += __shfl_sync(EVERY, upto, 31);
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
