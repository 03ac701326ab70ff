// e^x for sums of exponentials whose largest is 1.
#pragma once

#include <cuda_runtime.h>

namespace nirvana {

// 2^x by the machine's own instruction, relative error 2^-22; results below 2^-126 are 0. Neither exp2f nor __expf are
// this instruction alone: they scale what would be subnormal, in three more, unless everything is compiled to flush.
__device__ __forceinline__ float exponential2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);  // for whoever runs this on a CPU
#endif
}

__device__ __forceinline__ float exponential(float x) { return exponential2(__fmul_rn(x, 1.44269504f)); }

}  // namespace nirvana
