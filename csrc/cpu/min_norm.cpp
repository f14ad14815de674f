// The active-set method of bucketmoo_ds/ops/backends/min_norm.py, one block at a time. That file explains it, and the names
// here are its names; only what differs is said here: masked rows and zero rows are left out instead of being masked.
//
// Products with matrices add column after column to the whole vector. The compiler can vectorise that without changing
// the order in which an entry is summed, and equal rows get equal entries to the bit.

#include "min_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr int kMaxRows = 64;
constexpr double kZeroRow = 1e-15;
constexpr double kRidge = 1e-13;
constexpr double kOptimal = 1e-13;
constexpr double kAboutAsBad = 0.5;
constexpr double kTied = 1e-6;
constexpr double kRounding = 1e-15;
constexpr int kRefinements = 2;

// target += scale * source
inline void add_scaled(double* __restrict__ target, const double* __restrict__ source, double scale, int count) {
  for (int i = 0; i < count; ++i) target[i] += scale * source[i];
}

// In four chains, so that one addition need not wait for the last.
inline double dot(const double* a, const double* b, int count) {
  double chain[4] = {};
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int lane = 0; lane < 4; ++lane) chain[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) chain[0] += a[i] * b[i];
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// The Cholesky factor of a symmetric matrix, stored by columns of the lower triangle.
class Factor {
 public:
  // Takes the lower triangle of matrix [count, kMaxRows] plus the ridge; false where less than half of that is left.
  bool set(const double (*matrix)[kMaxRows], double ridge, int count) {
    count_ = count;
    for (int k = 0; k < count; ++k) {
      std::copy(matrix[k] + k, matrix[k] + count, column_[k] + k);
      column_[k][k] += ridge;
    }
    bool definite = true;
    for (int k = 0; k < count; ++k) {
      double* column = column_[k];
      definite = definite && column[k] >= 0.5 * ridge;
      // A part of a definite matrix is definite; should rounding say otherwise, half of the ridge is what is left.
      inverse_[k] = 1.0 / std::sqrt(std::max(column[k], 0.5 * ridge));
      for (int i = k + 1; i < count; ++i) column[i] *= inverse_[k];
      for (int j = k + 1; j < count; ++j) add_scaled(column_[j] + j, column + j, -column[j], count - j);
    }
    return definite;
  }

  void solve(double* x) const {
    for (int k = 0; k < count_; ++k) {
      x[k] *= inverse_[k];
      add_scaled(x + k + 1, column_[k] + k + 1, -x[k], count_ - k - 1);
    }
    for (int k = count_ - 1; k >= 0; --k) {
      x[k] = (x[k] - dot(column_[k] + k + 1, x + k + 1, count_ - k - 1)) * inverse_[k];
    }
  }

 private:
  int count_ = 0;
  double column_[kMaxRows][kMaxRows];
  double inverse_[kMaxRows];
};

enum class Place : char { kFree, kZero, kCap };

class MinNorm {
 public:
  // Sets weights [K] and returns whether the unmasked Gram is finite.
  bool solve(const double* gram, const bool* mask, double max_weight, int rows, double* weights) {
    std::fill(weights, weights + rows, 0.0);
    majors_ = solves_ = 0;
    count_ = 0;
    for (int i = 0; i < rows; ++i) {
      if (mask[i]) index_[count_++] = i;
    }
    if (count_ == 0) return true;
    gram_ = gram;
    rows_ = rows;
    bool finite = true;
    double largest = 0.0;
    for (int i = 0; i < count_; ++i) {
      for (int j = 0; j < count_; ++j) finite = finite && std::isfinite(entry(i, j));
      largest = std::max(largest, entry(i, i));
    }
    cap_ = std::max(max_weight, 1.0 / count_);
    scale_ = largest > 0.0 ? largest : 1.0;
    mass_ = share_zero_rows(finite, weights);
    if (mass_ > 0.0) {
      if (count_ == 1) weight_[0] = mass_;
      if (count_ == 2) closed_form();
      if (count_ > 2) active_set();
      for (int i = 0; i < count_; ++i) weights[index_[i]] = weight_[i];
    }
    return finite;
  }

  int majors() const { return majors_; }
  int solves() const { return solves_; }

 private:
  double entry(int i, int j) const { return gram_[index_[i] * rows_ + index_[j]]; }

  // Gives zero rows all that the cap lets them have, keeps the others in `index_`, and returns what is left for these.
  double share_zero_rows(bool finite, double* weights) {
    int zero[kMaxRows];
    int zeros = 0, kept = 0;
    for (int i = 0; i < count_; ++i) {
      const double norm = finite ? std::sqrt(std::max(entry(i, i) / scale_, 0.0)) : 0.0;
      if (norm > kZeroRow) {
        norm_[kept] = norm;
        index_[kept++] = index_[i];
      } else {
        zero[zeros++] = index_[i];
      }
    }
    count_ = kept;
    for (int i = 0; i < zeros; ++i) weights[zero[i]] = std::min(1.0 / zeros, cap_);
    return kept == 0 || zeros * cap_ >= 1.0 ? 0.0 : 1.0 - zeros * cap_;
  }

  void closed_form() {
    const double product = entry(0, 1) / scale_;
    const double to_first = entry(1, 1) / scale_ - product, to_second = entry(0, 0) / scale_ - product;
    const double distance = to_first + to_second;
    const double share = distance > 0.0 ? to_first / distance : 0.5;
    weight_[0] = std::min(std::max(std::min(std::max(share * mass_, mass_ - cap_), cap_), 0.0), mass_);
    weight_[1] = mass_ - weight_[0];
  }

  void active_set() {
    set_cosines();
    for (int i = 0; i < count_; ++i) {
      place_[i] = Place::kFree;
      v_[i] = 0.0;
    }
    double shortest = std::numeric_limits<double>::infinity();
    double v_before[kMaxRows];
    Place place_before[kMaxRows];
    bool bold = true;
    majors_ = 1;
    while (solves_ < 8 * count_ + 32) {
      solve_free();
      if (free_count_ > 1 && (bold ? hold_outside() : hold_blocking())) continue;
      for (int k = 0; k < free_count_; ++k) v_[free_[k]] = std::min(std::max(target_[k], 0.0), upper_[free_[k]]);
      const double square = set_gradient();
      if (bold && !(square < shortest)) {
        bold = false;
        std::copy(v_before, v_before + count_, v_);
        std::copy(place_before, place_before + count_, place_);
        continue;
      }
      shortest = square;
      if (!release(bold ? kAboutAsBad : 1.0)) break;
      ++majors_;
      std::copy(v_, v_ + count_, v_before);
      std::copy(place_, place_ + count_, place_before);
    }
    double total = 0.0;
    for (int i = 0; i < count_; ++i) total += weight_[i] = price_[i] * v_[i];
    for (int i = 0; i < count_; ++i) weight_[i] = std::min(weight_[i] * (mass_ / total), cap_);
  }

  void set_cosines() {
    const double shortest = *std::min_element(norm_, norm_ + count_);
    for (int i = 0; i < count_; ++i) {
      for (int j = 0; j < count_; ++j) {
        const double cosine = entry(i, j) / scale_ / (norm_[i] * norm_[j]);
        cosine_[i][j] = std::min(std::max(cosine, -1.0), 1.0);
      }
      price_[i] = shortest / norm_[i];
      upper_[i] = cap_ < mass_ ? cap_ / price_[i] : std::numeric_limits<double>::infinity();
    }
    ridge_ = kRidge;
    while (!factor_.set(cosine_, ridge_, count_)) ridge_ *= 4.0;
  }

  // Finds the free rows, their best lengths without regard to bounds, and the level.
  void solve_free() {
    ++solves_;
    free_count_ = 0;
    for (int i = 0; i < count_; ++i) {
      if (place_[i] == Place::kFree) free_[free_count_++] = i;
    }
    double ahead[kMaxRows], back[kMaxRows], price[kMaxRows], pull[kMaxRows];
    for (int k = 0; k < free_count_; ++k) {
      price[k] = price_[free_[k]];
      pull[k] = 0.0;
      for (int l = 0; l < free_count_; ++l) among_[k][l] = cosine_[free_[k]][free_[l]];
    }
    // The first step's factor is there: that of all rows told the ridge.
    if (solves_ > 1) factor_.set(among_, ridge_, free_count_);
    refine(price, ahead);
    double rest = mass_;
    bool capped = false;
    for (int i = 0; i < count_; ++i) {
      if (place_[i] != Place::kCap) continue;
      capped = true;
      rest -= price_[i] * v_[i];
      for (int k = 0; k < free_count_; ++k) pull[k] += cosine_[i][free_[k]] * v_[i];
    }
    if (capped) {
      refine(pull, back);
    } else {
      std::fill(back, back + free_count_, 0.0);
    }
    level_ = (rest + dot(price, back, free_count_)) / dot(price, ahead, free_count_);
    for (int k = 0; k < free_count_; ++k) target_[k] = level_ * ahead[k] - back[k];
  }

  // Solves (among + ridge) x = right.
  void refine(const double* right, double* x) const {
    std::copy(right, right + free_count_, x);
    factor_.solve(x);
    for (int round = 0; round < kRefinements; ++round) {
      double residual[kMaxRows], product[kMaxRows];
      std::fill(product, product + free_count_, 0.0);
      for (int l = 0; l < free_count_; ++l) add_scaled(product, among_[l], x[l], free_count_);
      for (int k = 0; k < free_count_; ++k) residual[k] = right[k] - product[k] - ridge_ * x[k];
      factor_.solve(residual);
      for (int k = 0; k < free_count_; ++k) x[k] += residual[k];
    }
  }

  bool below(int k) const { return target_[k] < 0.0; }
  bool above(int k) const { return target_[k] > upper_[free_[k]]; }

  // Holds the free rows that are out of bounds, on the side where more weight is; false where there are none.
  bool hold_outside() {
    double under = 0.0, over = 0.0;
    bool stopped = false;
    for (int k = 0; k < free_count_; ++k) {
      if (below(k)) under -= price_[free_[k]] * target_[k];
      if (above(k)) over += price_[free_[k]] * (target_[k] - upper_[free_[k]]);
      stopped = stopped || below(k) || above(k);
    }
    for (int k = 0; k < free_count_; ++k) {
      if (under >= over && below(k)) hold(k);
      if (under < over && above(k)) hold(k);
    }
    return stopped;
  }

  // Goes towards the target until rows reach their bounds, and holds these; false where none stops it.
  bool hold_blocking() {
    double room[kMaxRows];
    double length = 1.0;
    bool stopped = false;
    for (int k = 0; k < free_count_; ++k) {
      const double v = v_[free_[k]];
      room[k] = below(k) ? v / (v - target_[k]) : above(k) ? (upper_[free_[k]] - v) / (target_[k] - v) : 1.0;
      length = std::min(length, room[k]);
      stopped = stopped || below(k) || above(k);
    }
    if (!stopped) return false;
    bool all = true;
    for (int k = 0; k < free_count_; ++k) all = all && blocks(k, room[k], length);
    for (int k = 0; k < free_count_; ++k) {
      double& v = v_[free_[k]];
      v = std::min(std::max(v + length * (target_[k] - v), 0.0), upper_[free_[k]]);
      if (blocks(k, room[k], length) && !(all && k == 0)) hold(k);
    }
    return true;
  }

  bool blocks(int k, double room, double length) const {
    return (below(k) || above(k)) && room <= length * (1.0 + kTied);
  }

  void hold(int k) {
    const int i = free_[k];
    place_[i] = below(k) ? Place::kZero : Place::kCap;
    v_[i] = below(k) ? 0.0 : upper_[i];
  }

  // Sets the gradient, the products of the cosines with v, and returns the square that v has.
  double set_gradient() {
    std::fill(gradient_, gradient_ + count_, 0.0);
    for (int j = 0; j < count_; ++j) {
      if (v_[j] != 0.0) add_scaled(gradient_, cosine_[j], v_[j], count_);
    }
    for (int i = 0; i < count_; ++i) gradient_[i] += ridge_ * v_[i];
    return dot(gradient_, v_, count_);
  }

  // Frees the rows on either side whose violation is at least `share` of the side's worst; false at the optimum.
  bool release(double share) {
    if (free_count_ == 1 && cap_ < mass_ && !hold_corner(free_[0])) return false;
    double violation[kMaxRows];
    double length = 0.0, at_zero = 0.0, at_cap = 0.0;
    for (int i = 0; i < count_; ++i) {
      const double slack = gradient_[i] - level_ * price_[i];
      violation[i] = place_[i] == Place::kFree ? 0.0 : place_[i] == Place::kCap ? slack : -slack;
      double& worst = place_[i] == Place::kCap ? at_cap : at_zero;
      worst = std::max(worst, violation[i]);
      length += v_[i];
    }
    if (!(std::max(at_zero, at_cap) > kOptimal * length)) return false;
    for (int i = 0; i < count_; ++i) {
      const double worst = place_[i] == Place::kCap ? at_cap : at_zero;
      if (violation[i] > 0.0 && violation[i] >= share * worst) place_[i] = Place::kFree;
    }
    return true;
  }

  // Where the only free row is at a bound as well, it is held too, and the level is that at which the worst pair of a
  // row at its cap and a row at 0 violates optimality alike; false where there is no such pair.
  bool hold_corner(int only) {
    const double weight = price_[only] * v_[only];
    if (weight > kRounding && weight < cap_ - kRounding) return true;
    place_[only] = weight > kRounding ? Place::kCap : Place::kZero;
    int high = -1, low = -1;
    for (int i = 0; i < count_; ++i) {
      const double ratio = gradient_[i] / price_[i];
      if (place_[i] == Place::kCap) {
        if (high < 0 || ratio > gradient_[high] / price_[high]) high = i;
      } else {
        if (low < 0 || ratio < gradient_[low] / price_[low]) low = i;
      }
    }
    if (high < 0 || low < 0) return false;
    level_ = (gradient_[high] + gradient_[low]) / (price_[high] + price_[low]);
    return true;
  }

  const double* gram_ = nullptr;
  int rows_ = 0;
  int count_ = 0;  // of the rows in index_
  int index_[kMaxRows];
  double norm_[kMaxRows];
  double weight_[kMaxRows];
  double scale_ = 1.0;
  double cap_ = 1.0;
  double mass_ = 1.0;

  double cosine_[kMaxRows][kMaxRows];
  double ridge_ = kRidge;
  double price_[kMaxRows];
  double upper_[kMaxRows];
  double v_[kMaxRows];
  Place place_[kMaxRows];

  int free_count_ = 0;
  int free_[kMaxRows];
  double among_[kMaxRows][kMaxRows];  // the cosines of the free rows
  Factor factor_;
  double target_[kMaxRows];
  double level_ = 0.0;
  double gradient_[kMaxRows];
  int majors_ = 0;
  int solves_ = 0;
};

}  // namespace

void bucketmoo_min_norm(const double* gram, const bool* mask, double max_weight, double* weights, bool* finite,
                        int64_t begin, int64_t end, int64_t K, int64_t* steps) {
  MinNorm solver;
  for (int64_t block = begin; block < end; ++block) {
    finite[block] = solver.solve(gram + block * K * K, mask + block * K, max_weight, static_cast<int>(K),
                                 weights + block * K);
    if (steps != nullptr) {
      steps[2 * block] = solver.majors();
      steps[2 * block + 1] = solver.solves();
    }
  }
}
