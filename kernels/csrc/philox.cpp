#include "philox.h"

#include "normal.h"

namespace unite_fast {
namespace {

// Below about this many blocks, a draw takes less time than waking the threads.
constexpr std::int64_t kParallelBlocks = 4096;

// Calls draw_sample(b) for each sample. A number depends only on its counter, so the number of threads cannot change a
// bit. A parallel region is entered only with more than one thread: GNU OpenMP hangs in a forked data worker if the
// parent has used it.
template <class DrawSample>
void each_sample(std::int64_t samples, std::int64_t blocks, int threads, DrawSample&& draw_sample) {
    const bool parallel = threads > 1 && samples * blocks >= kParallelBlocks;
    (void)parallel;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (std::int64_t b = 0; b < samples; ++b) draw_sample(b);
}

void sample_words(const PhiloxDraw& draw, std::uint32_t position, std::int64_t blocks, std::int64_t* out) {
    for (std::int64_t block = 0; block < blocks; ++block) {
        const PhiloxWords words = philox_block(draw, position, static_cast<std::uint32_t>(block));
        out[block * 4 + 0] = words.w0;
        out[block * 4 + 1] = words.w1;
        out[block * 4 + 2] = words.w2;
        out[block * 4 + 3] = words.w3;
    }
}

}  // namespace

UNITE_FAST_PER_CPU void sample_normals(const PhiloxDraw& draw, std::uint32_t position, std::int64_t first,
                                       std::int64_t blocks, float* __restrict out) {
#pragma omp simd
    for (std::int64_t i = 0; i < blocks; ++i) {
        const PhiloxWords words = philox_block(draw, position, static_cast<std::uint32_t>(first + i));
        normal_pair(words.w0, words.w1, out[4 * i], out[4 * i + 1]);
        normal_pair(words.w2, words.w3, out[4 * i + 2], out[4 * i + 3]);
    }
}

void philox_words(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                  std::int64_t* out, int threads) {
    each_sample(samples, blocks, threads, [&](std::int64_t b) {
        sample_words(at_step(draw, positions[b]), static_cast<std::uint32_t>(positions[b]), blocks,
                     out + b * blocks * 4);
    });
}

void philox_normals(const PhiloxDraw& draw, const std::int64_t* positions, std::int64_t samples, std::int64_t blocks,
                    float* out, int threads) {
    each_sample(samples, blocks, threads, [&](std::int64_t b) {
        sample_normals(at_step(draw, positions[b]), static_cast<std::uint32_t>(positions[b]), 0, blocks,
                       out + b * blocks * 4);
    });
}

}  // namespace unite_fast
