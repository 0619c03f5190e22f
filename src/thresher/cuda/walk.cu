// Sums of FP8 keys in position order, and the means of blocks: see ops/pool_keys/walks.py.
//
// A thread block of as many threads as a key has dims walks one block of keys, a dim a thread: a chain of additions in fp32, whose order is
// the result's. Keys come through shared memory, a part of them ahead of the walk, for from device memory each took ten times as long.
#include <device.cuh>  // by angles, so that the tests can put their own in its place

#include <common.cuh>

constexpr u32 PART = 128;  // keys that are copied together
constexpr u32 PARTS = 3;   // in shared memory: one that is walked, two under way
constexpr u32 TURN = 16;   // keys that a thread reads ahead

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
  long long* olds;        // [requests]: lengths before, or so many blocks' tokens of them
  const long long* news;  // and after
  long long* counts;      // with tickets: told how many blocks are full where that changed, as `olds` is told the new lengths
  u32* tickets;           // null, or zeros before and after
  u32 block_size, programs;  // thread blocks for a request
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
  Part<DIM> parts[PARTS];
  u32 warps[DIM / 32];
  u32 run;
  int pages[1];  // of all that a block of keys lies in
};

// A thread's values of the keys from `at` on, and their scales. A product of both is exact, since scales are powers of two.
template <u32 DIM>
struct Turn {
  float values[TURN], scales[TURN];
  __device__ __forceinline__ Turn(const Part<DIM>& part, u32 at) {
#pragma unroll
    for (u32 key = 0; key < TURN; key += 2) {
      Two two = from_e4m3(part.values[at + key][threadIdx.x] | part.values[at + key + 1][threadIdx.x] << 8);
      values[key] = two.a, values[key + 1] = two.b;
    }
#pragma unroll
    for (u32 key = 0; key < TURN; key += 4) {
      Four four = *(const Four*)(part.scales + at + key);
      scales[key] = __uint_as_float(four.a), scales[key + 1] = __uint_as_float(four.b);
      scales[key + 2] = __uint_as_float(four.c), scales[key + 3] = __uint_as_float(four.d);
    }
  }
};

// Where the keys of a walk lie: the first is `within` a page, whose size is 1 << shift, the first of work.pages.
struct Place {
  u32 shift, within;
};

// Begin to copy the keys from `first` of the walk on, of `count` in all; zeros where there is no page or no key. Without a branch, so that
// loads of pages do not wait for one another.
template <u32 DIM>
__device__ __forceinline__ void fetch(const Rows& rows, Workspace<DIM>& work, Place place, u32 first, u32 count) {
  Part<DIM>& part = work.parts[first / PART % PARTS];
  constexpr u32 PIECES = DIM / 16;  // of a key, of 16 bytes
  u32 mask = (1u << place.shift) - 1;
  auto copy = [&](void* to, const void* from, u64 stride, u32 key, u32 start, u32 each) {
    u32 row = place.within + first + key;
    int page = work.pages[first + key < count ? row >> place.shift : 0];
    u64 offset = (u64)max(page, 0) * stride + start + (row & mask) * each;
    copy_or_zero((Four*)to, (const Four*)((const unsigned char*)from + offset), page >= 0 && first + key < count);
  };
#pragma unroll
  for (u32 turn = 0; turn < PART * PIECES / DIM; turn++) {
    u32 piece = turn * DIM + threadIdx.x, key = piece / PIECES, at = piece % PIECES * 16;
    copy(part.values[key] + at, rows.values, rows.value_stride, key, at, DIM);
  }
  if (threadIdx.x < PART / 4)
    copy(part.scales + threadIdx.x * 4, rows.scales, 4 * (u64)rows.scale_stride, threadIdx.x * 4, 4 * rows.scale_start, 4);
  commit_copies();
}

// The sum of keys `start .. start + count - 1` of a request in this thread's dim. `use` is told of each key's number and the sum up to it, up to
// TURN of them at a time. `start` is a multiple of 16, a page's size too, and a power of two. Begins at a barrier.
template <u32 DIM, class Use>
__device__ __forceinline__ float walk(const Rows& rows, u64 request, u32 start, u32 count, Workspace<DIM>& work, const Use& use) {
  Place place{(u32)__ffs(rows.page_size) - 1, start & (rows.page_size - 1)};
  u32 column = start >> place.shift;
  for (u32 at = threadIdx.x; at << place.shift < place.within + count; at += DIM) work.pages[at] = page_of(rows, request, column + at);
  __syncthreads();
  fetch(rows, work, place, 0, count);
  fetch(rows, work, place, PART, count);
  float sum = 0.0f;
  for (u32 first = 0; first < count; first += PART) {
    await_copies<1>();
    __syncthreads();
    fetch(rows, work, place, first + 2 * PART, count);
    const Part<DIM>& part = work.parts[first / PART % PARTS];
    u32 num = min(count - first, PART), at = 0;
    Turn<DIM> turn(part, 0);
    for (; at + TURN <= num; at += TURN) {
      Turn<DIM> next(part, min(at + TURN, PART - TURN));  // ahead of the chain
      float sums[TURN];
#pragma unroll
      for (u32 key = 0; key < TURN; key++) sums[key] = sum = fmaf(turn.values[key], turn.scales[key], sum);
      use(first + at, sums, TURN);
      turn = next;
    }
    for (; at < num; at++) {
      sum = fmaf(from_e4m3(part.values[at][threadIdx.x]).a, part.scales[at], sum);
      use(first + at, &sum, 1);
    }
  }
  __syncthreads();
  return sum;
}

template <u32 DIM>
__device__ __forceinline__ void pool_block(const Pool& pool, u64 request, u64 block) {
  Workspace<DIM>& work = *(Workspace<DIM>*)shared_memory;
  const Rows& means = pool.means;
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
  store_mean<DIM>(sum / (float)pool.block_size, (unsigned char*)means.values + value, (float*)means.scales + scale, work.warps, [] { __syncthreads(); });
}

// A thread block takes every so-many-th block of a request's keys that became full: so there need be no more than a few, however many became.
template <u32 DIM>
__device__ __forceinline__ void pool_blocks(const Pool& pool) {
  u64 request = blockIdx.x / pool.programs;
  long long room = pool.keys.page_size ? (long long)pool.keys.table_width * pool.keys.page_size : pool.news[request];
  u64 held = (u64)max(min(pool.news[request], room), 0ll), full = held / pool.block_size;
  u64 done = (u64)max(pool.olds[request], 0ll) / pool.block_size;
  if (done == full) return;
  for (u64 block = done + blockIdx.x % pool.programs; block < full; block += pool.programs) {
    pool_block<DIM>(pool, request, block);
    await_copies<0>();  // those past the block's end, which the next walk would meet
    __syncthreads();
  }
  if (!pool.tickets) return;
  __syncthreads();  // all have read the old length
  if (threadIdx.x == 0 && atomicAdd(&pool.tickets[request], 1u) + 1 == pool.programs)
    pool.olds[request] = (long long)held, pool.counts[request] = (long long)full, pool.tickets[request] = 0;
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
  constexpr u32 LOOKS = 8;  // of each thread at once
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
      u32 step = run + look * DIM + threadIdx.x;
      if (step < most && !follows(query + step, step)) stop = step;
    }
    atomicMin(&work.run, stop);
    __syncthreads();
    run += LOOKS * DIM;
    if (work.run < run || run >= most) break;
    __syncthreads();
  }
  run = work.run;
  u32 offset = (u32)seen.offset;
  float* to = own.sums + query * DIM + threadIdx.x;
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

extern "C" __global__ void __launch_bounds__(128) pool_128(const Pool pool) { pool_blocks<128>(pool); }
extern "C" __global__ void __launch_bounds__(64) pool_64(const Pool pool) { pool_blocks<64>(pool); }
extern "C" __global__ void __launch_bounds__(128) own_128(const Own own) { own_block<128>(own); }
extern "C" __global__ void __launch_bounds__(64) own_64(const Own own) { own_block<64>(own); }
