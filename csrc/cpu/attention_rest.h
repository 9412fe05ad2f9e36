// What rounding leaves of sums that are 0: those of gS and of gT over the keys of a row. It lies on
// the keys by their weights P, and dQ and dtQ have it times the mean of the keys by P: that is near
// the key that has most of the weight, if one has, else near the mean of all keys.
#pragma once

#include "attention_plan.h"

namespace scm {
namespace SCM_ISA {
namespace {

// to [width] = the mean of the rows of x, up to a whole vector; 0 where that is not finite.
static void mean_of_rows(const Matrix& x, int64_t rows, int64_t width, float* to) {
  if (!x) return;
  for (int64_t j = 0; j < width; j += kLanes) {
    VecF sum{};
    for (int64_t i = 0; i < rows; ++i) sum += load_elements<Float32>(x.at(i), x.type, j, width);
    sum *= 1.0f / rows;
    store(to + j, sum - sum == 0.0f ? sum : VecF{});
  }
}

struct Rest {
  // Of one vector of rows.
  struct Rows {
    VecF s, t;  // the sums
    VecF most;  // the largest P
    VecI key;   // whose it is

    [[gnu::always_inline]] void add(VecF p, VecF gs, VecF gt, int64_t of) {
      s += gs, t += gt;
      key = p > most ? VecI{} + static_cast<int32_t>(of) : key;
      most = max(p, most);
    }
  };

  alignas(64) float s[kRows], t[kRows], most[kRows];
  alignas(64) int32_t key[kRows];

  Rows load(int64_t column) const {
    return {SCM_ISA::load<VecF>(s + column), SCM_ISA::load<VecF>(t + column),
            SCM_ISA::load<VecF>(most + column), SCM_ISA::load<VecI>(key + column)};
  }

  void store(int64_t column, const Rows& x) {
    SCM_ISA::store(s + column, x.s), SCM_ISA::store(t + column, x.t);
    SCM_ISA::store(most + column, x.most), SCM_ISA::store(key + column, x.key);
  }

  // dq, dtq [d, columns], where they are wanted, less this much of K's and of tK's; `mean_k` and
  // `mean_tk` are of `mean_of_rows`.
  void take_off(const Matrix& k, const Matrix& tk, const float* mean_k, const float* mean_tk,
                int64_t rows, int64_t d, float* dq, float* dtq, int64_t pitch) const {
    for (int64_t i = 0; i < rows; ++i) {
      const auto subtract = [&](float* sum, float rest, const Matrix& x, const float* mean) {
        if (sum == nullptr || !x || rest == 0.0f) return;
        for (int64_t j = 0; j < d; j += kLanes) {
          const VecF near = most[i] > 0.5f ? load_elements<Float32>(x.at(key[i]), x.type, j, d)
                                           : SCM_ISA::load<VecF>(mean + j);
          const VecF part = near * rest;
          const int64_t count = least<int64_t>(kLanes, d - j);
          for (int64_t l = 0; l < count; ++l) sum[(j + l) * pitch + i] -= part[l];
        }
      };
      subtract(dq, s[i], k, mean_k);
      subtract(dq, t[i], tk, mean_tk);
      subtract(dtq, t[i], k, mean_k);
    }
  }
};

}  // namespace
}  // namespace SCM_ISA
}  // namespace scm
