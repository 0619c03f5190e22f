// A part of step.cu: the selection of a query by its parts, from scores and bins.

// Of each thread's number: the sum of those of threads before it, and of all.
template <class Work>
__device__ __forceinline__ u32 scan(u32 value, Work& work, u32& total) {
  u32 upto = sum_upto(value);
  meet_all();  // nobody reads the last scan's any more
  if (lane_of() == 31) work.warps[warp_of()] = upto;
  meet_all();
  u32 sum = lane_of() < GROUPS * WARPS ? work.warps[lane_of()] : 0;
  total = __reduce_add_sync(EVERY, sum);
  return __reduce_add_sync(EVERY, lane_of() < warp_of() ? sum : 0) + upto - value;
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

__device__ __forceinline__ void leave_out(const Step& c, u32 query, u32 at) {
  c.indices[(u64)query * c.topk + at] = -1;
  if (c.beside) c.beside[(u64)query * c.topk + at] = __uint_as_float(0xff800000u);
}

// What a block has of a query.
struct Part {
  u32 query, part, parts, first, num;  // which of how many parts; its keys, `num` from `first` of the query's on
  Orders orders;
  u32* masks;  // of those keys that may be taken
  __device__ __forceinline__ u64 pair_of(u32 order, u32 at) const { return (u64)order << 32 | ~(first + at); }

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
};

template <u32 DIM, u32 HEADS>
struct Selecting {
  const Step& c;
  Workspace<DIM, HEADS>& work;

  __device__ __forceinline__ u32* told(const Part& part) const { return c.told + (u64)part.query * TOLD; }
  __device__ __forceinline__ u32* above(const Part& part, u32 of) const { return c.above + part.query * gridDim.x + of; }
  __device__ __forceinline__ Part part_of(const Run& run) {
    u32 behind = work.first[run.query + 1], first = run.from / run.each;
    return {
        run.query, blockIdx.x - first, (behind - 1) / run.each - first + 1, (run.at - run.from) * KEYS, (run.upto - run.at) * KEYS,
        run.orders(c, work), run.masks(c, work)};
  }
  // Calls use(part, what the block knows of its query) in a thread for each part, all of them at once. Ends where all have met.
  template <class Use>
  __device__ __forceinline__ void each_alone(const Use& use) {
    bool more = true;
    for (u32 base = 0; more; base += THREADS) {
      Run run(c, work);
      u32 number = 0;
      Part mine;
      for (; run.next(work); number++)
        if (number == base + threadIdx.x) mine = part_of(run);
      if (base + threadIdx.x < number) use(mine, work.sought[base + threadIdx.x]);
      more = base + THREADS < number;
    }
    meet_all();
  }
  // Calls use(part, what the block knows of its query, what `fetch(part, the same)` made of both) for each part, one after the other: a part
  // is fetched for before the one ahead of it is used.
  template <class Fetch, class Use>
  __device__ __forceinline__ void each_in_turn(const Fetch& fetch, const Use& use) {
    Run run(c, work);
    if (!run.next(work)) return;
    Part part = part_of(run);
    auto fetched = fetch(part, work.sought[0]);
    for (u32 number = 0; true; number++) {
      Part next = part;
      auto ahead = fetched;
      bool more = run.next(work);
      if (more) next = part_of(run), ahead = fetch(next, work.sought[number + 1]);
      use(part, work.sought[number], fetched);
      if (!more) break;
      part = next, fetched = ahead;
    }
  }

  __device__ __forceinline__ void run() {
    each_alone([&](const Part& part, Sought& sought) {
      sought.above = 0;
      await_all(&told(part)[ARRIVED], part.parts);
    });
    each_in_turn(
        [&](const Part& part, const Sought&) { return told_bins(part); },
        [&](const Part& part, Sought& sought, const Four& bins) { seek(part, sought, bins); });
    meet_all();
    each_alone([&](const Part& part, const Sought& sought) {
      *above(part, part.part) = sought.above;
      arrive_for_all(&told(part)[ARRIVED]);
      await_all(&told(part)[ARRIVED], part.parts * sought.times);
      if (atomicAdd(&told(part)[LEFT], 1u) + 1 == part.parts) told(part)[ARRIVED] = told(part)[PAIRS] = told(part)[LEFT] = 0;
    });
    each_in_turn(
        [&](const Part& part, const Sought& sought) { return fetch(part, sought); },
        [&](const Part& part, const Sought& sought, const Fetched& fetched) { take(part, sought, fetched); });
  }

  // Four bins of all parts for each thread, the highest for the first.
  __device__ __forceinline__ Four told_bins(const Part& part) const { return fresh((const Four*)told(part) + (THREADS - 1 - threadIdx.x)); }
  // `seek_bin` in them. Ends where all have met.
  __device__ __forceinline__ u32 find_told_bin(const Four& bins, u32 want) {
    static_assert(BINS == 4 * THREADS);
    u32 counts[4] = {bins.d, bins.c, bins.b, bins.a}, sum = bins.a + bins.b + bins.c + bins.d, total, above = scan(sum, work, total);
    if (above < want && want <= above + sum) {
      u32 at = 0;
#pragma unroll
      for (u32 last = 0; last < 3; last++)
        if (at == last && above + counts[last] < want) above += counts[last], at++;
      work.bin = BINS - 1 - 4 * threadIdx.x - at, work.above = above, work.inside = at == 0 ? bins.d : at == 1 ? bins.c : at == 2 ? bins.b : bins.a;
    }
    meet_all();
    return total;
  }

  // Bins of the pairs from `low` on and below `high`, when they are too many to be told to all. How far they are shifted for that.
  __device__ __forceinline__ u32 divide(const Part& part, u64 low, u64 high, u32& times) {
    auto meet_parts = [&] {
      meet_all();
      times++;
      if (threadIdx.x == 0) arrive_for_all(&told(part)[ARRIVED]), await_all(&told(part)[ARRIVED], part.parts * times);
      meet_all();
    };
    u32 shift = shift_of(low, high, 11);
    static_assert(BINS == 1 << 11);
    meet_parts();
    for (u32 at = threadIdx.x; at < BINS; at += THREADS) {
      work.bins[at] = 0;
      if (part.part == 0) told(part)[at] = 0;
    }
    meet_parts();
    for (u32 at = threadIdx.x; at < part.num; at += THREADS) {
      u64 pair = part.pair_of(part.orders[at], at);
      if (pair >= low && pair < high) atomicAdd(&work.bins[(pair - low) >> shift], 1u);
    }
    meet_all();
    tell_bins(told(part), work);
    meet_parts();
    return shift;
  }

  // Find where the cut is and tell the others what this part has there. Only where a bin holds too many is anybody waited for once all are
  // scored.
  __device__ __forceinline__ void seek(const Part& part, Sought& sought, const Four& bins) {
    u32 total = find_told_bin(bins, c.topk), want = 0, inside = 0, times = 1;
    u64 low = SELECTABLE, high = SELECTABLE;
    if (total > c.topk) {
      want = c.topk - work.above, inside = work.inside;
      low = (u64)first_order(work.bin) << 32, high = work.bin + 1 < BINS ? (u64)first_order(work.bin + 1) << 32 : ~(u64)0;
      while (inside > MOST) {
        u32 shift = divide(part, low, high, times);
        find_told_bin(told_bins(part), want);
        low += (u64)work.bin << shift, high = min(high, low + ((u64)1 << shift));
        want -= work.above, inside = work.inside;
      }
    }
    if (threadIdx.x == 0) {
      sought.taken = min(total, c.topk), sought.want = want, sought.inside = inside, sought.times = times + 1;
      sought.low = low, sought.high = high;
    }
    tell(part, sought, low, high);
  }

  // Keep a mask of the keys from `low` on. Note how many this part takes for certain, those from `high` on, and tell all parts the pairs
  // between.
  __device__ __forceinline__ void tell(const Part& part, Sought& sought, u64 low, u64 high) {
    constexpr u32 TURN = 16;  // loads ahead
    u32 above = 0, within = 0;
    auto [begin, stop] = part.groups();
    auto look = [&](u32 group, bool reach, bool sure) {
      u32 mask = __ballot_sync(EVERY, reach);
      if (lane_of() == 0) part.masks[group] = mask;
      above += sure, within += reach && !sure;
    };
    // Mostly an order tells by itself on which side of both a pair is.
    bool plain = (u32)low == 0 && ((u32)high == 0 || high == ~(u64)0);
    auto look_at = [&](u32 order, u32 group) {
      u64 pair = part.pair_of(order, group * 32 + lane_of());
      look(group, pair >= low, pair >= high);
    };
    auto look_through = [&](const u32* orders, u32 from, u32 to) {
      u32 group = from, least = low >> 32, sure = high >> 32;
      for (; plain && group + TURN <= to; group += TURN) {
        u32 values[TURN];
#pragma unroll
        for (u32 at = 0; at < TURN; at++) values[at] = orders[(group + at) * 32 + lane_of()];
#pragma unroll
        for (u32 at = 0; at < TURN; at++) look(group + at, values[at] >= least, values[at] >= sure);
      }
      for (; group < to; group++) look_at(orders[group * 32 + lane_of()], group);
    };
    u32 near = min(max(part.orders.room / 32, begin), stop);  // room is whole tiles
    look_through(part.orders.near, begin, near);
    look_through(part.orders.far, near, stop);
    above = __reduce_add_sync(EVERY, above), within = __reduce_add_sync(EVERY, within);
    if (lane_of() == 0) {
      atomicAdd(&sought.above, above);
      if (within) work.befores[warp_of()] = atomicAdd(&told(part)[PAIRS], within);
    }
    __syncwarp();
    if (within)
      part.each_mask([&](u32 mask, u32 group) {
        part.each_key(mask, group, [&](u32 at) {
          u64 pair = part.pair_of(part.orders[at], at);
          if (pair < high) c.pairs[(u64)part.query * MOST + atomicAdd(&work.befores[warp_of()], 1u)] = pair;
        });
      });
  }

  // Of each thread: one of the pairs that were told, and how many one of the parts before this one takes for certain.
  struct Fetched {
    u64 pair = 0;
    u32 above = 0;
  };
  __device__ __forceinline__ Fetched fetch(const Part& part, const Sought& sought) const {
    Fetched fetched;
    if (threadIdx.x < sought.inside) fetched.pair = fresh(&c.pairs[(u64)part.query * MOST + threadIdx.x]);
    if (threadIdx.x < part.part) fetched.above = fresh(above(part, threadIdx.x));
    return fetched;
  }

  // Take what is this part's: the keys from the cut on, ascending, behind those that the parts before it take.
  __device__ __forceinline__ void take(const Part& part, const Sought& sought, const Fetched& fetched) {
    u32 inside = sought.inside, before = fetched.above, mine = 0;
    u64 cut = SELECTABLE;
    meet_all();
    if (inside > 0) {
      if (threadIdx.x == 0) work.num = 0;
      if (threadIdx.x < inside) work.near[threadIdx.x] = fetched.pair;
      for (u32 at = threadIdx.x + THREADS; at < inside; at += THREADS) work.near[at] = fresh(&c.pairs[(u64)part.query * MOST + at]);
      cut = nth_largest(sought.low, sought.high, sought.want, inside, inside, work);
      for (u32 at = threadIdx.x; at < inside; at += THREADS) before += work.near[at] >= cut && ~(u32)work.near[at] < part.first;
    }
    part.each_mask([&](u32 mask, u32 group) {
      u32 kept = mask;
      if (inside > 0)
        part.each_key(mask, group, [&](u32 at) {
          if (part.pair_of(part.orders[at], at) < cut) kept ^= 1u << at % 32;
        });
      if (kept != mask) part.masks[group] = kept;
      mine += __popc(kept);
    });
    mine = __reduce_add_sync(EVERY, mine), before = __reduce_add_sync(EVERY, before);
    if (lane_of() == 0) work.warps[warp_of()] = mine, work.befores[warp_of()] = before;
    meet_all();
    bool there = lane_of() < GROUPS * WARPS;
    u32 to = __reduce_add_sync(EVERY, there ? work.befores[lane_of()] + (lane_of() < warp_of() ? work.warps[lane_of()] : 0) : 0);
    part.each_mask([&](u32 mask, u32 group) {
      u32 upto = sum_upto(__popc(mask));
      u64 place = (u64)part.query * c.topk + to + upto - __popc(mask);
      part.each_key(mask, group, [&](u32 at) {
        c.indices[place] = part.first + at;
        if (c.beside) c.beside[place] = score_of(part.orders[at]);
        place++;
      });
      to += __shfl_sync(EVERY, upto, 31);
    });
    if (part.part + 1 < part.parts) return;
    ((Four*)told(part))[threadIdx.x] = {0, 0, 0, 0};  // all parts have read them
    if (threadIdx.x == 0) c.taken[part.query] = sought.taken;
    for (u32 at = sought.taken + threadIdx.x; at < c.topk; at += THREADS) leave_out(c, part.query, at);
  }
};
