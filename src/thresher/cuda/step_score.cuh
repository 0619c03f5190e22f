// A part of step.cu: every key of a block's run of tiles is scored, and scores are counted in bins.

template <Stage STAGE, u32 DIM, u32 HEADS, bool HISA>
__device__ __forceinline__ void fetch_tiles(const Step& c, Workspace<DIM, HEADS, HISA>& work, u32 fetcher, u32& turn) {
  Run run(c, work);
  while (run.next(work)) {
    const int* table = c.table + c.owners[run.query] * c.table_row;
    Chosen chosen(c, work, STAGE, run.query, run.end(work));
    // Of each lane, which tile of its request's one of the query's is, and the page.
    struct Found {
      u32 tile;
      int page;
    };
    auto look_up = [&](u32 tile) {
      u32 at = tile + lane_of() - run.from;
      if (tile + lane_of() >= run.upto) return Found{0, 0};
      if (STAGE == IN_BLOCKS) at = chosen.tile_of(at);
      return Found{at, STAGE == IN_BLOCKS && at >= c.table_tiles ? -1 : table[at]};
    };
    Found found = {0, 0}, ahead = look_up(run.at);
    for (u32 tile = run.at; tile < run.upto; tile++, turn++) {
      u32 lane = (tile - run.at) % 32;
      if (lane == 0) found = ahead, ahead = look_up(tile + 32);
      if (turn % FETCHERS != fetcher) continue;
      int page = __shfl_sync(EVERY, found.page, lane);
      bool there = (u32)page < c.num_pages;
      if (STAGE == IN_BLOCKS && lane_of() == lane && tile - run.begin < MAPPED) work.tiles_in[tile - run.begin] = found.tile;
      u32 slot = turn % STAGES;
      await(&work.empty[slot], turn / STAGES % 2 ^ 1);
      if (!there) {
        work.scales[slot][lane_of()] = work.scales[slot][lane_of() + 32] = __uint_as_float(ABSENT);
        fence_for_async();  // the copy engine brings other scales to this place later
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

template <u32 DIM, u32 HEADS, Stage STAGE>
struct Scorer {
  const Step& c;
  Workspace<DIM, HEADS, STAGE != TOKENS>& work;
  u32& turn;
  float weights[HEADS / 4];  // half of those of heads 8 j + lane % 4 * 2 and the next

  // 16 bytes of a query's heads and a weight: of each thread, while the query before is at work. Zeros where there is none.
  struct Ahead {
    Four piece = {0, 0, 0, 0};
    float weight = 0.0f;
  };
  static constexpr u32 PIECES = DIM / 16;  // of a head
  static_assert(HEADS * PIECES <= THREADS);
  __device__ __forceinline__ Ahead fetch(u32 query) const {
    Ahead ahead;
    if (threadIdx.x / PIECES < c.num_heads && threadIdx.x < HEADS * PIECES)
      ahead.piece = *(const Four*)(c.q + (u64)query * c.q_row + (u64)(threadIdx.x / PIECES) * c.q_head + threadIdx.x % PIECES * 16);
    if (threadIdx.x < c.num_heads) ahead.weight = c.weights[(u64)query * c.w_row + threadIdx.x];
    return ahead;
  }
  __device__ __forceinline__ void put(const Ahead& ahead) {
    if (threadIdx.x < HEADS * PIECES) *(Four*)(work.query + swizzled<DIM>(threadIdx.x / PIECES, threadIdx.x % PIECES)) = ahead.piece;
    if (threadIdx.x < HEADS) work.weights[threadIdx.x] = mul(ahead.weight, 0.5f);
    fence_for_async();
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
  __device__ __forceinline__ void take(u32 first, u32 end, const Orders& orders, u32 from) {
    u32 slot = turn % STAGES, own = lane_of() % 4, key = warp_of() % WARPS * 16 + lane_of() / 4 + own % 2 * 8;
    await(&work.full[slot], turn / STAGES % 2);
    float dots[HEADS / 2], scale = work.scales[slot][key];
    multiply<DIM>(dots, work.tiles[slot], work.query);
    await_products(dots, [&] {
      __syncwarp();
      if (lane_of() == 0) arrive(&work.empty[slot]);  // so that another tile is under way while this one's products are added
    });
    float low = total(dots, 0), high = total(dots, 1);
    // Times the scale and + 0.0 in one: (sum + 0.0) * scale has the same bits, since no scale is negative.
    u32 order = first + key < end && __float_as_uint(scale) != ABSENT ? rank_of(fmaf(own % 2 ? high : low, scale, 0.0f)) : 0;
    if (STAGE == BLOCKS && first + key == 0) order = FORCED;
    if (own < 2) {
      orders.put(from + key, order);
      if (first + key < end) atomicAdd(&work.bins[order ? score_bin(order) : LOST], 1u);
    }
  }

  __device__ __forceinline__ void run() {
    Run run(c, work);
    if (!run.next(work)) return;
    put(fetch(run.query));
    for (u32 bin = threadIdx.x; bin <= BINS; bin += THREADS) work.bins[bin] = 0;
    meet_all();
    while (true) {
      Run next = run;
      bool more = next.next(work);
      Ahead ahead;
      if (more) ahead = fetch(next.query);
#pragma unroll
      for (u32 at = 0; at < HEADS / 4; at++) weights[at] = work.weights[at / 2 * 8 + lane_of() % 4 * 2 + at % 2];
      u32 end = run.end(work);
      Orders orders = run.orders(c, work);
      for (u32 tile = run.at; tile < run.upto; tile++, turn++)
        if (turn % GROUPS == warp_of() / WARPS) take((tile - run.from) * KEYS, end, orders, (tile - run.at) * KEYS);
      meet_all();
      u32* told = c.told + (u64)run.query * TOLD;
      tell_bins(told, work);
      if (!more) break;
      put(ahead);
      meet_all();
      run = next;
    }
  }
};
