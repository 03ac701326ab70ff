// Copies of the kept units of matrices. Bytes are moved, in words as wide as every address and length allows.
//
// Bytes: what is kept is read once and written once. Of a row of columns the whole is read where the gaps are shorter
// than the 32 bytes that memory moves at a time.
#include "device.cuh"

namespace nirvana {
namespace {

constexpr int kMatrices = 16;  // a launch; they travel as an argument of the kernel, without a copy to the device
constexpr int kWarpSize = 32;
constexpr int kRowThreads = 256;
constexpr int kRowWords = 8;  // a thread of the row kernel has in flight
constexpr int kColumnThreads = 128;
constexpr int kColumnRows = 16;  // a thread of the column kernel

struct Matrix {
  const char* source;
  char* out;
  std::int64_t stride;  // bytes
  std::int64_t rows;
  std::int64_t words;  // a row of out
};

struct Matrices {
  Matrix matrix[kMatrices];
};

// 64-bit division is a long subroutine.
__device__ __forceinline__ std::int64_t quotient(std::int64_t size, std::int64_t part) {
  if (((size | part) >> 32) == 0) return static_cast<unsigned>(size) / static_cast<unsigned>(part);
  return size / part;
}

__device__ __forceinline__ std::int64_t source_of(std::int64_t index, const std::int64_t* kept, std::int64_t unit) {
  const std::int64_t number = quotient(index, unit);
  return __ldg(kept + number) * unit + (index - number * unit);
}

// A warp copies 32 x 8 words of a row.
template <typename Word>
__global__ __launch_bounds__(kRowThreads) void gather_rows(const Matrices matrices, const std::int64_t* kept,
                                                           std::int64_t unit) {
  const Matrix& matrix = matrices.matrix[blockIdx.y];
  constexpr int kWords = kWarpSize * kRowWords;
  const std::int64_t parts = divide_up(matrix.words, kWords);
  const std::int64_t item =
      static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const std::int64_t row = quotient(item, parts);
  if (row >= matrix.rows) return;
  const std::int64_t begin = (item - row * parts) * kWords + threadIdx.x % kWarpSize;
  const Word* source = reinterpret_cast<const Word*>(matrix.source + source_of(row, kept, unit) * matrix.stride);
  Word* out = reinterpret_cast<Word*>(matrix.out) + row * matrix.words;
  Word word[kRowWords];
#pragma unroll
  for (int i = 0; i < kRowWords; ++i) {
    if (begin + i * kWarpSize < matrix.words) word[i] = __ldg(source + begin + i * kWarpSize);
  }
#pragma unroll
  for (int i = 0; i < kRowWords; ++i) {
    if (begin + i * kWarpSize < matrix.words) out[begin + i * kWarpSize] = word[i];
  }
}

// A thread copies 16 words of one column: it looks its source up once, and a warp writes consecutive words. Eight
// blocks a multiprocessor leave 64 registers a thread: left to itself the compiler takes 32 and waits for every fourth
// load.
template <typename Word>
__global__ __launch_bounds__(kColumnThreads, 8) void gather_columns(const Matrices matrices, const std::int64_t* kept,
                                                                 std::int64_t unit) {
  const Matrix& matrix = matrices.matrix[blockIdx.y];
  const std::int64_t strips = divide_up(matrix.words, kColumnThreads);
  const std::int64_t tile = quotient(blockIdx.x, strips);
  const std::int64_t column = (blockIdx.x - tile * strips) * kColumnThreads + threadIdx.x;
  const std::int64_t row = tile * kColumnRows;
  if (row >= matrix.rows || column >= matrix.words) return;
  const char* source = matrix.source + row * matrix.stride + source_of(column, kept, unit) * sizeof(Word);
  Word* out = reinterpret_cast<Word*>(matrix.out) + row * matrix.words + column;
  if (row + kColumnRows <= matrix.rows) {
    constexpr int kFlight = sizeof(Word) <= 4 ? kColumnRows : kColumnRows / 2;  // loads before the first store
#pragma unroll
    for (int begin = 0; begin < kColumnRows; begin += kFlight) {
      Word word[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        word[i] = __ldg(reinterpret_cast<const Word*>(source));
        source += matrix.stride;
      }
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        *out = word[i];
        out += matrix.words;
      }
    }
  } else {
    for (std::int64_t left = matrix.rows - row; left > 0; --left) {
      *out = __ldg(reinterpret_cast<const Word*>(source));
      source += matrix.stride;
      out += matrix.words;
    }
  }
}

template <typename Word>
void gather_words(const GatherMatrix* matrices, int count, const std::int64_t* kept, int axis, std::int64_t unit,
                  Queue queue) {
  Matrices table{};
  std::int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const GatherMatrix& from = matrices[i];
    const std::int64_t words = from.bytes / static_cast<std::int64_t>(sizeof(Word));
    table.matrix[i] = {reinterpret_cast<const char*>(from.source), reinterpret_cast<char*>(from.out), from.stride,
                       from.rows, words};
    const std::int64_t needed =
        axis == 0 ? divide_up(from.rows * divide_up(words, kWarpSize * kRowWords), kRowThreads / kWarpSize)
                  : divide_up(words, kColumnThreads) * divide_up(from.rows, kColumnRows);
    blocks = needed > blocks ? needed : blocks;
  }
  if (axis == 0) {
    launch("gather rows", gather_rows<Word>, blocks, count, kRowThreads, queue, table, kept, unit);
  } else {
    const std::int64_t words = unit / static_cast<std::int64_t>(sizeof(Word));
    launch("gather columns", gather_columns<Word>, blocks, count, kColumnThreads, queue, table, kept, words);
  }
}

}  // namespace

void gather(const std::vector<GatherMatrix>& matrices, std::uintptr_t kept, int axis, std::int64_t unit, Queue queue) {
  const DeviceGuard guard(queue.device);
  const auto* indices = reinterpret_cast<const std::int64_t*>(kept);
  for (std::size_t begin = 0; begin < matrices.size(); begin += kMatrices) {
    const int count = static_cast<int>(matrices.size() - begin < kMatrices ? matrices.size() - begin : kMatrices);
    const GatherMatrix* part = matrices.data() + begin;
    std::uint64_t bits = axis == 0 ? 0 : static_cast<std::uint64_t>(unit);
    for (int i = 0; i < count; ++i) {
      bits |= part[i].source | part[i].out | static_cast<std::uint64_t>(part[i].stride | part[i].bytes);
    }
    if (bits % 16 == 0) {
      gather_words<uint4>(part, count, indices, axis, unit, queue);
    } else if (bits % 8 == 0) {
      gather_words<uint2>(part, count, indices, axis, unit, queue);
    } else if (bits % 4 == 0) {
      gather_words<unsigned>(part, count, indices, axis, unit, queue);
    } else if (bits % 2 == 0) {
      gather_words<unsigned short>(part, count, indices, axis, unit, queue);
    } else {
      gather_words<unsigned char>(part, count, indices, axis, unit, queue);
    }
  }
}

}  // namespace nirvana
