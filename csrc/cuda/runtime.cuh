// Launching and what the host must know of the device. Every launch is checked. Outside of nvcc the tests' emulator
// stands in for the runtime, and runs the same kernels on the CPU.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace bucketmoo {

struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may have
  int64_t l2_bytes;
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("bucketmoo_ds CUDA backend: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline Device current_device() {
  int index = 0;
  int l2 = 0;
  Device device{};
  check(cudaGetDevice(&index), "cudaGetDevice");
  const auto read = [index](int* value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(value, attribute, index), "cudaDeviceGetAttribute");
  };
  read(&device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&l2, cudaDevAttrL2CacheSize);
  device.l2_bytes = l2;
  return device;
}

// Above 48 KB a kernel must ask for its shared memory.
template <class Kernel>
void allow_shared(Kernel kernel, int shared_bytes, const char* name) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  }
}

template <class Kernel>
int blocks_per_multiprocessor(Kernel kernel, int threads, int shared_bytes, const char* name) {
  allow_shared(kernel, shared_bytes, name);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), name);
  if (blocks == 0) {
    throw std::runtime_error(std::string("bucketmoo_ds CUDA backend: ") + name + ": no block fits a multiprocessor");
  }
  return blocks;
}

struct Shape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  bool cooperative = false;
};

template <class... Parameters>
void launch(
    const char* name, void (*kernel)(Parameters...), Shape shape, void* stream,
    std::type_identity_t<Parameters>... values) {
  allow_shared(kernel, shape.shared_bytes, name);
  void* arguments[] = {&values...};
  const dim3 grid(static_cast<unsigned>(shape.blocks));
  const dim3 block(static_cast<unsigned>(shape.threads));
  const auto start = shape.cooperative ? cudaLaunchCooperativeKernel<void> : cudaLaunchKernel<void>;
  const cudaError_t error = start(
      reinterpret_cast<void*>(kernel), grid, block, arguments, shape.shared_bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess && shape.cooperative) {
    cudaGetLastError();  // forgets it
    throw NotTogether(cudaGetErrorString(error));
  }
  check(error, name);
}

}  // namespace bucketmoo

#else
#include "cuda_on_host.h"  // tests/unit/cuda_on_host
#endif
