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

#define STEP_STAGE(dim, heads, stage)                                                                                              \
  extern "C" int run_step_##dim##_##heads##_##stage(u32 grid, u32 threads, u32 shared, u32 order, const step::Step* arguments) { \
    return host::run([=] { step::step<dim, heads, (step::Stage)stage>(*arguments); }, grid, threads, shared, order, true);        \
  }
#define STEP_KERNELS(dim, heads) STEP_STAGE(dim, heads, 0) STEP_STAGE(dim, heads, 1) STEP_STAGE(dim, heads, 2)

STEP_KERNELS(64, 16)
STEP_KERNELS(64, 32)
STEP_KERNELS(64, 64)
STEP_KERNELS(128, 16)
STEP_KERNELS(128, 32)
STEP_KERNELS(128, 64)
KERNEL(settle_1, settle::Lists, settle::settle_row)
KERNEL(settle_2, settle::Lists, settle::settle_row)
KERNEL(settle_3, settle::Lists, settle::settle_row)
KERNEL(pool_64, walk::Pool, walk::pool_blocks<64>)
KERNEL(pool_128, walk::Pool, walk::pool_blocks<128>)
KERNEL(own_64, walk::Own, walk::own_block<64>)
KERNEL(own_128, walk::Own, walk::own_block<128>)

extern "C" u32 bytes_before_mask() { return offsetof(settle::Workspace, mask); }
extern "C" u32 least_words() { return (sizeof(settle::Workspace) - offsetof(settle::Workspace, mask)) / 4; }

extern "C" u32 extra_tiles() { return step::EXTRA; }
using Largest = step::Workspace<128, 64>;
extern "C" u32 bytes_of_tiles() { return offsetof(Largest, query); }
extern "C" u32 bytes_before_orders() { return offsetof(Largest, orders) - offsetof(Largest, query) - 64 * (128 + 4); }
