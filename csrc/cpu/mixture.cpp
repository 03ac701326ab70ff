#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "clusters.h"
#include "levels.h"
#include "parallel.h"

namespace nirvana {

namespace {

// As in nirvana/ops/mixture.py.
constexpr double kVarianceFloor = 1e-6;
constexpr double kTolerance = 1e-3;
constexpr int kMaxIterations = 100;
// Keeps a component without scores from dividing by zero; 10 rounding errors, as in scikit-learn.
constexpr double kLeastMass = 10 * std::numeric_limits<double>::epsilon();
constexpr double kTwoPi = 6.283185307179586;

// In fp64, as (mass, mean, variance); the kernels get it rounded.
struct Component {
  double mass, mean, variance;
};

Mixture rounded(const std::vector<Component>& components) {
  double total = 0;
  for (const Component& component : components) total += component.mass;
  Mixture mixture;
  mixture.components = static_cast<int>(components.size());
  for (int k = 0; k < mixture.components; ++k) {
    const auto [mass, mean, variance] = components[k];
    mixture.mean[k] = static_cast<float>(mean);
    mixture.scale[k] = static_cast<float>(std::sqrt(0.5 / variance));
    mixture.offset[k] = static_cast<float>(std::log(mass / total) - 0.5 * std::log(kTwoPi * variance));
  }
  return mixture;
}

std::vector<Component> from_clusters(const Clusters& clusters, const float* scores) {
  std::vector<Component> components;
  for (int k = 0; k < clusters.count(); ++k) {
    const double mean = clusters.mean(k), mass = static_cast<double>(clusters.end(k) - clusters.begin(k));
    double squares = 0;
    for (int64_t i = clusters.begin(k); i < clusters.end(k); ++i) squares += (scores[i] - mean) * (scores[i] - mean);
    components.push_back({mass + kLeastMass, mean, squares / (mass + kLeastMass) + kVarianceFloor});
  }
  return components;
}

void maximise(const Mixture& mixture, const MixtureSums& sums, std::vector<Component>* components) {
  for (int k = 0; k < mixture.components; ++k) {
    const double mass = sums.mass[k] + kLeastMass, scale = mixture.scale[k];
    const double first = sums.first[k] / mass, second = sums.second[k] / mass;
    const double variance = std::max(second - first * first, 0.0) / (scale * scale);
    (*components)[k] = {mass, mixture.mean[k] + first / scale, variance + kVarianceFloor};
  }
}

struct Fit {
  Mixture mixture;
  double log_likelihood;
};

Fit fit(const float* scores, int64_t length, const Clusters& clusters) {
  std::vector<Component> components = from_clusters(clusters, scores);
  Mixture mixture = rounded(components);
  MixtureSums sums;
  kernels().mixture_sums(scores, length, mixture, &sums);
  double before = -std::numeric_limits<double>::infinity();
  for (int step = 0; step < kMaxIterations; ++step) {
    const double likelihood = sums.log_likelihood / static_cast<double>(length);
    maximise(mixture, sums, &components);
    mixture = rounded(components);
    kernels().mixture_sums(scores, length, mixture, &sums);
    if (std::abs(likelihood - before) < kTolerance) break;
    before = likelihood;
  }
  return {mixture, sums.log_likelihood};
}

double bic(const Fit& fit, int64_t length) {
  const double parameters = 3 * fit.mixture.components - 1;
  return parameters * std::log(static_cast<double>(length)) - 2 * fit.log_likelihood;
}

// The mixture with the smallest BIC. One component more starts from each cluster of the best mixture split in two.
Mixture choose(const std::vector<float>& scores, int most) {
  const int64_t length = static_cast<int64_t>(scores.size());
  const Line line(scores.data(), length);
  Clusters clusters(line);
  Fit best = fit(scores.data(), length, clusters);
  for (int count = 1; count < most; ++count) {
    const Clusters before = clusters;
    Fit likeliest = {{}, -std::numeric_limits<double>::infinity()};
    for (int cluster = 0; cluster < count; ++cluster) {
      if (!before.divisible(cluster)) continue;
      const Clusters start = before.split(cluster);
      const Fit other = fit(scores.data(), length, start);
      if (other.log_likelihood > likeliest.log_likelihood) {
        likeliest = other;
        clusters = start;
      }
    }
    // Numbers that differ may be equal once they are standardised.
    if (!likeliest.mixture.components) break;
    if (bic(likeliest, length) < bic(best, length)) best = likeliest;
  }
  return best.mixture;
}

// Standardised in fp64, then rounded.
std::vector<float> standardised(const std::vector<float>& sorted) {
  const double length = static_cast<double>(sorted.size());
  double mean = 0, squares = 0;
  for (const float score : sorted) mean += score;
  mean /= length;
  for (const float score : sorted) squares += (score - mean) * (score - mean);
  double spread = std::sqrt(squares / length);
  // The mean of equal numbers may be off by a rounding.
  if (sorted.front() == sorted.back() || spread == 0) spread = 1;
  std::vector<float> scores;
  scores.reserve(sorted.size());
  for (const float score : sorted) scores.push_back(static_cast<float>((score - mean) / spread));
  return scores;
}

struct Bounds {
  float low, high;
  int32_t components;
};

Bounds bounds(const float* row, int64_t length, int most, int64_t low_density) {
  if (!std::all_of(row, row + length, [](float score) { return std::isfinite(score); })) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {nan, nan, 0};
  }
  std::vector<float> sorted(row, row + length);
  std::sort(sorted.begin(), sorted.end());
  const std::vector<float> scores = standardised(sorted);
  int distinct = 1;
  for (int64_t i = 1; i < length && distinct < most; ++i) distinct += sorted[i] != sorted[i - 1];

  const Mixture mixture = choose(scores, distinct);
  std::vector<double> density(static_cast<size_t>(length));
  kernels().mixture_density(scores.data(), length, mixture, density.data());
  std::vector<double> ranked = density;
  std::nth_element(ranked.begin(), ranked.begin() + low_density, ranked.end());
  const double threshold = ranked[low_density];
  int64_t first = 0, last = length - 1;
  while (density[first] < threshold) ++first;
  while (density[last] < threshold) --last;
  return {sorted[first], sorted[last], mixture.components};
}

}  // namespace

void mixture_bounds(const float* scores, int64_t units, int64_t length, int most, int64_t low_density, float* low,
                    float* high, int32_t* components, int threads) {
  // Each score is read some hundred times: threads are worth while for a few rows already.
  parallel_for(units, units * length * 1024, threads, [&](int64_t unit) {
    const Bounds found = bounds(scores + unit * length, length, most, low_density);
    low[unit] = found.low;
    high[unit] = found.high;
    components[unit] = found.components;
  });
}

}  // namespace nirvana
