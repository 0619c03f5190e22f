// The kernels as functions of a library for a CPU, whose threads take turns: see turns.h beside this file.
#include <cstddef>

#include <device.cuh>

namespace settle {
#include "settle.cu"
}
namespace step {
#include "step.cu"
}
namespace walk {
#include "walk.cu"
}

#define KERNEL(name, Arguments, call)                                                                             \
  extern "C" int run_##name(u32 grid, u32 threads, u32 shared, u32 order, const Arguments* arguments) {          \
    return host::run([=] { call(*arguments); }, grid, threads, shared, order);                                   \
  }

#define STEP_KERNEL(name, Arguments, kernel, dim, heads, teams)                                                                        \
  extern "C" int run_##name##_##dim##_##heads##_##teams(u32 grid, u32 threads, u32 shared, u32 order, const Arguments* arguments) { \
    return host::run([=] { kernel<dim, heads, teams>(*arguments); }, grid, threads, shared, order, true);                            \
  }
#define STEP_KERNELS(dim, heads, teams)                                       \
  STEP_KERNEL(select_tokens, step::Step, step::step, dim, heads, teams)       \
  STEP_KERNEL(select_in_blocks, step::Hisa, step::hisa, dim, heads, teams)

STEP_KERNELS(64, 16, 1)
STEP_KERNELS(128, 64, 1)
STEP_KERNELS(64, 16, 2)
STEP_KERNELS(64, 32, 2)
STEP_KERNELS(64, 64, 2)
STEP_KERNELS(128, 16, 2)
STEP_KERNELS(128, 32, 2)
STEP_KERNELS(128, 64, 2)
KERNEL(settle_1, settle::Lists, settle::settle_row)
KERNEL(settle_2, settle::Lists, settle::settle_row)
KERNEL(settle_3, settle::Lists, settle::settle_row)
KERNEL(pool_64, walk::Pool, walk::pool_blocks<64>)
KERNEL(pool_128, walk::Pool, walk::pool_blocks<128>)
KERNEL(own_64, walk::Own, walk::own_block<64>)
KERNEL(own_128, walk::Own, walk::own_block<128>)

extern "C" u32 bytes_before_mask() { return offsetof(settle::Workspace, mask); }
extern "C" u32 least_words() { return (sizeof(settle::Workspace) - offsetof(settle::Workspace, mask)) / 4; }

template <bool HISA>
using Largest = step::Workspace<128, 64, HISA>;
extern "C" u32 extra_tiles() { return step::EXTRA; }
extern "C" u32 mapped_tiles() { return step::MAPPED; }
extern "C" u32 bytes_of_tiles() { return offsetof(Largest<false>, query); }
extern "C" u32 bytes_before_pairs(bool in_blocks) {
  size_t query = offsetof(Largest<false>, query) + 64 * (128 + 4);
  return (in_blocks ? offsetof(Largest<true>, starts) : offsetof(Largest<false>, starts)) - query;
}
extern "C" u32 bytes_of_step() { return sizeof(step::Step); }
extern "C" u32 bytes_of_hisa() { return sizeof(step::Hisa); }
