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
    find_bin(want, THREADS, work);
    low += (u64)work.bin << shift, high = min(high, low + ((u64)1 << shift) - 1);
    want -= work.above, inside = work.inside;
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
    return find_bin(want, BINS, work);
  }

  // Find where the cut is and tell the others what this part has there. Only where a bin holds too many is anybody waited for once all are
  // scored.
  __device__ __forceinline__ void seek() {
    await_parts();
    u32 total = find_told_bin(c.topk), want = 0, inside = 0;
    if (total > c.topk) {
      want = c.topk - work.above;
      bin = work.bin, inside = work.inside;
      while (inside > MOST) {
        divide();
        find_told_bin(want);
        u32 width = min(shift, 11u);
        prefix = shift == 64 ? work.bin : prefix << width | work.bin;
        shift -= width, want -= work.above, inside = work.inside;
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
