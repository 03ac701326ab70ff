// Sums of products of weights and gradients over groups of rows or columns, for a table of matrices in two launches.
//
// Launch 1 sums tiles of fixed size to fp32 partials, launch 2 sums the partials of each unit and adds them to the
// output. No order depends on the number of blocks in flight, on other matrices of the table, on types or on alignment;
// no atomics. One matrix is a table of one, whose entry and output go as arguments of the kernels: nothing is copied to
// the device, and a grouped call has the bits of single ones by construction.
//
// Order of a sum. Axis 0: a lane adds trees over 8 columns, chunk after chunk of a 2048-column tile; a tree over the 32
// lanes. Axis 1: a lane adds 16 rows of a 128-row tile, 8 apart; a tree over the 8 warps. Then in both a tree over the
// neighbours of one unit, as many as `fold` says: a position of the partials is 1, 2, 4 .. rows or columns of a unit.
// Then, for each unit: a lane adds its positions and, 8 apart, tiles; a tree over lanes, a tree over the 8 warps, one
// addition to the output.
//
// Bytes, 8B shapes in bf16 (2 + 2 an element), one statistic. gate [14336, 4096], axis 0: 235 MB read, a partial every
// 2048 elements: 0.11 MB written and read, 0.1 %; 3584 tiles. down [4096, 14336], axis 1: 235 MB read, a partial every
// 128 elements: 1.8 MB written and read, 1.6 %, which fits the second-level cache; 1792 tiles. o [4096, 4096]: 512
// tiles. A statistic more costs a partial more: 3 % for two of axis 1, 9 % for all six.
#include <cstring>

#include "device.cuh"
#include "elements.cuh"

namespace nirvana {
namespace {

constexpr int kStatisticCount = 6;
constexpr int kReadsWeight = 1 | 2 | 8 | 16 | 32;  // statistics that need weights: all but sum |g|
constexpr int kReadsGrad = 1 | 2 | 4 | 8;          // all but sum |w| and sum w^2

// One row of the table. 8-byte fields, because Python writes it as int64.
struct Entry {
  std::int64_t weight;  // address
  std::int64_t grad;
  std::int64_t weight_stride;  // bytes from row to row
  std::int64_t grad_stride;
  std::int64_t weight_type;
  std::int64_t grad_type;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t axis;
  std::int64_t group;
  std::int64_t access;   // Access
  std::int64_t partial;  // first element in the workspace: [statistic][tile][position]
  std::int64_t next;     // entry that is added to the same output after this one, or -1
};

struct Output {
  std::int64_t data;   // address of fp32 [statistics, units]
  std::int64_t units;
  std::int64_t first;  // entry that is added first
  std::int64_t units_a_block;
};

// What is in no table: the only entry and the only output of a call.
struct One {
  Entry entry;
  Output output;
};

constexpr int kEntryFields = sizeof(Entry) / sizeof(std::int64_t);
constexpr int kOutputFields = sizeof(Output) / sizeof(std::int64_t);

struct Operand {
  const char* data;
  std::int64_t stride;
  int type;
  bool read;

  template <Access kAccess>
  __device__ __forceinline__ const char* at(std::int64_t row, std::int64_t column) const {
    return data + row * stride + column * size_of<kAccess>(type);
  }
};

// `statistic` is the number of a bit of the mask, known at compile time once loops are unrolled.
__device__ __forceinline__ float term(int statistic, float weight, float grad) {
  const float product = __fmul_rn(grad, weight);
  switch (statistic) {
    case 0:
      return fabsf(product);
    case 1:
      return product;
    case 2:
      return fabsf(grad);
    case 3:
      return __fmul_rn(product, product);
    case 4:
      return fabsf(weight);
    default:
      return __fmul_rn(weight, weight);
  }
}

// kStatistics: 1 where the mask is sum |g w| alone, else 6, of which the mask chooses at run time.
template <int kStatistics>
__device__ __forceinline__ bool chosen(int mask, int statistic) {
  return kStatistics == 1 || (mask >> statistic & 1);
}

// Rows (axis 0) or columns (axis 1) of a position: the most that neither a group nor what folds is cut by.
__device__ __forceinline__ int fold_of(const Entry& entry) {
  const std::int64_t most = entry.axis == 0 ? kAxis0Fold : kAxis1Fold, divisor = entry.group & -entry.group;
  return static_cast<int>(divisor < most ? divisor : most);
}

// Column sums of each warp of a block. Element i of lane l stands at 36 i + l: no two lanes of a warp meet in a bank,
// neither writing nor reading.
constexpr int kPitch = kWarp + 4;
using ColumnSums = float[kWarps][kChunk * kPitch];

// Axis 0: one row a warp, 2048 columns.
template <int kStatistics, Access kAccess>
__device__ __forceinline__ void sum_rows(const Entry& entry, const Operand& weight, const Operand& grad,
                                         std::int64_t tile, int mask, float* partials, ColumnSums& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t tiles = divide_up(entry.columns, kAxis0Columns);
  const std::int64_t row = tile / tiles * kAxis0Rows + warp;
  tile %= tiles;
  if (row >= entry.rows) return;  // a whole warp
  const std::int64_t left = entry.columns - tile * kAxis0Columns;
  const int columns = left < kAxis0Columns ? static_cast<int>(left) : kAxis0Columns;
  const char* weights = weight.at<kAccess>(row, tile * kAxis0Columns + lane * kChunk);
  const char* grads = grad.at<kAccess>(row, tile * kAxis0Columns + lane * kChunk);
  const int weight_step = kWarpChunk * size_of<kAccess>(weight.type);
  const int grad_step = kWarpChunk * size_of<kAccess>(grad.type);

  float sum[kStatistics] = {};
  const auto accumulate = [&](const Chunk& weight_chunk, const Chunk& grad_chunk) {
    float w[kChunk], g[kChunk];
    to_float<kAccess>(weight_chunk, weight.type, w);
    to_float<kAccess>(grad_chunk, grad.type, g);
#pragma unroll
    for (int statistic = 0; statistic < kStatistics; ++statistic) {
      if (!chosen<kStatistics>(mask, statistic)) continue;
      float terms[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) terms[i] = term(statistic, w[i], g[i]);
      sum[statistic] = __fadd_rn(sum[statistic], tree(terms));
    }
  };

  constexpr int kLoads = kBatch<kAccess>;
  for (int begin = 0; begin < columns; begin += kLoads * kWarpChunk) {
    Chunk w[kLoads] = {}, g[kLoads] = {};  // a chunk of zeros adds zero
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int chunk = begin / kWarpChunk + i;
      if (chunk * kWarpChunk + (lane + 1) * kChunk <= columns) {
        if (weight.read) w[i] = load_chunk<kAccess>(weights + chunk * weight_step, weight.type);
        if (grad.read) g[i] = load_chunk<kAccess>(grads + chunk * grad_step, grad.type);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) accumulate(w[i], g[i]);
  }
  // Columns that fill no chunk: the last ones of their lane.
  const int chunk = columns / kWarpChunk, rest = columns % kChunk;
  if (rest != 0 && lane == columns % kWarpChunk / kChunk) {
    Chunk w = {}, g = {};
    if (weight.read) w = load_part<kAccess>(weights + chunk * weight_step, weight.type, rest);
    if (grad.read) g = load_part<kAccess>(grads + chunk * grad_step, grad.type, rest);
    accumulate(w, g);
  }
  __syncwarp();

  float total[kStatistics];
#pragma unroll
  for (int statistic = 0; statistic < kStatistics; ++statistic) {
    total[statistic] = sum[statistic];
    if (!chosen<kStatistics>(mask, statistic)) continue;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      total[statistic] = __fadd_rn(total[statistic], __shfl_xor_sync(kAllLanes, total[statistic], offset));
    }
  }
  const int fold = fold_of(entry);
  if (fold > 1) {
    // The rows of a position are all in the matrix, so none of their warps has returned.
    if (lane == 0) {
#pragma unroll
      for (int statistic = 0; statistic < kStatistics; ++statistic) shared[statistic][warp] = total[statistic];
    }
    __syncthreads();
    if (warp % fold != 0) return;
#pragma unroll
    for (int statistic = 0; statistic < kStatistics; ++statistic) {
      float parts[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) parts[i] = i < fold ? shared[statistic][warp + i] : 0.0f;
      total[statistic] = tree(parts);
    }
  }
  if (lane != 0) return;
  const std::int64_t length = entry.rows / fold;
  float* partial = partials + tile * length + row / fold;
#pragma unroll
  for (int statistic = 0; statistic < kStatistics; ++statistic) {
    if (!chosen<kStatistics>(mask, statistic)) continue;
    *partial = total[statistic];
    partial += tiles * length;
  }
}

// Axis 1: 256 columns, 8 a lane; 128 rows, every eighth a warp.
template <int kStatistics, Access kAccess>
__device__ __forceinline__ void sum_columns(const Entry& entry, const Operand& weight, const Operand& grad,
                                            std::int64_t tile, int mask, float* partials,
                                            ColumnSums& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t strips = divide_up(entry.columns, kAxis1Columns);
  const std::int64_t tiles = divide_up(entry.rows, kAxis1Rows);
  const std::int64_t strip = tile % strips;
  tile /= strips;
  const std::int64_t column = strip * kAxis1Columns + lane * kChunk;
  const std::int64_t left = entry.columns - column;
  const int count = left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
  const std::int64_t first = tile * kAxis1Rows + warp;
  const std::int64_t left_rows = entry.rows - first;
  const int rows = left_rows < kAxis1Rows ? static_cast<int>(left_rows) : kAxis1Rows;  // may be negative
  const char* weights = weight.at<kAccess>(first, column);
  const char* grads = grad.at<kAccess>(first, column);

  float sum[kStatistics][kChunk] = {};
  const auto accumulate = [&](const Chunk& weight_chunk, const Chunk& grad_chunk) {
    float w[kChunk], g[kChunk];
    to_float<kAccess>(weight_chunk, weight.type, w);
    to_float<kAccess>(grad_chunk, grad.type, g);
#pragma unroll
    for (int statistic = 0; statistic < kStatistics; ++statistic) {
      if (!chosen<kStatistics>(mask, statistic)) continue;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        sum[statistic][i] = __fadd_rn(sum[statistic][i], term(statistic, w[i], g[i]));
      }
    }
  };

  if (count == kChunk) {
    constexpr int kLoads = kBatch<kAccess>;
    for (int begin = 0; begin < rows; begin += kLoads * kWarps) {
      Chunk w[kLoads] = {}, g[kLoads] = {};  // a chunk of zeros adds zero
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = begin + i * kWarps;
        if (row < rows) {
          if (weight.read) w[i] = load_chunk<kAccess>(weights + row * weight.stride, weight.type);
          if (grad.read) g[i] = load_chunk<kAccess>(grads + row * grad.stride, grad.type);
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) accumulate(w[i], g[i]);
    }
  } else if (count > 0) {  // the lane at the end of a matrix whose columns do not divide by 8
    for (int row = 0; row < rows; row += kWarps) {
      Chunk w = {}, g = {};
      if (weight.read) w = load_part<kAccess>(weights + row * weight.stride, weight.type, count);
      if (grad.read) g = load_part<kAccess>(grads + row * grad.stride, grad.type, count);
      accumulate(w, g);
    }
  }

  const std::int64_t mine = strip * kAxis1Columns + threadIdx.x;
  const int place = threadIdx.x % kChunk * kPitch + threadIdx.x / kChunk;
  const int fold = fold_of(entry);
  const std::int64_t length = entry.columns / fold;
  float* partial = partials + tile * length + mine / fold;
#pragma unroll
  for (int statistic = 0; statistic < kStatistics; ++statistic) {
    if (!chosen<kStatistics>(mask, statistic)) continue;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) shared[warp][j * kPitch + lane] = sum[statistic][j];
    __syncthreads();
    float parts[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) parts[i] = shared[i][place];
    float total = tree(parts);
    for (int offset = 1; offset < fold; offset *= 2) {
      total = __fadd_rn(total, __shfl_xor_sync(kAllLanes, total, offset));
    }
    if (mine < entry.columns && mine % fold == 0) *partial = total;
    partial += tiles * length;
    __syncthreads();
  }
}

template <int kStatistics, Access kAccess>
__device__ __forceinline__ void sum_tile(const Entry& entry, const Operand& weight, const Operand& grad,
                                         std::int64_t tile, int mask, float* partials,
                                         ColumnSums& shared) {
  if (entry.axis == 0) {
    sum_rows<kStatistics, kAccess>(entry, weight, grad, tile, mask, partials, shared);
  } else {
    sum_columns<kStatistics, kAccess>(entry, weight, grad, tile, mask, partials, shared);
  }
}

// `table` is null where `one` is meant.
template <int kStatistics>
__global__ __launch_bounds__(kThreads, kStatistics == 1 ? 3 : 2) void sum_tiles(const std::int64_t* table, One one,
                                                                                int entries, int mask,
                                                                                float* workspace) {
  __shared__ ColumnSums shared;
  Entry entry = one.entry;
  std::int64_t tile = blockIdx.x;
  if (table != nullptr) {
    const std::int64_t* first_tile = table + static_cast<std::int64_t>(entries) * kEntryFields;
    const int index = find(first_tile, entries, blockIdx.x);
    entry = reinterpret_cast<const Entry*>(table)[index];
    tile -= first_tile[index];
  }
  const Operand weight{reinterpret_cast<const char*>(entry.weight), entry.weight_stride,
                       static_cast<int>(entry.weight_type), kStatistics == 1 || (mask & kReadsWeight)};
  const Operand grad{reinterpret_cast<const char*>(entry.grad), entry.grad_stride, static_cast<int>(entry.grad_type),
                     kStatistics == 1 || (mask & kReadsGrad)};
  float* partials = workspace + entry.partial;
  switch (static_cast<Access>(entry.access)) {
    case Access::kHalf:
      return sum_tile<kStatistics, Access::kHalf>(entry, weight, grad, tile, mask, partials, shared);
    case Access::kVector:
      return sum_tile<kStatistics, Access::kVector>(entry, weight, grad, tile, mask, partials, shared);
    default:
      return sum_tile<kStatistics, Access::kScalar>(entry, weight, grad, tile, mask, partials, shared);
  }
}

// One statistic a layer of the grid. A warp holds 32 / lanes units, the warps of a block share the tiles.
__global__ __launch_bounds__(kThreads, 4) void add_totals(const std::int64_t* table, One one, int entries, int outputs,
                                                          const float* workspace) {
  __shared__ float shared[kWarps][kWarp];
  Output output = one.output;
  std::int64_t block = blockIdx.x;
  if (table != nullptr) {
    const std::int64_t* targets = table + static_cast<std::int64_t>(entries) * (kEntryFields + 1) + 1;
    const std::int64_t* first_block = targets + static_cast<std::int64_t>(outputs) * kOutputFields;
    const int index = find(first_block, outputs, blockIdx.x);
    output = reinterpret_cast<const Output*>(targets)[index];
    block -= first_block[index];
  }
  const std::int64_t begin = block * output.units_a_block;
  float* out = reinterpret_cast<float*>(output.data) + blockIdx.y * output.units;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  for (std::int64_t number = output.first, next; number >= 0; number = next) {
    const Entry& entry = table == nullptr ? one.entry : reinterpret_cast<const Entry*>(table)[number];
    next = entry.next;
    const int fold = fold_of(entry);
    const std::int64_t group = entry.group / fold;
    int lanes = 1;  // a unit, consecutive: depends on the entry alone, because the order of the sum does
    while (lanes < kWarp && lanes * 2 <= group) lanes *= 2;
    const std::int64_t length = (entry.axis == 0 ? entry.rows : entry.columns) / fold;
    const std::int64_t tiles = entry.axis == 0 ? divide_up(entry.columns, kAxis0Columns)
                                               : divide_up(entry.rows, kAxis1Rows);
    const float* partials = workspace + entry.partial + blockIdx.y * tiles * length;
    for (int base = 0; base < output.units_a_block; base += kWarp / lanes) {
      const std::int64_t unit = begin + base + lane / lanes;
      float sum = 0.0f;
      if (unit < output.units) {
        for (std::int64_t member = lane % lanes; member < group; member += lanes) {
          const float* column = partials + unit * group + member;
          for (std::int64_t tile = warp; tile < tiles; tile += 4 * kWarps) {
            float value[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (tile + i * kWarps < tiles) value[i] = __ldg(column + (tile + i * kWarps) * length);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum = __fadd_rn(sum, value[i]);
          }
        }
      }
      __syncwarp();
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, offset));
      }
      shared[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && lane % lanes == 0 && unit < output.units) {
        float parts[kWarps];
#pragma unroll
        for (int i = 0; i < kWarps; ++i) parts[i] = shared[i][lane];
        out[unit] = __fadd_rn(out[unit], tree(parts));
      }
      __syncthreads();  // before `shared` is written again; also orders two entries that add to one unit
    }
  }
}

}  // namespace

void saliency(std::uintptr_t table, const std::vector<std::int64_t>& one, std::int64_t entries, std::int64_t outputs,
              std::int64_t tiles, std::int64_t blocks, std::uintptr_t workspace, int statistics, Queue queue) {
  if (one.size() != (table == 0 ? sizeof(One) / sizeof(std::int64_t) : 0)) {
    throw std::runtime_error("nirvana CUDA kernel 'saliency': either a table, or one entry and one output");
  }
  One arguments{};
  if (table == 0) std::memcpy(&arguments, one.data(), sizeof(One));
  const DeviceGuard guard(queue.device);
  int count = 0;
  for (int bit = 0; bit < kStatisticCount; ++bit) count += statistics >> bit & 1;
  const auto sum = statistics == 1 ? sum_tiles<1> : sum_tiles<kStatisticCount>;
  const auto* rows = reinterpret_cast<const std::int64_t*>(table);
  auto* partials = reinterpret_cast<float*>(workspace);
  launch("saliency tiles", sum, tiles, 1, kThreads, queue, rows, arguments, entries, statistics, partials);
  launch("saliency totals", add_totals, blocks, count, kThreads, queue, rows, arguments, entries, outputs, partials);
}

}  // namespace nirvana
