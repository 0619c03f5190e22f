// The kernels as functions of a library for a CPU, whose threads take turns: see device.cuh beside this file.
#include "level.cu"
#include "settle.cu"

extern "C" int run_settle(u32 grid, u32 threads, u32 shared, u32 order, const Lists* arguments) {
  return host::run([=] { settle_row(*arguments); }, grid, threads, shared, order);
}

extern "C" int run_level(u32 grid, u32 threads, u32 shared, u32 order, const Samples* arguments) {
  return host::run([=] { level(*arguments); }, grid, threads, shared, order);
}

extern "C" u32 size_of_workspace() { return sizeof(Workspace); }
