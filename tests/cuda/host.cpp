// The kernels as functions of a library for a CPU, whose threads take turns: see device.cuh beside this file.
#include <cstddef>

#include "settle.cu"

extern "C" int run_settle(u32 grid, u32 threads, u32 shared, u32 order, const Lists* arguments) {
  return host::run([=] { settle_row(*arguments); }, grid, threads, shared, order);
}

extern "C" u32 bytes_before_mask() { return offsetof(Workspace, mask); }
extern "C" u32 least_words() { return (sizeof(Workspace) - offsetof(Workspace, mask)) / 4; }
