// The largest of a row's pairs (score, key), by one thread block.
//
// A pair is one number, so that no two are equal and a tie is a comparison like any other: the score in the high half, in an order of its own,
// and the key's complement in the low half. No score here is NaN or -inf. What a thread has of the pairs it tells by a function `each`, which
// calls its argument for each.
#pragma once

#include <device.cuh>  // by angles, so that the tests can put their own in its place

constexpr u32 BINS = 1024;
constexpr u32 NEAR = 128;  // pairs that are compared with one another
constexpr u32 MAX_WARPS = 32;

struct Workspace {
  u32 warps[2][MAX_WARPS];
  u32 bin, above, inside, num_near;
  u64 cut;
  u64 spare;  // so that what follows begins at a multiple of 16 bytes
  u64 near[NEAR];
  u32 bins[BINS];
};

__device__ __forceinline__ u32 order_of(float score) {
  u32 bits = __float_as_uint(score + 0.0f);  // -0.0 becomes 0.0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }
__device__ __forceinline__ u64 pair_of(float score, u32 key) { return (u64)order_of(score) << 32 | ~key; }
__device__ __forceinline__ u32 key_of(u64 pair) { return ~(u32)pair; }

// The sum of the values of threads before this one, and of all. `warps` may be used again after a further barrier.
__device__ __forceinline__ u32 scan(u32 value, u32* warps, u32& total) {
  u32 upto = value;
  for (u32 step = 1; step < 32; step *= 2) {
    u32 other = __shfl_up_sync(EVERY, upto, step);
    if (lane_of() >= step) upto += other;
  }
  if (lane_of() == 31) warps[warp_of()] = upto;
  __syncthreads();
  u32 count = lane_of() < blockDim.x / 32 ? warps[lane_of()] : 0;
  u32 before = __reduce_add_sync(EVERY, lane_of() < warp_of() ? count : 0);
  total = __reduce_add_sync(EVERY, count);
  return before + upto - value;
}

// What lies between scores in the order. `low` is a complement, so that 0 is neutral for both.
struct Range {
  u32 high = 0, low = 0;
  __device__ __forceinline__ void add(u64 pair) {
    high = max(high, (u32)(pair >> 32));
    low = max(low, ~(u32)(pair >> 32));
  }
};

// Of each thread's range: the one over all. `warps` may be used again after a further barrier.
__device__ __forceinline__ Range over_all(Range range, u32 (*warps)[MAX_WARPS]) {
  range.high = __reduce_max_sync(EVERY, range.high), range.low = __reduce_max_sync(EVERY, range.low);
  if (lane_of() == 0) warps[0][warp_of()] = range.high, warps[1][warp_of()] = range.low;
  __syncthreads();
  bool there = lane_of() < blockDim.x / 32;
  range.high = __reduce_max_sync(EVERY, there ? warps[0][lane_of()] : 0);
  range.low = __reduce_max_sync(EVERY, there ? warps[1][lane_of()] : 0);
  return range;
}

__device__ __forceinline__ void clear_bins(Workspace& work) {
  for (u32 at = threadIdx.x; at < BINS; at += blockDim.x) work.bins[at] = 0;
  if (threadIdx.x == 0) work.num_near = 0;
}

// Which bin the `want`-th largest lies in (work.bin), how many lie in those above (work.above), and how many in it (work.inside).
// Begins and ends at a barrier.
__device__ __forceinline__ void find_bin(u32 want, Workspace& work) {
  u32 own = BINS / blockDim.x, last = BINS - 1 - threadIdx.x * own, sum = 0, total;
  for (u32 at = 0; at < own; at++) sum += work.bins[last - at];
  u32 above = scan(sum, work.warps[0], total);
  if (above < want && want <= above + sum) {
    u32 bin = last, inside;
    while (above + (inside = work.bins[bin]) < want) above += inside, bin--;
    work.bin = bin, work.above = above, work.inside = inside;
  }
  __syncthreads();
}

// The `want`-th largest of the few pairs in work.near, each compared with all. Begins and ends at a barrier.
__device__ __forceinline__ u64 nth_near(u32 want, Workspace& work) {
  u32 num = work.inside;
  for (u32 at = threadIdx.x; at < num; at += blockDim.x) {
    u64 pair = work.near[at];
    u32 rank = 0;
#pragma unroll 4
    for (u32 other = 0; other < num; other++) rank += work.near[other] >= pair;
    if (rank == want) work.cut = pair;
  }
  __syncthreads();
  return work.cut;
}

// Equal parts of what lies between two numbers: a larger number is never in a lower one.
struct Scale {
  float from, factor;
  __device__ __forceinline__ Scale(float low, float high) : from(low), factor((BINS - 1) / (high - low)) {}
  // Of infinity less infinity, or times 0, which is NaN, the first.
  __device__ __forceinline__ u32 bin(float number) const { return (u32)fminf(fmaxf((number - from) * factor, 0.0f), BINS - 1); }
};

// The `want`-th largest of all threads' pairs, of which there are as many, in every thread; `range` is what a thread's own lie between.
// Begins and ends at a barrier.
//
// A histogram between the smallest and the largest score gives the bin of the one sought. Where that holds more pairs than can be compared
// with one another, the pairs in it are cut in bins as numbers until one does not; since no two are equal, that comes to an end.
template <class Each>
__device__ __forceinline__ u64 nth_largest(const Each& each, Range range, u32 want, Workspace& work) {
  clear_bins(work);
  range = over_all(range, work.warps);
  Scale scale(number_of(~range.low), number_of(range.high));
  each([&](u64 pair) { atomicAdd(&work.bins[scale.bin(number_of((u32)(pair >> 32)))], 1u); });
  __syncthreads();
  find_bin(want, work);
  u32 bin = work.bin;
  want -= work.above;
  if (work.inside <= NEAR) {
    each([&](u64 pair) {
      if (scale.bin(number_of((u32)(pair >> 32))) == bin) work.near[atomicAdd(&work.num_near, 1u)] = pair;
    });
    __syncthreads();
    return nth_near(want, work);
  }

  range = Range();
  each([&](u64 pair) {
    if (scale.bin(number_of((u32)(pair >> 32))) == bin) range.add(pair);
  });
  range = over_all(range, work.warps);
  u64 first = (u64)~range.low << 32, span = ((u64)range.high << 32 | 0xffffffffu) - first;
  while (true) {
    clear_bins(work);
    __syncthreads();
    int shift = max(64 - 10 - __clzll(span), 0);  // 10 bits for 1024 bins
    each([&](u64 pair) {
      if (pair - first <= span) atomicAdd(&work.bins[(pair - first) >> shift], 1u);
    });
    __syncthreads();
    find_bin(want, work);
    u64 over = (u64)work.bin << shift;
    first += over;
    span = min(((u64)1 << shift) - 1, span - over);  // no pairs beyond the last were counted
    want -= work.above;
    if (want == work.inside) return first;  // all of them
    if (work.inside <= NEAR) break;
    __syncthreads();
  }
  each([&](u64 pair) {
    if (pair - first <= span) work.near[atomicAdd(&work.num_near, 1u)] = pair;
  });
  __syncthreads();
  return nth_near(want, work);
}
