// In place of src/thresher/cuda/device.cuh: a thread block's threads take turns on one CPU.
//
// A thread runs until it waits for others, so what a kernel leaves to chance between two barriers is decided by the order of turns alone: run
// in several, it must give the same. Shared memory begins as garbage, and what is written behind it is found out.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

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
  Barrier barrier;
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
  std::vector<Copy> copies;  // begun, which show when they are awaited and not before
  u32 groups = 0;            // of them that were committed
};

inline Thread* current;
inline jmp_buf scheduler;
inline Dim block_size;
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

// Run a kernel; `order` 0: threads in order, 1: backwards, else shuffled by it, and half of the warps rest at a time. Returns 1 where
// threads wait for each other forever, 2 where shared memory did not suffice, 3 where it does not come to an end.
inline int run(const std::function<void()>& kernel, u32 grid, u32 threads, u32 shared, u32 order) {
  body = kernel;
  block_size = {threads, 1, 1};
  std::mt19937 random(order);
  for (u32 index = 0; index < grid; index++) {
    Block block;
    block.index.x = index;
    block.memory.assign(shared + GUARD, 0xcd);
    block.warps.resize(threads / 32);
    std::vector<Thread> all(threads);
    std::vector<Thread*> turns;
    for (u32 at = 0; at < threads; at++) {
      Thread& thread = all[at];
      thread.index.x = at;
      thread.block = &block;
      getcontext(&thread.begin);
      thread.begin.uc_stack.ss_sp = thread.stack.get();
      thread.begin.uc_stack.ss_size = STACK;
      makecontext(&thread.begin, enter, 0);
      turns.push_back(&thread);
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
        if (resting >> thread->index.x / 32 & 1) continue;
        if (thread->awaits && thread->awaits->turn == thread->turn) continue;
        go_on(thread);
      }
      if (!live) break;
      if (!moved) return 1;
    }
    for (size_t at = shared; at < block.memory.size(); at++)
      if (block.memory[at] != 0xcd) return 2;
  }
  return 0;
}

}  // namespace host

#define threadIdx (host::current->index)
#define blockIdx (host::current->block->index)
#define blockDim (host::block_size)
#define shared_memory (host::current->block->memory.data())

constexpr u32 EVERY = 0xffffffffu;

inline u32 lane_of() { return threadIdx.x % 32; }
inline u32 warp_of() { return threadIdx.x / 32; }

struct alignas(16) Four {
  u32 a, b, c, d;
};
struct alignas(16) Floats {
  float a, b, c, d;
};
struct Two {
  float a, b;
};
inline void copy_ahead(u64* to, const u64* from) { host::current->copies.push_back({to, from, sizeof(u64), host::current->groups}); }
inline void copy_or_zero(Four* to, const Four* from, bool there) {
  static const Four zeros = {0, 0, 0, 0};
  host::current->copies.push_back({to, there ? from : &zeros, sizeof(Four), host::current->groups});
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
using std::max;
using std::min;
