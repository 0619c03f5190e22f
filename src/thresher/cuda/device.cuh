// What the kernels ask of the machine beyond plain C++. tests/cuda has another file of this name, for which threads take turns on a CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// The one piece of shared memory, of as many bytes as the launch says; each kernel lays it out.
extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr u32 EVERY = 0xffffffffu;  // lanes of a warp

__device__ __forceinline__ u32 lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp_of() { return threadIdx.x / 32; }

// Begin to copy 8 bytes to shared memory, and wait for all that this thread began to.
__device__ __forceinline__ void copy_ahead(u64* to, const u64* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
