#include "flow_loss.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

// A sample is one draw of one image: its y is row `sample` of [draws * batch, tokens, channels], its z that of the
// image.

// A token is so short that its loops pay only where their length is known at compile time: `C` below is the number of
// channels, or 0 for one that is not in the list of `with_channels`, which calls f with it as a type.
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

// The sum of the squared errors of a token. Writes its mean and 1 / deviation.
template <class Y, class Z, int C>
UNITE_FAST_INLINE float forward_token(const FlowLoss& op, float eps, const Y* __restrict y, const Z* __restrict z,
                                      float* mean_out, float* inverse_out) {
    const Index channels = C ? C : op.channels;
    const float *__restrict weight = op.weight, *__restrict bias = op.bias;
    float sum = 0.0f, deviations = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < channels; ++i) sum += load(y[i]);
    const float mean = sum / static_cast<float>(channels);
#pragma omp simd reduction(+ : deviations)
    for (Index i = 0; i < channels; ++i) deviations += (load(y[i]) - mean) * (load(y[i]) - mean);
    const float inverse = inverse_rms(deviations, channels, eps);
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < channels; ++i) {
        const float error = load(z[i]) - ((load(y[i]) - mean) * inverse * weight[i] + bias[i]);
        squares += error * error;
    }
    *mean_out = mean;
    *inverse_out = inverse;
    return squares;
}

// Writes d_y and adds to the sums, rows of d_weight and d_bias. `factor` times the error is the gradient of the
// prediction. With a that of n, the norm passes back (a - mean(a) - n mean(a n)) / deviation.
template <class Y, class Z, int C>
UNITE_FAST_INLINE void backward_token(const FlowLoss& op, float factor, float mean, float inverse,
                                      const Y* __restrict y, const Z* __restrict z, Y* __restrict d_y, float* sums,
                                      float* scratch) {
    const Index channels = C ? C : op.channels;
    const float *__restrict weight = op.weight, *__restrict bias = op.bias;
    float *__restrict sum_weight = sums, *__restrict sum_bias = sums + channels;
    float *__restrict n = scratch, *__restrict a = scratch + channels;
    float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
    for (Index i = 0; i < channels; ++i) {
        n[i] = (load(y[i]) - mean) * inverse;
        const float gradient = factor * (n[i] * weight[i] + bias[i] - load(z[i]));
        sum_weight[i] += gradient * n[i];
        sum_bias[i] += gradient;
        a[i] = gradient * weight[i];
        sum += a[i];
        dot += a[i] * n[i];
    }
    const float mean_a = sum / static_cast<float>(channels), mean_an = dot / static_cast<float>(channels);
#pragma omp simd
    for (Index i = 0; i < channels; ++i) store(inverse * (a[i] - mean_a - n[i] * mean_an), d_y[i]);
}

// Calls f with y of a sample, z of its image, and the number of channels.
template <class F>
UNITE_FAST_INLINE void with_sample(const FlowLoss& op, Index sample, F&& f) {
    const Index size = op.tokens * op.channels;
    with_type(op.y_type, [&](auto y) UNITE_FAST_INLINE_LAMBDA {
        with_type(op.z_type, [&](auto z) UNITE_FAST_INLINE_LAMBDA {
            const auto* y_sample = static_cast<const decltype(y)*>(op.y) + sample * size;
            const auto* z_sample = static_cast<const decltype(z)*>(op.z) + sample % op.batch * size;
            with_channels(op.channels,
                          [&](auto channels) UNITE_FAST_INLINE_LAMBDA { f(y_sample, z_sample, channels); });
        });
    });
}

// The sum over the tokens from begin to end.
UNITE_FAST_PER_CPU float forward_chunk(const FlowLoss& op, float eps, Index sample, Index begin, Index end) {
    float *mean = op.mean + sample * op.tokens, *inverse = op.inverse + sample * op.tokens;
    float total = 0.0f;
    with_sample(op, sample, [&](const auto* y, const auto* z, auto channels) UNITE_FAST_INLINE_LAMBDA {
        using Y = std::decay_t<decltype(*y)>;
        using Z = std::decay_t<decltype(*z)>;
        for (Index from = begin; from < end; from += kBlock) {
            float sum = 0.0f;
            for (Index t = from; t < std::min(from + kBlock, end); ++t) {
                const Index at = t * op.channels;
                sum += forward_token<Y, Z, channels.value>(op, eps, y + at, z + at, mean + t, inverse + t);
            }
            total += sum;
        }
    });
    return total;
}

// Gradients of the tokens from begin to end; their sums of d_weight and d_bias into `partial`. Needs 4 rows of scratch.
UNITE_FAST_PER_CPU void backward_chunk(const FlowLoss& op, float d_loss, void* d_y, Index sample, Index begin,
                                       Index end, float* partial, float* scratch) {
    const float factor = 2.0f * d_loss * op.share[sample];
    const float *mean = op.mean + sample * op.tokens, *inverse = op.inverse + sample * op.tokens;
    float* sums = scratch + 2 * op.channels;
    std::fill_n(partial, 2 * op.channels, 0.0f);
    with_sample(op, sample, [&](const auto* y, const auto* z, auto channels) UNITE_FAST_INLINE_LAMBDA {
        using Y = std::decay_t<decltype(*y)>;
        using Z = std::decay_t<decltype(*z)>;
        Y* d_y_sample = static_cast<Y*>(d_y) + sample * op.tokens * op.channels;
        for (Index from = begin; from < end; from += kBlock) {
            std::fill_n(sums, 2 * op.channels, 0.0f);
            for (Index t = from; t < std::min(from + kBlock, end); ++t) {
                const Index at = t * op.channels;
                backward_token<Y, Z, channels.value>(op, factor, mean[t], inverse[t], y + at, z + at, d_y_sample + at,
                                                     sums, scratch);
            }
            add_row(sums, 2 * op.channels, partial);
        }
    });
}

UNITE_FAST_PER_CPU void sum_partials(float* partial, Index count, Index channels, float* d_weight, float* d_bias) {
    sum_rows(partial, count, 2 * channels, channels, d_weight);
    sum_rows(partial + channels, count, 2 * channels, channels, d_bias);
}

}  // namespace

void flow_loss_forward(const FlowLoss& op, const float* t, float min_time_left, float eps, float* loss, int threads) {
    const Index samples = op.draws * op.batch, chunks = chunks_of(op.tokens), tasks = samples * chunks;
    const int used = threads_for(samples * op.tokens * op.channels, threads);
    (void)used;  // unused where OpenMP is missing
    const std::unique_ptr<float[]> partial(new float[tasks]);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        partial[task] = forward_chunk(op, eps, task / chunks, begin, end);
    }
    for (Index sample = 0; sample < samples; ++sample) {
        const float left = std::max(1.0f - t[sample], min_time_left);
        op.share[sample] = 1.0f / (left * left * static_cast<float>(op.tokens * op.channels));
        float sum;
        sum_rows(partial.get() + sample * chunks, chunks, 1, 1, &sum);
        loss[sample] = sum * op.share[sample];
    }
}

void flow_loss_backward(const FlowLoss& op, const float* d_loss, void* d_y, float* d_weight, float* d_bias,
                        int threads) {
    const Index samples = op.draws * op.batch, chunks = chunks_of(op.tokens), tasks = samples * chunks;
    const Index partial_size = 2 * op.channels, scratch_size = 4 * op.channels;
    const int used = threads_for(samples * op.tokens * op.channels, threads);
    const std::unique_ptr<float[]> scratch(new float[used * scratch_size]);
    const std::unique_ptr<float[]> partial(new float[tasks * partial_size]);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index sample = task / chunks, begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        backward_chunk(op, d_loss[sample], d_y, sample, begin, end, partial.get() + task * partial_size,
                       scratch.get() + thread_number() * scratch_size);
    }
    sum_partials(partial.get(), tasks, op.channels, d_weight, d_bias);
}

}  // namespace unite_fast
