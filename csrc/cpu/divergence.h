#pragma once

#include "saliency.h"

namespace nirvana {

// For each row of two [tokens, vocabulary] matrices: KL(softmax(p) || softmax(q)) to `out` (fp32 [tokens]) and, where they
// are not null, the five running sums to `state` (fp64 [5, tokens]: max p, sum e^(p - max p), sum e^(p - max p) (p - q),
// max q, sum e^(q - max q)).
void kl_divergence(const Matrix& p, const Matrix& q, int64_t tokens, int64_t vocabulary, float* out, double* state,
                   int threads);

}  // namespace nirvana
