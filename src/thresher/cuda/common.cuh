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

// Store a mean in FP8 as cache.fp8.quantize_fp8 does, to the bit, by DIM threads, the first of a block: the scale is a power of two, from the
// bits of the largest magnitude. A mean that is not finite is stored as NaN under scale 1. `warps` are DIM / 32 words of theirs.
template <u32 DIM, class Meet>
__device__ __forceinline__ void store_mean(float mean, unsigned char* values, float* scale, u32* warps, const Meet& meet) {
  u32 top = __reduce_max_sync(EVERY, __float_as_uint(mean) & 0x7fffffffu);
  if (lane_of() == 0) warps[warp_of()] = top;
  meet();
  for (u32 warp = 0; warp < DIM / 32; warp++) top = max(top, warps[warp]);
  bool finite = top < 0x7f800000u;
  top = max(top, 0x38d1b717u);  // 1e-4
  // The largest over 448 = 1.75 * 2**8, rounded up to a power of two.
  u32 exponent = finite ? (top >> 23) - 8 + ((top & 0x7fffffu) > 0x600000u) : 127;
  float inverse = __uint_as_float((254 - exponent) << 23);
  values[threadIdx.x] = finite ? to_e4m3(mean * inverse) : 0x7f;
  if (threadIdx.x == 0) *scale = __uint_as_float(exponent << 23);
}
