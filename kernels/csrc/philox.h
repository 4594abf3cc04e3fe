// The random words and normals of unite_fast/randomness.py, which holds their definition.
#pragma once

#include "element.h"

namespace unite_fast {

// The key and the two counter words that all samples of one draw share.
struct PhiloxDraw {
    std::uint64_t seed;
    std::uint32_t step;
    std::uint32_t stream_and_draw;  // stream * 2**16 + draw
};

// The draw of a position whose high word counts steps after draw.step.
UNITE_FAST_INLINE PhiloxDraw at_step(PhiloxDraw draw, std::int64_t position) {
    draw.step += static_cast<std::uint32_t>(position >> 32);
    return draw;
}

struct PhiloxWords {
    std::uint32_t w0, w1, w2, w3;
};

// Ten rounds of Philox4x32, without tables or branches, so that the compiler can vectorise a loop over blocks.
UNITE_FAST_INLINE PhiloxWords philox_block(const PhiloxDraw& draw, std::uint32_t position, std::uint32_t block) {
    std::uint32_t c0 = block, c1 = position, c2 = draw.step, c3 = draw.stream_and_draw;
    auto k0 = static_cast<std::uint32_t>(draw.seed), k1 = static_cast<std::uint32_t>(draw.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
        const std::uint64_t product1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(product1);
        c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// The normals of a sample, four per block, starting with block `first`.
void sample_normals(const PhiloxDraw& draw, std::uint32_t position, std::int64_t first, std::int64_t blocks,
                    float* out);

// out[b, blocks * 4]: the words, each in [0, 2**32), or the normals of sample b, drawn at positions[b].
void philox_words(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                  std::int64_t* out, int threads);
void philox_normals(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                    float* out, int threads);

}  // namespace unite_fast
