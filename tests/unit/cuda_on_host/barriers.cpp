// Kernels that need one barrier each, with it and without: what the emulator's orders of threads, warps and blocks must
// tell apart. Without it each is right if threads run in the order of their numbers.
#include "cuda_on_host.h"

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

unsigned before(unsigned index) { return index == 0 ? 0 : index - 1; }

// Each thread reads what the one before it, maybe in another warp, has written to shared memory.
void read_in_block(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(bucketmoo::shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[before(threadIdx.x)];
}

// The same, of the thread before it in its warp.
void read_in_warp(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(bucketmoo::shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (barrier) __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[threadIdx.x % 32 == 0 ? threadIdx.x : before(threadIdx.x)];
}

// Each warp reads what the one behind it has written, and then overwrites its own.
void overwrite(int* out, bool barrier) {
  int* shared = reinterpret_cast<int*>(bucketmoo::shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[(threadIdx.x + 32) % kThreads / 32 * 32];
  // Where the warps have not met, one may be this far ahead.
  for (int turn = 0; turn < 4; ++turn) __syncwarp();
  if (barrier) __syncthreads();
  if (threadIdx.x >= 32) shared[threadIdx.x] = -1;
}

// Each block reads what the one before it has written to global memory.
void read_in_grid(int* out, bool barrier) {
  int* last = out + kBlocks * kThreads;
  if (threadIdx.x == 0) last[blockIdx.x] = blockIdx.x;
  if (barrier) bucketmoo::grid_barrier();
  out[blockIdx.x * kThreads + threadIdx.x] = last[before(blockIdx.x)];
}

}  // namespace

// out [4 * 64 + 4], of which the last 4 are scratch memory.
extern "C" void run_barriers(int kernel, bool barrier, uint32_t seed, int* out) {
  emulator::order.seed(seed);
  void (*const kernels[])(int*, bool) = {read_in_block, read_in_warp, overwrite, read_in_grid};
  bucketmoo::launch("barriers", kernels[kernel], {kBlocks, kThreads, kThreads * 4, true}, nullptr, out, barrier);
}
