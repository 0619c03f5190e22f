// Select from the lists that score_select's collecting fills: see ops/score_select/settle.py.
//
// A pair (score, key) is one number, so that no two are equal and a tie is a comparison like any other: the score in the high half, in an order
// of its own, and the key's complement in the low half. No score here is NaN or -inf.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

#include <common.cuh>

constexpr u32 BINS = 1024;
constexpr u32 NEAR = 128;  // pairs that are compared with one another
constexpr u32 MAX_WARPS = 32;

struct Lists {
  const u64* found;       // rows of `lists` lists of `room` pairs (score's bits << 32 | key) each, rows `found_row` apart
  const int* counts;      // [rows, lists]: how many a list was given, more than `room` where it did not hold them
  const long long* ends;  // [rows]: how many keys a row sees
  int* indices;           // [rows, topk]
  long long* lengths;     // [rows]
  float* beside;          // null, or [rows, topk]
  int* redo;              // [rows]: 1 where the lists do not hold the answer, and the selection is empty
  u32 topk, lists, room, found_row;
  u32 held;               // pairs that shared memory has room for; the others of a row are read again and again
  u32 words;              // of 32 keys each that the mask has room for; those of a row with more are looked at part after part
};

struct Workspace {
  u32 warps[2][MAX_WARPS];
  u32 bin, above, inside, num_near;
  u64 cut;
  u64 spare;  // so that what follows begins at a multiple of 16 bytes
  union {
    struct {
      u64 near[NEAR];
      u32 bins[BINS];
    };
    u32 mask[1];  // as many words as the launch makes room for, at least those of the others
  };
};

__device__ __forceinline__ u64 pair_of(u64 raw) { return (u64)order_of(__uint_as_float((u32)(raw >> 32))) << 32 | ~(u32)raw; }
__device__ __forceinline__ u32 key_of(u64 pair) { return ~(u32)pair; }

// The sum of the values of threads before this one, and of all. `warps` may be used again after a further barrier.
__device__ __forceinline__ u32 scan(u32 value, u32* warps, u32& total) {
  u32 upto = sum_upto(value);
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

// The `want`-th largest of all threads' pairs, of which there are as many, in every thread; `each` calls its argument for each of a thread's,
// and `range` is what these lie between. Begins and ends at a barrier.
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

__device__ __forceinline__ Four load_four(const u32* from, u32 num) {  // zeros behind the `num`-th
  if (num >= 4) return *(const Four*)from;
  return {from[0], num > 1 ? from[1] : 0, num > 2 ? from[2] : 0, 0};
}

// Write the keys of the pairs that are not below the cut, all before `end`, to `to`, ascending. Begins and ends at a barrier.
template <class Each>
__device__ __forceinline__ void write_keys(const Each& each, u64 cut, u32 end, u32 most, u32* to, Workspace& work) {
  u32 place = 0;
  for (u32 start = 0; start < end; start += 32 * most) {
    u32 words = min((end - start + 31) / 32, most), own = (words + 4 * blockDim.x - 1) / (4 * blockDim.x) * 4;
    for (u32 at = threadIdx.x; at < words; at += blockDim.x) work.mask[at] = 0;
    __syncthreads();
    each([&](u64 pair) {
      u32 at = key_of(pair) - start;
      if (pair >= cut && at < 32 * words) atomicOr(&work.mask[at / 32], 1u << at % 32);
    });
    __syncthreads();
    u32 first = min(threadIdx.x * own, words), last = min(first + own, words);  // multiples of 4, but for the mask's end
    u32 count = 0, total;
    for (u32 at = first; at < last; at += 4) {
      Four four = load_four(work.mask + at, last - at);
      count += __popc(four.a) + __popc(four.b) + __popc(four.c) + __popc(four.d);
    }
    u32 put = place + scan(count, work.warps[0], total);
    for (u32 at = first; at < last; at += 4) {
      Four four = load_four(work.mask + at, last - at);
      auto write = [&](u32 word, u32 key) {
        for (; word; word &= word - 1) to[put++] = key + (__ffs(word) - 1);
      };
      u32 key = start + 32 * at;
      write(four.a, key);
      write(four.b, key + 32);
      write(four.c, key + 64);
      write(four.d, key + 96);
    }
    place += total;
    __syncthreads();
  }
}

// How many of `num` places, the first of them, `holds` is true for.
template <class Holds>
__device__ __forceinline__ u32 how_many(u32 num, const Holds& holds) {
  u32 count = 0;
  for (u32 step = 1u << (31 - __clz(num)); step > 0; step /= 2)
    if (count + step <= num && holds(count + step - 1)) count += step;
  return count;
}

// A row's lists, of which each warp takes one after the other.
struct Listed {
  const u64* found;
  const u32* begins;  // where each list begins if they are put one behind the other, and the end
  u32 lists, room;

  // `use` is told where a pair stands among all, and where it lies.
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) const {
    for (u32 list = warp_of(); list < lists; list += blockDim.x / 32) {
      u32 begin = begins[list], num = begins[list + 1] - begin;
      const u64* from = found + list * room;
      for (u32 at = lane_of(); at < num; at += 32) use(begin + at, from + at);
    }
  }
  __device__ __forceinline__ u64 pair(u32 at) const {
    u32 list = how_many(lists, [&](u32 which) { return begins[which] <= at; }) - 1;
    return pair_of(found[list * room + at - begins[list]]);
  }
};

// A thread block takes the row of its number, whose lists are no more than its threads.
// Shared memory: Workspace up to the mask, `words` of that, `lists` + 1 words, rounded up to an even number, and `held` pairs. The keys taken
// stand where the pairs were, which nobody reads once a mask of all keys is made; behind them where it is made part after part.
__device__ __forceinline__ void settle_row(const Lists& rows) {
  Workspace& work = *(Workspace*)shared_memory;
  u32 topk = rows.topk, lists = rows.lists, room = rows.room, held = rows.held;
  u32* begins = work.mask + rows.words;
  u64* pairs = (u64*)(begins + (lists + 2) / 2 * 2);
  u64 row = blockIdx.x;

  u32 end = (u32)rows.ends[row], wanted = min(end, topk);
  u32 count = threadIdx.x < lists ? rows.counts[row * lists + threadIdx.x] : 0, num;
  u32 begin = scan(min(count, room), work.warps[0], num);
  bool full = __syncthreads_or(count > room);
  bool wrong = full || num < wanted;
  u32 length = wrong ? 0 : wanted;
  if (threadIdx.x == 0) rows.redo[row] = wrong, rows.lengths[row] = length;
  if (threadIdx.x < lists) begins[threadIdx.x] = begin;
  if (threadIdx.x == 0) begins[lists] = num;
  __syncthreads();
  if (length > 0) {
    Listed listed{rows.found + row * rows.found_row, begins, lists, room};
    u32* keys = (u32*)(pairs + (end <= 32 * rows.words ? 0 : held));
    u32 here = min(num, held);
    listed.each([&](u32 at, const u64* from) {
      if (at < here) copy_ahead(pairs + at, from);
    });
    commit_copies();
    await_copies<0>();
    __syncthreads();
    Range range;
    for (u32 at = threadIdx.x; at < here; at += blockDim.x) {
      u64 pair = pair_of(pairs[at]);
      pairs[at] = pair;
      range.add(pair);
    }
    for (u32 at = held + threadIdx.x; at < num; at += blockDim.x) range.add(listed.pair(at));
    auto each = [&](auto use) {
      for (u32 at = threadIdx.x; at < here; at += blockDim.x) use(pairs[at]);  // those that this thread has just written
      for (u32 at = held + threadIdx.x; at < num; at += blockDim.x) use(listed.pair(at));
    };
    u64 cut = 0;
    if (num > length) cut = nth_largest(each, range, length, work);
    write_keys(each, cut, end, rows.words, keys, work);
    for (u32 at = threadIdx.x; at < length; at += blockDim.x) rows.indices[row * topk + at] = keys[at];
    if (rows.beside != nullptr)
      listed.each([&](u32, const u64* from) {
        u64 raw = *from;
        if (pair_of(raw) < cut) return;
        u32 place = how_many(length, [&](u32 at) { return keys[at] < (u32)raw; });
        rows.beside[row * topk + place] = __uint_as_float((u32)(raw >> 32));
      });
  }
  for (u32 at = length + threadIdx.x; at < topk; at += blockDim.x) {
    rows.indices[row * topk + at] = -1;
    if (rows.beside != nullptr) rows.beside[row * topk + at] = -__int_as_float(0x7f800000);
  }
}

// As many rows at a time on a multiprocessor.
extern "C" __global__ void __launch_bounds__(1024, 1) settle_1(const Lists rows) { settle_row(rows); }
extern "C" __global__ void __launch_bounds__(1024, 2) settle_2(const Lists rows) { settle_row(rows); }
extern "C" __global__ void __launch_bounds__(512, 3) settle_3(const Lists rows) { settle_row(rows); }
