// The tangent g = a F + b V + k X + d J of each sample, its norm, and g normalised, each in one
// read of the inputs (two where a sample is normalised that is shared by threads, or beyond kKept):
// the formulas of scm_kernels/tangent/reference.py.
//
// Elements are combined in float32 and their squares summed in float64. A sample is cut into chunks
// of a fixed size, whose sums are added in order; so the result does not depend on which thread
// takes which chunk, and one sample of millions of elements is shared by all threads. Samples of
// less than a chunk go several to a work item.

#include <cstdlib>

#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "presets.h"
#include "simd.h"

namespace scm {
namespace SCM_ISA {
namespace {

// Elements: 256 KiB of float32 inputs, some 10 us, beside which taking a work item costs nothing.
constexpr int64_t kChunk = 16384;
// Samples up to this size are normalised from a float32 copy of g: up to 1 MiB of it in the core's
// cache, up to 16 MiB in the shared one, or in memory, which is still less than the inputs again.
constexpr int64_t kKept = 4194304;

// --- work items ---------------------------------------------------------------------------------

// One chunk of one sample, or, where a chunk is a whole sample, as many of those as fill one.
struct Work {
  int64_t sample, last;   // samples, the last one excluded
  int64_t first, count;   // elements
  int64_t chunk, chunks;  // of the sample
};

struct Grid {
  explicit Grid(const Tangent& p)
      : p(p),
        samples(p.d < kChunk ? kChunk / p.d : 1),
        chunks((p.d + kChunk - 1) / kChunk),
        items((p.b + samples - 1) / samples * chunks) {}

  Work operator[](int64_t item) const {
    const int64_t sample = item / chunks * samples, chunk = item % chunks;
    return {sample,         least(p.b, sample + samples),
            chunk * kChunk, least(kChunk, p.d - chunk * kChunk),
            chunk,          chunks};
  }

  const Tangent& p;
  int64_t samples, chunks, items;  // samples a work item, chunks a sample
};

// --- g, a vector at a time ----------------------------------------------------------------------

template <Type kType>
constexpr int64_t kSize = kType == Type::kFloat32 ? 4 : 2;

// The inputs of a sample from one of its elements on, and its scalars.
template <Type kType>
struct Row {
  Row(const Tangent& p, int64_t sample, int64_t first) {
    for (int i = 0; i < 4; ++i) {
      input[i] = p.input[i] + (sample * p.stride[i] + first) * kSize<kType>;
      scalar[i] = broadcast(static_cast<float>(p.coefficients[4 * sample + i]));
    }
  }

  const char* input[4];
  VecF scalar[4];
};

// body(i, g, n) for each vector of g, of elements i to i + n, n = kLanes but for the last one.
template <Type kType, class Body>
SCM_INLINE void combine(const Row<kType>& row, int64_t count, const Body& body) {
  const auto sum = [&row](const auto& load) __attribute__((always_inline)) {
    // From 0: of a b + c d a compiler fuses either product, and not the same in every loop.
    VecF g{};
    SCM_UNROLL
    for (int i = 0; i < 4; ++i) g = row.scalar[i] * load(row.input[i]) + g;
    return g;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    body(i, sum([i](const char* x) { return load_as_float(x + i * kSize<kType>, kType); }), kLanes);
  }
  if (const int64_t n = count - i; n > 0) {
    body(i, sum([i, n](const char* x) {
           return load_some_as_float(x + i * kSize<kType>, kType, n, 1);
         }),
         n);
  }
}

// n <= kLanes elements at `to`, rounded.
template <Type kType>
SCM_INLINE void write(char* to, VecF x, int64_t n) {
  if (n == kLanes) {
    store_from_float(to, kType, x);
  } else {
    store_some_from_float(to, kType, x, n, 1);
  }
}

// The sum of g^2 over at most a chunk; g itself goes to `kept` if that is not null, in whole
// vectors.
template <Type kType>
double sum_of_squares(const Row<kType>& row, int64_t count, float* kept) {
  VecD low{}, high{};
  combine(row, count, [&](int64_t i, VecF g, int64_t) __attribute__((always_inline)) {
    const VecD x = low_as_double(g), y = high_as_double(g);
    low += x * x;
    high += y * y;
    if (kept != nullptr) store(kept + i, g);
  });
  const VecD lanes = low + high;
  double sum = 0.0;
  for (int i = 0; i < kLanes / 2; ++i) sum += lanes[i];
  return sum;
}

// --- the steps ----------------------------------------------------------------------------------

struct Doubles {
  explicit Doubles(int64_t count)
      : data(static_cast<double*>(std::malloc(count * sizeof(double)))) {}
  ~Doubles() { std::free(data); }
  Doubles(const Doubles&) = delete;
  double* data;
};

template <Type kType>
Status norm(const TangentNorm& p) {
  const Grid grid(p);
  const Doubles sums(grid.chunks * p.b);
  if (sums.data == nullptr) return kOutOfMemory;
  const Status status = parallel_for(grid.items, p.threads, 0, [&](int64_t item, char*) {
    const Work work = grid[item];
    for (int64_t sample = work.sample; sample < work.last; ++sample) {
      sums.data[sample * work.chunks + work.chunk] =
          sum_of_squares(Row<kType>(p, sample, work.first), work.count, nullptr);
    }
  });
  for (int64_t sample = 0; sample < p.b; ++sample) {
    double sum = 0.0;
    for (int64_t i = 0; i < grid.chunks; ++i) sum += sums.data[sample * grid.chunks + i];
    p.squares[sample] = sum;
  }
  return status;
}

// out = s g with s = scale(sample); zeros where s is 0, whatever the inputs hold. From the end, of
// which the caches still hold most if there was a pass before this one.
template <Type kType, class Scale>
Status write_scaled(const Tangent& p, char* out, const Scale& scale) {
  const Grid grid(p);
  return parallel_for(grid.items, p.threads, 0, [&](int64_t item, char*) {
    const Work work = grid[grid.items - 1 - item];
    for (int64_t sample = work.sample; sample < work.last; ++sample) {
      const float s = scale(sample);
      char* to = out + (sample * p.d + work.first) * kSize<kType>;
      if (s == 0.0f) {
        std::memset(to, 0, work.count * kSize<kType>);
        continue;
      }
      combine(Row<kType>(p, sample, work.first), work.count,
              [to, s](int64_t i, VecF g, int64_t n) __attribute__((always_inline)) {
                write<kType>(to + i * kSize<kType>, g * s, n);
              });
    }
  });
}

template <Type kType>
Status apply(const TangentApply& p) {
  expect_writes(p.out, p.b * p.d * kSize<kType>);
  return write_scaled<kType>(p, p.out, [&p](int64_t sample) {
    const double* x = p.coefficients + 4 * sample;
    return x[0] == 0.0 && x[1] == 0.0 && x[2] == 0.0 && x[3] == 0.0 ? 0.0f : 1.0f;
  });
}

float scale(const TangentNormalize& p, double squares) {
  return static_cast<float>(sample::scale(p.options, squares, p.d));
}

// Whole samples at a time, g kept in the thread's scratch between its norm and its scaling.
template <Type kType>
Status normalize_kept(const TangentNormalize& p) {
  const Grid grid(p);
  const size_t bytes = 4 * (p.d + kLanes);
  return parallel_for(grid.items / grid.chunks, p.threads, bytes, [&](int64_t item, char* scratch) {
    float* g = reinterpret_cast<float*>(scratch);
    const Work work = grid[item * grid.chunks];
    for (int64_t sample = work.sample; sample < work.last; ++sample) {
      double squares = 0.0;
      for (int64_t i = 0; i < p.d; i += kChunk) {
        squares += sum_of_squares(Row<kType>(p, sample, i), least(kChunk, p.d - i), g + i);
      }
      const float s = scale(p, squares);
      char* to = p.out + sample * p.d * kSize<kType>;
      if (s == 0.0f) {
        std::memset(to, 0, p.d * kSize<kType>);
        continue;
      }
      for (int64_t i = 0; i < p.d; i += kLanes) {
        write<kType>(to + i * kSize<kType>, load<VecF>(g + i) * s, least<int64_t>(kLanes, p.d - i));
      }
    }
  });
}

// The norms of all samples, then g once more: the same roundings, and so the same bits.
template <Type kType>
Status normalize_twice(const TangentNormalize& p) {
  const Doubles squares(p.b);
  if (squares.data == nullptr) return kOutOfMemory;
  if (const Status status = norm<kType>(TangentNorm{p, squares.data})) return status;
  return write_scaled<kType>(p, p.out,
                             [&](int64_t sample) { return scale(p, squares.data[sample]); });
}

template <Type kType>
Status normalize(const TangentNormalize& p) {
  expect_writes(p.out, p.b * p.d * kSize<kType>);
  const bool shared = p.b < p.threads && p.d > kChunk;  // a sample is for several threads
  return shared || p.d > kKept ? normalize_twice<kType>(p) : normalize_kept<kType>(p);
}

template <Type k>
struct Constant {
  static constexpr Type kType = k;
};

// kernel(the type of the inputs as a constant).
template <class Kernel>
Status by_type(Type type, const Kernel& kernel) {
  switch (type) {
    case Type::kBFloat16:
      return kernel(Constant<Type::kBFloat16>());
    case Type::kFloat16:
      return kernel(Constant<Type::kFloat16>());
    default:
      return kernel(Constant<Type::kFloat32>());
  }
}

}  // namespace

Status tangent_norm(const TangentNorm& p) {
  return by_type(p.type, [&p](auto type) { return norm<decltype(type)::kType>(p); });
}

Status tangent_apply(const TangentApply& p) {
  return by_type(p.type, [&p](auto type) { return apply<decltype(type)::kType>(p); });
}

Status tangent_normalize(const TangentNormalize& p) {
  return by_type(p.type, [&p](auto type) { return normalize<decltype(type)::kType>(p); });
}

}  // namespace SCM_ISA
}  // namespace scm
