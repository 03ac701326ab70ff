// KL(p || q) of two matrices of logits: a block takes a token, or a part of its vocabulary where tokens are few, in one
// pass with an online softmax.
//
// Each thread keeps, in fp32: max p, S = sum e^(p - max p), T = sum e^(p - max p) ((p - max p) - (q - max q)), max q
// and sum e^(q - max q), and what each sum has lost to rounding. Differences to the maxima, because those of the logits
// themselves lose digits where the two differ by a constant. Threads, and then parts, merge in fp64 in a fixed tree.
//
// Bytes: both matrices are read once; 4 bytes a token are written, 40 of a state, 40 of a part; nothing in between.
#include "device.cuh"
#include "elements.cuh"
#include "exponential.cuh"

namespace nirvana {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.40282347e38f;
// T is kept in this unit, so that the sum of 2^30 words does not overflow, however large the words are.
constexpr float kUnit = 4294967296.0f;  // 2^32

// Below kLeastTokens a block takes a part of a token's vocabulary, of kLeastSteps steps of all threads or more, so that
// there are about kFilling blocks: four for each of the 132 multiprocessors of an H100.
constexpr int kStep = kThreads * kChunk;
constexpr std::int64_t kLeastTokens = 264, kFilling = 512, kMostParts = 64, kLeastSteps = 2;

// Sums with regard to maxima, and what they have lost to rounding.
struct Lane {
  float max_p = -kInfinity, max_q = -kInfinity;
  float sum_p = 0.0f, sum_q = 0.0f, dot = 0.0f;
  float error_p = 0.0f, error_q = 0.0f, error_dot = 0.0f;
};

// Merged lanes: the same in fp64. S is sum_p, T is dot.
struct Totals {
  double max_p, max_q, sum_p, sum_q, dot;
};

struct Row {
  const char* data;
  std::int64_t stride;
  int type;
};

// What x is compared with. Where the maximum is -inf nothing has been summed yet, and -inf - -inf would be NaN.
__device__ __forceinline__ float finite_or_zero(float max) { return max == -kInfinity ? 0.0f : max; }

__device__ __forceinline__ float largest(const float (&value)[kChunk]) {
  return fmaxf(fmaxf(fmaxf(value[0], value[1]), fmaxf(value[2], value[3])),
               fmaxf(fmaxf(value[4], value[5]), fmaxf(value[6], value[7])));
}

// (p - max p) - (q - max q). Finite where p is excluded (-inf), whatever q is: a probability of 0 then makes 0 of it.
__device__ __forceinline__ float difference(float below_p, float below_q) {
  return fmaxf(__fmul_rn(__fsub_rn(below_p, below_q), 1.0f / kUnit), -kLargest);
}

// Kahan's sum. Without it a vocabulary of 128256 words may be off by 4e-6, with it by 1e-8.
__device__ __forceinline__ void add(float& total, float& error, float term) {
  term = __fadd_rn(term, error);
  const float sum = __fadd_rn(total, term);
  error = __fsub_rn(term, __fsub_rn(sum, total));
  total = sum;
}

// The same sums with regard to maxima that are not smaller.
__device__ __forceinline__ void raise(Lane& lane, float max_p, float max_q) {
  const float down_p = __fsub_rn(lane.max_p, finite_or_zero(max_p));
  const float down_q = __fsub_rn(lane.max_q, finite_or_zero(max_q));
  const float factor_p = exponential(down_p), factor_q = exponential(down_q);
  lane.dot = __fmul_rn(__fadd_rn(lane.dot, __fmul_rn(lane.sum_p, difference(down_p, down_q))), factor_p);
  lane.error_dot = __fmul_rn(lane.error_dot, factor_p);
  lane.sum_p = __fmul_rn(lane.sum_p, factor_p);
  lane.error_p = __fmul_rn(lane.error_p, factor_p);
  lane.sum_q = __fmul_rn(lane.sum_q, factor_q);
  lane.error_q = __fmul_rn(lane.error_q, factor_q);
  lane.max_p = max_p;
  lane.max_q = max_q;
}

__device__ __forceinline__ void add_chunk(Lane& lane, const float (&p)[kChunk], const float (&q)[kChunk]) {
  // fmaxf skips NaN, which reaches the sums instead and stays there.
  const float max_p = fmaxf(lane.max_p, largest(p)), max_q = fmaxf(lane.max_q, largest(q));
  if (max_p > lane.max_p || max_q > lane.max_q) raise(lane, max_p, max_q);  // seldom, after the first chunks
  const float top_p = finite_or_zero(max_p), top_q = finite_or_zero(max_q);
  float e_p[kChunk], e_q[kChunk], product[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float below_p = __fsub_rn(p[i], top_p), below_q = __fsub_rn(q[i], top_q);
    e_p[i] = exponential(below_p);
    e_q[i] = exponential(below_q);
    product[i] = __fmul_rn(e_p[i], difference(below_p, below_q));
  }
  add(lane.sum_p, lane.error_p, tree(e_p));
  add(lane.sum_q, lane.error_q, tree(e_q));
  add(lane.dot, lane.error_dot, tree(product));
}

__device__ __forceinline__ double finite_or_zero(double max) { return max == -kInfinity ? 0.0 : max; }

// Of all threads of a block, in thread 0. One exponential a thread: here an error of the scale is one of the result.
__device__ Totals merged(Totals mine) {
  __shared__ double shared[3][kWarps];
  Totals all = mine;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    all.max_p = fmax(all.max_p, __shfl_xor_sync(kAllLanes, all.max_p, offset));
    all.max_q = fmax(all.max_q, __shfl_xor_sync(kAllLanes, all.max_q, offset));
  }
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[0][warp] = all.max_p, shared[1][warp] = all.max_q;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) {
    all.max_p = fmax(all.max_p, shared[0][i]);
    all.max_q = fmax(all.max_q, shared[1][i]);
  }
  __syncthreads();

  const double down_p = mine.max_p - finite_or_zero(all.max_p), down_q = mine.max_q - finite_or_zero(all.max_q);
  const double factor_p = exp(down_p);
  if (mine.sum_p != 0.0) mine.dot += __dmul_rn(mine.sum_p, down_p - down_q);
  all.sum_p = __dmul_rn(mine.sum_p, factor_p);
  all.sum_q = __dmul_rn(mine.sum_q, exp(down_q));
  all.dot = __dmul_rn(mine.dot, factor_p);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    all.sum_p += __shfl_xor_sync(kAllLanes, all.sum_p, offset);
    all.sum_q += __shfl_xor_sync(kAllLanes, all.sum_q, offset);
    all.dot += __shfl_xor_sync(kAllLanes, all.dot, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    shared[0][warp] = all.sum_p, shared[1][warp] = all.sum_q, shared[2][warp] = all.dot;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) all.sum_p += shared[0][i], all.sum_q += shared[1][i], all.dot += shared[2][i];
  }
  return all;
}

// The maximum that torch.amax gives: NaN where a NaN was summed. +inf makes the sum NaN too, and is the maximum.
__device__ __forceinline__ double reported(float max, float sum) {
  return sum != sum && max != kInfinity ? static_cast<double>(sum) : static_cast<double>(max);
}

// Writes the result of a token, or where `out` is null its state.
__device__ void finish(const Totals& all, std::int64_t token, std::int64_t tokens, float* out, double* states) {
  // Where q alone excludes a word T is infinite, or has become NaN on its way (0 * inf for a word of underflowing
  // probability, inf - inf in `add`). Any other NaN is in the sums, and not always in T: `difference` hides it.
  double dot = all.dot != all.dot ? kInfinity : all.dot;
  if (all.sum_p != all.sum_p || all.sum_q != all.sum_q) dot = all.sum_p + all.sum_q;
  if (out != nullptr) {
    out[token] = static_cast<float>(dot / all.sum_p - log(all.sum_p / all.sum_q));
    return;
  }
  const double max_p = reported(all.max_p, all.sum_p), max_q = reported(all.max_q, all.sum_q);
  states[token] = max_p;
  states[tokens + token] = all.sum_p;
  // sum e^(p - max p) (p - q)
  states[2 * tokens + token] = all.sum_p == 0.0 ? dot : dot + __dmul_rn(all.sum_p, max_p - max_q);
  states[3 * tokens + token] = max_q;
  states[4 * tokens + token] = all.sum_q;
}

// Block (x, y) takes `span` words of token x from y * span on, and leaves them in `parts` where it is not null.
template <Access kAccess>
__global__ __launch_bounds__(kThreads, 3) void divergence_rows(const Row p, const Row q, int vocabulary, int span,
                                                               float* out, double* states, Totals* parts) {
  const std::int64_t token = blockIdx.x;
  const std::int64_t size_p = size_of<kAccess>(p.type), size_q = size_of<kAccess>(q.type);
  const int first = static_cast<int>(blockIdx.y) * span;
  const char* row_p = p.data + token * p.stride + first * size_p;
  const char* row_q = q.data + token * q.stride + first * size_q;
  const int words = vocabulary - first < span ? vocabulary - first : span;
  Lane lane;

  constexpr int kLoads = kBatch<kAccess>;
  const int rest = words % kChunk, whole = words - rest;
  for (int begin = threadIdx.x * kChunk; begin < whole; begin += kLoads * kStep) {
    Chunk chunk_p[kLoads] = {}, chunk_q[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int word = begin + i * kStep;
      if (word < whole) {
        chunk_p[i] = load_chunk<kAccess>(row_p + word * size_p, p.type);
        chunk_q[i] = load_chunk<kAccess>(row_q + word * size_q, q.type);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (begin + i * kStep < whole) {
        float value_p[kChunk], value_q[kChunk];
        to_float<kAccess>(chunk_p[i], p.type, value_p);
        to_float<kAccess>(chunk_q[i], q.type, value_q);
        add_chunk(lane, value_p, value_q);
      }
    }
  }
  // Words that fill no chunk: after the others of their thread. Places past the end are excluded words.
  if (rest > 0 && static_cast<int>(threadIdx.x) == whole / kChunk % kThreads) {
    float value_p[kChunk], value_q[kChunk];
    to_float<kAccess>(load_part<kAccess>(row_p + whole * size_p, p.type, rest), p.type, value_p);
    to_float<kAccess>(load_part<kAccess>(row_q + whole * size_q, q.type, rest), q.type, value_q);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= rest) value_p[i] = value_q[i] = -kInfinity;
    }
    add_chunk(lane, value_p, value_q);
  }
  __syncwarp();

  const double sum_p = static_cast<double>(lane.sum_p) + lane.error_p;
  const double sum_q = static_cast<double>(lane.sum_q) + lane.error_q;
  const double dot = __dmul_rn(static_cast<double>(lane.dot) + lane.error_dot, kUnit);
  const Totals all = merged({lane.max_p, lane.max_q, sum_p, sum_q, dot});
  if (threadIdx.x != 0) return;
  if (parts != nullptr) {
    parts[token * gridDim.y + blockIdx.y] = all;
  } else {
    finish(all, token, gridDim.x, out, states);
  }
}

// Block x merges the `count` parts of token x.
__global__ __launch_bounds__(kThreads) void divergence_parts(const Totals* parts, int count, float* out,
                                                             double* states) {
  Totals mine{-kInfinity, -kInfinity, 0.0, 0.0, 0.0};
  if (static_cast<int>(threadIdx.x) < count) mine = parts[static_cast<std::int64_t>(blockIdx.x) * count + threadIdx.x];
  const Totals all = merged(mine);
  if (threadIdx.x == 0) finish(all, blockIdx.x, gridDim.x, out, states);
}

std::int64_t steps_of_part(std::int64_t tokens, std::int64_t vocabulary) {
  const std::int64_t steps = divide_up(vocabulary, kStep);
  if (tokens >= kLeastTokens) return steps;
  std::int64_t parts = divide_up(kFilling, tokens);
  parts = parts < kMostParts ? parts : kMostParts;
  parts = parts < steps / kLeastSteps ? parts : steps / kLeastSteps;
  return parts > 1 ? divide_up(steps, parts) : steps;
}

}  // namespace

std::int64_t divergence_workspace(std::int64_t tokens, std::int64_t vocabulary) {
  const std::int64_t parts = divide_up(vocabulary, steps_of_part(tokens, vocabulary) * kStep);
  return parts > 1 ? tokens * parts * static_cast<std::int64_t>(sizeof(Totals) / sizeof(double)) : 0;
}

void divergence(Logits p, Logits q, std::int64_t tokens, std::int64_t vocabulary, std::uintptr_t out,
                std::uintptr_t state, std::uintptr_t workspace, Queue queue) {
  if (vocabulary > 1 << 30) throw std::runtime_error("nirvana CUDA kernel 'divergence': more than 2^30 words");
  const DeviceGuard guard(queue.device);
  // The stride of a single row says nothing.
  const std::uint64_t strides = tokens > 1 ? static_cast<std::uint64_t>(p.stride | q.stride) : 0;
  const bool aligned = ((p.data | q.data | strides) % 16) == 0;
  const auto kernel = !aligned                                      ? divergence_rows<Access::kScalar>
                      : p.type == kFloat32 || q.type == kFloat32 ? divergence_rows<Access::kVector>
                                                                    : divergence_rows<Access::kHalf>;
  const std::int64_t span = steps_of_part(tokens, vocabulary) * kStep;
  const int count = static_cast<int>(divide_up(vocabulary, span));
  auto* results = reinterpret_cast<float*>(out);
  auto* states = reinterpret_cast<double*>(state);
  auto* parts = count > 1 ? reinterpret_cast<Totals*>(workspace) : nullptr;
  launch("divergence", kernel, tokens, count, kThreads, queue, Row{reinterpret_cast<const char*>(p.data), p.stride, p.type},
         Row{reinterpret_cast<const char*>(q.data), q.stride, q.type}, vocabulary, span, results, states, parts);
  if (count > 1) launch("divergence parts", divergence_parts, tokens, 1, kThreads, queue, parts, count, results, states);
}

}  // namespace nirvana
