// Sums of FP8 keys in position order, and the means of blocks: see ops/pool_keys/walks.py.
//
// A thread block walks one block of keys: a chain of additions in fp32 for each dim, whose order is the result's. Half of its threads add, a dim
// each; the others bring keys to shared memory, parts ahead of the walk, and turn them into fp32, so that the chain is nothing but additions.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

constexpr u32 PART = 32;  // keys that are copied together
constexpr u32 PARTS = 8;  // in shared memory: one that is turned into fp32, the others under way
constexpr u32 TURN = 16;  // keys that a thread reads ahead

struct Rows {  // struct Rows of cache/device.py, of keys in pages
  const unsigned char* values;
  const float* scales;
  const int* table;
  u32 table_width, num_pages, page_size, value_stride, scale_stride, scale_start;
};

// A page of a request's, by its place in the table; -1 where there is none.
__device__ __forceinline__ int page_of(const Rows& rows, u64 request, u64 column) {
  int page = column < rows.table_width ? rows.table[request * rows.table_width + column] : -1;
  return (u32)page < rows.num_pages ? page : -1;
}

struct Pool {
  Rows keys;
  Rows means;  // with page_size 0: rows one after the other, table_width of them a request
  const long long *olds, *news;  // [requests]: lengths before and after
  u32 block_size, programs;      // thread blocks for a request
};

struct Own {
  Rows keys;
  const long long *positions, *requests, *lengths;
  float* sums;  // [queries, dims]
  u32 num_queries, num_requests, block_size;
};

template <u32 DIM>
struct Part {
  alignas(16) unsigned char values[PART][DIM];
  alignas(16) float scales[PART];
};

template <u32 DIM>
struct Workspace {
  alignas(16) float terms[2][PART][DIM];  // keys times their scales: exact, since those are powers of two
  u32 warps[DIM / 32];
  u32 run;
  Part<DIM> parts[1];  // PARTS, or as many as a block of keys has; behind them the pages that it lies in
};

// A thread's terms of the keys from `at` on.
template <u32 DIM>
struct Turn {
  float terms[TURN];
  __device__ __forceinline__ Turn(const float (*part)[DIM], u32 at) {
#pragma unroll
    for (u32 key = 0; key < TURN; key++) terms[key] = part[at + key][threadIdx.x];
  }
};

// Whether a thread adds, and which of its half of the threads it is.
template <u32 DIM>
__device__ __forceinline__ bool adds() {
  return threadIdx.x < DIM;
}
template <u32 DIM>
__device__ __forceinline__ u32 of_half() {
  return threadIdx.x % DIM;
}

// Where the keys of a walk lie: the first is `within` a page, whose size is 1 << shift, the first of `pages`.
struct Place {
  u32 shift, within;
  int* pages;
};

// Begin to copy a part of the keys, of `count` in all; zeros where there is no page or no key. Without a branch, so that loads of pages do not
// wait for one another.
template <u32 DIM>
__device__ __forceinline__ void fetch(const Rows& rows, Workspace<DIM>& work, Place place, u32 number, u32 count) {
  Part<DIM>& part = work.parts[number % PARTS];
  constexpr u32 PIECES = DIM / 16;  // of a key, of 16 bytes
  u32 first = number * PART, mask = (1u << place.shift) - 1, thread = of_half<DIM>();
  auto copy = [&](void* to, const void* from, u64 stride, u32 key, u32 start, u32 each) {
    u32 row = place.within + first + key;
    int page = place.pages[first + key < count ? row >> place.shift : 0];
    u64 offset = (u64)max(page, 0) * stride + start + (row & mask) * each;
    copy_or_zero((Four*)to, (const Four*)((const unsigned char*)from + offset), page >= 0 && first + key < count);
  };
  if (first < count) {
#pragma unroll
    for (u32 turn = 0; turn < PART * PIECES / DIM; turn++) {
      u32 piece = turn * DIM + thread, key = piece / PIECES, at = piece % PIECES * 16;
      copy(part.values[key] + at, rows.values, rows.value_stride, key, at, DIM);
    }
    if (thread < PART / 4) copy(part.scales + thread * 4, rows.scales, 4 * (u64)rows.scale_stride, thread * 4, 4 * rows.scale_start, 4);
  }
  commit_copies();
}

// Turn a part of the keys into terms. Threads begin at different quarters of their pieces, so that they write to different banks.
template <u32 DIM>
__device__ __forceinline__ void convert(const Part<DIM>& part, float (*terms)[DIM]) {
  constexpr u32 PIECES = DIM / 16;
#pragma unroll
  for (u32 turn = 0; turn < PART * PIECES / DIM; turn++) {
    u32 piece = turn * DIM + of_half<DIM>(), key = piece / PIECES, at = piece % PIECES * 16, ahead = piece / 2 % 4;
    float scale = part.scales[key];
    Four four = *(const Four*)(part.values[key] + at);
    if (ahead & 1) four = {four.b, four.c, four.d, four.a};
    if (ahead & 2) four = {four.c, four.d, four.a, four.b};
    u32 words[4] = {four.a, four.b, four.c, four.d};
#pragma unroll
    for (u32 word = 0; word < 4; word++) {
      Two low = from_e4m3(words[word]), high = from_e4m3(words[word] >> 16);
      *(Floats*)&terms[key][at + (word + ahead) % 4 * 4] = {low.a * scale, low.b * scale, high.a * scale, high.b * scale};
    }
  }
}

// The sum of keys `start .. start + count - 1` of a request in this thread's dim, for those that add. `use` is told of each key's number and the
// sum up to it, up to TURN of them at a time. `start` is a multiple of 16, a page's size too, and a power of two. Once a thread block.
template <u32 DIM, class Use>
__device__ __forceinline__ float walk(const Rows& rows, u64 request, u32 start, u32 count, Workspace<DIM>& work, const Use& use) {
  u32 parts = (count + PART - 1) / PART;
  Place place{(u32)__ffs(rows.page_size) - 1, start & (rows.page_size - 1), (int*)(work.parts + min(parts, PARTS))};
  u32 column = start >> place.shift;
  for (u32 at = threadIdx.x; at << place.shift < place.within + count; at += 2 * DIM) place.pages[at] = page_of(rows, request, column + at);
  __syncthreads();
  float sum = 0.0f;
  if (!adds<DIM>())
    for (u32 number = 0; number < PARTS - 1; number++) fetch(rows, work, place, number, count);
  // One part is added while the next is turned into terms.
  for (u32 number = 0; number <= parts; number++) {
    if (!adds<DIM>()) await_copies<PARTS - 2>();
    __syncthreads();
    if (!adds<DIM>()) {
      fetch(rows, work, place, number + PARTS - 1, count);
      if (number < parts) convert(work.parts[number % PARTS], work.terms[number % 2]);
    } else if (number > 0) {
      const float(*part)[DIM] = work.terms[(number - 1) % 2];
      u32 first = (number - 1) * PART, num = min(count - first, PART), at = 0;
      Turn<DIM> turn(part, 0);
      for (; at + TURN <= num; at += TURN) {
        Turn<DIM> next(part, min(at + TURN, PART - TURN));  // ahead of the chain
        float sums[TURN];
#pragma unroll
        for (u32 key = 0; key < TURN; key++) sums[key] = sum = sum + turn.terms[key];
        use(first + at, sums, TURN);
        turn = next;
      }
      for (; at < num; at++) {
        sum += part[at][threadIdx.x];
        use(first + at, &sum, 1);
      }
    }
  }
  return sum;
}

// Store a mean in FP8 as cache.fp8.quantize_fp8 does, to the bit: the scale is a power of two, from the bits of the largest magnitude. A mean
// that is not finite is stored as NaN under scale 1.
template <u32 DIM>
__device__ __forceinline__ void store_mean(float mean, unsigned char* values, float* scale, Workspace<DIM>& work) {
  u32 top = __reduce_max_sync(EVERY, __float_as_uint(mean) & 0x7fffffffu);
  if (adds<DIM>() && lane_of() == 0) work.warps[warp_of()] = top;
  __syncthreads();
  if (!adds<DIM>()) return;
  for (u32 warp = 0; warp < DIM / 32; warp++) top = max(top, work.warps[warp]);
  bool finite = top < 0x7f800000u;
  top = max(top, 0x38d1b717u);  // 1e-4
  // The largest over 448 = 1.75 * 2**8, rounded up to a power of two.
  u32 exponent = finite ? (top >> 23) - 8 + ((top & 0x7fffffu) > 0x600000u) : 127;
  float inverse = __uint_as_float((254 - exponent) << 23);
  values[threadIdx.x] = finite ? to_e4m3(mean * inverse) : 0x7f;
  if (threadIdx.x == 0) *scale = __uint_as_float(exponent << 23);
}

// A thread block takes one block of a request's keys that became full.
template <u32 DIM>
__device__ __forceinline__ void pool_block(const Pool& pool) {
  Workspace<DIM>& work = *(Workspace<DIM>*)shared_memory;
  const Rows& means = pool.means;
  u64 request = blockIdx.x / pool.programs;
  u64 block = (u64)max(pool.olds[request], 0ll) / pool.block_size + blockIdx.x % pool.programs;
  if (pool.news[request] < 0 || block >= (u64)pool.news[request] / pool.block_size) return;
  u64 value = 0, scale = 0;
  bool there;
  if (means.page_size == 0) {
    there = block < means.table_width;
    value = (request * means.table_width + block) * DIM, scale = request * means.table_width + block;
  } else {
    int page = page_of(means, request, block / means.page_size);
    there = page >= 0;
    value = (u64)page * means.value_stride + block % means.page_size * DIM;
    scale = (u64)page * means.scale_stride + means.scale_start + block % means.page_size;
  }
  if (!there) return;
  float sum = walk(pool.keys, request, (u32)block * pool.block_size, pool.block_size, work, [](u32, const float*, u32) {});
  store_mean(sum / (float)pool.block_size, (unsigned char*)means.values + value, (float*)means.scales + scale, work);
}

struct Sight {
  long long request, last, offset;  // offset: of the last key seen in its block; -1 where the block is seen whole, or nothing is
};
__device__ __forceinline__ Sight sight(const Own& own, u64 query) {
  Sight seen{own.requests[query], -1, -1};
  if (seen.request < 0 || seen.request >= own.num_requests) return {-1, -1, -1};
  seen.last = max(min(own.positions[query], own.lengths[seen.request] - 1), -1ll);
  if (seen.last >= 0 && (seen.last + 1) % own.block_size != 0) seen.offset = seen.last % own.block_size;
  return seen;
}

// The sum of a query's own block up to the query; nothing is written where the query completes the block. Queries that stand behind one
// another in a block, as in prefill, are served by one walk, by the first one's thread block.
template <u32 DIM>
__device__ __forceinline__ void own_block(const Own& own) {
  Workspace<DIM>& work = *(Workspace<DIM>*)shared_memory;
  constexpr u32 LOOKS = 4;  // of each thread at once
  u64 query = blockIdx.x;
  Sight seen = sight(own, query);
  if (seen.offset < 0) return;
  long long length = own.lengths[seen.request];
  auto follows = [&](u64 other, long long steps) {  // whether that query stands so many keys behind
    return (own.requests[other] == seen.request) & (min(own.positions[other], length - 1) == seen.last + steps);
  };
  if (query > 0 && seen.offset > 0 && follows(query - 1, -1)) return;
  u32 most = (u32)min((u64)own.num_queries - query, (u64)own.block_size - 1 - seen.offset), run = 0;
  while (true) {
    if (threadIdx.x == 0) work.run = most;
    __syncthreads();
    u32 stop = most;
    for (u32 look = LOOKS; look-- > 0;) {
      u32 step = run + look * 2 * DIM + threadIdx.x;
      if (step < most && !follows(query + step, step)) stop = step;
    }
    atomicMin(&work.run, stop);
    __syncthreads();
    run += LOOKS * 2 * DIM;
    if (work.run < run || run >= most) break;
    __syncthreads();
  }
  run = work.run;
  u32 offset = (u32)seen.offset;
  float* to = own.sums + query * DIM + of_half<DIM>();
  auto use = [&](u32 key, const float* sums, u32 num) {
    float* from = to + ((long long)key - offset) * DIM;
    if (key >= offset) {  // without a branch for each
#pragma unroll
      for (u32 at = 0; at < TURN; at++)
        if (at < num) from[at * DIM] = sums[at];
    } else {
#pragma unroll
      for (u32 at = 0; at < TURN; at++)
        if (at < num && key + at >= offset) from[at * DIM] = sums[at];
    }
  };
  walk(own.keys, seen.request, (u32)(seen.last - offset), offset + run, work, use);
}

extern "C" __global__ void __launch_bounds__(256) pool_128(const Pool pool) { pool_block<128>(pool); }
extern "C" __global__ void __launch_bounds__(128) pool_64(const Pool pool) { pool_block<64>(pool); }
extern "C" __global__ void __launch_bounds__(256) own_128(const Own own) { own_block<128>(own); }
extern "C" __global__ void __launch_bounds__(128) own_64(const Own own) { own_block<64>(own); }
