// What the kernels ask of the machine beyond plain C++. tests/cuda has another file of this name, for which threads take turns on a CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// The one piece of shared memory, of as many bytes as the launch says; each kernel lays it out.
extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr u32 EVERY = 0xffffffffu;  // lanes of a warp

__device__ __forceinline__ u32 lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp_of() { return threadIdx.x / 32; }

struct alignas(16) Four {
  u32 a, b, c, d;
};
struct alignas(16) Floats {
  float a, b, c, d;
};
struct Two {
  float a, b;
};

// Begin to copy 8 bytes to shared memory, or 16 or as many zeros. Wait for all that this thread began to copy, but for the last so many
// groups of it.
__device__ __forceinline__ void copy_ahead(u64* to, const u64* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_or_zero(Four* to, const Four* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// FP8 e4m3 and fp32: from two bytes, the lower first; to one.
__device__ __forceinline__ Two from_e4m3(u32 pair) {
  Two two;
  asm("{ .reg .b16 pair, low, high; .reg .b32 halves; cvt.u16.u32 pair, %2; cvt.rn.f16x2.e4m3x2 halves, pair; mov.b32 {low, high}, halves; "
      "cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(two.a), "=f"(two.b)
      : "r"(pair));
  return two;
}
__device__ __forceinline__ unsigned char to_e4m3(float value) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return (unsigned char)pair;
}
