// In place of src/thresher/cuda/device.cuh: a thread block's threads take turns on one CPU.
//
// A thread runs until it waits for others, so what a kernel leaves to chance between two barriers is decided by the order of turns, and by
// when copies come: run in several orders, it must give the same. Shared memory begins as garbage, and what is written behind it is found out.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace host {

constexpr size_t STACK = 32 * 1024, GUARD = 256;
constexpr u32 ROUNDS = 10000;  // of turns of all threads, more than any kernel needs

struct Barrier {
  u32 arrived = 0, turn = 0, sum = 0, result = 0;
};
struct Warp {
  Barrier barrier;
  u64 values[32];
};
struct Dim {
  u32 x = 0, y = 0, z = 0;
};
struct Block {
  Dim index;
  std::vector<unsigned char> memory;
  Barrier barrier, named[16];
  std::vector<std::function<void()>> fetches;  // that the copy engine has not begun
  std::vector<Warp> warps;
};
struct Copy {
  void* to;
  const void* from;
  size_t size;
  u32 group;
};
struct Thread {
  ucontext_t begin;
  jmp_buf resume;  // from where it waits: unlike swapcontext, a jump asks the kernel for nothing
  bool begun = false;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
  Dim index;
  Block* block;
  const Barrier* awaits = nullptr;  // with the turn that it must leave
  u32 turn = 0;
  bool done = false;
  std::vector<Copy> copies;  // begun, which show when they are awaited if they are late
  u32 groups = 0;            // of them that were committed
  std::function<void()> product;  // begun, which is made when it is awaited
};

inline Thread* current;
inline jmp_buf scheduler;
inline Dim block_size, grid_size;
inline bool lazy;   // whether what is copied comes only when somebody waits for it
inline bool moved;  // whether anything happened since the scheduler last asked
inline std::function<void()> body;

inline void yield() {
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}
inline void go_on(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler)) return;
  if (thread->begun) _longjmp(thread->resume, 1);
  thread->begun = true;
  setcontext(&thread->begin);
}

inline u32 meet(Barrier& barrier, u32 expected, u32 value = 0) {
  u32 turn = barrier.turn;
  barrier.sum += value;
  if (++barrier.arrived == expected) {
    barrier.result = barrier.sum;
    barrier.arrived = barrier.sum = 0;
    barrier.turn++;
    moved = true;
  } else {
    current->awaits = &barrier, current->turn = turn;
    while (barrier.turn == turn) yield();
    current->awaits = nullptr;
  }
  return barrier.result;
}
inline void enter() {
  body();
  current->done = moved = true;
  while (true) yield();
}

template <class Value, class Combine>
Value exchange(Value value, const Combine& combine) {
  Warp& warp = current->block->warps[current->index.x / 32];
  u32 lane = current->index.x % 32;
  std::memcpy(&warp.values[lane], &value, sizeof value);
  meet(warp.barrier, 32);
  Value result = combine(lane, [&](u32 from) {
    Value theirs;
    std::memcpy(&theirs, &warp.values[from], sizeof theirs);
    return theirs;
  });
  meet(warp.barrier, 32);
  return result;
}

// Run a kernel; `order` 0: threads in order, 1: backwards, else shuffled by it, and half of the warps rest at a time; in odd ones what is
// copied comes as late as it can, in even ones at once. Blocks run one after the other, or all of them `together`. Returns 1 where threads wait for each other forever, 2 where
// shared memory did not suffice, 3 where it does not come to an end.
inline int run(const std::function<void()>& kernel, u32 grid, u32 threads, u32 shared, u32 order, bool together = false) {
  body = kernel;
  lazy = order % 2 == 1;
  block_size = {threads, 1, 1}, grid_size = {grid, 1, 1};
  std::mt19937 random(order);
  u32 at_once = together ? grid : 1;
  for (u32 first = 0; first < grid; first += at_once) {
    std::vector<Block> blocks(at_once);
    std::vector<Thread> all(at_once * threads);
    std::vector<Thread*> turns;
    for (u32 index = 0; index < at_once; index++) {
      Block& block = blocks[index];
      block.index.x = first + index;
      block.memory.assign(shared + GUARD, 0xcd);
      block.warps.resize(threads / 32);
      for (u32 at = 0; at < threads; at++) {
        Thread& thread = all[index * threads + at];
        thread.index.x = at;
        thread.block = &block;
        getcontext(&thread.begin);
        thread.begin.uc_stack.ss_sp = thread.stack.get();
        thread.begin.uc_stack.ss_size = STACK;
        makecontext(&thread.begin, enter, 0);
        turns.push_back(&thread);
      }
    }
    if (order == 1) std::reverse(turns.begin(), turns.end());
    for (u32 round = 0;; round++) {
      if (round == ROUNDS) return 3;
      if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
      u64 resting = order > 1 ? (u64)random() << 32 | random() : 0;  // some warps fall behind
      bool live = false;
      moved = resting != 0;
      for (Thread* thread : turns) {
        if (thread->done) continue;
        live = true;
        if (resting >> (thread->index.x / 32 + 7 * thread->block->index.x) % 64 & 1) continue;
        if (thread->awaits && thread->awaits->turn == thread->turn) continue;
        go_on(thread);
      }
      if (!live) break;
      if (!moved) return 1;
    }
    for (const Block& block : blocks)
      for (size_t at = shared; at < block.memory.size(); at++)
        if (block.memory[at] != 0xcd) return 2;
  }
  return 0;
}

}  // namespace host

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
inline void fence_for_copies() {}
inline void fence_for_async() {}
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
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul(float a, float b) { return a * b; }
inline float add_two(float a, float b) { return a + b; }

inline void arrive_for_all(u32* at) { ++*at, host::moved = true; }
inline void await_all(const u32* at, u32 times) {
  while (*at < times) host::yield();
}
inline void publish(u64* to, u64 word) { *to = word, host::moved = true; }
inline u64 await_word(const u64* from) {
  while (*from == 0) host::yield();
  return *from;
}
template <class T>
T changed(const T* from) {
  return *from;
}
template <class T>
T fresh(const T* from) {
  return *from;
}

// Products are of values that add up exactly in any order, and made when they are awaited.
template <u32 DIM, u32 NUM>
void multiply(float (&d)[NUM], const void* keys, const void* queries) {
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
