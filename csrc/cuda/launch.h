// What the Python module calls: plain C++, so that no compiler but nvcc needs the CUDA headers.
//
// Every function selects `device`, enqueues its kernels on `stream`, selects the former device again and returns
// without waiting. An error of CUDA is thrown as std::runtime_error with the text of CUDA. Addresses are of device
// memory. Shapes and types are checked in Python.
#pragma once

#include <cstdint>
#include <vector>

namespace nirvana {

// A device and a cudaStream_t of it.
struct Queue {
  int device;
  std::uintptr_t stream;
};

// Codes of element types in tables and arguments.
enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows and columns of one block in the first launch of `saliency`: where axis 0 is kept (sums over columns), and where
// axis 1 is (sums over rows). Python computes tables with the same numbers.
constexpr int kAxis0Rows = 8, kAxis0Columns = 2048;
constexpr int kAxis1Rows = 128, kAxis1Columns = 256;

// Most rows (axis 0) or columns (axis 1) of a unit that the first launch of `saliency` leaves one partial sum of.
constexpr int kAxis0Fold = kAxis0Rows, kAxis1Fold = 32;

// Adds sums of products to the outputs that a table names; nirvana/ops/backends/cuda.py builds it, saliency.cu reads
// it.
//   table       int64: `entries` entries, their first tiles [entries + 1], `outputs` outputs, their first blocks
//               [outputs + 1]; or 0
//   one         without a table the one entry and after it the one output: they go to the kernels as arguments
//   workspace   fp32, as large as the table's entries say
//   tiles       blocks of the first launch, first_tile[entries]
//   blocks      blocks of the second launch, first_block[outputs]
//   statistics  bits of nirvana.ops.saliency.STATISTICS
void saliency(std::uintptr_t table, const std::vector<std::int64_t>& one, std::int64_t entries, std::int64_t outputs,
              std::int64_t tiles, std::int64_t blocks, std::uintptr_t workspace, int statistics, Queue queue);

struct GatherMatrix {
  std::uintptr_t source;
  std::int64_t stride;  // bytes from row to row of the source
  std::uintptr_t out;   // contiguous
  std::int64_t rows;    // of out
  std::int64_t bytes;   // of a row of out
};

// Copies the kept units of several matrices.
//   kept  int64 indices of units, on the device
//   unit  rows a unit (axis 0) or bytes a unit (axis 1)
void gather(const std::vector<GatherMatrix>& matrices, std::uintptr_t kept, int axis, std::int64_t unit, Queue queue);

struct Logits {
  std::uintptr_t data;
  std::int64_t stride;  // bytes from token to token
  int type;
};

// fp64 numbers that `divergence` needs for logits of this shape; a pure function of it, 0 for many tokens.
std::int64_t divergence_workspace(std::int64_t tokens, std::int64_t vocabulary);

// KL(p || q) of each token: fp32 [tokens] to `out`, or where that is 0 the fp64 [5, tokens] of
// nirvana.ops.divergence.merge to `state`.
void divergence(Logits p, Logits q, std::int64_t tokens, std::int64_t vocabulary, std::uintptr_t out,
                std::uintptr_t state, std::uintptr_t workspace, Queue queue);

}  // namespace nirvana
