// The min-norm weights of one block, by one warp, in float64: the active-set method of Wolfe (Finding the nearest point
// in a polytope, Mathematical Programming 11, 1976) with upper bounds. No step depends on anything but the Gram's bits.
//
// Variables are v_i = w_i d_i / d_min over the cosines C_ij = G_ij / (d_i d_j), d_i the rows' norms, so that norms of
// very different size cost no digits: minimise v C v subject to sum_i a_i v_i = mass, 0 <= v_i <= cap / a_i, with
// a_i = d_min / d_i. A row is at 0, at its cap, or free; the free rows F satisfy C_FF v_F + C_FU v_U = lambda a_F,
// which a Cholesky factor of C_FF solves: it grows by a row when a row becomes free, and is rebuilt from where one
// leaves.
#pragma once

#include "common.cuh"

namespace bucketmoo {

constexpr double kRidge = 1e-13;      // on the diagonal of the cosines: duplicate rows stay solvable
constexpr double kZeroNorm = 1e-15;   // of the largest norm: such a row is zero
constexpr double kOptimal = 1e-12;    // of the gradient's magnitude: no multiplier is violated by more

// Bytes of shared memory that one warp needs.
__host__ __device__ constexpr int min_norm_bytes(int rows) {
  return (2 * rows * (rows + 1) + 8 * rows) * 8 + 3 * rows * 4 + (4 - 3 * rows % 4) % 4 * 4;
}

class MinNorm {
 public:
  __device__ __forceinline__ MinNorm(char* shared, int rows) : stride_(rows + 1) {
    double* next = reinterpret_cast<double*>(shared);
    const auto take = [&](int count) {
      double* taken = next;
      next += count;
      return taken;
    };
    cosine_ = take(rows * stride_);
    factor_ = take(rows * stride_);
    norm_ = take(rows);
    price_ = take(rows);
    value_ = take(rows);
    target_ = take(rows);
    right_ = take(rows);
    held_ = take(rows);
    inverse_ = take(rows);
    weight_ = take(rows);
    index_ = reinterpret_cast<int*>(next);
    free_ = index_ + rows;
    state_ = free_ + rows;
  }

  // gram [K, K], mask [K] -> weights [K], and whether the unmasked Gram is finite.
  __device__ __forceinline__ void solve(
      const double* gram, const bool* mask, int rows, double max_weight, double* weights, bool* finite) {
    __syncwarp();
    count_ = 0;
    for (int base = 0; base < rows; base += kWarp) {
      const int row = base + lane();
      const bool counts = row < rows && mask[row];
      const unsigned ballot = __ballot_sync(kAll, counts);
      if (counts) index_[count_ + __popc(ballot & ((1u << lane()) - 1))] = row;
      count_ += __popc(ballot);
    }
    __syncwarp();
    bool bad = false;
    for (int i = 0; i < count_; ++i) {
      for (int j = lane(); j < count_; j += kWarp) bad |= !isfinite(gram[index_[i] * rows + index_[j]]);
    }
    bad = __any_sync(kAll, bad);
    for (int row = lane(); row < rows; row += kWarp) weights[row] = 0.0;
    if (lane() == 0) *finite = !bad;
    __syncwarp();
    if (count_ == 0) return;
    const double uniform = 1.0 / count_;
    if (bad || max_weight <= uniform) {
      for (int i = lane(); i < count_; i += kWarp) weights[index_[i]] = uniform;
      return;
    }
    const double mass = share_zero_rows(gram, rows, max_weight, weights);
    if (count_ == 0 || mass <= 0.0) return;
    for (int i = lane(); i < count_; i += kWarp) weight_[i] = 0.0;
    __syncwarp();
    if (count_ == 1) {
      if (lane() == 0) weight_[0] = mass;
    } else if (count_ == 2) {
      if (lane() == 0) closed_form(gram, rows, max_weight, mass);
    } else {
      active_set(gram, rows, max_weight, mass);
    }
    __syncwarp();
    for (int i = lane(); i < count_; i += kWarp) weights[index_[i]] = weight_[i];
    __syncwarp();
  }

 private:
  static constexpr int kAtZero = 0;
  static constexpr int kAtCap = 1;
  static constexpr int kFree = 2;

  struct Found {
    double value;
    int index;
  };

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  // The smallest value over the warp, the lowest index among equals, in every lane.
  static __device__ __forceinline__ Found smallest(Found best) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const double value = __shfl_xor_sync(kAll, best.value, offset);
      const int index = __shfl_xor_sync(kAll, best.index, offset);
      if (value < best.value || (value == best.value && index < best.index)) best = {value, index};
    }
    return best;
  }

  // Gives zero rows all the weight that the cap lets them have, keeps the others in `index_`, and returns the rest.
  __device__ __forceinline__ double share_zero_rows(
      const double* gram, int rows, double max_weight, double* weights) {
    double largest = 0.0;
    for (int i = lane(); i < count_; i += kWarp) {
      norm_[i] = sqrt(fmax(gram[index_[i] * (rows + 1)], 0.0));
      largest = fmax(largest, norm_[i]);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      largest = fmax(largest, __shfl_xor_sync(kAll, largest, offset));
    }
    int zeros = 0;
    for (int base = 0; base < count_; base += kWarp) {
      const int i = base + lane();
      zeros += __popc(__ballot_sync(kAll, i < count_ && norm_[i] <= kZeroNorm * largest));
    }
    if (zeros == 0) return 1.0;
    const double each = fmin(1.0 / zeros, max_weight);
    int kept = 0;
    for (int base = 0; base < count_; base += kWarp) {
      const int i = base + lane();
      const bool inside = i < count_;
      const double norm = inside ? norm_[i] : 0.0;
      const int row = inside ? index_[i] : 0;
      const bool zero = norm <= kZeroNorm * largest;
      const unsigned ballot = __ballot_sync(kAll, inside && !zero);
      if (inside && zero) weights[row] = each;
      __syncwarp();
      if (inside && !zero) {
        const int place = kept + __popc(ballot & ((1u << lane()) - 1));
        norm_[place] = norm;
        index_[place] = row;
      }
      kept += __popc(ballot);
      __syncwarp();
    }
    count_ = kept;
    return max_weight * zeros >= 1.0 ? 0.0 : 1.0 - each * zeros;
  }

  __device__ __forceinline__ void closed_form(const double* gram, int rows, double cap, double mass) {
    const double g00 = gram[index_[0] * (rows + 1)];
    const double g11 = gram[index_[1] * (rows + 1)];
    const double g01 = gram[index_[0] * rows + index_[1]];
    const double apart = (g00 - g01) + (g11 - g01);
    const double best = apart > 0.0 ? mass * ((g11 - g01) / apart) : 0.5 * mass;
    weight_[0] = fmin(fmax(best, fmax(mass - cap, 0.0)), fmin(mass, cap));
    weight_[1] = mass - weight_[0];
  }

  __device__ __forceinline__ void active_set(const double* gram, int rows, double cap, double mass) {
    for (int i = 0; i < count_; ++i) {
      for (int j = lane(); j < count_; j += kWarp) {
        cosine_[i * stride_ + j] =
            i == j ? 1.0 + kRidge : gram[index_[i] * rows + index_[j]] / (norm_[i] * norm_[j]);
      }
    }
    Found least{INFINITY, kMaxRows};
    for (int i = lane(); i < count_; i += kWarp) least = smaller(least, {norm_[i], i});
    least = smallest(least);
    for (int i = lane(); i < count_; i += kWarp) {
      price_[i] = least.value / norm_[i];
      value_[i] = 0.0;
      state_[i] = kAtZero;
    }
    __syncwarp();
    // An uncapped problem has no upper bounds: no weight can reach more than the mass.
    cap_ = cap < mass ? cap : INFINITY;
    start(cap, mass);
    int entering = -1;
    int origin = kFree;
    for (int step = 0; step < 8 * count_ + 32; ++step) {
      const double multiplier = set_target(mass);
      const int leaving = move();
      if (leaving >= 0) {
        // A row that goes straight back had a multiplier of rounding errors: there is no better point.
        if (free_[leaving] == entering && state_[entering] == origin) break;
        entering = -1;
        drop(leaving);
        continue;
      }
      entering = most_violated(multiplier);
      if (entering < 0) break;
      origin = state_[entering];
      __syncwarp();
      if (lane() == 0) {
        state_[entering] = kFree;
        free_[free_count_] = entering;
      }
      __syncwarp();
      append(free_count_++);
    }
    double total = 0.0;
    for (int i = lane(); i < count_; i += kWarp) total += price_[i] * value_[i];
    total = warp_sum(total);
    for (int i = lane(); i < count_; i += kWarp) {
      const double weight = price_[i] * value_[i] * (mass / total);
      weight_[i] = fmin(weight, cap);
    }
  }

  static __device__ __forceinline__ Found smaller(Found a, Found b) {
    return b.value < a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }

  // The rows of the smallest norms, each filled to its cap; the last of them is free.
  __device__ __forceinline__ void start(double cap, double mass) {
    free_count_ = 0;
    double rest = mass;
    for (int filled = 0; filled < count_; ++filled) {
      Found least{INFINITY, kMaxRows};
      for (int i = lane(); i < count_; i += kWarp) {
        if (state_[i] == kAtZero) least = smaller(least, {norm_[i], i});
      }
      least = smallest(least);
      const bool last = rest <= cap * (1.0 + 1e-12) || filled + 1 == count_;
      __syncwarp();
      if (lane() == 0) {
        value_[least.index] = fmin(rest, cap) / price_[least.index];
        state_[least.index] = last ? kFree : kAtCap;
        if (last) free_[0] = least.index;
      }
      __syncwarp();
      if (last) break;
      rest -= cap;
    }
    append(0);
    free_count_ = 1;
  }

  // Row `place` of the factor, from those before it.
  __device__ __forceinline__ void append(int place) {
    const int row = free_[place];
    for (int i = lane(); i < place; i += kWarp) right_[i] = cosine_[row * stride_ + free_[i]];
    __syncwarp();
    forward(right_, place);
    double length = 0.0;
    for (int i = lane(); i < place; i += kWarp) {
      factor_[place * stride_ + i] = right_[i];
      length += right_[i] * right_[i];
    }
    length = warp_sum(length);
    // Rounding may leave nothing, or less, of a row that depends on the others.
    const double pivot = sqrt(fmax(cosine_[row * stride_ + row] - length, kRidge));
    if (lane() == 0) {
      factor_[place * stride_ + place] = pivot;
      inverse_[place] = 1.0 / pivot;
    }
    __syncwarp();
  }

  // x <- L^-1 x, the first `size` entries.
  __device__ __forceinline__ void forward(double* x, int size) const {
    double low = lane() < size ? x[lane()] : 0.0;
    double high = lane() + kWarp < size ? x[lane() + kWarp] : 0.0;
    for (int k = 0; k < size; ++k) {
      const double entry = __shfl_sync(kAll, k < kWarp ? low : high, k % kWarp) * inverse_[k];
      const auto update = [&](double& mine, int i) {
        if (i == k) mine = entry;
        if (i > k && i < size) mine -= factor_[i * stride_ + k] * entry;
      };
      update(low, lane());
      update(high, lane() + kWarp);
    }
    if (lane() < size) x[lane()] = low;
    if (lane() + kWarp < size) x[lane() + kWarp] = high;
    __syncwarp();
  }

  // x <- L^-T x.
  __device__ __forceinline__ void backward(double* x, int size) const {
    double low = lane() < size ? x[lane()] : 0.0;
    double high = lane() + kWarp < size ? x[lane() + kWarp] : 0.0;
    for (int k = size - 1; k >= 0; --k) {
      const double entry = __shfl_sync(kAll, k < kWarp ? low : high, k % kWarp) * inverse_[k];
      const auto update = [&](double& mine, int i) {
        if (i == k) mine = entry;
        if (i < k) mine -= factor_[k * stride_ + i] * entry;
      };
      update(low, lane());
      update(high, lane() + kWarp);
    }
    if (lane() < size) x[lane()] = low;
    if (lane() + kWarp < size) x[lane() + kWarp] = high;
    __syncwarp();
  }

  // Solves the problem of the free rows without their bounds into `target_`; returns lambda.
  __device__ __forceinline__ double set_target(double mass) {
    double taken = 0.0;
    bool capped = false;
    for (int i = lane(); i < count_; i += kWarp) {
      if (state_[i] == kAtCap) {
        capped = true;
        taken += price_[i] * value_[i];
      }
    }
    capped = __any_sync(kAll, capped);
    for (int k = lane(); k < free_count_; k += kWarp) {
      right_[k] = price_[free_[k]];
      double sum = 0.0;
      if (capped) {
        for (int i = 0; i < count_; ++i) {
          if (state_[i] == kAtCap) sum += cosine_[free_[k] * stride_ + i] * value_[i];
        }
      }
      held_[k] = sum;
    }
    __syncwarp();
    forward(right_, free_count_);
    if (capped) forward(held_, free_count_);
    double squares = 0.0;
    double products = 0.0;
    for (int k = lane(); k < free_count_; k += kWarp) {
      squares += right_[k] * right_[k];
      products += right_[k] * held_[k];
    }
    const double rest = capped ? mass - warp_sum(taken) : mass;
    const double multiplier = (rest + warp_sum(products)) / warp_sum(squares);
    for (int k = lane(); k < free_count_; k += kWarp) target_[k] = multiplier * right_[k] - held_[k];
    __syncwarp();
    backward(target_, free_count_);
    return multiplier;
  }

  // Goes to the target, or as far towards it as the bounds allow; returns the place of the row that stops it, or -1.
  // The only free row has nowhere to go, and stays, at a bound too: others are held against its multiplier.
  __device__ __forceinline__ int move() {
    Found stop{1.0, kMaxRows};
    for (int k = lane(); k < free_count_ && free_count_ > 1; k += kWarp) {
      const double from = value_[free_[k]];
      const double to = target_[k];
      const double top = cap_ / price_[free_[k]];
      if (to < 0.0) stop = smaller(stop, {from / (from - to), k});
      if (to > top) stop = smaller(stop, {fmax(top - from, 0.0) / (to - from), k});
    }
    stop = smallest(stop);
    for (int k = lane(); k < free_count_; k += kWarp) {
      const int row = free_[k];
      const double from = value_[row];
      const double to = target_[k];
      const double top = cap_ / price_[row];
      const double there = stop.index == kMaxRows ? to : from + stop.value * (to - from);
      value_[row] = stop.index == k ? (to < 0.0 ? 0.0 : top) : fmin(fmax(there, 0.0), top);
      if (stop.index == k) state_[row] = to < 0.0 ? kAtZero : kAtCap;
    }
    __syncwarp();
    return stop.index == kMaxRows ? -1 : stop.index;
  }

  // Takes the row at a place out of the factor.
  __device__ __forceinline__ void drop(int place) {
    --free_count_;
    for (int base = place; base < free_count_; base += kWarp) {
      const int k = base + lane();
      const int next = k < free_count_ ? free_[k + 1] : 0;
      __syncwarp();
      if (k < free_count_) free_[k] = next;
      __syncwarp();
    }
    for (int k = place; k < free_count_; ++k) append(k);
  }

  // The row whose multiplier is violated most, or -1 at the optimum.
  __device__ __forceinline__ int most_violated(double multiplier) {
    double magnitude = 0.0;
    for (int i = lane(); i < count_; i += kWarp) magnitude += value_[i];
    magnitude = warp_sum(magnitude);
    Found worst{-kOptimal * magnitude, kMaxRows};
    for (int i = lane(); i < count_; i += kWarp) {
      if (state_[i] == kFree) continue;
      double gradient = 0.0;
      for (int j = 0; j < count_; ++j) gradient += cosine_[i * stride_ + j] * value_[j];
      const double excess = gradient - multiplier * price_[i];
      worst = smaller(worst, {state_[i] == kAtCap ? -excess : excess, i});
    }
    worst = smallest(worst);
    return worst.index == kMaxRows ? -1 : worst.index;
  }

  int stride_;
  int count_ = 0;
  int free_count_ = 0;
  double cap_ = 0.0;
  double* cosine_;
  double* factor_;
  double* norm_;
  double* price_;
  double* value_;
  double* target_;
  double* right_;
  double* held_;
  double* inverse_;
  double* weight_;
  int* index_;
  int* free_;
  int* state_;
};

}  // namespace bucketmoo
