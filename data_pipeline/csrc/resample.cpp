// Resizes 8-bit RGB images with Pillow's bits: each pass has weights in 22-bit fixed point and sums products in 32 bits,
// then rounds and clamps to 8 bits. The weights come from resample.py.
//
// Both passes run over long rows of bytes, which a compiler vectorises. For the pass along the rows, the image is
// transposed first.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "element.h"

namespace nb = nanobind;

namespace {

constexpr int kBits = 22;
constexpr int64_t kBlock = 512;

// out[i, :] = sum over k of weights[i, k] * in[starts[i] + k, :], rows of `length` bytes.
UNITE_FAST_PER_CPU void weigh_rows(const uint8_t *in, uint8_t *out, int64_t length, int64_t rows, const int32_t *starts,
                       const int32_t *weights, int64_t taps) {
  int32_t sums[kBlock];
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t n = std::min(kBlock, length - first);
    for (int64_t i = 0; i < rows; ++i) {
      std::fill(sums, sums + n, 1 << (kBits - 1));
      for (int64_t k = 0; k < taps; ++k) {
        const int32_t weight = weights[i * taps + k];
        if (weight == 0) continue;
        const uint8_t *row = in + (starts[i] + k) * length + first;
        for (int64_t j = 0; j < n; ++j) sums[j] += weight * row[j];
      }
      uint8_t *target = out + i * length + first;
      for (int64_t j = 0; j < n; ++j) target[j] = static_cast<uint8_t>(std::clamp(sums[j] >> kBits, 0, 255));
    }
  }
}

// [rows, columns, 3] -> [columns, rows, 3], in tiles that stay in the cache.
void transpose(const uint8_t *in, uint8_t *out, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 32;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t c0 = 0; c0 < columns; c0 += kTile)
      for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r)
        for (int64_t c = c0; c < std::min(c0 + kTile, columns); ++c) {
          const uint8_t *from = in + (r * columns + c) * 3;
          uint8_t *to = out + (c * rows + r) * 3;
          to[0] = from[0], to[1] = from[1], to[2] = from[2];
        }
}

using Pixels = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Starts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void check(const Starts &starts, const Weights &weights, size_t count, int64_t length) {
  bool valid = starts.shape(0) == count && weights.shape(0) == count;
  for (size_t i = 0; valid && i < count; ++i)
    valid = starts(i) >= 0 && starts(i) + static_cast<int64_t>(weights.shape(1)) <= length;
  if (!valid) throw std::invalid_argument("weights do not fit the image");
}

// pixels [h, w, 3] -> out [a, b, 3]: first the rows to b columns, then the columns to a rows.
void resample(Pixels pixels, Starts column_starts, Weights column_weights, Starts row_starts, Weights row_weights,
              Target out) {
  const int64_t h = pixels.shape(0), w = pixels.shape(1), a = out.shape(0), b = out.shape(1);
  if (pixels.shape(2) != 3 || out.shape(2) != 3) throw std::invalid_argument("images have three channels");
  check(column_starts, column_weights, b, w);
  check(row_starts, row_weights, a, h);
  nb::gil_scoped_release release;
  std::vector<uint8_t> transposed(w * h * 3), narrow_transposed(b * h * 3), narrow(h * b * 3);
  transpose(pixels.data(), transposed.data(), h, w);
  weigh_rows(transposed.data(), narrow_transposed.data(), h * 3, b, column_starts.data(), column_weights.data(),
             column_weights.shape(1));
  transpose(narrow_transposed.data(), narrow.data(), b, h);
  weigh_rows(narrow.data(), out.data(), b * 3, a, row_starts.data(), row_weights.data(), row_weights.shape(1));
}

}  // namespace

NB_MODULE(_resample, m) {
  m.def("resample", &resample, nb::arg("pixels"), nb::arg("column_starts"), nb::arg("column_weights"),
        nb::arg("row_starts"), nb::arg("row_weights"), nb::arg("out"));
}
