// The random words of unite_fast/randomness.py, which holds their definition.
#pragma once

#include <cstdint>

namespace unite_fast {

// What all samples of one draw share: the key and two of the four counter words.
struct PhiloxDraw {
    std::uint64_t seed;
    std::uint32_t step;
    std::uint32_t stream_and_draw;  // stream * 2**16 + draw
};

// Writes out[b, blocks * 4]: four words, each in [0, 2**32), a block; sample b is drawn at positions[b].
void philox_words(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                  std::int64_t* out, int threads);

}  // namespace unite_fast
