#include "divergence.h"

#include <cmath>

#include "levels.h"
#include "parallel.h"

namespace nirvana {

void kl_divergence(const Matrix& p, const Matrix& q, int64_t tokens, int64_t vocabulary, float* out, double* state,
                   int threads) {
  const int64_t bytes = tokens * vocabulary * (element_size(p.dtype) + element_size(q.dtype));
  parallel_for(tokens, bytes, threads, [&](int64_t token) {
    double sums[5];
    kernels().divergence(p, q, token, vocabulary, sums);
    const auto [max_p, sum_p, dot, max_q, sum_q] = sums;
    if (out) out[token] = static_cast<float>(dot / sum_p - (max_p - max_q) - std::log(sum_p / sum_q));
    if (state) {
      for (int i = 0; i < 5; ++i) state[i * tokens + token] = sums[i];
    }
  });
}

}  // namespace nirvana
