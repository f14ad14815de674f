// The min-norm weights of one block, in float64, for the CPU and for a GPU: the active-set method that
// bucketmoo_ds/ops/backends/min_norm.py explains. The names here are its names; only what differs is said here: masked
// rows and zero rows are left out instead of being masked.
//
// A Team solves a block together: one thread of the CPU, or a warp. It says which lane this is, how many there are, and
// how they wait, add and compare. What is in the scratch memory belongs to all lanes, a member to each of them, with the
// same value in all; between a lane's write and another's read stands a `Team::sync`.
//
// Products with matrices add column after column to the whole vector: a lane has whole entries, the compiler of a CPU
// can vectorise, and equal rows get equal entries to the bit.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define BUCKETMOO_DEVICE __device__ __forceinline__
#define BUCKETMOO_BOTH __host__ __device__
#define BUCKETMOO_ROLLED _Pragma("unroll 1")  // a warp's lane has two turns at most
#else
#define BUCKETMOO_DEVICE inline
#define BUCKETMOO_BOTH
#define BUCKETMOO_ROLLED
#endif

namespace bucketmoo {

template <class Team>
class MinNorm {
 public:
  // Of scratch memory, which begins where a double may.
  static BUCKETMOO_BOTH constexpr int scratch_bytes(int rows) {
    return (2 * rows * rows + kVectors * rows) * 8 + (kLists * rows + 2) / 2 * 8;
  }

  BUCKETMOO_DEVICE MinNorm(void* scratch, int rows) : rows_(rows), scratch_(static_cast<double*>(scratch)) {}

  // gram [K, K], mask [K] -> `weights`, and whether the unmasked Gram is finite. max_weight is in (0, 1].
  BUCKETMOO_DEVICE void solve(const double* gram, const bool* mask, double max_weight, bool* finite) {
    gram_ = gram;
    majors_ = solves_ = 0;
    Team::sync();  // what the block before has left may still be read
    each(rows_, [&](int i) { result()[i] = 0.0; });
    count_ = gather(index(), rows_, [&](int i) { return mask[i]; });
    const bool counts = is_finite();
    if (Team::lane() == 0) *finite = counts;
    if (count_ > 0) share_out(counts, max_weight);
    Team::sync();
  }

  // [K], in scratch memory until the next block is solved.
  BUCKETMOO_DEVICE const double* weights() const { return result(); }
  BUCKETMOO_DEVICE int majors() const { return majors_; }
  BUCKETMOO_DEVICE int solves() const { return solves_; }

 private:
  BUCKETMOO_DEVICE bool is_finite() const {
    bool finite = true;
    each(count_, [&](int i) {
      for (int j = 0; j < count_; ++j) finite = finite && entry(i, j) - entry(i, j) == 0.0;
    });
    return !Team::any(!finite);
  }

  BUCKETMOO_DEVICE void share_out(bool finite, double max_weight) {
    double largest = 0.0;
    each(count_, [&](int i) { largest = larger(largest, entry(i, i)); });
    largest = Team::largest(largest);
    cap_ = larger(max_weight, 1.0 / count_);
    scale_ = largest > 0.0 ? largest : 1.0;
    mass_ = share_zero_rows(finite);
    if (mass_ > 0.0) {
      if (count_ == 1 && Team::lane() == 0) weight()[0] = mass_;
      if (count_ == 2 && Team::lane() == 0) closed_form();
      if (count_ > 2) active_set();
      Team::sync();
      each(count_, [&](int i) { result()[index()[i]] = weight()[i]; });
    }
  }

  static constexpr double kZeroRow = 1e-15;
  static constexpr double kRidge = 1e-13;
  static constexpr double kOptimal = 1e-13;
  static constexpr double kAboutAsBad = 0.5;
  static constexpr double kTied = 1e-6;
  static constexpr double kRounding = 1e-15;
  static constexpr double kLift = 16.0;
  static constexpr int kRefinements = 2;

  static constexpr int kFree = 0;
  static constexpr int kZero = 1;
  static constexpr int kCap = 2;

  static BUCKETMOO_DEVICE double larger(double a, double b) { return a < b ? b : a; }
  static BUCKETMOO_DEVICE double smaller(double a, double b) { return b < a ? b : a; }

  // target += scale * source
  static BUCKETMOO_DEVICE void add_scaled(
      double* __restrict__ target, const double* __restrict__ source, double scale, int count) {
    BUCKETMOO_ROLLED
    for (int i = Team::lane(); i < count; i += Team::kSize) target[i] += scale * source[i];
  }

  // Shares out the numbers below `count`.
  template <class Work>
  static BUCKETMOO_DEVICE void each(int count, const Work& work) {
    BUCKETMOO_ROLLED
    for (int i = Team::lane(); i < count; i += Team::kSize) work(i);
  }

  static BUCKETMOO_DEVICE double dot(const double* a, const double* b, int count) {
    // One thread adds in four chains, so that one addition need not wait for the last.
    double chain[4] = {};
    int i = Team::lane();
    for (; Team::kSize == 1 && i + 4 <= count; i += 4) {
      for (int k = 0; k < 4; ++k) chain[k] += a[i + k] * b[i + k];
    }
    BUCKETMOO_ROLLED
    for (; i < count; i += Team::kSize) chain[0] += a[i] * b[i];
    return Team::sum((chain[0] + chain[1]) + (chain[2] + chain[3]));
  }

  // Lists those of the numbers below `count` that are chosen, in order; returns how many.
  template <class Chosen>
  BUCKETMOO_DEVICE int gather(int* list, int count, const Chosen& chosen) {
    if (Team::lane() == 0) {
      int found = 0;
      for (int i = 0; i < count; ++i) {
        if (chosen(i)) list[found++] = i;
      }
      *found_() = found;
    }
    Team::sync();
    return *found_();
  }

  BUCKETMOO_DEVICE double entry(int i, int j) const { return gram_[index()[i] * rows_ + index()[j]]; }

  // Gives zero rows all that the cap lets them have, keeps the others in `index`, and returns what is left for these.
  BUCKETMOO_DEVICE double share_zero_rows(bool finite) {
    each(count_, [&](int i) {
      norm()[i] = finite ? sqrt(larger(entry(i, i) / scale_, 0.0)) : 0.0;
    });
    Team::sync();
    const int kept = gather(free(), count_, [&](int i) { return norm()[i] > kZeroRow; });
    if (kept == count_) return 1.0;
    const int zeros = count_ - kept;
    each(count_, [&](int i) {
      if (!(norm()[i] > kZeroRow)) result()[index()[i]] = smaller(1.0 / zeros, cap_);
    });
    Team::sync();
    if (Team::lane() == 0) {
      for (int i = 0; i < kept; ++i) {
        norm()[i] = norm()[free()[i]];
        index()[i] = index()[free()[i]];
      }
    }
    Team::sync();
    count_ = kept;
    return kept == 0 || zeros * cap_ >= 1.0 ? 0.0 : 1.0 - zeros * cap_;
  }

  BUCKETMOO_DEVICE void closed_form() {
    const double product = entry(0, 1) / scale_;
    const double to_first = entry(1, 1) / scale_ - product, to_second = entry(0, 0) / scale_ - product;
    const double distance = to_first + to_second;
    const double share = distance > 0.0 ? to_first / distance : 0.5;
    weight()[0] = smaller(larger(smaller(larger(share * mass_, mass_ - cap_), cap_), 0.0), mass_);
    weight()[1] = mass_ - weight()[0];
  }

  BUCKETMOO_DEVICE void active_set() {
    set_cosines();
    ridge_ = kRidge;
    lift_ = 0.0;
    each(count_, [&](int i) {
      place()[i] = kFree;
      v()[i] = 0.0;
    });
    Team::sync();
    double shortest = INFINITY;
    bool bold = true;
    about_v_ = false;
    majors_ = 1;
    while (solves_ < 24 * count_ + 96) {
      solve_free();
      if (free_count_ > 1 && (bold ? hold_outside() : hold_blocking())) continue;
      const double moved = go_to_target();
      if (about_v_ && moved > kOptimal) continue;
      const double square = set_gradient();
      if (bold && !(square < shortest)) {
        bold = false;
        copy_state(before(), place_before(), v(), place());
        continue;
      }
      shortest = square;
      if (release(bold ? kAboutAsBad : 1.0)) {
        ++majors_;
        copy_state(v(), place(), before(), place_before());
        continue;
      }
      if (about_v_ || ridge_ == kRidge) break;
      about_v_ = true;
      bold = false;
      // Without any free row, which `release` may leave at its optimum, there would be no level.
      Team::sync();
      if (free_count_ == 1 && Team::lane() == 0) place()[free()[0]] = kFree;
      Team::sync();
    }
    double total = 0.0;
    each(count_, [&](int i) { total += weight()[i] = price()[i] * v()[i]; });
    total = Team::sum(total);
    each(count_, [&](int i) {
      weight()[i] = smaller(weight()[i] * (mass_ / total), cap_);
    });
  }

  BUCKETMOO_DEVICE void copy_state(const double* v, const int* place, double* to_v, int* to_place) {
    each(count_, [&](int i) { to_v[i] = v[i]; });
    each(count_, [&](int i) { to_place[i] = place[i]; });
    Team::sync();
  }

  BUCKETMOO_DEVICE void set_cosines() {
    double shortest = INFINITY;
    each(count_, [&](int i) { shortest = smaller(shortest, norm()[i]); });
    shortest = -Team::largest(-shortest);
    for (int i = 0; i < count_; ++i) {
      each(count_, [&](int j) {
        cosine(i)[j] = entry(i, j) / scale_ / (norm()[i] * norm()[j]);
      });
    }
    each(count_, [&](int i) {
      price()[i] = shortest / norm()[i];
      upper()[i] = cap_ < mass_ ? cap_ / price()[i] : INFINITY;
    });
  }

  // Factors the cosines of the free rows, with ridge and lift, by columns of the lower triangle, and keeps these as rows
  // of the upper one too; false where less than half of the ridge is left.
  BUCKETMOO_DEVICE bool factor_free() {
    for (int k = 0; k < free_count_; ++k) {
      const double* from = cosine(free()[k]);
      const double lift = lift_ * price()[free()[k]];
      for (int i = k + Team::lane(); i < free_count_; i += Team::kSize) {
        factor(k)[i] = from[free()[i]] + lift * price()[free()[i]] + (i == k ? ridge_ : 0.0);
      }
    }
    Team::sync();
    bool definite = true;
    for (int k = 0; k < free_count_; ++k) {
      double* column = factor(k);
      const double pivot = column[k];
      definite = definite && pivot >= 0.5 * ridge_;
      // A part of a definite matrix is definite; should rounding say otherwise, half of the ridge is what is left.
      const double inverse = 1.0 / sqrt(larger(pivot, 0.5 * ridge_));
      if (Team::lane() == 0) this->inverse()[k] = inverse;
      for (int i = k + 1 + Team::lane(); i < free_count_; i += Team::kSize) factor(i)[k] = column[i] *= inverse;
      Team::sync();
      for (int j = k + 1; j < free_count_; ++j) add_scaled(factor(j) + j, column + j, -column[j], free_count_ - j);
      Team::sync();
    }
    return definite;
  }

  // Divides x by the factor and by its transpose. While its column is taken away from others x[k] is read by all lanes,
  // and waits to be divided by the diagonal.
  BUCKETMOO_DEVICE void divide(double* x) {
    for (int k = 0; k < free_count_; ++k) {
      add_scaled(x + k + 1, factor(k) + k + 1, -(x[k] * inverse()[k]), free_count_ - k - 1);
      Team::sync();
    }
    divide_by_diagonal(x);
    for (int k = free_count_ - 1; k >= 0; --k) {
      add_scaled(x, factor(k), -(x[k] * inverse()[k]), k);
      Team::sync();
    }
    divide_by_diagonal(x);
  }

  BUCKETMOO_DEVICE void divide_by_diagonal(double* x) {
    each(free_count_, [&](int k) { x[k] *= inverse()[k]; });
    Team::sync();
  }

  // Finds the free rows, their best lengths without regard to bounds, and the level.
  BUCKETMOO_DEVICE void solve_free() {
    ++solves_;
    free_count_ = gather(free(), count_, [&](int i) { return place()[i] == kFree; });
    each(free_count_, [&](int k) {
      paid()[k] = price()[free()[k]];
      pull()[k] = 0.0;
    });
    Team::sync();
    if (about_v_) {
      lift_ = kLift / dot(paid(), paid(), free_count_);
      ridge_ = larger(ridge_ / 64.0, kRidge);
    }
    // The first step has all rows, and the ridge that makes them definite serves any of them.
    while (!factor_free() && (about_v_ || solves_ == 1)) ridge_ *= 4.0;
    double rest = mass_;
    bool pulled = about_v_;
    for (int i = 0; i < count_; ++i) {
      if (place()[i] != kCap) continue;
      pulled = true;
      rest -= price()[i] * v()[i];
      each(free_count_, [&](int k) { pull()[k] += cosine(i)[free()[k]] * v()[i]; });
    }
    each(free_count_, [&](int k) {
      back()[k] = 0.0;
      if (about_v_) pull()[k] -= ridge_ * v()[free()[k]];
    });
    Team::sync();
    for (int side = 0; side < (pulled ? 2 : 1); ++side) {
      refine(side == 0 ? paid() : pull(), side == 0 ? ahead() : back());
    }
    const double level = (rest + dot(paid(), back(), free_count_)) / dot(paid(), ahead(), free_count_);
    each(free_count_, [&](int k) { target()[k] = level * ahead()[k] - back()[k]; });
    Team::sync();
    level_ = level - lift_ * rest;
  }

  // Solves the equations of the free rows.
  BUCKETMOO_DEVICE void refine(const double* right, double* x) {
    each(free_count_, [&](int k) { residual()[k] = right[k]; });
    each(free_count_, [&](int k) { x[k] = 0.0; });
    for (int round = 0; round <= kRefinements; ++round) {
      if (round > 0) set_residual(right, x);
      Team::sync();
      divide(residual());
      each(free_count_, [&](int k) { x[k] += residual()[k]; });
      Team::sync();
    }
  }

  BUCKETMOO_DEVICE void set_residual(const double* right, const double* x) {
    each(count_, [&](int i) { product()[i] = 0.0; });
    for (int l = 0; l < free_count_; ++l) add_scaled(product(), cosine(free()[l]), x[l], count_);
    const double lift = lift_ == 0.0 ? 0.0 : lift_ * dot(paid(), x, free_count_);
    Team::sync();
    each(free_count_, [&](int k) {
      residual()[k] = right[k] - product()[free()[k]] - ridge_ * x[k] - lift * paid()[k];
    });
  }

  BUCKETMOO_DEVICE bool below(int k) const { return target()[k] < 0.0; }
  BUCKETMOO_DEVICE bool above(int k) const { return target()[k] > upper()[free()[k]]; }

  // Goes to the target; returns how far from optimal the ridge about v leaves the free rows, of the sum of the lengths.
  BUCKETMOO_DEVICE double go_to_target() {
    double farthest = 0.0, length = 0.0;
    each(free_count_, [&](int k) {
      double& v = this->v()[free()[k]];
      const double there = smaller(larger(target()[k], 0.0), upper()[free()[k]]);
      farthest = larger(farthest, there < v ? v - there : there - v);
      length += there;
      v = there;
    });
    Team::sync();
    return about_v_ ? ridge_ * Team::largest(farthest) / Team::sum(length) : 0.0;
  }

  // Holds the free rows that are out of bounds, on the side where more weight is; false where there are none.
  BUCKETMOO_DEVICE bool hold_outside() {
    double under = 0.0, over = 0.0;
    bool stopped = false;
    each(free_count_, [&](int k) {
      if (below(k)) under -= paid()[k] * target()[k];
      if (above(k)) over += paid()[k] * (target()[k] - upper()[free()[k]]);
      stopped = stopped || below(k) || above(k);
    });
    under = Team::sum(under);
    over = Team::sum(over);
    each(free_count_, [&](int k) {
      if (under >= over && below(k)) hold(k);
      if (under < over && above(k)) hold(k);
    });
    Team::sync();
    return Team::any(stopped);
  }

  // Goes towards the target until rows reach their bounds, and holds these; false where none stops it.
  BUCKETMOO_DEVICE bool hold_blocking() {
    double length = 1.0;
    bool stopped = false;
    each(free_count_, [&](int k) {
      const double v = this->v()[free()[k]];
      room()[k] = below(k)   ? v / (v - target()[k])
                  : above(k) ? (upper()[free()[k]] - v) / (target()[k] - v)
                             : 1.0;
      length = smaller(length, room()[k]);
      stopped = stopped || below(k) || above(k);
    });
    if (!Team::any(stopped)) return false;
    length = -Team::largest(-length);
    bool some = false;
    each(free_count_, [&](int k) { some = some || !blocks(k, length); });
    // One row stays free, to tell the level.
    some = Team::any(some);
    each(free_count_, [&](int k) {
      double& v = this->v()[free()[k]];
      v = smaller(larger(v + length * (target()[k] - v), 0.0), upper()[free()[k]]);
      if (blocks(k, length) && (some || k > 0)) hold(k);
    });
    Team::sync();
    return true;
  }

  BUCKETMOO_DEVICE bool blocks(int k, double length) const {
    return (below(k) || above(k)) && room()[k] <= length * (1.0 + kTied);
  }

  BUCKETMOO_DEVICE void hold(int k) {
    const int i = free()[k];
    place()[i] = below(k) ? kZero : kCap;
    v()[i] = below(k) ? 0.0 : upper()[i];
  }

  // Sets the gradient, the products of the cosines with v, and returns the square that v has.
  BUCKETMOO_DEVICE double set_gradient() {
    each(count_, [&](int i) { gradient()[i] = 0.0; });
    for (int j = 0; j < count_; ++j) {
      if (v()[j] != 0.0) add_scaled(gradient(), cosine(j), v()[j], count_);
    }
    if (!about_v_) each(count_, [&](int i) { gradient()[i] += ridge_ * v()[i]; });
    Team::sync();
    return dot(gradient(), v(), count_);
  }

  // Frees the rows on either side whose violation is at least `share` of the side's worst; false at the optimum.
  BUCKETMOO_DEVICE bool release(double share) {
    if (free_count_ == 1 && cap_ < mass_ && !hold_corner(free()[0])) return false;
    double length = 0.0, at_zero = 0.0, at_cap = 0.0;
    each(count_, [&](int i) {
      const double slack = gradient()[i] - level_ * price()[i];
      violation()[i] = place()[i] == kFree ? 0.0 : place()[i] == kCap ? slack : -slack;
      if (place()[i] == kCap) at_cap = larger(at_cap, violation()[i]);
      if (place()[i] == kZero) at_zero = larger(at_zero, violation()[i]);
      length += v()[i];
    });
    at_cap = Team::largest(at_cap);
    at_zero = Team::largest(at_zero);
    length = Team::sum(length);
    if (!(larger(at_zero, at_cap) > kOptimal * length)) return false;
    each(count_, [&](int i) {
      const double worst = place()[i] == kCap ? at_cap : at_zero;
      if (violation()[i] > 0.0 && violation()[i] >= share * worst) place()[i] = kFree;
    });
    Team::sync();
    return true;
  }

  // Where the only free row is at a bound as well, it is held too, and the level is that at which the worst pair of a
  // row at its cap and a row at 0 violates optimality alike; false where there is no such pair.
  BUCKETMOO_DEVICE bool hold_corner(int only) {
    const double weight = price()[only] * v()[only];
    if (weight > kRounding && weight < cap_ - kRounding) return true;
    Team::sync();
    if (Team::lane() == 0) place()[only] = weight > kRounding ? kCap : kZero;
    Team::sync();
    int high = -1, low = -1;
    for (int i = 0; i < count_; ++i) {
      const double ratio = gradient()[i] / price()[i];
      if (place()[i] == kCap) {
        if (high < 0 || ratio > gradient()[high] / price()[high]) high = i;
      } else {
        if (low < 0 || ratio < gradient()[low] / price()[low]) low = i;
      }
    }
    if (high < 0 || low < 0) return false;
    level_ = (gradient()[high] + gradient()[low]) / (price()[high] + price()[low]);
    return true;
  }

  // Scratch memory: two matrices [K, K], vectors [K], and lists [K] of integers.
  BUCKETMOO_DEVICE double* cosine(int i) const { return scratch_ + i * rows_; }
  BUCKETMOO_DEVICE double* factor(int k) const { return scratch_ + (rows_ + k) * rows_; }
  BUCKETMOO_DEVICE double* vector(int number) const { return scratch_ + (2 * rows_ + number) * rows_; }
  BUCKETMOO_DEVICE double* norm() const { return vector(0); }
  BUCKETMOO_DEVICE double* weight() const { return vector(1); }
  BUCKETMOO_DEVICE double* price() const { return vector(2); }
  BUCKETMOO_DEVICE double* upper() const { return vector(3); }
  BUCKETMOO_DEVICE double* v() const { return vector(4); }
  BUCKETMOO_DEVICE double* before() const { return vector(5); }
  BUCKETMOO_DEVICE double* gradient() const { return vector(6); }
  BUCKETMOO_DEVICE double* product() const { return vector(7); }
  // Of the free rows.
  BUCKETMOO_DEVICE double* paid() const { return vector(8); }
  BUCKETMOO_DEVICE double* pull() const { return vector(9); }
  BUCKETMOO_DEVICE double* ahead() const { return vector(10); }
  BUCKETMOO_DEVICE double* back() const { return vector(11); }
  BUCKETMOO_DEVICE double* target() const { return vector(12); }
  BUCKETMOO_DEVICE double* inverse() const { return vector(13); }
  BUCKETMOO_DEVICE double* residual() const { return vector(14); }
  BUCKETMOO_DEVICE double* room() const { return vector(14); }
  BUCKETMOO_DEVICE double* violation() const { return vector(14); }
  BUCKETMOO_DEVICE double* result() const { return vector(15); }
  static constexpr int kVectors = 16;
  BUCKETMOO_DEVICE int* list(int number) const { return reinterpret_cast<int*>(vector(kVectors)) + number * rows_; }
  BUCKETMOO_DEVICE int* index() const { return list(0); }
  BUCKETMOO_DEVICE int* free() const { return list(1); }
  BUCKETMOO_DEVICE int* place() const { return list(2); }
  BUCKETMOO_DEVICE int* place_before() const { return list(3); }
  static constexpr int kLists = 4;
  BUCKETMOO_DEVICE int* found_() const { return list(kLists); }

  const int rows_;
  double* const scratch_;
  const double* gram_ = nullptr;
  int count_ = 0;  // of the rows in `index`
  int free_count_ = 0;
  double scale_ = 1.0;
  double cap_ = 1.0;
  double mass_ = 1.0;
  double ridge_ = kRidge;
  double lift_ = 0.0;
  double level_ = 0.0;
  bool about_v_ = false;
  int majors_ = 0;
  int solves_ = 0;
};

}  // namespace bucketmoo
