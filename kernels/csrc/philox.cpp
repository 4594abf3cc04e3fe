#include "philox.h"

namespace unite_fast {
namespace {

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u;
constexpr std::uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

// Below about this many blocks a draw takes less time than waking the threads.
constexpr std::int64_t kParallelBlocks = 4096;

void sample_words(const PhiloxDraw& draw, std::uint32_t position, std::int64_t blocks, std::int64_t* out) {
    const auto key0 = static_cast<std::uint32_t>(draw.seed);
    const auto key1 = static_cast<std::uint32_t>(draw.seed >> 32);
    for (std::int64_t block = 0; block < blocks; ++block) {
        auto c0 = static_cast<std::uint32_t>(block);
        std::uint32_t c1 = position, c2 = draw.step, c3 = draw.stream_and_draw;
        std::uint32_t k0 = key0, k1 = key1;
        for (int round = 0; round < kRounds; ++round) {
            const std::uint64_t product0 = static_cast<std::uint64_t>(c0) * kMultiplier0;
            const std::uint64_t product1 = static_cast<std::uint64_t>(c2) * kMultiplier1;
            c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c1 = static_cast<std::uint32_t>(product1);
            c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c3 = static_cast<std::uint32_t>(product0);
            k0 += kWeyl0;
            k1 += kWeyl1;
        }
        out[block * 4 + 0] = c0;
        out[block * 4 + 1] = c1;
        out[block * 4 + 2] = c2;
        out[block * 4 + 3] = c3;
    }
}

}  // namespace

void philox_words(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                  std::int64_t* out, int threads) {
    // A word depends on its counter alone, so the split over threads cannot change a bit. The region is entered with
    // more than one thread only when asked to: GNU OpenMP hangs in a forked data worker once the parent has used it.
    const bool parallel = threads > 1 && samples * blocks >= kParallelBlocks;
    (void)parallel;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        sample_words(draw, static_cast<std::uint32_t>(positions[sample]), blocks, out + sample * blocks * 4);
    }
}

}  // namespace unite_fast
