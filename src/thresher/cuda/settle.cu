// Select from the lists that score_select's collecting fills: see ops/score_select/settle.py.
#include <select.cuh>

struct Lists {
  const u64* found;       // rows of `lists` lists of `room` pairs (score's bits << 32 | key) each, rows `found_row` apart
  const int* counts;      // [rows, lists]: how many a list was given, more than `room` where it did not hold them
  const long long* ends;  // [rows]: how many keys a row sees
  int* indices;           // [rows, topk]
  long long* lengths;     // [rows]
  float* beside;          // null, or [rows, topk]
  int* redo;              // [rows]: 1 where the lists do not hold the answer, and the selection is empty
  u32 topk, lists, room, found_row;
  u32 held;               // pairs that shared memory has room for; the lists of a row with more are read again and again
  u32 words;              // of 32 keys each that the mask has room for; those of a row with more are looked at part after part
};

__device__ __forceinline__ u64 pair_of_raw(u64 raw) { return pair_of(__uint_as_float((u32)(raw >> 32)), (u32)raw); }

struct alignas(16) Four {
  u32 a, b, c, d;
};
__device__ __forceinline__ Four load_four(const u32* from, u32 num) {  // zeros behind the `num`-th
  if (num >= 4) return *(const Four*)from;
  return {from[0], num > 1 ? from[1] : 0, num > 2 ? from[2] : 0, 0};
}

// Write the keys of the pairs that are not below the cut, all before `end`, to `to`, ascending. Begins and ends at a barrier.
template <class Each>
__device__ __forceinline__ void write_keys(const Each& each, u64 cut, u32 end, u32 most, u32* mask, u32* to, Workspace& work) {
  u32 place = 0;
  for (u32 start = 0; start < end; start += 32 * most) {
    u32 words = min((end - start + 31) / 32, most), own = (words + 4 * blockDim.x - 1) / (4 * blockDim.x) * 4;
    for (u32 at = threadIdx.x; at < words; at += blockDim.x) mask[at] = 0;
    __syncthreads();
    each([&](u64 pair) {
      u32 at = key_of(pair) - start;
      if (pair >= cut && at < 32 * words) atomicOr(&mask[at / 32], 1u << at % 32);
    });
    __syncthreads();
    u32 first = min(threadIdx.x * own, words), last = min(first + own, words);  // multiples of 4, but for the mask's end
    u32 count = 0, total;
    for (u32 at = first; at < last; at += 4) {
      Four four = load_four(mask + at, last - at);
      count += __popc(four.a) + __popc(four.b) + __popc(four.c) + __popc(four.d);
    }
    u32 put = place + scan(count, work.warps[0], total);
    for (u32 at = first; at < last; at += 4) {
      Four four = load_four(mask + at, last - at);
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
};

// Seek the cut among the pairs where they lie, and write the keys: for rows that shared memory cannot hold, which are few.
__device__ __noinline__ u64 settle_unheld(const Listed& listed, u32 num, u32 length, u32 end, u32 words, u32* mask, u32* keys, Workspace& work) {
  auto each = [&](auto use) { listed.each([&](u32, const u64* from) { use(pair_of_raw(*from)); }); };
  Range range;
  each([&](u64 pair) { range.add(pair); });
  u64 cut = num > length ? nth_largest(each, range, length, work) : 0;
  write_keys(each, cut, end, words, mask, keys, work);
  return cut;
}

// A thread block takes the row of its number, whose lists are no more than its threads.
// Shared memory: Workspace, `words` of the mask, `lists` + 1 + `topk` words, rounded up to an even number, and `held` pairs.
__device__ __forceinline__ void settle_row(const Lists& rows) {
  Workspace& work = *(Workspace*)shared_memory;
  u32 topk = rows.topk, lists = rows.lists, room = rows.room, held = rows.held;
  u32* mask = (u32*)(shared_memory + sizeof(Workspace));
  u32* begins = mask + rows.words;
  u32* keys = begins + lists + 1;
  u64* pairs = (u64*)(keys + topk + (lists + 1 + topk) % 2);
  u64 row = blockIdx.x;
  await_launch();

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
    u64 cut = 0;
    if (num <= held) {
      listed.each([&](u32 at, const u64* from) { copy_ahead(pairs + at, from); });
      await_copies();
      __syncthreads();
      Range range;
      for (u32 at = threadIdx.x; at < num; at += blockDim.x) {
        u64 pair = pair_of_raw(pairs[at]);
        pairs[at] = pair;
        range.add(pair);
      }
      auto each = [&](auto use) {  // those that this thread has just written
        for (u32 at = threadIdx.x; at < num; at += blockDim.x) use(pairs[at]);
      };
      if (num > length) cut = nth_largest(each, range, length, work);
      write_keys(each, cut, end, rows.words, mask, keys, work);
    } else {
      cut = settle_unheld(listed, num, length, end, rows.words, mask, keys, work);
    }
    for (u32 at = threadIdx.x; at < length; at += blockDim.x) rows.indices[row * topk + at] = keys[at];
    if (rows.beside != nullptr)
      listed.each([&](u32, const u64* from) {
        u64 raw = *from;
        if (pair_of_raw(raw) < cut) return;
        u32 place = 0;  // how many keys are smaller
        for (u32 step = 1u << (31 - __clz(length)); step > 0; step /= 2)
          if (place + step <= length && keys[place + step - 1] < (u32)raw) place += step;
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
