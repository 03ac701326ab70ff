// The kernels in simd/ are compiled once for each level of the instruction set, and one level is chosen at run time.
//
// Not with target_clones: GCC 12 splits vector operations into SSE ones before it makes the clones (9.7 instead of 25 GB/s
// for columns of bf16), and Clang knows no clones of templates.
#pragma once

#include <cstdint>

#include "mixture.h"
#include "saliency.h"

namespace nirvana {

struct Kernels {
  const char* level;

  // sums[s * stride + row] for each of the rows [first, last): 64 fp32 lanes over blocks of 2048 columns (32 terms each),
  // then fp64.
  void (*row_sums)(const Reduction& reduction, int64_t first, int64_t last, int statistics, double* sums,
                   int64_t stride);

  // Adds to sums[s * stride + column - left] for the columns [left, right) over the rows [first, last): fp32 over 4 rows,
  // then fp64.
  void (*column_sums)(const Reduction& reduction, int64_t first, int64_t last, int64_t left, int64_t right,
                      int statistics, double* sums, int64_t stride);

  // The five running sums of one row of two matrices of logits; fp32 terms, 64 lanes over blocks of 1024 words, then
  // fp64.
  void (*divergence)(const Matrix& p, const Matrix& q, int64_t row, int64_t vocabulary, double* state);

  // What a step of expectation-maximisation needs of `length` scores; fp32 terms, 16 lanes over 32 terms, then fp64.
  void (*mixture_sums)(const float* scores, int64_t length, const Mixture& mixture, MixtureSums* sums);

  // Log-density of each score.
  void (*mixture_density)(const float* scores, int64_t length, const Mixture& mixture, double* density);

  // Copies the elements of a row whose bit in `kept` is set (bit c % 16 of word c / 16), in order; there are `width` of them.
  // False, and nothing done, where this level has no instruction for elements of that size.
  bool (*compress)(const char* from, const uint16_t* kept, int64_t columns, int element_size, char* to, int64_t width);

  // Reads two buffers once.
  uint64_t (*checksum)(const char* first, const char* second, int64_t bytes);
};

// Those of the highest level that this processor has, or of the one that was forced.
const Kernels& kernels();

// The levels that this processor has, lowest first. All give the same bits.
std::vector<const char*> levels();

// Forces a level, for tests. False if this processor does not have it.
bool force_level(const char* level);

}  // namespace nirvana
