// A part of step.cu: HISA's step in one launch. Means are brought up to date; the blocks of largest mean score are chosen, the first and a
// query's own always; and tokens are selected in them, each tile fetched as soon as it is known which it is.

struct Hisa {
  Step of_blocks, in_blocks;
  long long *pooled, *counts;  // null, or [requests]: tokens of which full blocks are pooled, and how many blocks: told of new ones
  u32* meeting;                // [2], zeros before and after
};

// Full blocks that a request holds, and those of them that are pooled.
__device__ __forceinline__ u32 blocks_in(const Step& c, long long tokens) {
  return (u32)min(max(tokens, 0ll), (long long)c.table_tiles * KEYS) / c.block_size;
}
__device__ __forceinline__ u32 full_blocks(const Step& c, u32 request) { return blocks_in(c, c.lengths[request]); }
__device__ __forceinline__ u32 pooled_blocks(const Hisa& h, u32 request) { return blocks_in(h.in_blocks, h.pooled[request]); }

// The mean of a block of a request's tokens, with the bits of walk.cu: keys are added in the order of positions. Absent pages count as zeros.
template <u32 DIM, class Work>
__device__ __forceinline__ void pool_here(const Hisa& h, Work& work, u32 request, u32 block) {
  constexpr u32 TURN = 256, PIECES = DIM / 16;  // keys at a time; of a key, of 16 bytes
  static_assert(TURN * DIM <= sizeof(work.tiles) && TURN * 4 <= sizeof(work.scales));
  const Step &means = h.of_blocks, &c = h.in_blocks;
  const int* table = c.table + (u64)request * c.table_row;
  auto *values = (unsigned char*)work.tiles, *pages = (unsigned char*)c.pages;
  auto scales = (float*)work.scales;
  float sum = 0.0f;
  for (u32 base = 0; base < c.block_size; base += TURN) {
    u32 num = min(c.block_size - base, TURN);
    auto place_of = [&](u32 key, bool& there) {
      u32 token = block * c.block_size + base + key;
      int page = table[token / KEYS];
      there = (u32)page < c.num_pages;
      return there ? pages + (u64)page * c.page_bytes : pages;
    };
    bool there;
    for (u32 piece = threadIdx.x; piece < num * PIECES; piece += blockDim.x) {
      u32 key = piece / PIECES;
      const unsigned char* page = place_of(key, there);
      ((Four*)values)[piece] = there ? ((const Four*)(page + (base + key) % KEYS * DIM))[piece % PIECES] : Four{0, 0, 0, 0};
    }
    for (u32 key = threadIdx.x; key < num; key += blockDim.x) {
      const unsigned char* page = place_of(key, there);
      scales[key] = there ? ((const float*)(page + KEYS * DIM))[(base + key) % KEYS] : 0.0f;
    }
    __syncthreads();
    if (threadIdx.x < DIM) {
#pragma unroll 8
      for (u32 key = 0; key < num; key += 2) {
        Two two = from_e4m3(values[key * DIM + threadIdx.x] | values[key * DIM + DIM + threadIdx.x] << 8);
        sum = fmaf(two.b, scales[key + 1], fmaf(two.a, scales[key], sum));
      }
    }
    __syncthreads();
  }
  int page = means.table[(u64)request * means.table_row + block / KEYS];
  if (threadIdx.x >= DIM || (u32)page >= means.num_pages) return;
  auto to = (unsigned char*)means.pages + (u64)page * means.page_bytes;
  auto scale = (float*)(to + KEYS * DIM) + block % KEYS;
  store_mean<DIM>(sum / (float)c.block_size, to + block % KEYS * DIM, scale, work.warps, [] { meet(1, DIM); });
}

// Pool what became full, all blocks together, and wait until all of it is written.
template <u32 DIM, class Work>
__device__ __forceinline__ void grow_means(const Hisa& h, Work& work) {
  const Step& c = h.in_blocks;
  u32 each = max(gridDim.x / c.num_requests, 1u), step = gridDim.x / each;  // blocks for a request, requests at a time
  if (blockIdx.x < step * each) {
    for (u32 request = blockIdx.x / each; request < c.num_requests; request += step) {
      u32 full = min(full_blocks(c, request), h.of_blocks.row_tiles * KEYS);
      for (u32 block = pooled_blocks(h, request) + blockIdx.x % each; block < full; block += each) pool_here<DIM>(h, work, request, block);
    }
  }
  fence_for_async_global();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_for_all(&h.meeting[0]), await_all(&h.meeting[0], gridDim.x);
    if (atomicAdd(&h.meeting[1], 1u) + 1 == gridDim.x) h.meeting[0] = h.meeting[1] = 0;
  }
  __syncthreads();
  fence_for_async_global();
  // All have read how many were pooled.
  for (u32 request = blockIdx.x * blockDim.x + threadIdx.x; request < c.num_requests; request += gridDim.x * blockDim.x) {
    u32 full = full_blocks(c, request);
    if (full != pooled_blocks(h, request)) h.pooled[request] = (u64)full * c.block_size, h.counts[request] = full;
  }
}

template <u32 DIM, u32 HEADS, u32 TEAMS>
__device__ __forceinline__ void hisa(const Hisa& h) {
  auto& work = *(Workspace<DIM, HEADS, true>*)aligned_memory<1024>();
  const Step &of_blocks = h.of_blocks, &in_blocks = h.in_blocks;
  u32 num = in_blocks.num_queries, size = in_blocks.block_size;
  if (warp_of() == 0) fetch_first(of_blocks);
  if (warp_of() == 1) fetch_first(in_blocks);
  overlap_launches();
  bool grown = false;
  // By other threads than the first queries are looked at by, so that they do not wait for one another.
  for (u32 request = blockDim.x - 1 - threadIdx.x; h.pooled && request < in_blocks.num_requests; request += blockDim.x)
    grown |= full_blocks(in_blocks, request) != pooled_blocks(h, request);
  for (u32 query = threadIdx.x; query < num; query += blockDim.x) {
    u32 tokens = tokens_of(in_blocks, query), own = tokens > 0 ? (tokens - 1) / size : 0;
    work.own[query] = own;
    put_end(work.first, work.last, query, min(own, of_blocks.row_tiles * KEYS));
    put_end(work.first_in, work.last_in, query, tokens > 0 ? min(own, in_blocks.most_blocks - 1) * size + (tokens - 1) % size + 1 : 0);
  }
  if (threadIdx.x == 0) begin_barriers(work);
  grown = __syncthreads_or(grown);
  if (warp_of() == 0) add_up(work.first, work.begins_in, num);
  if (warp_of() == 1) add_up(work.first_in, work.in_begins_in, num);
  if (grown) grow_means<DIM>(h, work);
  if (grown) fence_for_async();
  __syncthreads();
  u32 turn = 0;
  auto meet_fetchers = [] { meet(15, THREADS + FETCHERS_OF_HISA * 32); };
  if (warp_of() >= GROUPS * WARPS) {
    fetch_tiles<BLOCKS>(of_blocks, work, warp_of() - GROUPS * WARPS, turn);
    in_blocks.sending.send<FETCHERS_OF_HISA * 32>(threadIdx.x - THREADS);  // while blocks are chosen
    meet_fetchers(), meet_fetchers();
    fetch_tiles<IN_BLOCKS>(in_blocks, work, warp_of() - GROUPS * WARPS, turn);
    meet_fetchers();
    if (warp_of() == GROUPS * WARPS) take_whole(in_blocks, work), in_blocks.sending.meet_ranks();
    return;
  }
  Scorer<DIM, HEADS, BLOCKS>{of_blocks, work, turn}.run();
  Selecting<DIM, HEADS, BLOCKS, TEAMS>{of_blocks, work}.run();
  meet_fetchers();  // they look no more at where the tiles of means are: in a block that has none they may only have begun to
  for (u32 query = threadIdx.x; query < num; query += THREADS)
    work.first[query + 1] = work.first_in[query + 1], work.last[query] = work.last_in[query];
  if (threadIdx.x == 0) work.begins_in = work.in_begins_in;
  fence_for_async();  // tiles come where masks were
  meet_fetchers();
  Scorer<DIM, HEADS, IN_BLOCKS>{in_blocks, work, turn}.run();
  meet_fetchers();  // nor at which blocks were chosen, which is cleared once all have selected
  Selecting<DIM, HEADS, IN_BLOCKS, TEAMS>{in_blocks, work}.run();
}
