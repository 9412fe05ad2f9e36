// Attention with its tangent in one pass over the keys: the recurrence of
// scm_kernels/attention/reference.py, for a tile of queries [kRows] and a tile of keys at a time.
//
//     S^T, T^T = [K tK] x [Q^T tQ^T]                     [keys, rows]
//     P^T, H^T = softmax_tile(S^T, T^T)                  a vector lane is a row
//     O^T, tO^T = alpha O^T + [V^T tV^T] x [P^T H^T]     rescaled on the way
//
// bfloat16 runs on the bfloat16 dot instruction where the processor has it, with p and h rounded
// and the sums that normalise taken of the rounded ones; everything else is converted to float32.

#include "attention_tiles.h"
#include "isa.h"
#include "parallel.h"

namespace scm {
namespace SCM_ISA {
namespace {

// Scores and their tangents take 40 KiB: two of their columns and a tile of V of D = 64 fit into a
// first-level cache. With AVX2 32 to 96 keys are equal; 128 keys lose 3%, 128 rows 7%, 32 rows 2%,
// in bfloat16 15%.
constexpr int64_t kRows = 64;
constexpr int64_t kKeys = 64;
constexpr float kNothing = 1e-10f;  // sums of weights that are lost in rounding: eps / 1024

// A tile of scores, which are final under a mask and raw without, and of their tangents.
struct Scores {
  const float *s, *t, *t_bias;
  float scale;

  template <bool kMasked>
  [[gnu::always_inline]] VecF weights(int64_t at, VecF origin) const {
    const VecF x = load<VecF>(s + at);
    return exp_nonpositive((kMasked ? x : rounded(x * scale)) - origin);
  }

  // T; 0 of a dead key, of which it may be anything.
  template <bool kMasked>
  [[gnu::always_inline]] VecF tangents(int64_t at) const {
    VecF y = rounded(load<VecF>(t + at) * scale);  // and c is such a number
    if constexpr (kMasked) {
      if (t_bias) y += load<VecF>(t_bias + at);
      y = load<VecF>(s + at) == broadcast(-__builtin_inff()) ? VecF{} : y;
    }
    return y;
  }
};

// One state a row; `total` and `moment` are l and mu.
struct Softmax {
  alignas(64) float peak[kRows], total[kRows], moment[kRows], shift[kRows];
  alignas(64) float rescale[kRows];                               // of this tile
  alignas(64) float rounded_total[kRows], rounded_moment[kRows];  // what normalises
};

template <class Element>
class Forward {
 public:
  Forward(const AttentionForward& p, Arena arena) : p_(p) {
    columns_ = round_up(least(kRows, p.m), kLanes);
    pitch_ = pitch_of(columns_);
    tangent_scores_ = p.tq || p.tk || p.tmask;
    tangent_ = tangent_scores_ || p.tv;
    const int64_t d = elements<Element>(p.d), keys = least(kKeys, p.n);
    q_ = arena.floats(d * pitch_);
    tq_ = arena.floats(p.tq ? d * pitch_ : 0);
    k_ = arena.floats(keys * pitch_of(p.d));
    tk_ = arena.floats(p.tk ? keys * pitch_of(p.d) : 0);
    v_ = arena.floats(keys * pitch_of(p.e));
    tv_ = arena.floats(p.tv ? keys * pitch_of(p.e) : 0);
    s_ = arena.floats(keys * pitch_);
    t_ = arena.floats(tangent_scores_ ? keys * pitch_ : 0);
    bias_ = arena.floats(p.mask || p.causal ? keys * pitch_ : 0);
    t_bias_ = arena.floats(p.tmask ? keys * pitch_ : 0);
    out_ = arena.floats(p.e * pitch_);
    t_out_ = arena.floats(tangent_ ? p.e * pitch_ : 0);
    end_ = arena.next;
  }

  static size_t scratch_bytes(const AttentionForward& p) {
    alignas(64) static char base[64];
    return Forward(p, Arena{base}).end_ - base;
  }

  void run(int64_t b, int64_t h, int64_t row) {
    const int64_t hk = h / (p_.h / p_.hk), rows = least(kRows, p_.m - row);
    columns_ = round_up(rows, kLanes);
    inputs_ = {matrix(p_.k, b, hk),  matrix(p_.v, b, hk),   matrix(p_.tk, b, hk),
               matrix(p_.tv, b, hk), matrix(p_.mask, b, h), matrix(p_.tmask, b, h)};
    transpose_rows<Element>(matrix(p_.q, b, h), row, rows, p_.d, q_, columns_, pitch_);
    if (p_.tq) {
      transpose_rows<Element>(matrix(p_.tq, b, h), row, rows, p_.d, tq_, columns_, pitch_);
    }
    start();
    const int64_t last = p_.causal ? least(p_.n, row + rows) : p_.n;
    for (int64_t key = 0; key < last; key += kKeys) {
      const Tile tile{row, rows, key, least(kKeys, last - key), columns_, pitch_};
      const Cover cover = mask_tile(inputs_.mask, p_.causal, tile, bias_);
      if (cover == Cover::kAll) continue;
      scores(tile);
      softmax(tile, cover);
      accumulate(tile);
    }
    finish(b, h, row, rows);
  }

 private:
  struct Inputs {
    Matrix k, v, tk, tv, mask, tmask;
  };

  void start() {
    for (int64_t i = 0; i < columns_; ++i) {
      state_.peak[i] = -__builtin_inff();
      state_.total[i] = state_.moment[i] = state_.shift[i] = 0.0f;
      state_.rounded_total[i] = state_.rounded_moment[i] = 0.0f;
    }
    empty_ = true;
  }

  // s, t [keys, columns], not scaled yet.
  void scores(const Tile& tile) {
    const Left k = rows_as_elements<Element>(inputs_.k, tile.key, tile.keys, p_.d, k_);
    const Left tk = rows_as_elements<Element>(inputs_.tk, tile.key, tile.keys, p_.d, tk_);
    const Right right{bytes(q_), p_.tq ? bytes(tq_) : nullptr, 4 * pitch_};
    const Sum sum{s_, t_, pitch_, true, nullptr};
    dual_product<Element>(tile.keys, columns_ / kLanes, elements<Element>(p_.d), k, tk, right, sum);
    if (tangent_scores_ && !p_.tq && !p_.tk) {
      std::memset(t_, 0, 4 * tile.keys * pitch_);
    }
  }

  void softmax(const Tile& tile, Cover cover) {
    const bool masked = cover == Cover::kSome || p_.tmask;
    if (p_.tmask) transpose_mask(inputs_.tmask, tile, 0.0f, t_bias_);
    for (int64_t i = 0; i < columns_; i += kLanes) {
      if (tangent_scores_) {
        masked ? softmax_tile<true, true>(tile.keys, i) : softmax_tile<true, false>(tile.keys, i);
      } else {
        masked ? softmax_tile<false, true>(tile.keys, i) : softmax_tile<false, false>(tile.keys, i);
      }
    }
  }

  // One vector of rows: s becomes p and t becomes h, and the state takes in the tile.
  template <bool kTangent, bool kMasked>
  void softmax_tile(int64_t keys, int64_t column) {
    const VecF dead = broadcast(-__builtin_inff());
    const float scale = p_.scale;
    float* s = s_ + column;
    float* t = t_ + column;
    const int64_t row = pitch_;
    VecF peak = load<VecF>(state_.peak + column);
    const VecF old_peak = peak;
    for (int64_t key = 0; key < keys; ++key) {
      VecF x = rounded(load<VecF>(s + key * row) * scale);
      if constexpr (kMasked) {
        const VecF bias = load<VecF>(bias_ + column + key * row);
        x = bias == dead ? dead : x + bias;  // whatever a dead key's score is
        store(s + key * row, x);
      }
      peak = max(x, peak);
    }
    const VecF origin = peak == dead ? VecF{} : peak;
    const VecF rescale = exp_nonpositive(old_peak - origin);
    const Scores x{s_, t_, p_.tmask ? t_bias_ : nullptr, scale};
    const VecF before = load<VecF>(state_.total + column) * rescale;
    const VecI anew = (before < broadcast(kNothing)) & (peak != dead);
    if (kTangent && any(anew)) fix_shift<kMasked>(x, keys, column, origin, anew);
    const VecF shift = load<VecF>(state_.shift + column);
    Sums sums;
    for (int64_t key = 0; key < keys; key += Element::kPerElement) {
      VecF p[2] = {}, h[2] = {};
      SCM_UNROLL
      for (int i = 0; i < Element::kPerElement; ++i) {
        if (key + i >= keys) break;
        const int64_t at = column + (key + i) * row;
        p[i] = x.weights<kMasked>(at, origin);
        if constexpr (kTangent) h[i] = p[i] * (x.tangents<kMasked>(at) - shift);
        sums.total += p[i];
        sums.moment += h[i];
      }
      const int64_t at = key / Element::kPerElement * row;
      store_elements(s + at, p, &sums.rounded_total);
      if constexpr (kTangent) store_elements(t + at, h, &sums.rounded_moment);
    }
    store(state_.peak + column, peak);
    store(state_.rescale + column, rescale);
    sums.add_to(state_.total, state_.moment, rescale, column);
    if (Element::kPerElement == 2) {
      store(state_.rounded_total + column,
            load<VecF>(state_.rounded_total + column) * rescale + sums.rounded_total);
      store(state_.rounded_moment + column,
            load<VecF>(state_.rounded_moment + column) * rescale + sums.rounded_moment);
    }
  }

  struct Sums {
    VecF total{}, moment{}, rounded_total{}, rounded_moment{};

    void add_to(float* l, float* mu, VecF rescale, int64_t column) const {
      store(l + column, load<VecF>(l + column) * rescale + total);
      store(mu + column, load<VecF>(mu + column) * rescale + moment);
    }
  };

  // x of one key, or of two as a pair of bfloat16, whose rounded values `sum` takes in.
  SCM_INLINE void store_elements(float* to, const VecF (&x)[2], VecF* sum) {
    if constexpr (Element::kPerElement == 1) {
      store(to, x[0]);
    } else {
      const VecU pairs = Element::pairs(Element::round(x[0], x[1]));
      *sum += (VecF)(pairs << 16) + (VecF)(pairs & 0xffff0000);
      store(to, pairs);
    }
  }

  // c, the mean of T by p, of the rows in which nothing counts that came before this tile. It takes
  // the exponentials a second time: of most rows in their first tile alone.
  template <bool kMasked>
  void fix_shift(const Scores& x, int64_t keys, int64_t column, VecF origin, VecI anew) {
    VecF sum{}, total{};
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t at = column + key * pitch_;
      const VecF p = x.weights<kMasked>(at, origin);
      sum += p * x.tangents<kMasked>(at);
      total += p;
    }
    store(state_.shift + column, anew ? sum / total : load<VecF>(state_.shift + column));
  }

  // out, t_out [e, columns] take in p V and h V + p tV.
  void accumulate(const Tile& tile) {
    const Left v = columns_as_elements<Element>(inputs_.v, tile.key, tile.keys, p_.e, v_);
    const Left tv = columns_as_elements<Element>(inputs_.tv, tile.key, tile.keys, p_.e, tv_);
    const Right right{bytes(s_), tangent_scores_ ? bytes(t_) : nullptr, 4 * pitch_};
    const Sum sum{out_, t_out_, pitch_, empty_, state_.rescale};
    dual_product<Element>(p_.e, columns_ / kLanes, elements<Element>(tile.keys), v, tv, right, sum);
    empty_ = false;
  }

  // O = acc / l, tO = tacc / l - (mu / l) O, lse + lse_low = m + log l, mu = mu / l + c.
  void finish(int64_t b, int64_t h, int64_t row, int64_t rows) {
    const int64_t first = (b * p_.h + h) * p_.m + row;
    for (int64_t i = 0; i < rows; ++i) {
      const float total = state_.total[i], log = __builtin_logf(total);
      const bool alive = total != 0.0f;
      const float lse = alive ? state_.peak[i] + log : -__builtin_inff();
      p_.lse[first + i] = lse;
      p_.mu[first + i] = alive ? state_.moment[i] / total + state_.shift[i] : 0.0f;
      if (p_.lse_low) p_.lse_low[first + i] = alive ? state_.peak[i] - lse + log : 0.0f;
    }
    const bool rounded = Element::kPerElement == 2;
    const float* total = rounded ? state_.rounded_total : state_.total;
    const float* moment = rounded ? state_.rounded_moment : state_.moment;
    alignas(64) float inverse[kRows], mean[kRows];
    for (int64_t i = 0; i < columns_; ++i) {
      inverse[i] = 1.0f / (total[i] == 0.0f ? 1.0f : total[i]);
      mean[i] = moment[i] * inverse[i];
    }
    const auto out = [&](int64_t e, int64_t column) {
      if (empty_) return VecF{};
      return load<VecF>(out_ + e * pitch_ + column) * load<VecF>(inverse + column);
    };
    const auto t_out = [&](int64_t e, int64_t column) {
      if (empty_ || !tangent_) return VecF{};
      return load<VecF>(t_out_ + e * pitch_ + column) * load<VecF>(inverse + column) -
             load<VecF>(mean + column) * out(e, column);
    };
    store_transposed(matrix(p_.out, b, h), row, rows, p_.e, out);
    store_transposed(matrix(p_.t_out, b, h), row, rows, p_.e, t_out);
  }

  const AttentionForward& p_;
  Inputs inputs_;
  int64_t columns_, pitch_;
  bool tangent_scores_, tangent_, empty_;
  float *q_, *tq_, *k_, *tk_, *v_, *tv_, *s_, *t_, *bias_, *t_bias_, *out_, *t_out_;
  char* end_;
  Softmax state_;
};

template <class Element>
Status run(const AttentionForward& p) {
  const int64_t tiles = (p.m + kRows - 1) / kRows;
  const size_t bytes = Forward<Element>::scratch_bytes(p);
  return parallel_for(p.b * p.h * tiles, p.threads, bytes, [&](int64_t item, char* scratch) {
    const int64_t head = item / tiles, tile = tiles - 1 - item % tiles;  // causal: longest first
    Forward<Element>(p, Arena{scratch}).run(head / p.h, head % p.h, tile * kRows);
  });
}

}  // namespace

Status attention_forward(const AttentionForward& p) {
#if defined(SCM_BFLOAT16_PAIRS)
  if (p.q.type == Type::kBFloat16) return run<BFloat16Pair>(p);
#endif
  return run<Float32>(p);
}

}  // namespace SCM_ISA
}  // namespace scm
