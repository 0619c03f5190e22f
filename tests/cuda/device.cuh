// In place of src/thresher/cuda/device.cuh: what kernels ask of the machine, for threads that take turns (turns.h beside this file).
#pragma once

#include "turns.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (host::current->index)
#define blockIdx (host::current->block->index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)
#define shared_memory (host::current->block->memory.data())

constexpr u32 EVERY = 0xffffffffu;

inline u32 lane_of() { return threadIdx.x % 32; }
inline u32 warp_of() { return threadIdx.x / 32; }

struct alignas(16) Four {
  u32 a, b, c, d;
};
struct Two {
  float a, b;
};
namespace host {
inline void copy(void* to, const void* from, size_t size) {
  if (lazy)
    current->copies.push_back({to, from, size, current->groups});
  else
    std::memcpy(to, from, size);
}
}  // namespace host
inline void copy_ahead(u64* to, const u64* from) { host::copy(to, from, sizeof(u64)); }
inline void copy_or_zero(Four* to, const Four* from, bool there) {
  static const Four zeros = {0, 0, 0, 0};
  host::copy(to, there ? from : &zeros, sizeof(Four));
}
inline void commit_copies() { host::current->groups++; }
template <u32 GROUPS>
void await_copies() {
  std::vector<host::Copy> left;
  for (const host::Copy& copy : host::current->copies)
    if (copy.group + GROUPS < host::current->groups)
      std::memcpy(copy.to, copy.from, copy.size);
    else
      left.push_back(copy);
  host::current->copies = left;
}

// A barrier that counts arrivals and bytes.
namespace host {
struct Counter {
  unsigned char arrivals, missing, round, spare;
  int bytes;
};
static_assert(sizeof(Counter) == sizeof(u64));
inline Counter* counter(u64* at) { return (Counter*)at; }
inline void count(u64* at, int arrivals, int bytes) {
  Counter* counter = host::counter(at);
  counter->missing -= arrivals, counter->bytes += bytes;
  if (counter->missing == 0 && counter->bytes == 0) counter->round ^= 1, counter->missing = counter->arrivals;
  moved = true;
}
inline void fetch(const std::function<void()>& copy) {
  if (lazy)
    current->block->fetches.push_back(copy);
  else
    copy();
}
}  // namespace host

struct alignas(64) TileMap {
  const unsigned char* pages;
  u64 page_bytes, dim, spare[13];
};
inline u32 swizzled_by(u32 dim, u32 row, u32 piece) { return row * dim + (piece ^ (dim == 128 ? row % 8 : row / 2 % 4)) * 16; }
template <u32 DIM>
u32 swizzled(u32 row, u32 piece) {
  return swizzled_by(DIM, row, piece);
}
inline void begin_barrier(u64* at, u32 arrivals) { *host::counter(at) = {(unsigned char)arrivals, (unsigned char)arrivals, 0, 0, 0}; }
inline void arrive(u64* at) { host::count(at, 1, 0); }
inline void expect(u64* at, u32 bytes) { host::count(at, 1, bytes); }
inline void await(u64* at, u32 parity) {
  while (host::counter(at)->round == parity) {
    std::vector<std::function<void()>> fetches;
    std::swap(fetches, host::current->block->fetches);
    for (auto& fetch : fetches) fetch();
    if (fetches.empty()) host::yield();
  }
}
inline void fetch_tile(void* to, const TileMap& map, u32 page, u64* barrier) {
  host::fetch([=, &map] {
    for (u32 row = 0; row < 64; row++)
      for (u32 piece = 0; piece < map.dim / 16; piece++)
        std::memcpy((unsigned char*)to + swizzled_by(map.dim, row, piece), map.pages + page * map.page_bytes + row * map.dim + piece * 16, 16);
    host::count(barrier, 0, -64 * (int)map.dim);
  });
}
inline void fetch_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
  host::fetch([=] {
    std::memcpy(to, from, bytes);
    host::count(barrier, 0, -(int)bytes);
  });
}
inline void fetch_map(const TileMap&) {}
inline void fence_for_copies() {}
inline void fence_for_async() {}
inline void fence_for_async_global() {}
inline void meet(u32 number, u32 threads) { host::meet(host::current->block->named[number], threads); }
template <u32 ALIGNMENT>
void* aligned_memory() {
  size_t at = (size_t)shared_memory;
  return (void*)((at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

inline void __syncthreads() { host::meet(host::current->block->barrier, blockDim.x); }
inline bool __syncthreads_or(bool value) { return host::meet(host::current->block->barrier, blockDim.x, value) > 0; }
inline u32 __shfl_up_sync(u32, u32 value, u32 step) {
  return host::exchange(value, [&](u32 lane, auto from) { return from(lane >= step ? lane - step : lane); });
}
inline u32 __reduce_add_sync(u32, u32 value) {
  return host::exchange(value, [&](u32, auto from) {
    u32 sum = 0;
    for (u32 lane = 0; lane < 32; lane++) sum += from(lane);
    return sum;
  });
}
template <class T>
T __shfl_sync(u32, T value, u32 lane) {
  return host::exchange(value, [&](u32, auto from) { return from(lane); });
}
template <class T>
T __shfl_xor_sync(u32, T value, u32 mask) {
  return host::exchange(value, [&](u32 lane, auto from) { return from(lane ^ mask); });
}
inline u32 __ballot_sync(u32, bool value) {
  return host::exchange((u32)value, [&](u32, auto from) {
    u32 word = 0;
    for (u32 lane = 0; lane < 32; lane++) word |= from(lane) << lane;
    return word;
  });
}
inline bool __any_sync(u32, bool value) { return __ballot_sync(0, value) != 0; }
inline void __syncwarp() { host::meet(host::current->block->warps[threadIdx.x / 32].barrier, 32); }
inline u32 __reduce_max_sync(u32, u32 value) {
  return host::exchange(value, [&](u32, auto from) {
    u32 most = 0;
    for (u32 lane = 0; lane < 32; lane++) most = std::max(most, from(lane));
    return most;
  });
}
inline u32 atomicAdd(u32* to, u32 value) { return *to += value, *to - value; }
inline u32 atomicMin(u32* to, u32 value) {
  u32 before = *to;
  *to = std::min(*to, value);
  return before;
}
inline u64 atomicCAS(u64* to, u64 expected, u64 value) {
  u64 before = *to;
  if (before == expected) *to = value;
  return before;
}
inline u32 atomicAnd(u32* to, u32 value) {
  u32 before = *to;
  *to &= value;
  return before;
}
inline u32 atomicOr(u32* to, u32 value) {
  u32 before = *to;
  *to |= value;
  return before;
}

inline int __popc(u32 word) { return __builtin_popcount(word); }
inline int __ffs(u32 word) { return __builtin_ffs(word); }
inline int __clz(u32 word) { return word ? __builtin_clz(word) : 32; }
inline int __clzll(u64 word) { return word ? __builtin_clzll(word) : 64; }
inline u32 __float_as_uint(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float((u32)bits); }
inline Two from_e4m3(u32 pair) {
  auto number = [](u32 code) {
    u32 exponent = code >> 3 & 15, fraction = code & 7;
    float size = exponent ? std::ldexp(8.0f + fraction, (int)exponent - 10) : std::ldexp((float)fraction, -9);
    if ((code & 127) == 127) size = NAN;
    return code & 128 ? -size : size;
  };
  return {number(pair & 255), number(pair >> 8 & 255)};
}
inline unsigned char to_e4m3(float value) {
  u32 sign = std::signbit(value) ? 128 : 0;
  float size = std::fabs(value);
  u32 exponent = size < 0.015625f ? 1 : (__float_as_uint(size) >> 23) - 120;
  u32 steps = (u32)std::nearbyint(std::ldexp(size, 10 - (int)exponent));  // of the last place; 16 of them are the next exponent's 8
  return (unsigned char)(sign | std::min((exponent - 1) * 8 + steps, 126u));
}
// NaN as Hopper makes it.
inline float fmaf(float a, float b, float c) {
  float made = std::fma(a, b, c);
  return made == made ? made : __uint_as_float(0x7fffffffu);
}
inline float mul(float a, float b) { return a * b; }
inline float add_two(float a, float b) { return a + b; }

inline void arrive_for_all(u32* at) { ++*at, host::moved = true; }
inline void await_all(const u32* at, u32 times) {
  while (*at < times) host::yield();
}
template <class T>
void publish(T* to, T word) {
  *to = word, host::moved = true;
}
inline void publish_far(u32* to, u32 word) { *to = word, host::moved = true; }
inline void await_far(const u32* from, u32 turn, u64) {
  while ((int)(*from - turn) < 0) host::yield();
}
template <class T>
T await_word(const T* from) {
  while (*from == 0) host::yield();
  return *from;
}
inline u32 kept_ready(u32 value) { return value; }
inline u32 uniform(u32 value) { return __shfl_sync(EVERY, value, 0); }
inline void pause() { host::yield(); }
inline void overlap_launches() {}
inline void fetch_line(const void*) {}
template <class T>
T changed(const T* from) {
  return *from;
}
template <class T>
T fresh(const T* from) {
  return *from;
}

struct Matrix {
  const unsigned char* at;
  explicit Matrix(const void* at) : at((const unsigned char*)at) {}
  Matrix operator+(u32 pieces) const { return Matrix(at + pieces * 1024); }
};
// Products are of values that add up exactly in any order, and made when they are awaited.
template <u32 DIM, u32 NUM>
void multiply(float (&d)[NUM], Matrix keys_at, Matrix queries_at) {
  const unsigned char *keys = keys_at.at, *queries = queries_at.at;
  static const std::vector<float> numbers = [] {
    std::vector<float> all;
    for (u32 code = 0; code < 256; code++) all.push_back(from_e4m3(code).a);
    return all;
  }();
  for (float& sum : d) sum = NAN;
  float* sums = d;
  host::current->product = [=] {
    u32 warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    auto row = [&](const void* from, u32 index, u32 at) {
      return numbers[((const unsigned char*)from)[swizzled_by(DIM, index, at / 16) + at % 16]];
    };
    for (u32 at = 0; at < NUM; at++) {
      u32 key = warp * 16 + lane / 4 + at % 4 / 2 * 8, column = at / 4 * 8 + lane % 4 * 2 + at % 2;
      float sum = 0;
      for (u32 dim = 0; dim < DIM; dim++) sum += row(keys, key, dim) * row(queries, column, dim);
      sums[at] = sum;
    }
  };
}
template <u32 NUM, class Then>
void await_products(float (&)[NUM], const Then& then) {
  host::current->product();
  __syncwarp();  // no lane goes on alone
  then();
}
using std::max;
using std::min;
