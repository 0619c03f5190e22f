// What the kernels ask of the machine beyond plain C++. tests/cuda has another file of this name, for which threads take turns on a CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// The one piece of shared memory, of as many bytes as the launch says; each kernel lays it out.
extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr u32 EVERY = 0xffffffffu;  // lanes of a warp

__device__ __forceinline__ u32 lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp_of() { return threadIdx.x / 32; }

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

struct alignas(16) Four {
  u32 a, b, c, d;
};
struct Two {
  float a, b;
};

// Begin to copy 8 bytes to shared memory, and wait for all that this thread began to.
__device__ __forceinline__ void copy_ahead(u64* to, const u64* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Barriers in shared memory that count arrivals and bytes of the copy engine. They are waited for by the parity of their round.
__device__ __forceinline__ void begin_barrier(u64* at, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_begun_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive_and_expect(u64* at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await_round(u64* at, u32 parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}
// What this thread wrote to shared memory comes before what the copy engine brings there.
__device__ __forceinline__ void fence_for_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Have the copy engine bring bytes, a multiple of 16 as both addresses are, of which the barrier is told.
__device__ __forceinline__ void fetch_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// FP8 e4m3 and fp32.
__device__ __forceinline__ Two from_e4m3(u32 a, u32 b) {
  Two two;
  asm("{ .reg .b16 pair, low, high; .reg .b32 halves; cvt.u16.u32 pair, %2; cvt.rn.f16x2.e4m3x2 halves, pair; mov.b32 {low, high}, halves; "
      "cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(two.a), "=f"(two.b)
      : "r"(a | b << 8));
  return two;
}
__device__ __forceinline__ unsigned char to_e4m3(float value) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return (unsigned char)pair;
}
