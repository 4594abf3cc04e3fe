// noise_injection; kernels/noise_injection.py has the formula. t, the result and all gradients are dense float32.
#include "arguments.h"

#include "philox.h"

#include <algorithm>

namespace unite_fast {
namespace {

struct NoiseInjection {
    Index draws, batch, elements;  // elements per sample
    const float* t;                // [draws, batch]
    const std::uint8_t* gate;      // [batch], 0 or 1; null for all 1
};

// Normals that are drawn at once, so that they fit into the L1 cache. A multiple of 4, the normals of a block.
constexpr Index kPiece = 1024;

UNITE_FAST_INLINE Index pieces_of(Index elements) { return (elements + kPiece - 1) / kPiece; }

UNITE_FAST_INLINE bool passes(const NoiseInjection& op, Index b) { return !op.gate || op.gate[b]; }

template <class T>
UNITE_FAST_INLINE void mix(const T* __restrict z, float t, const float* __restrict noise, Index count,
                           float* __restrict out) {
#pragma omp simd
    for (Index i = 0; i < count; ++i) out[i] = t * load(z[i]) + (1.0f - t) * noise[i];
}

template <class T>
UNITE_FAST_INLINE void copy(const T* __restrict z, Index count, float* __restrict out) {
#pragma omp simd
    for (Index i = 0; i < count; ++i) out[i] = load(z[i]);
}

UNITE_FAST_PER_CPU void forward_piece(const NoiseInjection& op, const PhiloxDraw& first_draw, std::uint32_t position,
                                      Type z_type, const void* z, Index f, Index b, Index begin, float* out) {
    const Index count = std::min(kPiece, op.elements - begin), from = b * op.elements + begin;
    out += (f * op.batch + b) * op.elements + begin;
    const bool noisy = passes(op, b);
    float noise[kPiece];
    if (noisy) {
        PhiloxDraw draw = first_draw;
        draw.stream_and_draw += static_cast<std::uint32_t>(f);
        sample_normals(draw, position, begin / 4, (count + 3) / 4, noise);
    }
    with_type(z_type, [&](auto type) UNITE_FAST_INLINE_LAMBDA {
        const auto* z_b = static_cast<const decltype(type)*>(z) + from;
        if (noisy)
            mix(z_b, op.t[f * op.batch + b], noise, count, out);
        else
            copy(z_b, count, out);
    });
}

UNITE_FAST_PER_CPU void backward_piece(const NoiseInjection& op, const float* d_out, Index b, Index begin,
                                       float* __restrict d_z) {
    const Index count = std::min(kPiece, op.elements - begin), from = b * op.elements + begin;
    d_z += from;
    std::fill_n(d_z, count, 0.0f);
    for (Index f = 0; f < op.draws; ++f) {
        const float* __restrict d = d_out + f * op.batch * op.elements + from;
        const float t = passes(op, b) ? op.t[f * op.batch + b] : 1.0f;
#pragma omp simd
        for (Index i = 0; i < count; ++i) d_z[i] += t * d[i];
    }
}

// z [batch, elements], dense -> out [draws, batch, elements]. Draw f is `first_draw` with its draw raised by f.
void noise_injection_forward(const NoiseInjection& op, const PhiloxDraw& first_draw, const std::int64_t* positions,
                             Type z_type, const void* z, float* out, int threads) {
    const Index pieces = pieces_of(op.elements), tasks = op.draws * op.batch * pieces;
    parallel_for(tasks, op.draws * op.batch * op.elements, threads, [&](Index task) {
        const Index sample = task / pieces, f = sample / op.batch, b = sample % op.batch;
        const auto position = static_cast<std::uint32_t>(positions[b]);
        const PhiloxDraw draw = at_step(first_draw, positions[b]);
        forward_piece(op, draw, position, z_type, z, f, b, task % pieces * kPiece, out);
    });
}

// d_out [draws, batch, elements] -> d_z [batch, elements].
void noise_injection_backward(const NoiseInjection& op, const float* d_out, float* d_z, int threads) {
    const Index pieces = pieces_of(op.elements), tasks = op.batch * pieces;
    parallel_for(tasks, op.draws * op.batch * op.elements, threads,
                 [&](Index task) { backward_piece(op, d_out, task / pieces, task % pieces * kPiece, d_z); });
}

}  // namespace

static NoiseInjection read_op(Arguments& in) {
    NoiseInjection op{};
    op.draws = in.integer();
    op.batch = in.integer();
    op.elements = in.integer();
    op.t = in.floats();
    op.gate = static_cast<const std::uint8_t*>(in.address());
    return op;
}

UNITE_FAST_FUNCTION(noise_injection_forward) {
    const NoiseInjection op = read_op(in);
    const auto seed_low = static_cast<std::uint64_t>(in.integer());
    const auto seed_high = static_cast<std::uint64_t>(in.integer());
    const auto step = static_cast<std::uint32_t>(in.integer());
    const auto stream = static_cast<std::uint32_t>(in.integer());
    const auto* positions = static_cast<const std::int64_t*>(in.address());
    const Type z_type = in.type();
    const void* z = in.address();
    float* out = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    noise_injection_forward(op, {seed_high << 32 | seed_low, step, stream << 16}, positions, z_type, z, out, threads);
}

UNITE_FAST_FUNCTION(noise_injection_backward) {
    const NoiseInjection op = read_op(in);
    const float* d_out = in.floats();
    float* d_z = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    noise_injection_backward(op, d_out, d_z, threads);
}

}  // namespace unite_fast
