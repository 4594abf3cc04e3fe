// Two normals from two random words, in float64, written so that the compiler can vectorise a loop over them.
#pragma once

#include "element.h"

namespace unite_fast {

// An integer below 2^52 as a double: put it into the low bits of 2^52, then subtract 2^52.
UNITE_FAST_INLINE double to_double(std::uint64_t integer) {
    return bit_cast<double>(integer | 0x4330000000000000u) - 0x1p52;
}

// log(x) of a normal, positive x: x = 2^e m with m from sqrt(1/2) to sqrt(2), and log(m) = 2 atanh(s) with
// s = (m - 1) / (m + 1), which is at most 0.172. The series ends where its terms are below 2.3e-17 of the sum.
UNITE_FAST_INLINE double log_f64(double x) {
    constexpr std::uint64_t kOne = 0x3FF0000000000000u, kSqrtHalf = 0x3FE6A09E667F3BCDu, kBias = 1023;
    const auto bits = bit_cast<std::uint64_t>(x);
    const std::uint64_t exponent = (bits + (kOne - kSqrtHalf)) >> 52;  // e + kBias
    const auto m = bit_cast<double>(bits - (exponent << 52) + (kBias << 52));
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    p = p * z + 1.0 / 3.0;
    constexpr double kLog2 = 0.69314718055994531;
    return (to_double(exponent) - static_cast<double>(kBias)) * kLog2 + 2.0 * (s + s * (z * p));
}

struct Turn {
    double cos, sin;
};

// cos and sin of the angle `word` 2 pi / 2^32. The angle minus the nearest quarter turn is at most pi / 4 in size, for
// which the terms of Taylor's series that are left out are below 6e-17 of the sum.
UNITE_FAST_INLINE Turn turn_f64(std::uint32_t word) {
    const std::uint32_t quarters = ((word >> 29) + 1) >> 1;
    // The last factor is separate, because it is exact: a compiler that fuses a product and a sum then cannot skip the
    // rounding of the angle, which is part of the definition and matters near the zeros. The second part of pi / 2
    // matters there too; the first has 51 bits, so that up to 4 times it is exact.
    const double angle = to_double(word) * 6.283185307179586 * 0x1p-32, n = to_double(quarters);
    const double r = (angle - n * 1.5707963267948966) - n * 6.123233995736766e-17, z = r * r;
    double s = -1.0 / 1307674368000.0;  // 15!
    s = s * z + 1.0 / 6227020800.0;
    s = s * z - 1.0 / 39916800.0;
    s = s * z + 1.0 / 362880.0;
    s = s * z - 1.0 / 5040.0;
    s = s * z + 1.0 / 120.0;
    s = s * z - 1.0 / 6.0;
    s = r + r * (z * s);
    double c = 1.0 / 20922789888000.0;  // 16!
    c = c * z - 1.0 / 87178291200.0;
    c = c * z + 1.0 / 479001600.0;
    c = c * z - 1.0 / 3628800.0;
    c = c * z + 1.0 / 40320.0;
    c = c * z - 1.0 / 720.0;
    c = c * z + 1.0 / 24.0;
    c = c * z - 1.0 / 2.0;
    c = c * z + 1.0;
    const bool odd = quarters & 1;
    const double cos = odd ? s : c, sin = odd ? c : s;
    return {(quarters + 1) & 2 ? -cos : cos, quarters & 2 ? -sin : sin};
}

// Box and Muller's pair, each rounded once.
UNITE_FAST_INLINE void normal_pair(std::uint32_t length, std::uint32_t angle, float& first, float& second) {
    const double radius = std::sqrt(-2.0 * log_f64((to_double(length) + 0.5) * 0x1p-32));
    const Turn turn = turn_f64(angle);
    first = static_cast<float>(radius * turn.cos);
    second = static_cast<float>(radius * turn.sin);
}

}  // namespace unite_fast
