// The few primitives that the CUDA kernels are written on. A kernel is a function template over its grid; here is the grid of a GPU.
// tests/native/emulated_grid.h has one with the same members that runs on the CPU, one fiber for each CUDA thread, so that the
// very same kernels are tested without a GPU.
//
//   thread() threads()         index in the block, size of the block (a multiple of 32)
//   block() blocks()           index in the grid, size of the grid
//   lane() warp() warps()      index in the warp, index of the warp in the block, warps in the block
//   block_barrier()            all threads of the block; orders memory within the block
//   grid_barrier()             all threads of the grid (cooperative launches only); orders memory within the grid
//   ballot(p)                  bit j: p of lane j. All 32 lanes must call it, as with shuffle
//   shuffle(v, lane)           v of another lane
//   atomic_add(p, v)           in shared or global memory, no order implied; gives what was there before
//   atomic_or(p, v)            likewise
//   shared<S>()                the block's S, not initialised; one S per kernel
#pragma once

#include "../key.h"

#if defined(__CUDACC__)
#define S2AP_DEVICE __device__ __forceinline__
#define S2AP_DEVICE_APART __device__ __noinline__  // off the hot path: it is to cost the rest of the kernel no registers
#define S2AP_UNROLL _Pragma("unroll")
#include <cooperative_groups.h>
#else
#include <bit>
#define S2AP_DEVICE inline
#define S2AP_DEVICE_APART inline
#define S2AP_UNROLL
#endif

namespace s2ap::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kThreads = 512;  // of a block on a GPU; known to the compiler, so that what a thread loads lies at fixed distances

#if defined(__CUDACC__)

struct CudaGrid {
  S2AP_DEVICE unsigned thread() const { return threadIdx.x; }
  S2AP_DEVICE unsigned threads() const { return kThreads; }
  S2AP_DEVICE unsigned block() const { return blockIdx.x; }
  S2AP_DEVICE unsigned blocks() const { return gridDim.x; }
  S2AP_DEVICE unsigned lane() const { return threadIdx.x % kWarp; }
  S2AP_DEVICE unsigned warp() const { return threadIdx.x / kWarp; }
  S2AP_DEVICE unsigned warps() const { return kThreads / kWarp; }

  S2AP_DEVICE void block_barrier() const { __syncthreads(); }
  S2AP_DEVICE void grid_barrier() const { cooperative_groups::this_grid().sync(); }

  S2AP_DEVICE uint32_t ballot(bool predicate) const { return __ballot_sync(~0u, predicate); }
  template <class V>
  S2AP_DEVICE V shuffle(V value, unsigned lane) const {
    return __shfl_sync(~0u, value, static_cast<int>(lane));
  }

  S2AP_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) const { return atomicAdd(p, v); }
  S2AP_DEVICE int64_t atomic_add(int64_t* p, int64_t v) const {  // two's complement: the same bits as the unsigned sum
    return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v)));
  }
  S2AP_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t v) const { return atomicOr(p, v); }

  template <class S>
  S2AP_DEVICE S& shared() const {
    __shared__ alignas(16) unsigned char storage[sizeof(S)];
    return reinterpret_cast<S&>(storage);
  }
};

S2AP_DEVICE unsigned count_bits(uint32_t bits) { return __popc(bits); }
S2AP_DEVICE unsigned first_bit(uint32_t bits) { return __ffs(bits) - 1; }
S2AP_DEVICE int bit_length(uint32_t x) { return 32 - __clz(x); }
S2AP_DEVICE int bit_length(uint64_t x) { return 64 - __clzll(x); }

#else

S2AP_DEVICE unsigned count_bits(uint32_t bits) { return std::popcount(bits); }
S2AP_DEVICE unsigned first_bit(uint32_t bits) { return std::countr_zero(bits); }
template <class V>
S2AP_DEVICE int bit_length(V x) {
  return static_cast<int>(std::bit_width(x));
}

#endif

// Runs the phases first to last - 1 of a kernel with grid barriers between them. One that is idle, which must be the same to all threads
// from the barrier in front of it on, costs no barrier of its own.
template <class Grid, class IsIdle, class Run>
S2AP_DEVICE void run_phases(const Grid& grid, int first, int last, IsIdle is_idle, Run run) {
  bool separated = true;  // from what the last phase did
  for (int phase = first; phase < last; ++phase) {
    if (!separated) grid.grid_barrier();
    separated = is_idle(phase);
    if (!separated) run(phase);
  }
}

// Sum over the warp, in every lane.
template <class Grid, class V>
S2AP_DEVICE V warp_sum(const Grid& grid, V value) {
  for (unsigned step = kWarp / 2; step > 0; step /= 2) value += grid.shuffle(value, grid.lane() ^ step);
  return value;
}

// What block_scan needs of a block's shared storage.
struct ScanStorage {
  uint32_t warp_sums[32];
};

struct Scan {
  uint32_t before;  // sum over the threads before this one
  uint32_t total;   // sum over the block
};

// Prefix sum over the block. Ends with a barrier, so that the storage is free again.
template <class Grid>
S2AP_DEVICE Scan block_scan(const Grid& grid, ScanStorage& storage, uint32_t value) {
  uint32_t inclusive = value;
  for (unsigned step = 1; step < kWarp; step *= 2) {
    uint32_t lower = grid.shuffle(inclusive, (grid.lane() - step) % kWarp);
    if (grid.lane() >= step) inclusive += lower;
  }
  if (grid.lane() == kWarp - 1) storage.warp_sums[grid.warp()] = inclusive;
  grid.block_barrier();
  Scan scan{inclusive - value, 0};
  for (unsigned warp = 0; warp < grid.warps(); ++warp) {
    if (warp < grid.warp()) scan.before += storage.warp_sums[warp];
    scan.total += storage.warp_sums[warp];
  }
  grid.block_barrier();
  return scan;
}

}  // namespace s2ap::cuda
