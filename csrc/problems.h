// What the kernels of every device take: plain pointers, sizes and strides. Nothing here knows
// torch or Python.
#pragma once

#include <cstdint>

namespace scm {

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16, kBool };

// A tensor of four dimensions. Strides are in elements; 0 repeats a dimension. No data: absent.
struct Tensor {
  char* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  Type type = Type::kFloat32;

  explicit operator bool() const { return data != nullptr; }
};

// Symbols and formulas: scm_kernels/attention/reference.py. The last dimension of q, k, v, of their
// tangents, and of out, t_out, dout and dt_out is contiguous. Heads of q share heads of k: h is a
// multiple of hk. q, k, v and their tangents are of one type; a mask is bool (true takes part),
// of q's type or float32.
struct Attention {
  int64_t b, h, hk, m, n, d, e;
  bool causal;  // aligned top-left
  float scale;
  int threads;         // of the CPU
  Tensor q, tq;        // [b, h, m, d]
  Tensor k, tk;        // [b, hk, n, d]
  Tensor v, tv;        // [b, hk, n, e]
  Tensor mask, tmask;  // [b, h, m, n]
};

struct AttentionForward : Attention {
  Tensor out, t_out;  // [b, h, m, e]
  float *lse, *mu;    // [b, h, m], contiguous
  float* lse_low;     // the same, or null: what lse has lost by rounding
};

// dt_out absent: the gradient through out alone, which sees neither tangents, nor t_out, nor mu.
// An absent gradient is one that nobody asks for.
struct AttentionBackward : Attention {
  Tensor out, t_out, dout, dt_out;   // [b, h, m, e]
  const float *lse, *mu, *lse_low;   // [b, h, m], contiguous; lse_low null: 0
  Tensor dq, dk, dv, dtq, dtk, dtv;  // any strides
  Tensor dmask, dtmask;              // [b, h, m, n] float32, to be added to; stride 0 sums
};

// A number a sample, float32 or float64. Stride 0 repeats one for all.
struct Numbers {
  char* data = nullptr;
  int64_t stride = 0;
  bool wide = false;  // float64
};

// f, v, x, j [b, d] with a contiguous last dimension; coefficients [b, 4] contiguous. Symbols and
// formulas: scm_kernels/tangent/reference.py.
struct Tangent {
  int64_t b, d;
  int threads;   // of the CPU
  double* sums;  // of a GPU: room for those of the parts of samples
  Type type;
  const char* input[4];
  int64_t stride[4];  // of a row, in elements
  double* coefficients;
};

struct TangentNorm : Tangent {
  double* squares;  // [b]
};

struct TangentApply : Tangent {
  char* out;  // [b, d], contiguous
};

// The presets, in the order of scm_kernels/tangent/presets.py.
enum class Preset : int32_t { kPaper, kRms, kSana, kRcm, kMeanflow };

// What a sample's coefficients, scale and weight are made of: presets.h.
struct Options {
  Numbers t, warmup;
  double r;  // for all samples, where there is no `warmup`
  double sigma_data, c;
  Preset preset;
  bool zero;  // a non-finite sample is left out, not NaN
};

// The coefficients are an output, times s.
struct TangentLoss : Tangent {
  Options options;
  Numbers log_weight;
  float* losses;                // [b]
  double *distances, *weights;  // [b]
};

// The gradient of the losses in F, and in log_weight: at 0 where there is none.
struct TangentGradient : TangentApply {
  double* scaled;                     // room for what is applied, [b, 4]
  const double *distances, *weights;  // [b]
  Numbers log_weight, dlosses, dlog_weight;
};

// `coefficients` has room for them.
struct TangentNormalize : TangentApply {
  Options options;
};

}  // namespace scm
