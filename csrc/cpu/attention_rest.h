// What rounding leaves of sums that are 0: those of gS and of gT over the keys of a row. It lies on
// the keys by their weights P, and dQ and dtQ have it times the mean of the keys by P: that is near
// the key that has most of the weight, if one has, else near what all keys have in common.
#pragma once

#include "attention_plan.h"

namespace scm {
namespace SCM_ISA {
namespace {

// to [width], up to a whole vector: what all rows of x have in common. Of the means of four parts
// of them, the least if all are positive, the largest if all are negative, else 0: a few rows that
// are unlike the others have no part in it.
static void common_of_rows(const Matrix& x, int64_t rows, int64_t width, float* to) {
  if (!x) return;
  for (int64_t j = 0; j < width; j += kLanes) {
    VecF sums[4] = {};
    for (int64_t i = 0; i < rows; ++i) {
      sums[i % 4] += load_elements<Float32>(x.at(i), x.type, j, width);
    }
    VecF low = sums[0], high = sums[0];
    for (const VecF& sum : sums) low = sum < low ? sum : low, high = max(sum, high);
    const VecF common = (max(low, VecF{}) + (high < 0.0f ? high : VecF{})) * (4.0f / rows);
    store(to + j, common - common == 0.0f ? common : VecF{});
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

  // dq, dtq [d, columns], where they are wanted, less this much of K's and of tK's; `common_k` and
  // `common_tk` are of `common_of_rows`, or zeros.
  void take_off(const Matrix& k, const Matrix& tk, const float* common_k, const float* common_tk,
                int64_t rows, int64_t d, float* dq, float* dtq, int64_t pitch) const {
    for (int64_t i = 0; i < rows; ++i) {
      const auto subtract = [&](float* sum, float rest, const Matrix& x, const float* common) {
        if (sum == nullptr || !x || rest == 0.0f) return;
        for (int64_t j = 0; j < d; j += kLanes) {
          const VecF near = most[i] > 0.5f ? load_elements<Float32>(x.at(key[i]), x.type, j, d)
                                           : SCM_ISA::load<VecF>(common + j);
          const VecF part = near * rest;
          const int64_t count = least<int64_t>(kLanes, d - j);
          for (int64_t l = 0; l < count; ++l) sum[(j + l) * pitch + i] -= part[l];
        }
      };
      subtract(dq, s[i], k, common_k);
      subtract(dq, t[i], tk, common_tk);
      subtract(dtq, t[i], k, common_k);
    }
  }
};

}  // namespace
}  // namespace SCM_ISA
}  // namespace scm
