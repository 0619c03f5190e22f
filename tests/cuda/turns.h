// How the threads of a thread block take turns on one CPU.
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

namespace host {

constexpr size_t STACK = 32 * 1024, GUARD = 256;
constexpr u32 LATE = 16;  // in step.cu those that fetch
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

// Run a kernel; `order` 0: threads in order, 1: backwards, 2: warps from LATE on in every sixteenth round alone, else shuffled by it, and half of
// the warps rest at a time; in odd ones what is copied comes as late as it can, in even ones at once. Blocks run one after the other, or all of
// them `together`. Returns 1 where threads wait for each other forever, 2 where shared memory did not suffice, 3 where it does not come to an
// end.
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
    for (u32 round = 0, stuck = 0;; round++) {
      if (round == ROUNDS) return 3;
      if (order > 2) std::shuffle(turns.begin(), turns.end(), random);
      u64 resting = order > 2 ? (u64)random() << 32 | random() : 0;  // some warps fall behind
      bool late = order == 2 && round % 16, live = false;
      moved = resting != 0 || late;
      for (Thread* thread : turns) {
        if (thread->done) continue;
        live = true;
        if (late && thread->index.x / 32 >= LATE) continue;
        if (resting >> (thread->index.x / 32 + 7 * thread->block->index.x) % 64 & 1) continue;
        if (thread->awaits && thread->awaits->turn == thread->turn) continue;
        go_on(thread);
      }
      if (!live) break;
      if (moved && !late) stuck = 0;
      if (!moved && ++stuck == (order == 2 ? 4 : 1)) return 1;  // what late warps waited for may have come in a round of the others
    }
    for (const Block& block : blocks)
      for (size_t at = shared; at < block.memory.size(); at++)
        if (block.memory[at] != 0xcd) return 2;
  }
  return 0;
}

}  // namespace host
