// A part of step.cu: the selection of a query by its parts, from scores and bins.

// How far pairs from `low` on and below `high` are shifted, so that there are at most 1 << bits of them.
__device__ __forceinline__ u32 shift_of(u64 low, u64 high, u32 bits) { return max(64 - __clzll(high - 1 - low) - (int)bits, 0); }

__device__ __forceinline__ void put_taken(const Step& c, u32 query, u32 at, u32 key, u32 slot) {
  c.indices[(u64)query * c.topk + at] = key, c.slots[(u64)query * c.topk + at] = slot;
}
__device__ __forceinline__ void leave_out(const Step& c, u32 query, u32 at) {
  put_taken(c, query, at, ~0u, ~0u);
  if (c.beside) c.beside[(u64)query * c.topk + at] = __uint_as_float(0xff800000u);
}

// What a part publishes: how many keys it takes for certain, how many pairs it tells, and where those begin that find no slot.
__device__ __forceinline__ u64 word_of(u32 above, u32 within, u32 base) { return (u64)1 << 63 | (u64)base << 48 | (u64)within << 32 | above; }

// What a block has of a query.
struct Part {
  u32 query, part, parts, first, num, end;  // which of how many parts; its keys, `num` from `first` of the query's on; how many that sees
  u32 tile, number;                         // the first of the block's tiles that is the part's; which of its parts it is
  u32 *masks, *ranks;  // of those keys that may be taken; of all of them, or null
};

template <u32 DIM, u32 HEADS, Stage STAGE, u32 TEAMS>
struct Selecting {
  const Step& c;
  Workspace<DIM, HEADS, STAGE != TOKENS>& work;
  u32 teams = 1, number = 0, threads = THREADS, thread = threadIdx.x;  // this thread's team, its threads and which of those this is

  __device__ __forceinline__ void divide_into(u32 num) {  // 1 or 2
    teams = num, threads = THREADS >> (num - 1), number = num == 2 ? threadIdx.x / (THREADS / 2) : 0, thread = threadIdx.x & (threads - 1);
  }
  static_assert(TEAMS <= 2);
  __device__ __forceinline__ auto& team() { return work.teams[number]; }
  __device__ __forceinline__ u64* near() { return work.near + number * (MOST / 2); }
  __device__ __forceinline__ void meet_team() { meet(2 + number, threads); }

  __device__ __forceinline__ u32* told(const Part& part) const { return c.told + (u64)part.query * TOLD; }
  __device__ __forceinline__ u64* words(const Part& part) const { return c.words + part.query * gridDim.x; }
  __device__ __forceinline__ u64* shared_pairs(const Part& part) const { return c.pairs + (u64)part.query * 2 * MOST; }
  // Slots of each part, a power of two.
  __device__ __forceinline__ static u32 slots_of(const Part& part) { return 1u << (31 - __clz(MOST / part.parts)); }
  __device__ __forceinline__ Part part_of(const Run& run, u32 at) {
    u32 behind = work.first[run.query + 1], first = run.from / run.each;
    return {
        run.query, blockIdx.x - first, (behind - 1) / run.each - first + 1, (run.at - run.from) * KEYS, (run.upto - run.at) * KEYS,
        run.end(work), run.at - run.begin, at, run.masks(c, work), run.ranks(c)};
  }
  // Calls use(part, what the block knows of its query) for each part that is `wanted`, one after the other in each team.
  template <class Wanted, class Use>
  __device__ __forceinline__ void each_in_teams(const Wanted& wanted, const Use& use) {
    Run run(c, work);
    for (u32 at = 0; run.next(work); at++)
      if (at % teams == number && wanted(work.sought[at])) use(part_of(run, at), work.sought[at]);
  }

  __device__ __forceinline__ void run() {
    u32 num = 0;
    for (Run run(c, work); run.next(work); num++)
      if (threadIdx.x == 0) work.sought[num].above = 0, work.sought[num].known = 0;
    if (threadIdx.x == 0) work.postponed = 0;
    meet_all();
    u32 most = TEAMS > 1 && num > 1 ? 2 : 1;
    // Once in teams; then those that a team has no room for, by all threads.
    auto passes = [&](const auto& wanted, const auto& use) {
      for (u32 pass = 0; pass < 2; pass++) {
        divide_into(pass == 0 ? most : 1);
        each_in_teams([&](const Sought& sought) { return wanted(sought, pass); }, use);
        meet_all();
        if (most == 1 || !work.postponed) break;
      }
    };
    passes(
        [](const Sought& sought, u32 pass) { return pass == 0 || !sought.known; },
        [&](const Part& part, Sought& sought) { seek(part, sought); });
    passes(
        [&](const Sought& sought, u32 pass) { return (sought.inside <= MOST / most) == (pass == 0); },
        [&](const Part& part, const Sought& sought) { take(part, sought); });
  }

  // Of each thread's number: the sum of those of threads before it in the team, and of all.
  __device__ __forceinline__ u32 scan(u32 value, u32& total) {
    u32 upto = sum_upto(value), first = number * (threads / 32);
    meet_team();  // nobody reads the last scan's any more
    if (lane_of() == 31) work.warps[warp_of()] = upto;
    meet_team();
    u32 sum = lane_of() < threads / 32 ? work.warps[first + lane_of()] : 0;
    total = __reduce_add_sync(EVERY, sum);
    return __reduce_add_sync(EVERY, first + lane_of() < warp_of() ? sum : 0) + upto - value;
  }

  // The bin that the `want`-th from above lies in (bin), of those that all parts have added up, how many lie in those above (above), and how
  // many in it (inside), for the team. Returns how many there are in all. Ends where the team has met. They are all there once they are
  // `keys`, with those that have no score: each count only grows, up to what it ends with.
  __device__ __forceinline__ u32 find_told_bin(const Part& part, u32 want, u32 keys) {
    static_assert(BINS == 4 * THREADS);
    Four fours[TEAMS];  // so many for each thread, from the highest of all to the lowest; zeros beyond
    u32 sum, total, above;
    do {
#pragma unroll
      for (u32 at = 0; at < TEAMS; at++)
        fours[at] = at < teams ? fresh((const Four*)told(part) + (BINS / 4 - 1 - thread * teams - at)) : Four{0, 0, 0, 0};
      u32 lost = thread + 1 == threads ? fresh(&told(part)[LOST]) : 0;
      if (thread + 1 == threads) team().base = lost;
      sum = 0;
#pragma unroll
      for (u32 at = 0; at < TEAMS; at++) sum += fours[at].a + fours[at].b + fours[at].c + fours[at].d;
      above = scan(sum + lost, total);
    } while (total < keys);
    total -= team().base;
    if (above < want && want <= above + sum) {
      u32 bin = BINS - thread * teams * 4;
      auto pass = [&](u32 count) {
        bin--;
        if (above < want && want <= above + count) team().bin = bin, team().above = above, team().inside = count;
        above += count;
      };
#pragma unroll
      for (u32 at = 0; at < TEAMS; at++) pass(fours[at].d), pass(fours[at].c), pass(fours[at].b), pass(fours[at].a);
    }
    meet_team();
    return total;
  }

  // The pairs kept of a part, shared out over the team; zeros among them. `use` is also told where the part's masks are: where these and a
  // warp's pairs have room in shared memory, the compiler knows that it is there.
  template <class Use>
  __device__ __forceinline__ void each_pair(const Part& part, const Use& use) {
    constexpr u32 TURN = 4;  // loads ahead
    auto each_of = [&](const auto& pairs, u32 begin, u32 stop, u32* masks) {
      for (u32 base = begin + lane_of(); base < stop; base += TURN * 32) {
        u64 ahead[TURN];
#pragma unroll
        for (u32 at = 0; at < TURN; at++) ahead[at] = base + at * 32 < stop ? pairs[base + at * 32] : 0;
#pragma unroll
        for (u32 at = 0; at < TURN; at++) use(ahead[at], masks);
      }
    };
    Run run(c, work);
    for (u32 warp = thread / 32; warp < GROUPS * WARPS; warp += threads / 32) {
      Pairs pairs = run.pairs(c, work, warp);
      u32 begin = work.starts[part.number][warp], stop = work.starts[part.number + 1][warp];
      if (stop <= pairs.room && run.near_masks(c))
        each_of(pairs.near, begin, stop, work.masks + part.tile * (KEYS / 32));
      else
        each_of(pairs, begin, stop, part.masks);
    }
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
    each_pair(part, [&](u64 pair, u32*) {
      if (pair >= low && pair < high) atomicAdd(&work.bins[(pair - low) >> shift], 1u);
    });
    meet_all();
    tell_bins(told(part), work, 0);
    meet_parts();
    return shift;
  }

  // Find where the cut is and tell the others what this part has there. Only where a bin holds too many is anybody waited for once all are
  // scored; a team has room for fewer, and leaves that to all threads.
  __device__ __forceinline__ void seek(const Part& part, Sought& sought) {
    u32 owner = STAGE != BLOCKS && thread == 0 ? (u32)c.owners[part.query] : 0;  // needed later, when others wait
    meet_team();  // nobody asks how many pairs the part before told any more
    if (thread == 0) team().num = 0;
    for (u32 at = thread; at < part.num / 32; at += threads) part.masks[at] = 0;
    u32 total = find_told_bin(part, c.topk, part.end), want = 0, inside = 0, times = 0;
    u64 low = SELECTABLE, high = SELECTABLE;
    if (total > c.topk) {
      want = c.topk - team().above, inside = team().inside;
      low = (u64)first_order(team().bin) << 32, high = team().bin + 1 < BINS ? (u64)first_order(team().bin + 1) << 32 : ~(u64)0;
      if (teams > 1 && inside > MOST / teams) {
        work.postponed = 1;
        return;
      }
      while (inside > MOST) {
        u32 shift = divide(part, low, high, times);
        find_told_bin(part, want, 0);
        low += (u64)team().bin << shift, high = min(high, low + ((u64)1 << shift));
        want -= team().above, inside = team().inside;
      }
    }
    if (thread == 0) {
      sought.taken = min(total, c.topk), sought.want = want, sought.inside = inside, sought.known = 1;
      sought.low = low, sought.high = high, sought.owner = owner;
    }
    tell(part, sought, low, high);
  }

  // The groups of 32 keys of a warp: they stand together.
  struct Groups {
    u32 begin, stop;
  };
  __device__ __forceinline__ Groups groups(const Part& part) const {
    u32 all = part.num / 32, warps = threads / 32, share = (all + warps - 1) / warps, begin = min(thread / 32 * share, all);
    return {begin, min(begin + share, all)};
  }

  // Keep a mask of the keys from `low` on; it is zeros. Tell all parts how many this one takes for certain, those from `high` on, and the pairs between.
  __device__ __forceinline__ void tell(const Part& part, Sought& sought, u64 low, u64 high) {
    u32 above = 0;
    each_pair(part, [&](u64 pair, u32* masks) {
      if (pair < low) return;
      u32 key = ~(u32)pair - part.first;
      atomicOr(&masks[key / 32], 1u << key % 32);
      if (pair >= high)
        above++;
      else
        near()[atomicAdd(&team().num, 1u)] = pair;
    });
    above = __reduce_add_sync(EVERY, above);
    if (lane_of() == 0) atomicAdd(&sought.above, above);
    meet_team();
    u32 within = team().num, slots = slots_of(part), more = within > slots ? within - slots : 0, base = 0;
    if (more && thread == 0) team().base = MOST + atomicAdd(&told(part)[PAIRS], more);
    if (more) meet_team(), base = team().base;
    for (u32 at = thread; at < within; at += threads) publish(&shared_pairs(part)[at < slots ? part.part * slots + at : base + at - slots], near()[at]);
    if (thread == 0) publish(&words(part)[part.part], word_of(sought.above, within, base));
  }

  // The `want`-th largest of the first `num` of near(), all distinct, which lie from `low` on and below `high`. team().num is 0.
  __device__ __forceinline__ u64 nth_largest(u64 low, u64 high, u32 want, u32 num) {
    u32 inside = num, bits = 31 - __clz(threads), *bins = work.bins + number * threads, total;
    meet_team();
    while (inside > FEW) {
      u32 shift = shift_of(low, high, bits);
      bins[thread] = 0;
      meet_team();
      for (u32 at = thread; at < num; at += threads) {
        u64 pair = near()[at];
        if (pair >= low && pair < high) atomicAdd(&bins[(pair - low) >> shift], 1u);
      }
      meet_team();
      u32 bin = threads - 1 - thread, count = bins[bin], above = scan(count, total);
      if (above < want && want <= above + count) team().bin = bin, team().above = above, team().inside = count;
      meet_team();
      low += (u64)team().bin << shift, high = min(high, low + ((u64)1 << shift));
      want -= team().above, inside = team().inside;
    }
    for (u32 at = thread; at < num; at += threads) {
      u64 pair = near()[at];
      if (pair >= low && pair < high) team().small[atomicAdd(&team().num, 1u)] = pair;
    }
    meet_team();
    if (thread < inside) {
      u32 rank = 0;
      for (u32 at = 0; at < inside; at++) rank += team().small[at] >= team().small[thread];
      if (rank == want) team().cut = team().small[thread];
    }
    meet_team();
    return team().cut;
  }

  // What all parts told: their pairs into near(), in any order. How many the parts before this one take for certain, over all threads.
  __device__ __forceinline__ u32 gather(const Part& part) {
    constexpr u32 TURN = 4;  // slots ahead, before it is known what they hold
    u32 before = 0, slots = slots_of(part), shift = 31 - __clz(slots), all = part.parts << shift;
    u64 ahead[TURN];
#pragma unroll
    for (u32 at = 0; at < TURN; at++) ahead[at] = thread + at * threads < all ? fresh(&shared_pairs(part)[thread + at * threads]) : 0;
    for (u32 at = thread; at < part.parts; at += threads) {
      u64 word = await_word(&words(part)[at]);
      u32 within = (word >> 32) & 0xffff, base = (word >> 48) & 0x7fff;
      if (at < part.part) before += (u32)word;
      team().within[at] = within;
      for (u32 more = slots; more < within; more++) near()[atomicAdd(&team().num, 1u)] = await_word(&shared_pairs(part)[base + more - slots]);
    }
    meet_team();
    auto put = [&](u32 slot, u64 pair) {
      if ((slot & (slots - 1)) < team().within[slot >> shift]) near()[atomicAdd(&team().num, 1u)] = pair ? pair : await_word(&shared_pairs(part)[slot]);
    };
#pragma unroll
    for (u32 at = 0; at < TURN; at++)
      if (thread + at * threads < all) put(thread + at * threads, ahead[at]);
    for (u32 slot = thread + TURN * threads; slot < all; slot += threads) put(slot, 0);
    meet_team();
    return before;
  }

  // Leave zeros where all parts have read.
  __device__ __forceinline__ void clear(const Part& part) {
    u32 slots = slots_of(part);
    for (u32 at = thread; at < part.parts; at += threads) {
      u32 within = team().within[at], base = within > slots ? (fresh(&words(part)[at]) >> 48) & 0x7fff : 0;
      for (u32 pair = 0; pair < within; pair++) shared_pairs(part)[pair < slots ? at * slots + pair : base + pair - slots] = 0;
      words(part)[at] = 0;
    }
    for (u32 at = thread; at < TOLD / 4; at += threads) ((Four*)told(part))[at] = {0, 0, 0, 0};
    for (u32 at = thread; STAGE == IN_BLOCKS && at + 1 < c.most_blocks; at += threads) c.blocks[(u64)part.query * (c.most_blocks - 1) + at] = 0;
  }

  // Take what is this part's: the keys from the cut on, ascending, behind those that the parts before it take.
  __device__ __forceinline__ void take(const Part& part, const Sought& sought) {
    u32 inside = sought.inside, mine = 0;
    // Groups stand in lanes, 32 of them at a time. The pages that the first of them are in are looked up before anybody is waited for.
    Groups own = groups(part);
    auto tile_of = [&](u32 group) {
      u32 tile = group * 32 / KEYS;
      return STAGE == IN_BLOCKS ? work.tiles_in[part.tile + tile] : part.first / KEYS + tile;
    };
    auto page_of = [&](u32 group) {
      if (STAGE == BLOCKS || group >= own.stop) return 0u;
      u32 tile = tile_of(group);
      return STAGE == IN_BLOCKS && tile >= c.table_tiles ? NONE : (u32)c.table[(u64)sought.owner * c.table_row + tile];
    };
    u32 ahead = page_of(own.begin + lane_of());
    if (thread == 0) team().num = 0;
    meet_team();
    u32 before = gather(part);
    // What this part reads of others it has read by now, so the last one to come here may clear it. Nobody waits for the answer yet.
    u32 left = thread == 0 ? atomicAdd(&told(part)[LEFT], 1u) : 0;
    if (thread == 0) team().num = 0;
    if (inside > 0) {
      u64 cut = nth_largest(sought.low, sought.high, sought.want, inside);
      for (u32 at = thread; at < inside; at += threads) {
        u64 pair = near()[at];
        u32 key = ~(u32)pair;
        before += pair >= cut && key < part.first;
        if (pair < cut && key - part.first < part.num) atomicAnd(&part.masks[(key - part.first) / 32], ~(1u << key % 32));
      }
      meet_team();
    }
    auto mask_of = [&](u32 group) { return group < own.stop ? changed(&part.masks[group]) : 0; };
    for (u32 group = own.begin + lane_of(); group - lane_of() < own.stop; group += 32) mine += __popc(mask_of(group));
    mine = __reduce_add_sync(EVERY, mine), before = __reduce_add_sync(EVERY, before);
    if (lane_of() == 0) work.warps[warp_of()] = mine, work.befores[warp_of()] = before;
    meet_team();
    u32 from = number * (threads / 32) + lane_of();
    u32 to = __reduce_add_sync(EVERY, lane_of() < threads / 32 ? work.befores[from] + (from < warp_of() ? work.warps[from] : 0) : 0);
    auto put = [&](u32 at, u32 key, u32 tile, u32 page) {
      if (STAGE == BLOCKS)
        publish(&c.blocks[(u64)part.query * c.topk + at], tile * KEYS + key % KEYS + 1);
      else
        put_taken(c, part.query, at, tile * KEYS + key % KEYS, page * KEYS + key % KEYS);
      if (c.beside) c.beside[(u64)part.query * c.topk + at] = score_of(part.ranks[key]);
    };
    for (u32 group = own.begin + lane_of(); group - lane_of() < own.stop; group += 32) {
      u32 mask = mask_of(group), upto = sum_upto(__popc(mask)), at = to + upto - __popc(mask), all = __shfl_sync(EVERY, upto, 31);
      u32 tile = group < own.stop ? tile_of(group) : 0, page = ahead;
      ahead = page_of(group + 32);
      u32 num = min(own.stop - (group - lane_of()), 32u), most = __reduce_max_sync(EVERY, __popc(mask));  // of groups, of keys in one
      if (most <= num) {
#pragma unroll 1
        for (; mask; mask &= mask - 1) put(at++, group * 32 + __ffs(mask) - 1, tile, page);
      } else {  // so many that a lane takes one of each group
#pragma unroll 1
        for (u32 lane = 0; lane < num; lane++) {
          u32 theirs = __shfl_sync(EVERY, mask, lane), first = __shfl_sync(EVERY, at, lane);
          u32 there = __shfl_sync(EVERY, tile, lane), on = __shfl_sync(EVERY, page, lane), key = (group - lane_of() + lane) * 32 + lane_of();
          if (theirs >> lane_of() & 1) put(first + __popc(theirs & ((1u << lane_of()) - 1)), key, there, on);
        }
      }
      to += all;
    }
    if (thread == 0) team().last = left + 1 == part.parts;
    meet_team();
    if (team().last) clear(part);
    if (part.part + 1 < part.parts) return;
    if (STAGE == BLOCKS) {  // only what is waited for
      for (u32 at = sought.taken + thread; at < min(c.topk, part.end); at += threads) publish(&c.blocks[(u64)part.query * c.topk + at], NONE);
      return;
    }
    if (thread == 0) c.taken[part.query] = sought.taken;
    for (u32 at = sought.taken + thread; at < c.topk; at += threads) leave_out(c, part.query, at);
  }
};
