// A part of step.cu: every key of a block's run of tiles is scored, and scores are counted in bins.

template <Stage STAGE, u32 DIM, u32 HEADS, bool HISA>
__device__ __forceinline__ void fetch_tiles(const Step& c, Workspace<DIM, HEADS, HISA>& work, u32 fetcher, u32& turn) {
  constexpr u32 FETCHING = HISA ? FETCHERS_OF_HISA : FETCHERS;
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
      if (turn % FETCHING != fetcher) continue;
      int page = __shfl_sync(EVERY, found.page, lane);
      bool there = (u32)page < c.num_pages;
      if (STAGE == IN_BLOCKS && lane_of() == lane) work.tiles_in[tile - run.begin] = found.tile;
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

// What a part's scores must not lie below, even while they are counted, and above it the number of the turn; NaN as long as any may be
// selected. It is made the least number of the bin that the topk-th best of those counted lies in, as soon as there are so many, by a warp that
// only does that: any other would be late for the next tile. What that found in an earlier turn does not change a later one's.
struct Bound {
  u64& word;
  static constexpr u32 NONE_YET = 0x7fffffff;
  __device__ __forceinline__ u32 turn() const { return changed((const u32*)&word + 1); }
  __device__ __forceinline__ float number() const { return __uint_as_float(changed((const u32*)&word)); }
  __device__ __forceinline__ void begin() { word = (u64)(turn() | 1) << 32 | NONE_YET; }
  __device__ __forceinline__ void count() { word = (u64)(turn() + 1) << 32 | NONE_YET; }
  __device__ __forceinline__ void end() { word = ~(u64)0; }

  __device__ __forceinline__ void keep(const u32* bins, u32 topk) {
    while (true) {
      u64 now = __shfl_sync(EVERY, changed(&word), 0);
      u32 counting = now >> 32;
      if (counting == 0xffffffff) return;
      if (counting && counting % 2 == 0) raise(bins, topk, now);
      pause();
    }
  }
  __device__ __forceinline__ void raise(const u32* bins, u32 want, u64 now) {
    constexpr u32 EACH = BINS / 32;  // bins of a lane, which begins to read them elsewhere than the next, at other banks
    static_assert(EACH == 64);
    u32 sum = 0;
#pragma unroll
    for (u32 at = 0; at < EACH; at++) sum += changed(&bins[lane_of() * EACH + (at + lane_of()) % EACH]);
    u32 upto = sum_upto(sum), total = __shfl_sync(EVERY, upto, 31);
    u32 found = __ballot_sync(EVERY, total - upto < want && want <= total - upto + sum);
    if (!found) return;
    u32 lane = __ffs(found) - 1, first = lane * EACH + 32;
    want -= __shfl_sync(EVERY, total - upto, lane);
    u32 low = changed(&bins[first - 32 + lane_of()]), count = changed(&bins[first + lane_of()]);
    upto = sum_upto(count), total = __shfl_sync(EVERY, upto, 31);
    if (total < want) want -= total, first -= 32, count = low, upto = sum_upto(low), total = __shfl_sync(EVERY, upto, 31);
    u32 bin = first + lane_of();
    if (total - upto < want && want <= total - upto + count && bin > 0)
      atomicCAS(&word, now, now >> 32 << 32 | __float_as_uint(number_of(first_order(bin))));
  }
};

template <u32 DIM, u32 HEADS, Stage STAGE>
struct Scorer {
  const Step& c;
  Workspace<DIM, HEADS, STAGE != TOKENS>& work;
  u32& turn;
  float weights[HEADS / 4];  // half of those of heads 8 j + lane % 4 * 2 and the next
  u32 kept = 0;              // pairs of this warp

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

  // A part of the score of one of a thread's two keys, and of one of them the score, in the order of index_score/triton.py: heads onto the
  // sums of their classes modulo 8, ascending; two of them; lanes two apart, and one.
  __device__ __forceinline__ float part_of(const float (&dots)[HEADS / 2], u32 key) const {
    float sums[2];
#pragma unroll
    for (u32 at = 0; at < HEADS / 4; at++) {
      float dot = dots[at / 2 * 4 + key * 2 + at % 2], twice = add_two(dot, fabsf(dot));
      sums[at % 2] = at < 2 ? mul(twice, weights[at]) : fmaf(twice, weights[at], sums[at % 2]);
    }
    return add_two(sums[0], sums[1]);
  }
  u32 second = kept_ready(lane_of() & 2);  // whether the score is of the thread's second key
  __device__ __forceinline__ float total(const float (&dots)[HEADS / 2]) const {
    float low = part_of(dots, 0), high = part_of(dots, 1);
    float sum = add_two(second ? high : low, __shfl_xor_sync(EVERY, second ? low : high, 2));
    return add_two(sum, __shfl_xor_sync(EVERY, sum, 1));
  }

  // Two threads make the score of one key of a tile, `key`: the first of them has it.
  u32 key = kept_ready(warp_of() % WARPS * 16 + lane_of() / 4 + lane_of() / 2 % 2 * 8);
  __device__ __forceinline__ bool has_it() const { return lane_of() % 2 == 0; }
  Matrix tiles{work.tiles}, query{work.query};

  // The order of a key's score, at least the least number's; but 1 for NaN, which ranks below every number, and 0 where there is no page.
  static __device__ __forceinline__ u32 rank_of(float score, float scale, u32 word) {
    if (STAGE == BLOCKS && word == ~0u) return FORCED;
    u32 bits = __float_as_uint(score), order = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
    return score == score ? max(order, ~0xff7fffffu) : __float_as_uint(scale) != ABSENT;
  }

  // Score the tile in a place of the ring, and keep what may be selected. `word` is the last one of the key's pair; that of one to be kept is
  // above `last`.
  __device__ __forceinline__ void take(u32 slot, u32 parity, u32 word, u32 last, const Pairs& pairs, u32* ranks) {
    await(&work.full[slot], parity);
    float dots[HEADS / 2], scale = work.scales[slot][key];
    float bound = STAGE == TOKENS ? Bound{work.bound}.number() : __uint_as_float(Bound::NONE_YET);
    multiply<DIM>(dots, tiles + slot * (KEYS * DIM / 1024), query);
    await_products(dots, [&] {
      __syncwarp();
      if (lane_of() == 0) arrive(&work.empty[slot]);  // so that another tile is under way while this one's products are added
    });
    // Times the scale and + 0.0 in one: (sum + 0.0) * scale has the same bits, since no scale is negative; and -0.0 becomes 0.0.
    float score = fmaf(total(dots), scale, 0.0f);
    bool keep = !(score < bound);
    if (__any_sync(EVERY, keep)) {
      keep = keep && word > last;
      u32 order = rank_of(score, scale, word);
      if (keep && !order) atomicAdd(&work.bins[LOST], 1u);
      keep = keep && order > (bound == bound);  // NaN where there is no bound yet
      u32 keeping = __ballot_sync(EVERY, keep);
      if (keep) {
        pairs.put(kept + __popc(keeping & ((1u << lane_of()) - 1)), (u64)order << 32 | word);
        atomicAdd(&work.bins[score_bin(order)], 1u);
      }
      kept += __popc(keeping);
    }
    if (ranks && has_it()) ranks[~word] = word > last ? rank_of(score, scale, word) : 0;
  }

  __device__ __forceinline__ void run() {
    Run run(c, work);
    if (!run.next(work)) return;
    put(fetch(run.query));
    for (u32 bin = threadIdx.x; STAGE != TOKENS && bin <= BINS; bin += THREADS) work.bins[bin] = 0;
    u32 part = 0;
    Bound bound{work.bound};
    while (true) {
      if (lane_of() == 0) work.starts[part][warp_of()] = kept;
      if (STAGE == TOKENS && threadIdx.x == 0) bound.begin();
      meet_all();
      if (STAGE == TOKENS && threadIdx.x == 0) bound.count();  // all bins are zeros
      Run next = run;
      bool more = next.next(work);
      Ahead ahead;
      if (more) ahead = fetch(next.query);
#pragma unroll
      for (u32 at = 0; at < HEADS / 4; at++) weights[at] = work.weights[at / 2 * 8 + lane_of() % 4 * 2 + at % 2];
      u32 end = run.end(work), before = kept, tiles = uniform(run.upto - run.at), first = (run.at - run.from) * KEYS;
      u32 last = kept_ready(has_it() ? ~end : ~0u);
      Pairs pairs = run.pairs(c, work, warp_of());
      u32* ranks = c.ranks ? run.ranks(c) - first : nullptr;
      u32 tile = uniform((warp_of() / WARPS - turn) % GROUPS), slot = uniform((turn + tile) % STAGES);
      u32 parity = uniform((turn + tile) / STAGES % 2);
      for (u32 word = ~(first + tile * KEYS + key); tile < tiles; tile += GROUPS, word -= GROUPS * KEYS) {
        take(slot, parity, word, last, pairs, ranks);
        static_assert(STAGES == 2 * GROUPS);
        parity ^= slot / GROUPS, slot ^= GROUPS;
      }
      turn += tiles;
      if (lane_of() == 0) atomicAdd(&work.bins[0], before - kept);
      meet_all();
      tell_bins(c.told + (u64)run.query * TOLD, work, min(tiles * KEYS, end - first));
      part++;
      if (!more) break;
      put(ahead);
      run = next;
    }
    if (lane_of() == 0) work.starts[part][warp_of()] = kept;
  }
};
