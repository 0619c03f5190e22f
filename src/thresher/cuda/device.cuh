// What the kernels ask of the machine beyond plain C++. tests/cuda has another file of this name, for which threads take turns on a CPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

// The one piece of shared memory, of as many bytes as the launch says; each kernel lays it out.
extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr u32 EVERY = 0xffffffffu;  // lanes of a warp

__device__ __forceinline__ u32 lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ u32 warp_of() { return threadIdx.x / 32; }

// What a warp's lanes have alike; so the compiler knows that they do.
__device__ __forceinline__ u32 uniform(u32 value) { return __shfl_sync(EVERY, value, 0); }

// The compiler keeps this in a register, rather than make it again and again.
__device__ __forceinline__ u32 kept_ready(u32 value) {
  asm("" : "+r"(value));
  return value;
}

struct alignas(16) Four {
  u32 a, b, c, d;
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

// Arithmetic that the compiler leaves as it is: no multiplication and addition become one.
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_two(float a, float b) { return __fadd_rn(a, b); }

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
template <u32 ALIGNMENT>  // of the launch's shared memory, which must have so much more
__device__ __forceinline__ void* aligned_memory() {
  return shared_memory + (ALIGNMENT - shared_address(shared_memory) % ALIGNMENT) % ALIGNMENT;
}

// A barrier of some of a block's threads, number 1 to 15.
__device__ __forceinline__ void meet(u32 number, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// Barriers in shared memory that count arrivals and, where told to expect them, bytes: waited for by the parity of their round.
__device__ __forceinline__ void begin_barrier(u64* at, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u64* at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void expect(u64* at, u32 bytes) {  // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await(u64* at, u32 parity) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory comes before what the copy engine and the matrix unit do there.
__device__ __forceinline__ void fence_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory, also for what other blocks wrote there and this thread waited for.
__device__ __forceinline__ void fence_for_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The copy engine: a tile of 64 keys of a page, swizzled, and bytes as they are; either at a multiple of 16 bytes. They leave the L2 cache
// before others do: what blocks exchange, and scores that found no room in shared memory, should stay.
constexpr u64 READ_ONCE = 0x12f0000000000000;
struct alignas(64) TileMap {
  unsigned char opaque[128];
};
// To the caches, before it is asked for: a map, a line of 128 bytes.
__device__ __forceinline__ void fetch_map(const TileMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
__device__ __forceinline__ void fetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
__device__ __forceinline__ void fence_for_copies() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void fetch_tile(void* to, const TileMap& map, u32 page, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %2, %3}], [%4], "
      "%5;" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(0), "r"(page), "r"(shared_address(barrier)), "l"(READ_ONCE)
      : "memory");
}
__device__ __forceinline__ void fetch_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(READ_ONCE)
               : "memory");
}

// The launch that follows may begin, and this one goes on once that before it has ended: nothing it wrote is read before.
__device__ __forceinline__ void overlap_launches() { asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory"); }

// What all blocks at work see: how often some have arrived at a place, and memory that others wrote before they did.
__device__ __forceinline__ void arrive_for_all(u32* at) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}
__device__ __forceinline__ void await_all(const u32* at, u32 times) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
  while (seen < times);
}
// A word that others read as soon as it is not zero: no arrival need be waited for, nor one ordered behind it.
__device__ __forceinline__ void publish(u64* to, u64 word) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory"); }
__device__ __forceinline__ void publish(u32* to, u32 word) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory"); }
// A word that tells other GPUs what this warp, or whom it has met, wrote to their memory before.
__device__ __forceinline__ void publish_far(u32* to, u32 word) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory"); }
__device__ __forceinline__ void look(const u64* from, u64& word) { asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory"); }
__device__ __forceinline__ void look(const u32* from, u32& word) { asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory"); }
__device__ __forceinline__ void pause() { __nanosleep(1500); }  // before a thread looks again
template <class T>
__device__ __forceinline__ T await_word(const T* from) {
  T word;
  do look(from, word);
  while (word == 0);
  return word;
}
// A word that another GPU tells this one by. Who waits for longer than `patience` ns gives up, and with it the process.
__device__ __forceinline__ void await_far(const u32* from, u32 turn, u64 patience) {
  u64 began, now;
  u32 seen;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
  while (true) {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(from) : "memory");
    if ((int)(seen - turn) >= 0) return;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (now - began > patience) __trap();
  }
}
template <class T>  // of this memory or of shared memory: what others of this block made it by atomic operations
__device__ __forceinline__ T changed(const T* from) {
  return *(const volatile T*)from;
}
template <class T>
__device__ __forceinline__ T fresh(const T* from) {
  return __ldcg(from);
}
__device__ __forceinline__ Four fresh(const Four* from) {
  uint4 four = __ldcg((const uint4*)from);
  return {four.x, four.y, four.z, four.w};
}

// The matrix unit: 64 keys by as many columns, in FP8, as the copy engine swizzles them. Thread t of a group of four warps has keys
// t / 32 * 16 + t % 32 / 4 and 8 more, and columns 8 j + t % 4 * 2 and the next: d[4 j + 2 * key + column].
template <u32 DIM>
__device__ __forceinline__ u32 swizzled(u32 row, u32 piece) {  // where 16 bytes of a row stand
  return row * DIM + (piece ^ (DIM == 128 ? row % 8 : row / 2 % 4)) * 16;
}
// Where a matrix stands, as the unit is told: the lower of two words, of which the upper is the same for all.
struct Matrix {
  u32 word;
  __device__ __forceinline__ Matrix(u32 word) : word(word) {}
  __device__ __forceinline__ explicit Matrix(const void* at) : word(kept_ready(1 << 16 | (shared_address(at) & 0x3ffff) / 16)) {}
  __device__ __forceinline__ Matrix operator+(u32 pieces) const { return word + pieces * 64; }  // of 1024 bytes
};
__device__ __forceinline__ void multiply_32(float (&d)[8], u32 keys, u32 queries, u32 high, bool onto) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 a, b; mov.b64 a, {%8, %10}; mov.b64 b, {%9, %10}; setp.ne.b32 p, %11, 0; "
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, a, b, p, 1, 1; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(keys), "r"(queries), "r"(high), "r"((int)onto));
}
__device__ __forceinline__ void multiply_32(float (&d)[16], u32 keys, u32 queries, u32 high, bool onto) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 a, b; mov.b64 a, {%16, %18}; mov.b64 b, {%17, %18}; setp.ne.b32 p, %19, 0; "
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, a, b, p, 1, 1; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(keys), "r"(queries), "r"(high), "r"((int)onto));
}
__device__ __forceinline__ void multiply_32(float (&d)[32], u32 keys, u32 queries, u32 high, bool onto) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 a, b; mov.b64 a, {%32, %34}; mov.b64 b, {%33, %34}; setp.ne.b32 p, %35, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, a, b, p, 1, 1; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(keys), "r"(queries), "r"(high), "r"((int)onto));
}
template <u32 DIM, u32 NUM>  // begin a product
__device__ __forceinline__ void multiply(float (&d)[NUM], Matrix keys, Matrix queries) {
  constexpr u32 HIGH = (DIM == 128 ? 1u : 2u) << 30 | DIM / 2;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (u32 k = 0; k < DIM / 32; k++) multiply_32(d, keys.word + 2 * k, queries.word + 2 * k, HIGH, k > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <u32 NUM, class Then>  // wait for all products, call then(), and only then read `d`
__device__ __forceinline__ void await_products(float (&d)[NUM], const Then& then) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  then();
#pragma unroll
  for (u32 at = 0; at < NUM; at++) asm volatile("" : "+f"(d[at])::"memory");
}
