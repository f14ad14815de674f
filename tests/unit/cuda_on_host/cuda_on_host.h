// As much of CUDA as the kernels in csrc/cuda use, on one thread of the CPU, for tests where no GPU is: every CUDA
// thread is a fiber, and barriers, shuffles and the tensor-core instruction are meetings of fibers. Between meetings
// threads run in an order that is drawn, as blocks and warps do, so that what needs a barrier and has none comes out
// wrong. Shared memory is poisoned before each block; a barrier that not all threads reach is an error. It shows that
// indices, barriers and arithmetic are right, and nothing about speed, memory ordering or the rounding inside of a tensor
// core.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
using std::isfinite;

namespace emulator {

struct Meeting {
  int expected = 0;
  int arrived = 0;
  int generation = 0;
};

struct Warp {
  Meeting meeting;
  uint64_t value[32];
  uint32_t a[32][4];
  uint32_t b[32][2];
};

struct Block {
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<char> shared;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started;
  const Meeting* awaited;
  int generation;
  Block* block;
  unsigned thread;
  unsigned block_index;
  bool done;
};

inline Fiber* current;
// Switching by jumps needs no system call; only the first entry into a fiber takes a context.
inline jmp_buf scheduler;
inline Meeting grid;
inline std::function<void()> body;
inline int64_t progress;  // meetings kept and fibers ended
inline std::minstd_rand order;  // who runs next

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  std::shuffle(result.begin(), result.end(), order);
  return result;
}

inline void meet(Meeting& meeting) {
  const int generation = meeting.generation;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++progress;
    return;
  }
  current->awaited = &meeting;
  current->generation = generation;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

inline Warp& warp() { return current->block->warps[current->thread / 32]; }

template <class T>
T exchange(T value, unsigned from) {
  Warp& mine = warp();
  mine.value[current->thread % 32] = 0;
  std::memcpy(&mine.value[current->thread % 32], &value, sizeof(T));
  meet(mine.meeting);
  T result;
  std::memcpy(&result, &mine.value[from % 32], sizeof(T));
  meet(mine.meeting);
  return result;
}

inline void enter() {
  body();
  current->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

inline bool waits(const Fiber& fiber) {
  return fiber.done || (fiber.awaited != nullptr && fiber.awaited->generation == fiber.generation);
}

// Lets a fiber run until it waits or ends.
inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block_index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Lets the 32 fibers of a warp run, in one of 512 orders; and mostly once more, if that let some go on: a warp may be far
// ahead of the others.
inline void resume_warp(Fiber* warp) {
  for (int64_t before = -1; before != progress && order() % 4 != 0;) {
    before = progress;
    const unsigned first = order() % 32, stride = order() % 16 * 2 + 1;
    for (unsigned turn = 0; turn < 32; ++turn) {
      Fiber& fiber = warp[(first + turn * stride) % 32];
      if (!waits(fiber)) resume(fiber);
    }
  }
}

// Runs the blocks [first, last) side by side.
inline void run(const char* name, unsigned first, unsigned last, unsigned threads, int shared_bytes) {
  constexpr size_t kStack = 1 << 15;
  static std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Block> blocks(last - first);
  std::vector<Fiber> fibers(size_t{last - first} * threads);
  grid = {static_cast<int>(fibers.size()), 0, 0};
  for (auto& block : blocks) {
    block.meeting.expected = static_cast<int>(threads);
    block.warps.resize(threads / 32);
    for (auto& warp : block.warps) warp.meeting.expected = 32;
    block.shared.assign(shared_bytes + 16, static_cast<char>(0xff));
  }
  for (size_t index = 0; index < fibers.size(); ++index) {
    Fiber& fiber = fibers[index];
    if (index >= stacks.size()) stacks.push_back(std::make_unique<char[]>(kStack));
    fiber.started = false;
    fiber.awaited = nullptr;
    fiber.block = &blocks[index / threads];
    fiber.thread = index % threads;
    fiber.block_index = first + index / threads;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[index].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    for (unsigned warp : shuffled(fibers.size() / 32)) resume_warp(&fibers[32 * warp]);
    running = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.done; });
    if (running && std::all_of(fibers.begin(), fibers.end(), waits)) {
      throw std::runtime_error(std::string(name) + ": a barrier that not all reach");
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet(emulator::current->block->meeting); }
inline void __syncwarp() { emulator::meet(emulator::warp().meeting); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  emulator::Warp& warp = emulator::warp();
  warp.value[threadIdx.x % 32] = predicate;
  emulator::meet(warp.meeting);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(warp.value[lane]) << lane;
  emulator::meet(warp.meeting);
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }

namespace bucketmoo {

struct Device {
  int multiprocessors;
  int shared_bytes;
  int64_t l2_bytes;
};

inline Device emulated_device{3, 227 << 10, 50 << 20};
inline Device current_device() { return emulated_device; }

template <class Kernel>
int blocks_per_multiprocessor(Kernel, int, int shared_bytes, const char* name) {
  if (shared_bytes > emulated_device.shared_bytes) throw std::runtime_error(std::string(name) + ": shared memory");
  return 1;
}

struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool cooperative = false;
};

template <class... Parameters>
void launch(
    const char* name, void (*kernel)(Parameters...), Shape shape, void*, std::type_identity_t<Parameters>... values) {
  emulator::body = [&] { kernel(values...); };
  gridDim.x = static_cast<unsigned>(shape.blocks);
  blockDim.x = static_cast<unsigned>(shape.threads);
  const unsigned together = shape.cooperative ? gridDim.x : 1;
  for (unsigned index : emulator::shuffled(gridDim.x / together)) {
    emulator::run(name, index * together, (index + 1) * together, blockDim.x, shape.shared_bytes);
  }
}

inline char* shared_memory() {
  auto address = reinterpret_cast<uintptr_t>(emulator::current->block->shared.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

inline void grid_barrier() { emulator::meet(emulator::grid); }

inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
inline float float16_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t to_float16(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The fragments of mma.m16n8k16: lane = 4 g + t has rows g and g + 8 of A, column g of B, and k = 2t, 2t + 1 and the
// same plus 8 of both; of the result, columns 2t and 2t + 1 of those rows. (PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type".)
template <float (*kWiden)(uint16_t)>
void tensor_multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Warp& warp = emulator::warp();
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(warp.a[lane], a, sizeof(a));
  std::memcpy(warp.b[lane], b, sizeof(b));
  emulator::meet(warp.meeting);
  for (int result = 0; result < 4; ++result) {
    const int upper = result / 2;
    const unsigned row = lane / 4;
    const unsigned column = lane % 4 * 2 + result % 2;
    float sum = c[result];
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2;
      const int shift = k % 2 * 16;
      const auto left = static_cast<uint16_t>(warp.a[row * 4 + quarter][upper + k / 8 * 2] >> shift);
      const auto right = static_cast<uint16_t>(warp.b[column * 4 + quarter][k / 8] >> shift);
      sum += kWiden(left) * kWiden(right);
    }
    c[result] = sum;
  }
  emulator::meet(warp.meeting);
}

inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  tensor_multiply<bfloat16_to_float>(c, a, b);
}
inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  tensor_multiply<float16_to_float>(c, a, b);
}

}  // namespace bucketmoo
