// The gradient of attention and of its tangent by the closed form of
// scm_kernels/attention/reference.py, a tile of queries [kRows] and a tile of keys at a time; lse
// and mu of the forward stand for the softmax. Dual products of the same kernel, in float32 or in
// pairs of bfloat16:
//
//     S^T, T^T   = [K tK] x [Q^T tQ^T]        B^T, A^T   = [V tV] x [dtO^T dO^T]
//     P, tP, gT, gS of a tile from S, T, B, A                                       [keys, rows]
//     dtQ^T, dQ^T += [K^T tK^T] x [gT gS]     dtK, dK += [gT gS] x [Q tQ]
//                                             dtV, dV += [P tP] x [dtO dO]
//
// A job goes over tiles of queries, and for each over the keys: dQ stays in cache, and dK and dV
// grow in a float32 workspace of the job's own, so that nothing is shared. Where (batch, key head)
// pairs are fewer than the threads want, the queries of one are split over several jobs, whose
// parts are summed in order: the result depends on the number of threads, but not on their timing.

#include <cstdlib>

#include "attention_plan.h"
#include "attention_rest.h"
#include "isa.h"
#include "parallel.h"

namespace scm {
namespace SCM_ISA {
namespace {

constexpr int64_t kKeys = 64;

template <class Element>
class Backward {
 public:
  Backward(const AttentionBackward& p, const Plan& plan, Arena arena) : p_(p), plan_(plan) {
    const auto take = [&](bool wanted, int64_t floats) {
      return wanted ? arena.floats(floats) : nullptr;
    };
    columns_ = round_up(least(kRows, p.m), kLanes);
    pitch_ = pitch_of(columns_);
    const int64_t keys = round_up(least(kKeys, p.n), 2), tile = keys * pitch_;
    const bool both = bool(p.dt_out), pairs = Element::kPerElement == 2;
    q_ = take(true, p.d * pitch_), tq_ = take(bool(p.tq), p.d * pitch_);
    do_ = take(bool(p.dout), p.e * pitch_), dto_ = take(both, p.e * pitch_);
    q_rows_ = take(true, columns_ * pitch_of(p.d));
    tq_rows_ = take(bool(p.tq), columns_ * pitch_of(p.d));
    do_rows_ = take(bool(p.dout), columns_ * pitch_of(p.e));
    dto_rows_ = take(both, columns_ * pitch_of(p.e));
    k_ = take(true, keys * pitch_of(p.d)), tk_ = take(bool(p.tk), keys * pitch_of(p.d));
    v_ = take(true, keys * pitch_of(p.e)), tv_ = take(bool(p.tv), keys * pitch_of(p.e));
    s_ = take(true, tile), t_ = take(both, tile), b_ = take(both, tile), a_ = take(true, tile);
    p_tile_ = {pairs ? take(true, tile / 2) : s_, nullptr};
    tp_ = {pairs ? take(both, tile / 2) : t_, nullptr};
    gt_ = {pairs ? take(both, tile / 2) : b_, pairs ? take(both, tile / 2) : b_};
    gs_ = {pairs ? take(true, tile / 2) : a_, pairs ? take(true, tile / 2) : a_};
    bias_ = take(p.mask || p.causal, tile), t_bias_ = take(bool(p.tmask), tile);
    dq_ = take(bool(p.dq), p.d * pitch_), dtq_ = take(bool(p.dtq), p.d * pitch_);
    lse_ = take(true, columns_), low_ = take(true, columns_), mu_ = take(true, columns_);
    beta_ = take(true, columns_), delta_ = take(true, columns_);
    common_k_ = take(true, pitch_of(p.d)), common_tk_ = take(bool(p.tk), pitch_of(p.d));
    end_ = arena.next;
  }

  static size_t scratch_bytes(const AttentionBackward& p, const Plan& plan) {
    alignas(64) static char base[64];
    return Backward(p, plan, Arena{base}).end_ - base;
  }

  // The queries of one part of all heads of a (batch, key head).
  void run(int64_t b, int64_t hk, int64_t part, const KeySums& sums) {
    const int64_t first = plan_.tiles * part / plan_.parts;
    const int64_t last = plan_.tiles * (part + 1) / plan_.parts;
    const int64_t group = p_.h / p_.hk;
    sums_ = sums;
    // Of keys that a row may not see it gets nothing.
    const int64_t seen = p_.mask || p_.causal ? 0 : p_.n;
    common_of_rows(matrix(p_.k, b, hk), seen, p_.d, common_k_);
    common_of_rows(matrix(p_.tk, b, hk), seen, p_.d, common_tk_);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
      inputs_ = {matrix(p_.k, b, hk),  matrix(p_.v, b, hk),   matrix(p_.tk, b, hk),
                 matrix(p_.tv, b, hk), matrix(p_.mask, b, h), matrix(p_.tmask, b, h)};
      for (int64_t tile = first; tile < last; ++tile) run_rows(b, h, tile * kRows);
    }
  }

 private:
  struct Inputs {
    Matrix k, v, tk, tv, mask, tmask;
  };

  // What the scores become, as the elements of sums over the queries [keys, columns] and of sums
  // over the keys; for float32 both are one, in the scores' own place.
  struct TileOfElements {
    float *rows, *pairs;
  };

  void run_rows(int64_t b, int64_t h, int64_t row) {
    const int64_t rows = least(kRows, p_.m - row);
    columns_ = round_up(rows, kLanes);
    load_rows(b, h, row, rows);
    statistics(b, h, row, rows);
    if (dq_) std::memset(dq_, 0, 4 * p_.d * pitch_);
    if (dtq_) std::memset(dtq_, 0, 4 * p_.d * pitch_);
    rest_ = {};
    const int64_t last = p_.causal ? least(p_.n, row + rows) : p_.n;
    for (int64_t key = 0; key < last; key += kKeys) {
      const Tile tile{row, rows, key, least(kKeys, last - key), columns_, pitch_};
      const Cover cover = mask_tile(inputs_.mask, p_.causal, tile, bias_);
      if (cover == Cover::kAll) continue;
      products(tile);
      gradients(tile, cover, last <= kKeys);
      scatter(tile);
      add_to_mask(matrix(p_.dmask, b, h), tile, a_);
      add_to_mask(matrix(p_.dtmask, b, h), tile, b_);
    }
    rest_.take_off(inputs_.k, inputs_.tk, common_k_, common_tk_, rows, p_.d, dq_, dtq_, pitch_);
    store_scaled(matrix(p_.dq, b, h), row, rows, dq_);
    store_scaled(matrix(p_.dtq, b, h), row, rows, dtq_);
  }

  void store_scaled(const Matrix& to, int64_t row, int64_t rows, const float* x) const {
    if (!to) return;
    store_transposed(to, row, rows, p_.d, [this, x](int64_t d, int64_t column) {
      return load<VecF>(x + d * pitch_ + column) * p_.scale;
    });
  }

  // Queries and cotangents: transposed for the scores, and as they are for sums over the queries.
  void load_rows(int64_t b, int64_t h, int64_t row, int64_t rows) {
    const auto take = [&](const Tensor& x, int64_t width, float* transposed, float* as_rows) {
      if (transposed == nullptr) return;
      const Matrix from = matrix(x, b, h);
      transpose_rows<Element>(from, row, rows, width, transposed, columns_, pitch_);
      if constexpr (Element::kPerElement == 1) {
        copy_rows<Element>(from, row, rows, width, as_rows);
      } else {
        columns_as_elements<Element>(from, row, rows, width, as_rows);
      }
    };
    take(p_.q, p_.d, q_, q_rows_), take(p_.tq, p_.d, tq_, tq_rows_);
    take(p_.dout, p_.e, do_, do_rows_), take(p_.dt_out, p_.e, dto_, dto_rows_);
  }

  // lse, mu, beta, delta of the rows. A row without a live key has lse = -infinity, and P = 0.
  void statistics(int64_t b, int64_t h, int64_t row, int64_t rows) {
    const int64_t first = (b * p_.h + h) * p_.m + row;
    for (int64_t i = 0; i < columns_; ++i) {
      const bool alive = i < rows && p_.lse[first + i] != -__builtin_inff();
      lse_[i] = alive ? p_.lse[first + i] : __builtin_inff();
      low_[i] = alive && p_.lse_low ? p_.lse_low[first + i] : 0.0f;
      mu_[i] = alive && dto_ ? p_.mu[first + i] : 0.0f;
    }
    const Matrix out = matrix(p_.out, b, h), t_out = matrix(p_.t_out, b, h);
    const Matrix dout = matrix(p_.dout, b, h), dt_out = matrix(p_.dt_out, b, h);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      const RowSums sums = sums_of_rows(out, t_out, dout, dt_out, row + i, rows - i, p_.e);
      const VecI alive = load<VecF>(lse_ + i) != broadcast(__builtin_inff());
      store(beta_ + i, alive ? sums.beta : VecF{});
      store(delta_ + i, alive ? sums.delta : VecF{});
    }
  }

  // S and T, not scaled, to s_ and t_; B and A to b_ and a_.
  void products(const Tile& tile) {
    const int64_t vectors = columns_ / kLanes, size = 4 * tile.keys * pitch_;
    const int64_t d = elements<Element>(p_.d), e = elements<Element>(p_.e);
    const Left k = rows_as_elements<Element>(inputs_.k, tile.key, tile.keys, p_.d, k_);
    const Left tk = rows_as_elements<Element>(inputs_.tk, tile.key, tile.keys, p_.d, tk_);
    const Right q{bytes(q_), dto_ && tq_ ? bytes(tq_) : nullptr, 4 * pitch_};
    const Sum scores{s_, t_, pitch_, true, nullptr};
    dual_product<Element>(tile.keys, vectors, d, k, tk, q, scores);
    if (t_ && !p_.tq && !p_.tk) std::memset(t_, 0, size);

    const Left v = rows_as_elements<Element>(inputs_.v, tile.key, tile.keys, p_.e, v_);
    const Left tv = rows_as_elements<Element>(inputs_.tv, tile.key, tile.keys, p_.e, tv_);
    if (dto_) {
      const Right cotangents{bytes(dto_), do_ ? bytes(do_) : nullptr, 4 * pitch_};
      const Sum sums{b_, a_, pitch_, true, nullptr};
      dual_product<Element>(tile.keys, vectors, e, v, tv, cotangents, sums);
      if (!do_ && !p_.tv) std::memset(a_, 0, size);
    } else {
      const Right cotangent{bytes(do_), nullptr, 4 * pitch_};
      const Sum sum{a_, a_, pitch_, true, nullptr};
      dual_product<Element>(tile.keys, vectors, e, v, Left{}, cotangent, sum);
    }
  }

  // `whole`: the rows see no keys but this tile's.
  void gradients(const Tile& tile, Cover cover, bool whole) {
    const bool masked = cover == Cover::kSome || p_.tmask;
    if (p_.tmask) transpose_mask(inputs_.tmask, tile, 0.0f, t_bias_);
    for (int64_t column = 0; column < columns_; column += kLanes) {
      if (dto_) {
        masked ? gradients_of<true, true>(tile, column, whole)
               : gradients_of<true, false>(tile, column, whole);
      } else {
        masked ? gradients_of<false, true>(tile, column, whole)
               : gradients_of<false, false>(tile, column, whole);
      }
    }
  }

  // What is known of one vector of rows, and of their weights for one key.
  struct Rows {
    VecF lse, low, mu, beta, delta;
  };
  struct Weights {
    VecF p, x, b, a;  // P, T - mu, B - beta, A - delta
  };

  template <bool kBoth, bool kMasked>
  Weights weights(int64_t at, const Rows& rows) const {
    const VecF dead = broadcast(-__builtin_inff());
    VecF s = rounded(load<VecF>(s_ + at) * p_.scale);
    VecF t{}, b{};
    if constexpr (kMasked) {
      const VecF bias = load<VecF>(bias_ + at);
      s = bias == dead ? dead : s + bias;
    }
    if constexpr (kBoth) {
      t = rounded(load<VecF>(t_ + at) * p_.scale);  // as in the forward, whose mu it is
      if constexpr (kMasked) {
        if (p_.tmask) t += load<VecF>(t_bias_ + at);
        t = s == dead ? VecF{} : t;
      }
      b = load<VecF>(b_ + at) - rows.beta;
    }
    const VecF p = exp_nonpositive(s - rows.lse - rows.low);
    return {p, t - rows.mu, b, load<VecF>(a_ + at) - rows.delta};
  }

  // mu, beta and delta of rows all of whose keys are here, as sums of the very numbers that they
  // are taken from: where one key takes all, those cancel to the last digit, as in eager's formula.
  template <bool kBoth, bool kMasked>
  void centre(int64_t keys, int64_t column, Rows& rows) const {
    if constexpr (kBoth) {
      VecF mu{}, beta{};
      for (int64_t key = 0; key < keys; ++key) {
        const Weights w = weights<kBoth, kMasked>(key * pitch_ + column, rows);
        mu += w.p * w.x, beta += w.p * w.b;
      }
      rows.mu += mu, rows.beta += beta;
    }
    VecF delta{};
    for (int64_t key = 0; key < keys; ++key) {
      const Weights w = weights<kBoth, kMasked>(key * pitch_ + column, rows);
      delta += w.p * (w.a + w.b * w.x);
    }
    rows.delta += delta;
  }

  // P, tP, gT, gS of one vector of rows, from S, T, B, A.
  template <bool kBoth, bool kMasked>
  void gradients_of(const Tile& tile, int64_t column, bool whole) {
    const int64_t keys = tile.keys;
    Rows rows{load<VecF>(lse_ + column), load<VecF>(low_ + column), load<VecF>(mu_ + column),
              load<VecF>(beta_ + column), load<VecF>(delta_ + column)};
    if (whole) centre<kBoth, kMasked>(keys, column, rows);
    Rest::Rows rest = rest_.load(column);
    for (int64_t key = 0; key < keys; key += Element::kPerElement) {
      VecF p[2] = {}, tp[2] = {}, gt[2] = {}, gs[2] = {};
      SCM_UNROLL
      for (int i = 0; i < Element::kPerElement; ++i) {
        if (key + i >= keys) break;
        const int64_t at = (key + i) * pitch_ + column;
        const Weights w = weights<kBoth, kMasked>(at, rows);
        p[i] = w.p;
        VecF gradient = w.a;
        if constexpr (kBoth) {
          gradient += w.b * w.x;
          tp[i] = w.p * w.x;
          gt[i] = w.p * w.b;
          if (p_.dtmask) store(b_ + at, gt[i]);
        }
        gs[i] = w.p * gradient;
        rest.add(w.p, gs[i], gt[i], tile.key + key + i);
        if (p_.dmask) store(a_ + at, gs[i]);
      }
      put(p, key, column, p_tile_, pitch_);
      put(gs, key, column, gs_, pitch_);
      if constexpr (kBoth) {
        put(tp, key, column, tp_, pitch_);
        put(gt, key, column, gt_, pitch_);
      }
    }
    rest_.store(column, rest);
  }

  // x of one key, or of two as bfloat16.
  SCM_INLINE void put(const VecF (&x)[2], int64_t key, int64_t column, const TileOfElements& to,
                      int64_t pitch) {
    if constexpr (Element::kPerElement == 1) {
      store(to.rows + key * pitch + column, x[0]);
    } else {
      const auto halves = Element::round(x[0], x[1]);
      char* at = reinterpret_cast<char*>(to.rows) + 2 * (key * pitch + column);
      std::memcpy(at, &halves, 2 * kLanes);
      std::memcpy(at + 2 * pitch, reinterpret_cast<const char*>(&halves) + 2 * kLanes, 2 * kLanes);
      if (to.pairs) store(to.pairs + key / 2 * pitch + column, Element::pairs(halves));
    }
  }

  // This tile's part of dq, dk, dv and their tangents'.
  void scatter(const Tile& tile) {
    const int64_t d = plan_.d, e = plan_.e, vectors = columns_ / kLanes;
    const int64_t keys = elements<Element>(tile.keys), rows = elements<Element>(tile.rows);
    const auto left = [&](const TileOfElements& x) {
      return x.rows ? Left{bytes(x.rows), 4 * pitch_ / Element::kPerElement, 4} : Left{};
    };
    const auto right = [&](const float* b1, const float* b2, int64_t pitch) {
      return Right{b1 ? bytes(b1) : nullptr, b2 ? bytes(b2) : nullptr, 4 * pitch};
    };
    const auto sum = [&](float* x, int64_t width) { return x ? x + tile.key * width : nullptr; };
    if (dq_ || dtq_) {
      const Left k = columns_as_elements<Element>(inputs_.k, tile.key, tile.keys, p_.d, k_);
      const Left tk = columns_as_elements<Element>(inputs_.tk, tile.key, tile.keys, p_.d, tk_);
      add_product<Element>(p_.d, vectors, keys, k, tk, right(gt_.pairs, gs_.pairs, pitch_), dtq_,
                           dq_, pitch_);
    }
    add_product<Element>(tile.keys, d / kLanes, rows, left(gt_), left(gs_),
                         right(q_rows_, tq_rows_, pitch_of(p_.d)), sum(sums_.dtk, d),
                         sum(sums_.dk, d), d);
    add_product<Element>(tile.keys, e / kLanes, rows, left(p_tile_), left(tp_),
                         right(dto_rows_, do_rows_, pitch_of(p_.e)), sum(sums_.dtv, e),
                         sum(sums_.dv, e), e);
  }

  // x [keys, columns] to a gradient of a mask.
  void add_to_mask(const Matrix& to, const Tile& tile, const float* x) const {
    if (!to) return;
    for (int64_t i = 0; i < tile.rows; ++i) {
      char* row = to.at(tile.row + i) + tile.key * to.column;
      for (int64_t key = 0; key < tile.keys; ++key) {
        *reinterpret_cast<float*>(row + key * to.column) += x[key * pitch_ + i];
      }
    }
  }

  const AttentionBackward& p_;
  const Plan& plan_;
  Inputs inputs_;
  KeySums sums_;
  int64_t columns_, pitch_;
  float *q_, *tq_, *do_, *dto_;                      // [d or e, columns]
  float *q_rows_, *tq_rows_, *do_rows_, *dto_rows_;  // [columns, d or e]
  float *k_, *tk_, *v_, *tv_;                        // [keys, d or e], converted
  float *s_, *t_, *b_, *a_, *bias_, *t_bias_;        // [keys, columns]
  TileOfElements p_tile_, tp_, gt_, gs_;
  float *dq_, *dtq_;                          // [d, columns]
  float *lse_, *low_, *mu_, *beta_, *delta_;  // [columns]
  float *common_k_, *common_tk_;              // [d]
  char* end_;
  Rest rest_;
};

template <class Element>
Status run(const AttentionBackward& p) {
  const Plan plan(p);
  const int64_t floats = p.b * p.hk * plan.parts * plan.part_floats;
  float* workspace = static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats + 1, 64)));
  if (workspace == nullptr) return kOutOfMemory;
  const size_t bytes = Backward<Element>::scratch_bytes(p, plan);
  const auto job = [&](int64_t item, char* scratch) {
    Backward<Element> backward(p, plan, Arena{scratch});
    const int64_t part = item % plan.parts, groups = p.hk / plan.heads;
    const int64_t b0 = item / plan.parts / groups * plan.batches;
    const int64_t h0 = item / plan.parts % groups * plan.heads;
    for (int64_t b = b0; b < b0 + plan.batches; ++b) {
      for (int64_t hk = h0; hk < h0 + plan.heads; ++hk) {
        float* place = plan.place(p, workspace, b, hk, part);
        std::memset(place, 0, 4 * plan.part_floats);
        backward.run(b, hk, part, plan.sums(p, place));
      }
    }
  };
  Status status = parallel_for(plan.jobs(p), p.threads, bytes, job);
  if (status == kOk) {
    status = parallel_for(p.b * p.hk, p.threads, 0, [&](int64_t item, char*) {
      store_sums(p, plan, workspace, item / p.hk, item % p.hk);
    });
  }
  std::free(workspace);
  return status;
}

}  // namespace

Status attention_backward(const AttentionBackward& p) {
#if defined(SCM_BFLOAT16_PAIRS)
  // Cotangents of half inputs may be float32, and then want more digits than a pair has.
  const auto pairs = [](const Tensor& x) { return !x || x.type == Type::kBFloat16; };
  if (pairs(p.q) && pairs(p.dout) && pairs(p.dt_out)) return run<BFloat16Pair>(p);
#endif
  return run<Float32>(p);
}

}  // namespace SCM_ISA
}  // namespace scm
