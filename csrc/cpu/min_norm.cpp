// csrc/common/min_norm.h by one thread, block after block.
#include "min_norm.h"

#include <algorithm>
#include <vector>

#include "../common/min_norm.h"

namespace {

struct Alone {
  static constexpr int kSize = 1;
  static constexpr int lane() { return 0; }
  static void sync() {}
  static double sum(double value) { return value; }
  static double largest(double value) { return value; }
  static bool any(bool value) { return value; }
};

using Solver = bucketmoo::MinNorm<Alone>;

}  // namespace

void bucketmoo_min_norm(const double* gram, const bool* mask, double max_weight, double* weights, bool* finite,
                        int64_t begin, int64_t end, int64_t K, int64_t* steps) {
  const int rows = static_cast<int>(K);
  std::vector<double> scratch(Solver::scratch_bytes(rows) / sizeof(double));
  Solver solver(scratch.data(), rows);
  for (int64_t block = begin; block < end; ++block) {
    solver.solve(gram + block * K * K, mask + block * K, max_weight, finite + block);
    std::copy_n(solver.weights(), K, weights + block * K);
    if (steps != nullptr) {
      steps[2 * block] = solver.majors();
      steps[2 * block + 1] = solver.solves();
    }
  }
}
