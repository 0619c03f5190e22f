// What kernel files have in common. Included by each for itself, so without a guard: in the tests each has a namespace of its own.

// A score that is neither NaN nor -inf as a number that orders like it, and back.
__device__ __forceinline__ u32 order_of(float score) {
  u32 bits = __float_as_uint(score + 0.0f);  // -0.0 becomes 0.0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

constexpr u32 SCORE_BINS = 2048;

// Bins of orders, ascending: 32 for each power of two from 2**-16 to 2**16, of either sign. The outer ones hold what lies beyond.
__device__ __forceinline__ u32 score_bin(u32 order) {
  bool negative = order < 0x80000000u;
  u32 size = (negative ? ~order : order) & 0x7fffffffu;
  u32 place = min(max((int)(size >> 18) - (127 - 16) * 32, 0), (int)SCORE_BINS / 2 - 1);
  return negative ? SCORE_BINS / 2 - 1 - place : SCORE_BINS / 2 + place;
}

// The sum of the values of a warp's lanes up to this one.
__device__ __forceinline__ u32 sum_upto(u32 value) {
  for (u32 step = 1; step < 32; step *= 2) {
    u32 other = __shfl_up_sync(EVERY, value, step);
    if (lane_of() >= step) value += other;
  }
  return value;
}
