// exp in float32 without branches, tables or calls, so that the compiler can vectorise a loop over it.
#pragma once

#include "element.h"

namespace unite_fast {

// Accurate to 1 unit in the last place. The argument is clamped to [-87, 87], so that neither the result nor its
// inverse leaves the normal numbers of float32; exp(NaN) is NaN. With n = round(x / ln 2) and r = x - n ln 2, which is
// at most ln(2) / 2 in size, exp(x) = 2^n exp(r).
UNITE_FAST_INLINE float exp_f32(float x) {
    // One comparison, on the magnitude: GCC 12 turns two in a row into branches.
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    float size = bit_cast<float>(bits & 0x7FFFFFFFu);
    size = size > 87.0f ? 87.0f : size;
    x = bit_cast<float>(bit_cast<std::uint32_t>(size) | (bits & 0x80000000u));
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits; adding 127 gives the biased exponent.
    constexpr float kMagic = 12582912.0f + 127.0f;
    const float shifted = x * 1.44269504f + kMagic;
    const float n = shifted - kMagic;
    // ln 2 in two parts: the first has 9 bits, so that n times it is exact.
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    // (exp(r) - 1 - r) / r^2: the polynomial of degree 4 with the smallest maximal error in exp(r), 3.1e-9.
    float p = 1.381453942e-3f;
    p = p * r + 8.368745446e-3f;
    p = p * r + 4.166838899e-2f;
    p = p * r + 1.666652113e-1f;
    p = p * r + 4.999999404e-1f;
    const float exp_r = (p * (r * r) + r) + 1.0f;
    return exp_r * bit_cast<float>(bit_cast<std::uint32_t>(shifted) << 23);
}

}  // namespace unite_fast
