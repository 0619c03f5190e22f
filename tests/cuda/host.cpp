// The kernels as functions of a library for a CPU, whose threads take turns: see device.cuh beside this file.
#include <cstddef>

#include <device.cuh>

namespace settle {
#include "settle.cu"
}
namespace walk {
#include "walk.cu"
}

#define KERNEL(name, Arguments, call)                                                                             \
  extern "C" int run_##name(u32 grid, u32 threads, u32 shared, u32 order, const Arguments* arguments) {          \
    return host::run([=] { call(*arguments); }, grid, threads, shared, order);                                   \
  }

KERNEL(settle_1, settle::Lists, settle::settle_row)
KERNEL(settle_2, settle::Lists, settle::settle_row)
KERNEL(settle_3, settle::Lists, settle::settle_row)
KERNEL(pool_64, walk::Pool, walk::pool_block<64>)
KERNEL(pool_128, walk::Pool, walk::pool_block<128>)
KERNEL(own_64, walk::Own, walk::own_block<64>)
KERNEL(own_128, walk::Own, walk::own_block<128>)

extern "C" u32 bytes_before_mask() { return offsetof(settle::Workspace, mask); }
extern "C" u32 least_words() { return (sizeof(settle::Workspace) - offsetof(settle::Workspace, mask)) / 4; }
