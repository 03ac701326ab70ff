// The few pieces of CUDA that csrc/cuda uses, on the CPU, for tests without a GPU: the same .cu files, host and device
// code, compile with g++ -x c++ -I tests/cuda_emulation.
//
// A launch runs its blocks one after the other; the threads of a block are fibers that run in turn, each until it waits
// at a __syncthreads, __syncwarp or __shfl_xor_sync, and each warp as far as it comes. With NIRVANA_EMULATION_REVERSE
// set, blocks and threads run in the opposite order, which must not change a bit. `stream` is ignored. There are two
// devices; a third is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, at most
constexpr std::size_t kStack = 128 * 1024;

enum class State { kReady, kWaitsForWarp, kWaitsForBlock, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf place;  // _setjmp is many times faster than swapcontext, which calls the kernel
  State state;
  double offered[2];  // in shuffles, in turn: no lane can be two shuffles ahead of another
  int turn;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current;
inline const std::function<void()>* body;

inline void wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

// A fiber lives for ever: it runs a kernel, waits for the next block, and so on.
inline void enter() {
  for (wait(State::kDone);; wait(State::kDone)) (*body)();
}

inline void start() {
  if (!fibers.empty()) return;
  fibers.resize(kThreads);
  for (current = 0; current < kThreads; ++current) {
    Fiber& fiber = fibers[current];
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    if (_setjmp(scheduler) == 0) setcontext(&context);
  }
}

inline void resume(int index) {
  current = index;
  if (_setjmp(scheduler) == 0) _longjmp(fibers[index].place, 1);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

// Lets the threads begin..end go on if all of them wait for `state`. Threads that have ended count for __syncthreads,
// as on a GPU; in a warp they are an error, because every mask here names all lanes.
inline bool release(int begin, int end, State state) {
  int waiting = 0, done = 0;
  for (int i = begin; i < end; ++i) {
    waiting += fibers[i].state == state;
    done += fibers[i].state == State::kDone;
  }
  if (waiting == 0 || waiting + done < end - begin) return false;
  if (state == State::kWaitsForWarp && done > 0) fail("a lane has left its warp before a collective of all lanes");
  for (int i = begin; i < end; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::kReady;
  }
  return true;
}

// Runs a warp until it can go no further by itself: as far ahead of the others as a GPU may let it come.
inline void run_warp(int begin, bool reverse) {
  do {
    for (int i = 0; i < kWarp; ++i) {
      const int thread = begin + (reverse ? kWarp - 1 - i : i);
      if (fibers[thread].state != State::kReady) continue;
      threadIdx = dim3(thread, 0, 0);
      resume(thread);
    }
  } while (release(begin, begin + kWarp, State::kWaitsForWarp));
}

inline void run_block(int threads, bool reverse) {
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = State::kReady;
    fibers[i].turn = 0;
  }
  do {
    for (int i = 0; i < threads; i += kWarp) run_warp(reverse ? threads - kWarp - i : i, reverse);
  } while (release(0, threads, State::kWaitsForBlock));
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].state != State::kDone) fail("threads wait for each other at different places");
  }
}

template <typename T>
T exchange(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(double), "");
  Fiber& fiber = fibers[current];
  const int turn = fiber.turn;
  fiber.turn ^= 1;
  std::memcpy(&fiber.offered[turn], &value, sizeof value);
  wait(State::kWaitsForWarp);
  std::memcpy(&value, &fibers[current / kWarp * kWarp + lane].offered[turn], sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::kWaitsForBlock); }
inline void __syncwarp() { emulation::wait(emulation::State::kWaitsForWarp); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) emulation::fail("masks of some lanes are not emulated");
  return emulation::exchange(value, emulation::current % emulation::kWarp ^ lanes);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

inline int emulated_device = 0;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulated_device = device;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const std::function<void()> call = [&] { kernel(arguments...); };
  emulation::body = &call;
  const bool reverse = std::getenv("NIRVANA_EMULATION_REVERSE") != nullptr;
  emulation::start();
  if (config->blockDim.x > emulation::kThreads || config->blockDim.x % emulation::kWarp != 0) {
    emulation::fail("blocks of other sizes are not emulated");
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned blocks = gridDim.x * gridDim.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = reverse ? blocks - 1 - i : i;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
    emulation::run_block(static_cast<int>(blockDim.x), reverse);
  }
  return cudaSuccess;
}
