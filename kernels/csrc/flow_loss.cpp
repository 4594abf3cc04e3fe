// flow_loss; kernels/flow_loss.py has the formula. All tensors are dense, and float32 where no type is named.
#include "arguments.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

struct FlowLoss {
    Index draws, batch, tokens, channels;
    Type y_type;
    const void* y;  // [draws, batch, tokens, channels]
    const float *weight, *bias;
    Type z_type;
    const void* z;                // [batch, tokens, channels]
    const std::int32_t* lengths;  // [batch], or null for all tokens
    // Written by the forward pass.
    float* share;  // [draws, batch], weight of a squared error in its sample's loss
    float* mean;   // [draws, batch, tokens], over y's channels
    float* rstd;   // [draws, batch, tokens], 1 / standard deviation

    // Tokens of a sample that count; the others are pads, which are never read.
    Index length(Index sample) const { return lengths ? lengths[sample % batch] : tokens; }
};

// A sample is one draw of one image: its y is row `sample` of [draws * batch, tokens, channels], its z is the image's.

// A token is so short that vector code pays only with a length known at compile time: `C` below is the number of
// channels, or 0 if `with_channels`, which calls f with it as a type, does not list it.
template <int C>
struct Channels {
    static constexpr int value = C;
};

template <class F>
UNITE_FAST_INLINE void with_channels(Index channels, F&& f) {
    switch (channels) {
        case 16: return f(Channels<16>{});
        case 32: return f(Channels<32>{});
        default: return f(Channels<0>{});
    }
}

// The sum of the squared errors of a token. Writes its mean and rstd.
template <class Y, class Z, int C>
UNITE_FAST_INLINE float forward_token(const FlowLoss& op, float eps, const Y* __restrict y, const Z* __restrict z,
                                      float* mean_out, float* rstd_out) {
    const Index channels = C ? C : op.channels;
    const float *__restrict weight = op.weight, *__restrict bias = op.bias;
    float sum = 0.0f, deviations = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < channels; ++i) sum += load(y[i]);
    const float mean = sum / static_cast<float>(channels);
#pragma omp simd reduction(+ : deviations)
    for (Index i = 0; i < channels; ++i) deviations += (load(y[i]) - mean) * (load(y[i]) - mean);
    const float rstd = rms_rstd(deviations, channels, eps);
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < channels; ++i) {
        const float error = load(z[i]) - ((load(y[i]) - mean) * rstd * weight[i] + bias[i]);
        squares += error * error;
    }
    *mean_out = mean;
    *rstd_out = rstd;
    return squares;
}

// Writes d_y and adds to the sums of d_weight and d_bias. The gradient of the prediction is `factor` times the error.
// With a the gradient of n, the gradient of y is (a - mean(a) - n mean(a n)) rstd.
template <class Y, class Z, int C>
UNITE_FAST_INLINE void backward_token(const FlowLoss& op, float factor, float mean, float rstd,
                                      const Y* __restrict y, const Z* __restrict z, Y* __restrict d_y, float* sums,
                                      float* scratch) {
    const Index channels = C ? C : op.channels;
    const float *__restrict weight = op.weight, *__restrict bias = op.bias;
    float *__restrict sum_weight = sums, *__restrict sum_bias = sums + channels;
    float *__restrict n = scratch, *__restrict a = scratch + channels;
    float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
    for (Index i = 0; i < channels; ++i) {
        n[i] = (load(y[i]) - mean) * rstd;
        const float gradient = factor * (n[i] * weight[i] + bias[i] - load(z[i]));
        sum_weight[i] += gradient * n[i];
        sum_bias[i] += gradient;
        a[i] = gradient * weight[i];
        sum += a[i];
        dot += a[i] * n[i];
    }
    const float mean_a = sum / static_cast<float>(channels), mean_an = dot / static_cast<float>(channels);
#pragma omp simd
    for (Index i = 0; i < channels; ++i) store(rstd * (a[i] - mean_a - n[i] * mean_an), d_y[i]);
}

// The tokens from begin to end, of which those before `pads` count.
struct Chunk {
    Index sample, begin, pads, end;
};

UNITE_FAST_INLINE Chunk chunk_of(const FlowLoss& op, Index task, Index chunks) {
    const Index sample = task / chunks, begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
    return {sample, begin, std::max(begin, std::min(end, op.length(sample))), end};
}

// Calls f with y of a sample, z of its image, and the number of channels.
template <class F>
UNITE_FAST_INLINE void with_sample(const FlowLoss& op, Index sample, F&& f) {
    const Index size = op.tokens * op.channels;
    with_types(op.y_type, op.z_type, [&](auto y, auto z) UNITE_FAST_INLINE_LAMBDA {
        const auto* y_sample = static_cast<const decltype(y)*>(op.y) + sample * size;
        const auto* z_sample = static_cast<const decltype(z)*>(op.z) + sample % op.batch * size;
        with_channels(op.channels, [&](auto channels) UNITE_FAST_INLINE_LAMBDA { f(y_sample, z_sample, channels); });
    });
}

// The sum over the tokens of a chunk.
UNITE_FAST_PER_CPU float forward_chunk(const FlowLoss& op, float eps, const Chunk& chunk) {
    float *mean = op.mean + chunk.sample * op.tokens, *rstd = op.rstd + chunk.sample * op.tokens;
    float total = 0.0f;
    with_sample(op, chunk.sample, [&](const auto* y, const auto* z, auto channels) UNITE_FAST_INLINE_LAMBDA {
        using Y = std::decay_t<decltype(*y)>;
        using Z = std::decay_t<decltype(*z)>;
        for (Index from = chunk.begin; from < chunk.pads; from += kBlock) {
            float sum = 0.0f;
            for (Index t = from; t < std::min(from + kBlock, chunk.pads); ++t) {
                const Index at = t * op.channels;
                sum += forward_token<Y, Z, channels.value>(op, eps, y + at, z + at, mean + t, rstd + t);
            }
            total += sum;
        }
    });
    std::fill(mean + chunk.pads, mean + chunk.end, 0.0f);
    std::fill(rstd + chunk.pads, rstd + chunk.end, 0.0f);
    return total;
}

// Gradients of the tokens of a chunk, with the sums of d_weight and d_bias in `partial`. Needs 4 rows of scratch.
UNITE_FAST_PER_CPU void backward_chunk(const FlowLoss& op, float d_loss, void* d_y, const Chunk& chunk, float* partial,
                                       float* scratch) {
    const float factor = 2.0f * d_loss * op.share[chunk.sample];
    const float *mean = op.mean + chunk.sample * op.tokens, *rstd = op.rstd + chunk.sample * op.tokens;
    float* sums = scratch + 2 * op.channels;
    std::fill_n(partial, 2 * op.channels, 0.0f);
    with_sample(op, chunk.sample, [&](const auto* y, const auto* z, auto channels) UNITE_FAST_INLINE_LAMBDA {
        using Y = std::decay_t<decltype(*y)>;
        using Z = std::decay_t<decltype(*z)>;
        Y* d_y_sample = static_cast<Y*>(d_y) + chunk.sample * op.tokens * op.channels;
        for (Index from = chunk.begin; from < chunk.pads; from += kBlock) {
            std::fill_n(sums, 2 * op.channels, 0.0f);
            for (Index t = from; t < std::min(from + kBlock, chunk.pads); ++t) {
                const Index at = t * op.channels;
                backward_token<Y, Z, channels.value>(op, factor, mean[t], rstd[t], y + at, z + at, d_y_sample + at,
                                                     sums, scratch);
            }
            add_row(sums, 2 * op.channels, partial);
        }
        std::fill(d_y_sample + chunk.pads * op.channels, d_y_sample + chunk.end * op.channels, Y{});
    });
}

UNITE_FAST_PER_CPU void sum_partials(float* partial, Index count, Index channels, float* d_weight, float* d_bias) {
    sum_rows(partial, count, 2 * channels, channels, d_weight);
    sum_rows(partial + channels, count, 2 * channels, channels, d_bias);
}

// t and loss [draws, batch].
void flow_loss_forward(const FlowLoss& op, const float* t, float min_time_left, float eps, float* loss, int threads) {
    const Index samples = op.draws * op.batch, chunks = chunks_of(op.tokens), tasks = samples * chunks;
    const std::unique_ptr<float[]> partial(new float[tasks]);
    parallel_for(tasks, samples * op.tokens * op.channels, threads, [&](Index task) {
        partial[task] = forward_chunk(op, eps, chunk_of(op, task, chunks));
    });
    for (Index sample = 0; sample < samples; ++sample) {
        const float left = std::max(1.0f - t[sample], min_time_left);
        op.share[sample] = 1.0f / (left * left * static_cast<float>(op.length(sample) * op.channels));
        float sum;
        sum_rows(partial.get() + sample * chunks, chunks, 1, 1, &sum);
        loss[sample] = sum * op.share[sample];
    }
}

// d_y has y's type.
void flow_loss_backward(const FlowLoss& op, const float* d_loss, void* d_y, float* d_weight, float* d_bias,
                        int threads) {
    const Index samples = op.draws * op.batch, chunks = chunks_of(op.tokens), tasks = samples * chunks;
    const Index partial_size = 2 * op.channels, scratch_size = 4 * op.channels;
    const Index elements = samples * op.tokens * op.channels;
    const std::unique_ptr<float[]> scratch(new float[threads_for(elements, threads) * scratch_size]);
    const std::unique_ptr<float[]> partial(new float[tasks * partial_size]);
    parallel_for(tasks, elements, threads, [&](Index task) {
        const Chunk chunk = chunk_of(op, task, chunks);
        backward_chunk(op, d_loss[chunk.sample], d_y, chunk, partial.get() + task * partial_size,
                       scratch.get() + thread_number() * scratch_size);
    });
    sum_partials(partial.get(), tasks, op.channels, d_weight, d_bias);
}

}  // namespace

static FlowLoss read_op(Arguments& in) {
    FlowLoss op{};
    op.draws = in.integer();
    op.batch = in.integer();
    op.tokens = in.integer();
    op.channels = in.integer();
    op.y_type = in.type();
    op.y = in.address();
    op.weight = in.floats();
    op.bias = in.floats();
    op.z_type = in.type();
    op.z = in.address();
    op.lengths = static_cast<const std::int32_t*>(in.address());
    op.share = in.floats();
    op.mean = in.floats();
    op.rstd = in.floats();
    return op;
}

UNITE_FAST_FUNCTION(flow_loss_forward) {
    const FlowLoss op = read_op(in);
    const float* t = in.floats();
    const float min_time_left = in.number(), eps = in.number();
    float* loss = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    flow_loss_forward(op, t, min_time_left, eps, loss, threads);
}

UNITE_FAST_FUNCTION(flow_loss_backward) {
    const FlowLoss op = read_op(in);
    const float* d_loss = in.floats();
    void* d_y = in.address();
    float *d_weight = in.floats(), *d_bias = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    flow_loss_backward(op, d_loss, d_y, d_weight, d_bias, threads);
}

}  // namespace unite_fast
