#include "../mixture.h"

#include "exponential.h"

namespace nirvana {
namespace NIRVANA_LEVEL {
namespace {

// Terms that a lane adds before they are widened.
constexpr int64_t kTerms = 32;

template <int K>
struct Densities {
  Floats t[K], e[K];  // (x - mean) scale; density times weight, as parts of e^peak
  Floats peak, total;
};

template <int K>
NIRVANA_INLINE Densities<K> densities(Floats x, const Mixture& mixture) {
  Densities<K> result;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    result.t[k] = (x - mixture.mean[k]) * mixture.scale[k];
    result.e[k] = all(mixture.offset[k]) - result.t[k] * result.t[k];
    result.peak = k ? greater(result.e[k], result.peak) : result.e[k];
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    result.e[k] = exponential(result.e[k] - result.peak);
    result.total = k ? result.total + result.e[k] : result.e[k];
  }
  return result;
}

template <int K>
struct Chain {
  Floats peaks, product;  // the product of 32 totals of at most 8 is below 2^96
  Floats mass[K], first[K], second[K];
};

// Adds 16 scores.
template <int K>
NIRVANA_INLINE void add(Floats x, const Mixture& mixture, Chain<K>* chain) {
  const Densities<K> at = densities<K>(x, mixture);
  chain->peaks += at.peak;
  chain->product = chain->product * at.total;
  const Floats part = all(1.0f) / at.total;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const Floats share = at.e[k] * part, moment = share * at.t[k];
    chain->mass[k] += share;
    chain->first[k] += moment;
    chain->second[k] += moment * at.t[k];
  }
}

template <int K>
NIRVANA_INLINE void flush(const Chain<K>& chain, MixtureSums* sums) {
  float totals[kLanes];
  std::memcpy(totals, &chain.product, sizeof totals);
  sums->log_likelihood += sum(chain.peaks);
  for (const float total : totals) sums->log_likelihood += __builtin_log(static_cast<double>(total));
  for (int k = 0; k < K; ++k) {
    sums->mass[k] += sum(chain.mass[k]);
    sums->first[k] += sum(chain.first[k]);
    sums->second[k] += sum(chain.second[k]);
  }
}

template <int K>
NIRVANA_INLINE Chain<K> empty() {
  Chain<K> chain = {};
  chain.product = all(1.0f);
  return chain;
}

template <int K>
NIRVANA_INLINE void add_all(const float* scores, int64_t length, const Mixture& mixture, MixtureSums* sums) {
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t block = 0; block < whole; block += kTerms * kLanes) {
    Chain<K> chain = empty<K>();
    const int64_t end = smaller(whole, block + kTerms * kLanes);
    for (int64_t i = block; i < end; i += kLanes) add<K>(read_lanes<FloatRegister>(scores + i), mixture, &chain);
    flush<K>(chain, sums);
  }
  // What is left over one by one, in lanes that all hold it: 1/16 of each sum, which is exact.
  for (int64_t i = whole; i < length; ++i) {
    Chain<K> chain = empty<K>();
    add<K>(all(scores[i]), mixture, &chain);
    MixtureSums one = {};
    flush<K>(chain, &one);
    sums->log_likelihood += one.log_likelihood / kLanes;
    for (int k = 0; k < K; ++k) {
      sums->mass[k] += one.mass[k] / kLanes;
      sums->first[k] += one.first[k] / kLanes;
      sums->second[k] += one.second[k] / kLanes;
    }
  }
}

template <int K>
NIRVANA_INLINE void store(Floats x, const Mixture& mixture, int64_t count, double* density) {
  const Densities<K> at = densities<K>(x, mixture);
  float peaks[kLanes], totals[kLanes];
  std::memcpy(peaks, &at.peak, sizeof peaks);
  std::memcpy(totals, &at.total, sizeof totals);
  for (int64_t i = 0; i < count; ++i) density[i] = peaks[i] + __builtin_log(static_cast<double>(totals[i]));
}

template <int K>
NIRVANA_INLINE void store_all(const float* scores, int64_t length, const Mixture& mixture, double* density) {
  for (int64_t i = 0; i < length; i += kLanes) {
    const int64_t count = smaller(kLanes, length - i);
    const char* from = reinterpret_cast<const char*>(scores + i);
    const Floats x = count == kLanes ? Float32::load(from) : load_first<Float32>(from, static_cast<int>(count));
    store<K>(x, mixture, count, density + i);
  }
}

template <int K>
struct Count {
  static constexpr int kValue = K;
};

template <typename Body>
NIRVANA_INLINE void with_components(int components, const Body& body) {
  switch (components) {
    case 1: return body(Count<1>());
    case 2: return body(Count<2>());
    case 3: return body(Count<3>());
    case 4: return body(Count<4>());
    case 5: return body(Count<5>());
    case 6: return body(Count<6>());
    case 7: return body(Count<7>());
    case 8: return body(Count<8>());
  }
}

}  // namespace

void mixture_sums(const float* scores, int64_t length, const Mixture& mixture, MixtureSums* sums) {
  *sums = {};
  with_components(mixture.components, [&](auto count) __attribute__((always_inline)) {
    add_all<decltype(count)::kValue>(scores, length, mixture, sums);
  });
}

void mixture_density(const float* scores, int64_t length, const Mixture& mixture, double* density) {
  with_components(mixture.components, [&](auto count) __attribute__((always_inline)) {
    store_all<decltype(count)::kValue>(scores, length, mixture, density);
  });
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
