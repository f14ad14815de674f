// The launch layer of csrc/cuda for ctypes: every call returns its error as text, "" if there is none.
#include <algorithm>

#include "common.cuh"

using namespace bucketmoo;

namespace {

std::string error;

template <class Call>
const char* guarded(const Call& call) {
  error.clear();
  try {
    call();
  } catch (const std::runtime_error& raised) {
    error = raised.what();
  }
  return error.c_str();
}

Rows rows_of(void* const* data, int count, int dtype) {
  Rows rows{};
  std::copy(data, data + count, rows.data);
  rows.count = count;
  rows.dtype = static_cast<Dtype>(dtype);
  return rows;
}

// Poisoned, so that a partial which nobody writes shows.
std::vector<double> workspace(int64_t slots, int count) { return std::vector<double>(slots * count * count, NAN); }

}  // namespace

extern "C" {

void set_device(int multiprocessors, int shared_bytes, int64_t l2_bytes) {
  emulated_device = {multiprocessors, shared_bytes, l2_bytes};
}

void set_order(uint32_t seed) { emulator::order.seed(seed); }

const char* run_gram(void** data, int count, int dtype, const Tiles* tiles, double* result) {
  return guarded([&] {
    const Rows rows = rows_of(data, count, dtype);
    gram(rows, *tiles, workspace(gram_slots(rows, *tiles), count).data(), result, nullptr);
  });
}

const char* run_accumulate(
    void** data, int count, const Incoming* incoming, const Tiles* tiles, bool last, double* result) {
  return guarded([&] {
    const Rows rows = rows_of(data, count, 0);
    accumulate_gram(
        rows, *incoming, *tiles, last, workspace(accumulate_slots(rows, *tiles), count).data(), result, nullptr);
  });
}

const char* run_min_norm(
    const double* gram, const bool* mask, int64_t blocks, int rows, double max_weight, double* weights, bool* finite) {
  return guarded([&] { min_norm(gram, mask, blocks, rows, max_weight, weights, finite, nullptr); });
}

const char* run_combine(
    void** data, int count, int dtype, const double* weights, const Tiles* tiles, void* out, int out_dtype,
    bool backward) {
  return guarded([&] {
    const Rows rows = rows_of(data, count, dtype);
    combine(rows, weights, *tiles, out, static_cast<Dtype>(out_dtype), backward, nullptr);
  });
}

const char* run_resolve(
    void** data, int count, int dtype, const Tiles* tiles, int64_t elements, const bool* mask, double max_weight,
    double* result, double* weights, bool* finite, void* out, int out_dtype) {
  return guarded([&] {
    const Rows rows = rows_of(data, count, dtype);
    const int64_t slots = resolve_slots(rows, *tiles, elements);
    if (slots == 0) throw std::runtime_error("resolve: rows do not fit into L2");
    resolve(
        rows, *tiles, mask, max_weight, workspace(slots, count).data(), result, weights, finite, out,
        static_cast<Dtype>(out_dtype), nullptr);
  });
}
}
