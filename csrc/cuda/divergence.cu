// KL(p || q) of two matrices of logits, one block a token, one pass with an online softmax.
//
// Each thread keeps, in fp32: max p, S = sum e^(p - max p), T = sum e^(p - max p) ((p - max p) - (q - max q)), max q
// and sum e^(q - max q). Differences to the maxima, because those of the logits themselves lose digits where the two
// differ by a constant. Threads merge in a fixed tree; the end is fp64.
//
// Bytes: both matrices are read once; 4 bytes a token are written, 40 of a state; nothing in between.
#include "device.cuh"
#include "elements.cuh"

namespace nirvana {
namespace {

struct State {
  float max_p, sum_p, dot, max_q, sum_q;  // S is sum_p, T is dot
};

constexpr float kInfinity = __builtin_huge_valf();

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

// The same sums with regard to maxima that are not smaller.
__device__ __forceinline__ void raise(State& state, float max_p, float max_q) {
  const float down_p = __fsub_rn(state.max_p, finite_or_zero(max_p));
  const float down_q = __fsub_rn(state.max_q, finite_or_zero(max_q));
  const float factor_p = __expf(down_p), factor_q = __expf(down_q);
  if (state.sum_p != 0.0f) state.dot = __fadd_rn(state.dot, __fmul_rn(state.sum_p, __fsub_rn(down_p, down_q)));
  // An infinite sum stays infinite, even times e^-1000.
  if (fabsf(state.dot) != kInfinity) state.dot = __fmul_rn(state.dot, factor_p);
  state.sum_p = __fmul_rn(state.sum_p, factor_p);
  state.sum_q = __fmul_rn(state.sum_q, factor_q);
  state.max_p = max_p;
  state.max_q = max_q;
}

__device__ __forceinline__ void add_chunk(State& state, const float (&p)[kChunk], const float (&q)[kChunk]) {
  // fmaxf skips NaN, which reaches the sums instead and stays there.
  raise(state, fmaxf(state.max_p, largest(p)), fmaxf(state.max_q, largest(q)));
  const float top_p = finite_or_zero(state.max_p), top_q = finite_or_zero(state.max_q);
  float e_p[kChunk], e_q[kChunk], product[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float below_p = __fsub_rn(p[i], top_p), below_q = __fsub_rn(q[i], top_q);
    e_p[i] = __expf(below_p);
    e_q[i] = __expf(below_q);
    // A word that p excludes counts nothing; one that q alone does is infinite, however small its probability.
    const float difference = below_p == -kInfinity ? 0.0f : __fsub_rn(below_p, below_q);
    product[i] = difference == kInfinity ? kInfinity : __fmul_rn(e_p[i], difference);
  }
  state.sum_p = __fadd_rn(state.sum_p, tree(e_p));
  state.dot = __fadd_rn(state.dot, tree(product));
  state.sum_q = __fadd_rn(state.sum_q, tree(e_q));
}

__device__ __forceinline__ void merge(State& state, State other) {
  const float max_p = fmaxf(state.max_p, other.max_p), max_q = fmaxf(state.max_q, other.max_q);
  raise(state, max_p, max_q);
  raise(other, max_p, max_q);
  state.sum_p = __fadd_rn(state.sum_p, other.sum_p);
  state.dot = __fadd_rn(state.dot, other.dot);
  state.sum_q = __fadd_rn(state.sum_q, other.sum_q);
}

// The maximum that torch.amax gives: NaN where a NaN was summed. +inf makes the sum NaN too, and is the maximum.
__device__ __forceinline__ double reported(float max, float sum) {
  return sum != sum && max != kInfinity ? static_cast<double>(sum) : static_cast<double>(max);
}

template <Access kAccess>
__global__ __launch_bounds__(kThreads, 3) void divergence_rows(const Row p, const Row q, int vocabulary,
                                                               float* out, double* states) {
  const std::int64_t token = blockIdx.x;
  const char* row_p = p.data + token * p.stride;
  const char* row_q = q.data + token * q.stride;
  const std::int64_t size_p = size_of<kAccess>(p.type), size_q = size_of<kAccess>(q.type);
  State state{-kInfinity, 0.0f, 0.0f, -kInfinity, 0.0f};

  constexpr int kLoads = kBatch<kAccess>;
  constexpr int kStep = kThreads * kChunk;
  const int rest = vocabulary % kChunk, whole = vocabulary - rest;
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
        add_chunk(state, value_p, value_q);
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
    add_chunk(state, value_p, value_q);
  }
  __syncwarp();

#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    State other;
    other.max_p = __shfl_xor_sync(kAllLanes, state.max_p, offset);
    other.sum_p = __shfl_xor_sync(kAllLanes, state.sum_p, offset);
    other.dot = __shfl_xor_sync(kAllLanes, state.dot, offset);
    other.max_q = __shfl_xor_sync(kAllLanes, state.max_q, offset);
    other.sum_q = __shfl_xor_sync(kAllLanes, state.sum_q, offset);
    merge(state, other);
  }
  __shared__ State shared[kWarps];
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = state;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) merge(state, shared[warp]);

  const double sum_p = state.sum_p, dot = state.dot, sum_q = state.sum_q;
  if (out != nullptr) {
    out[token] = static_cast<float>(dot / sum_p - log(sum_p / sum_q));
  } else {
    const double max_p = reported(state.max_p, state.sum_p), max_q = reported(state.max_q, state.sum_q);
    const std::int64_t tokens = gridDim.x;
    states[token] = max_p;
    states[tokens + token] = sum_p;
    // sum e^(p - max p) (p - q)
    states[2 * tokens + token] = sum_p == 0.0 ? dot : dot + __dmul_rn(sum_p, max_p - max_q);
    states[3 * tokens + token] = max_q;
    states[4 * tokens + token] = sum_q;
  }
}

}  // namespace

void divergence(Logits p, Logits q, std::int64_t tokens, std::int64_t vocabulary, std::uintptr_t out,
                std::uintptr_t state, Queue queue) {
  if (vocabulary > 1 << 30) throw std::runtime_error("nirvana CUDA kernel 'divergence': more than 2^30 words");
  const DeviceGuard guard(queue.device);
  // The stride of a single row says nothing.
  const std::uint64_t strides = tokens > 1 ? static_cast<std::uint64_t>(p.stride | q.stride) : 0;
  const bool aligned = ((p.data | q.data | strides) % 16) == 0;
  const auto kernel = !aligned                                      ? divergence_rows<Access::kScalar>
                      : p.type == kFloat32 || q.type == kFloat32 ? divergence_rows<Access::kVector>
                                                                    : divergence_rows<Access::kHalf>;
  launch("divergence", kernel, tokens, 1, kThreads, queue, Row{reinterpret_cast<const char*>(p.data), p.stride, p.type},
         Row{reinterpret_cast<const char*>(q.data), q.stride, q.type}, vocabulary, reinterpret_cast<float*>(out),
         reinterpret_cast<double*>(state));
}

}  // namespace nirvana
