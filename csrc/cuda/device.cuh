// The host side of a launch: the current device, the grid, and errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace nirvana {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what could be reported has been; the next call of anyone must not find it again
  throw std::runtime_error(std::string("nirvana CUDA kernel '") + what + "': " + cudaGetErrorString(error));
}

// Makes a device current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "current device");
    if (device != before_) check(cudaSetDevice(device), "device");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t size, std::int64_t part) {
  return (size + part - 1) / part;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), std::int64_t blocks, int layers, int threads, Queue queue,
            Arguments... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("nirvana CUDA kernel '") + what + "': too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(layers));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace nirvana
