// A level for each row from a sample of its scores: see ops/score_select/level.py.
#include <select.cuh>

struct Samples {
  const float* scores;        // [rows, width], rows `score_row` apart, at multiples of 16 bytes; NaN and -inf say nothing
  const long long* ends;      // [rows]: how many keys a row sees
  const long long* requests;  // [rows]
  float* levels;              // [rows]
  int* level_keys;            // [rows]
  u64* found;                 // null, or the lists that what passes of the sample is entered in, as settle.cu has them
  int* counts;                // [rows, lists]
  u32 num_rows, score_row, width, found_row, lists, room;
  u32 stride, want, whole;
  u32 together;               // rows that collect together
};

// Column c of the sample is this key; every `stride`-th tile of 64 is in it.
__device__ __forceinline__ u32 key_at(u32 column, u32 stride) { return column / 64 * (stride * 64) + column % 64; }

// A thread block takes the row of its number. Its level is the `want`-th largest pair (score, key) of the sample; -inf, so that all passes, for
// a row of up to `whole` keys, and for one whose sample has too few scores.
//
// With lists, what passes of the sample is entered, from the tiles that collecting then leaves out. Rows collect `together`: of those that
// have one request, the tiles are left out that all see to their end, none if any of these rows is so short that it needs no level.
// Shared memory: Workspace, and a word for each column and each list.
extern "C" __global__ void __launch_bounds__(512, 3) level(const Samples rows) {
  Workspace& work = *(Workspace*)shared_memory;
  u32* orders = (u32*)(shared_memory + sizeof(Workspace));  // 0: no number
  u32* counts = orders + rows.width;
  u32 row = blockIdx.x, width = rows.width;
  await_launch();
  const float* scores = rows.scores + (u64)row * rows.score_row;
  bool levelled = rows.ends[row] > rows.whole;
  Range range;
  u32 own = 0, num;
  for (u32 start = threadIdx.x; start < width; start += 4 * blockDim.x) {
    float score[4];
#pragma unroll
    for (u32 turn = 0; turn < 4; turn++) score[turn] = start + turn * blockDim.x < width ? scores[start + turn * blockDim.x] : 0.0f;
#pragma unroll
    for (u32 turn = 0; turn < 4; turn++) {
      u32 column = start + turn * blockDim.x;
      if (column >= width) break;
      bool number = score[turn] > -__int_as_float(0x7f800000);
      u64 pair = pair_of(score[turn], column);
      orders[column] = number ? (u32)(pair >> 32) : 0;
      if (number) range.add(pair), own++;
    }
  }
  for (u32 list = threadIdx.x; list < rows.lists; list += blockDim.x) counts[list] = 0;
  scan(own, work.warps[0], num);
  __syncthreads();
  auto each = [&](auto use) {  // of what this thread has just written
    for (u32 column = threadIdx.x; column < width; column += blockDim.x)
      if (orders[column] != 0) use((u64)orders[column] << 32 | ~column);
  };
  u64 level = 0;
  if (levelled && num >= rows.want) level = nth_largest(each, range, rows.want, work);
  // A column stands for as many keys as the stride.
  int level_key = level == 0 ? -1 : (int)(min((key_of(level) + 1) * rows.stride, 0x80000000u) - 1);
  if (threadIdx.x == 0) {
    rows.levels[row] = level == 0 ? -__int_as_float(0x7f800000) : number_of((u32)(level >> 32));
    rows.level_keys[row] = level_key;
  }
  if (rows.found == nullptr) return;

  u32 first = row / rows.together * rows.together, last = min(first + rows.together, rows.num_rows);
  u32 stop = ~0u;  // tiles
  for (u32 near = first; near < last; near++) {
    if (rows.requests[near] != rows.requests[row]) continue;
    long long end = rows.ends[near];
    stop = min(stop, end > rows.whole ? (u32)(end / 64) : 0);
  }
  each([&](u64 pair) {
    // By the rule of collecting, so that together they have all that passes.
    u32 column = key_of(pair), key = key_at(column, rows.stride), order = (u32)(pair >> 32), bar = (u32)(level >> 32);
    if (order < bar || (order == bar && (int)key > level_key) || key / 64 >= stop) return;
    u32 list = column % rows.lists, place = atomicAdd(&counts[list], 1u);  // any list would do
    u64 raw = (u64)__float_as_uint(scores[column]) << 32 | key;
    if (place < rows.room) rows.found[(u64)row * rows.found_row + list * rows.room + place] = raw;
  });
  __syncthreads();
  for (u32 list = threadIdx.x; list < rows.lists; list += blockDim.x) rows.counts[(u64)row * rows.lists + list] = counts[list];
}
