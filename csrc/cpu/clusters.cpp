#include "clusters.h"

#include <algorithm>

namespace nirvana {

namespace {

constexpr int kLloydSteps = 300;

}  // namespace

Clusters::Clusters(const float* sorted, int64_t length) : sorted_(sorted), length_(length), cuts_{0, length} {
  sums_.resize(static_cast<size_t>(length) + 1);
  for (int64_t i = 0; i < length; ++i) sums_[i + 1] = sums_[i] + sorted[i];
}

void Clusters::split() {
  double best = -1;
  int64_t place = length_;
  for (int cluster = 0; cluster < count(); ++cluster) {
    const int64_t left = begin(cluster), right = end(cluster);
    for (int64_t i = left + 1; i < right; ++i) {
      const double size = static_cast<double>(i - left) * static_cast<double>(right - i) / static_cast<double>(right - left);
      const double gap = mean(left, i) - mean(i, right);
      if (gap * gap * size > best) {
        best = gap * gap * size;
        place = i;
      }
    }
  }
  cuts_.insert(std::lower_bound(cuts_.begin(), cuts_.end(), place), place);
  for (int step = 0; step < kLloydSteps && lloyd(); ++step) {
  }
}

// Each number to the nearest mean. False where that changes nothing, or would leave a cluster without a number.
bool Clusters::lloyd() {
  moved_ = cuts_;
  for (int cluster = 1; cluster < count(); ++cluster) {
    const double middle = (mean(cluster - 1) + mean(cluster)) / 2;
    moved_[cluster] = std::upper_bound(sorted_, sorted_ + length_, middle) - sorted_;
  }
  for (int cluster = 0; cluster < count(); ++cluster) {
    if (moved_[cluster] >= moved_[cluster + 1]) return false;
  }
  if (moved_ == cuts_) return false;
  cuts_.swap(moved_);
  return true;
}

}  // namespace nirvana
