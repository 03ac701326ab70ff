#include "exponential.h"

namespace nirvana {
namespace NIRVANA_LEVEL {
namespace {

// Words of the vocabulary whose maximum is found before they are summed: 2 x 4 KB stay in the first-level cache, and a lane
// adds 16 terms before it is widened.
constexpr int64_t kBlock = 1024;
constexpr int kChains = 4;

constexpr float kInfinity = __builtin_inff();

NIRVANA_INLINE float greatest(Floats value) {
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof lanes);
  for (int lane = 1; lane < kLanes; ++lane) lanes[0] = lanes[lane] > lanes[0] ? lanes[lane] : lanes[0];
  return lanes[0];
}

// Running sums of one token; see nirvana/ops/divergence.py.
struct State {
  double max_p, sum_p, dot, max_q, sum_q;
};

struct Block {
  Floats sum_p, dot, sum_q;
};

// Adds 16 words. Both logits are counted from the maximum of theirs: a difference as large as that of the two maxima would
// multiply the rounding errors of e_p.
NIRVANA_INLINE void add(Floats p, Floats q, float max_p, float max_q, Block* block) {
  const Floats to_max_p = p - max_p, to_max_q = q - max_q;
  const Floats e_p = exponential(to_max_p), difference = to_max_p - to_max_q;
  // p excludes the word: nothing. q alone does: infinitely far, however small e_p is.
  Floats product = select(difference == kInfinity, all(kInfinity), e_p * difference);
  product = select(p == -kInfinity, all(0.0f), product);
  block->sum_p += e_p;
  block->dot += product;
  block->sum_q += exponential(to_max_q);
}

template <typename P, typename Q>
NIRVANA_INLINE void add_block(const char* p, const char* q, int64_t n, State* state) {
  const Floats lowest = all(-kInfinity);
  const int64_t whole = n / kLanes * kLanes;
  const int rest = static_cast<int>(n - whole);
  Floats greatest_p = lowest, greatest_q = lowest;
  for (int64_t i = 0; i < whole; i += kLanes) {
    greatest_p = greater(P::load(p + i * P::kSize), greatest_p);
    greatest_q = greater(Q::load(q + i * Q::kSize), greatest_q);
  }
  Floats last_p = {}, last_q = {};
  if (rest) {
    // Words beyond the end are excluded by both.
    constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints lanes = read_lanes<IntRegister>(kNumbers);
    last_p = select(lanes < rest, load_first<P>(p + whole * P::kSize, rest), lowest);
    last_q = select(lanes < rest, load_first<Q>(q + whole * Q::kSize, rest), lowest);
    greatest_p = greater(last_p, greatest_p);
    greatest_q = greater(last_q, greatest_q);
  }
  const double max_p = greatest(greatest_p), max_q = greatest(greatest_q);
  if (max_p > state->max_p) {
    // What has been summed so far is taken to the new maximum. An infinite sum stays so.
    const double factor = __builtin_exp(state->max_p - max_p);
    state->sum_p *= factor;
    if (state->dot != kInfinity) state->dot *= factor;
    state->max_p = max_p;
  }
  if (max_q > state->max_q) {
    state->sum_q *= __builtin_exp(state->max_q - max_q);
    state->max_q = max_q;
  }
  // Nothing but -inf so far: -inf - 0 is -inf, where -inf - -inf would be NaN.
  const float shift_p = state->max_p == -kInfinity ? 0.0f : static_cast<float>(state->max_p);
  const float shift_q = state->max_q == -kInfinity ? 0.0f : static_cast<float>(state->max_q);
  // Chain after chain and not side by side: the sums of one stay in registers at every level.
  Block chains[kChains] = {};
  const int64_t even = whole / (kChains * kLanes) * (kChains * kLanes);
  for (int chain = 0; chain < kChains; ++chain) {
    Block sums = {};
    for (int64_t i = chain * kLanes; i < even; i += kChains * kLanes) {
      add(P::load(p + i * P::kSize), Q::load(q + i * Q::kSize), shift_p, shift_q, &sums);
    }
    chains[chain] = sums;
  }
  for (int64_t i = even; i < whole; i += kLanes) {
    add(P::load(p + i * P::kSize), Q::load(q + i * Q::kSize), shift_p, shift_q, &chains[0]);
  }
  if (rest) add(last_p, last_q, shift_p, shift_q, &chains[1]);
  for (const Block& chain : chains) {
    const double sum_p = sum(chain.sum_p);
    state->sum_p += sum_p;
    state->dot += sum(chain.dot) + (static_cast<double>(shift_p) - shift_q) * sum_p;
    state->sum_q += sum(chain.sum_q);
  }
}

}  // namespace

void divergence(const Matrix& p, const Matrix& q, int64_t row, int64_t vocabulary, double* state) {
  State sums = {-kInfinity, 0, 0, -kInfinity, 0};
  with_types(p.dtype, q.dtype, [&](auto p_type, auto q_type) __attribute__((always_inline)) {
    for (int64_t word = 0; word < vocabulary; word += kBlock) {
      add_block<decltype(p_type), decltype(q_type)>(p.at(row, word), q.at(row, word), smaller(kBlock, vocabulary - word),
                                                    &sums);
    }
  });
  std::memcpy(state, &sums, sizeof sums);
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
