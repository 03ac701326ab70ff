// Elements of fp32, bf16 and fp16 matrices, read eight consecutive ones at a time: a chunk.
//
// The same thread sums the same eight elements whatever their type and alignment, so that bits depend on values alone.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace nirvana {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 8;
constexpr int kWarpChunk = kWarp * kChunk;  // consecutive elements that a warp reads at once
constexpr unsigned kAllLanes = 0xffffffffu;

// How a kernel reads: chosen for a whole matrix, compiled separately to keep as many registers as a case needs.
enum class Access {
  kHalf,    // both operands 16 bits an element, 128-bit loads
  kVector,  // any types, 128-bit loads
  kScalar,  // any types, any alignment
};

// Chunks of each of two operands that are read before the first is used: 8 independent 128-bit loads a thread for two
// operands of 16 bits or two of 32, 16 scalar loads where nothing is aligned.
template <Access kAccess>
constexpr int kBatch = kAccess == Access::kHalf ? 4 : kAccess == Access::kVector ? 2 : 1;

// Bits of a chunk: one word an fp32 element, one word two 16-bit elements (the last four stay unused).
struct Chunk {
  unsigned word[kChunk];
};

template <Access kAccess>
__device__ __forceinline__ int size_of(int type) {
  return kAccess != Access::kHalf && type == kFloat32 ? 4 : 2;
}

// The first `count` elements, one by one; 0 for the others.
template <Access kAccess>
__device__ __forceinline__ Chunk load_part(const char* address, int type, int count) {
  Chunk chunk = {};
  if (kAccess != Access::kHalf && type == kFloat32) {
    const unsigned* elements = reinterpret_cast<const unsigned*>(address);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) chunk.word[i] = __ldg(elements + i);
    }
  } else {
    const unsigned short* elements = reinterpret_cast<const unsigned short*>(address);
    unsigned element[kChunk] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) element[i] = __ldg(elements + i);
    }
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) chunk.word[i] = element[2 * i] | element[2 * i + 1] << 16;
  }
  return chunk;
}

// A whole chunk.
template <Access kAccess>
__device__ __forceinline__ Chunk load_chunk(const char* address, int type) {
  if constexpr (kAccess == Access::kScalar) {
    return load_part<kAccess>(address, type, kChunk);
  } else {
    Chunk chunk = {};
    const uint4* vectors = reinterpret_cast<const uint4*>(address);
    const uint4 low = __ldg(vectors);
    chunk.word[0] = low.x, chunk.word[1] = low.y, chunk.word[2] = low.z, chunk.word[3] = low.w;
    if (kAccess == Access::kVector && type == kFloat32) {
      const uint4 high = __ldg(vectors + 1);
      chunk.word[4] = high.x, chunk.word[5] = high.y, chunk.word[6] = high.z, chunk.word[7] = high.w;
    }
    return chunk;
  }
}

// Every conversion is exact.
template <Access kAccess>
__device__ __forceinline__ void to_float(const Chunk& chunk, int type, float (&value)[kChunk]) {
  if (kAccess != Access::kHalf && type == kFloat32) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[i] = __uint_as_float(chunk.word[i]);
  } else if (type == kBFloat16) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      value[2 * i] = __uint_as_float(chunk.word[i] << 16);
      value[2 * i + 1] = __uint_as_float(chunk.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      value[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(chunk.word[i] & 0xffffu)));
      value[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(chunk.word[i] >> 16)));
    }
  }
}

// Sums in a fixed tree. Intrinsics, here and in every kernel, because a compiler must not fuse them with a product:
// fused and separate round differently.
__device__ __forceinline__ float tree(const float (&value)[8]) {
  return __fadd_rn(__fadd_rn(__fadd_rn(value[0], value[1]), __fadd_rn(value[2], value[3])),
                   __fadd_rn(__fadd_rn(value[4], value[5]), __fadd_rn(value[6], value[7])));
}

// Last index with first[index] <= block; `first` ascends from 0. The array is small and stays in the first-level cache.
__device__ __forceinline__ int find(const std::int64_t* first, int size, std::int64_t block) {
  int low = 0, high = size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(first + middle) <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace nirvana
