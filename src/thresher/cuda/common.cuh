// What kernel files have in common. Included by each for itself, so without a guard: in the tests each has a namespace of its own.

// A score that is neither NaN nor -inf as a number that orders like it, and back.
__device__ __forceinline__ u32 order_of(float score) {
  u32 bits = __float_as_uint(score + 0.0f);  // -0.0 becomes 0.0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

// The sum of the values of a warp's lanes up to this one.
__device__ __forceinline__ u32 sum_upto(u32 value) {
  for (u32 step = 1; step < 32; step *= 2) {
    u32 other = __shfl_up_sync(EVERY, value, step);
    if (lane_of() >= step) value += other;
  }
  return value;
}
