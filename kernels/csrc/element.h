// Element types, strided views and small arithmetic that all ops share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

// Compiles a function twice, for any x86-64 and for x86-64 with AVX2; one is chosen when the module is loaded, so that
// the build never needs -march=native. CMake checks whether compiler and C library support it. What such a function
// calls must be inlined into it to be compiled for AVX2; OpenMP regions cannot be inlined, so they stand outside.
#ifdef UNITE_FAST_CLONES
#define UNITE_FAST_PER_CPU __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define UNITE_FAST_PER_CPU
#endif

#if defined(__GNUC__) || defined(__clang__)
#define UNITE_FAST_INLINE inline __attribute__((always_inline))
#define UNITE_FAST_INLINE_LAMBDA __attribute__((always_inline))
#else
#define UNITE_FAST_INLINE inline
#define UNITE_FAST_INLINE_LAMBDA
#endif

namespace unite_fast {

using Index = std::int64_t;

struct Bf16 {
    std::uint16_t bits;
};

// The numbers are those of DTYPES in kernels/tensors.py.
enum class Type : int { f32 = 0, bf16 = 1 };

// Calls f with a value of the type: `with_type(type, [&](auto t) UNITE_FAST_INLINE_LAMBDA { use<decltype(t)>(); })`.
template <class F>
UNITE_FAST_INLINE void with_type(Type type, F&& f) {
    if (type == Type::f32)
        f(float{});
    else
        f(Bf16{});
}

// The same for two types.
template <class F>
UNITE_FAST_INLINE void with_types(Type first, Type second, F&& f) {
    with_type(first, [&](auto a) UNITE_FAST_INLINE_LAMBDA {
        with_type(second, [&](auto b) UNITE_FAST_INLINE_LAMBDA { f(a, b); });
    });
}

template <class To, class From>
UNITE_FAST_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

UNITE_FAST_INLINE float load(float x) { return x; }
UNITE_FAST_INLINE float load(Bf16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

UNITE_FAST_INLINE void store(float x, float& to) { to = x; }
UNITE_FAST_INLINE void store(float x, Bf16& to) {
    const auto bits = bit_cast<std::uint32_t>(x);
    // To nearest, ties to even. NaN is a case of its own: its payload could carry into the exponent.
    const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    to.bits = static_cast<std::uint16_t>((x != x ? 0x7FC00000u : rounded) >> 16);
}

// What `x` becomes when stored as T.
template <class T>
UNITE_FAST_INLINE float round_to(float x) {
    T stored;
    store(x, stored);
    return load(stored);
}

// A tensor [B, T, D], dense in D; strides count elements.
struct Rows {
    void* data;
    Type type;
    Index batch_stride;
    Index token_stride;

    template <class T>
    UNITE_FAST_INLINE T* row(Index b, Index t) const {
        return static_cast<T*>(data) + b * batch_stride + t * token_stride;
    }
};

// A tensor [B, D], dense in D.
struct Vectors {
    void* data;
    Type type;
    Index stride;

    // Row b in float32.
    UNITE_FAST_INLINE void read(Index b, Index d, float* __restrict to) const {
        if (type == Type::f32) {
            std::memcpy(to, static_cast<const float*>(data) + b * stride, d * sizeof(float));
        } else {
            const Bf16* __restrict from = static_cast<const Bf16*>(data) + b * stride;
#pragma omp simd
            for (Index i = 0; i < d; ++i) to[i] = load(from[i]);
        }
    }

    UNITE_FAST_INLINE void write(Index b, Index d, const float* __restrict from) const {
        if (type == Type::f32) {
            std::memcpy(static_cast<float*>(data) + b * stride, from, d * sizeof(float));
        } else {
            Bf16* __restrict to = static_cast<Bf16*>(data) + b * stride;
#pragma omp simd
            for (Index i = 0; i < d; ++i) store(from[i], to[i]);
        }
    }
};

// A tensor [B, H, T, K], dense in K; strides count elements.
struct Heads {
    void* data;
    Index batch_stride;
    Index head_stride;
    Index token_stride;

    template <class T>
    UNITE_FAST_INLINE T* row(Index b, Index h, Index t) const {
        return static_cast<T*>(data) + b * batch_stride + h * head_stride + t * token_stride;
    }
};

struct Size {
    Index batch, tokens, width;

    Index elements() const { return batch * tokens * width; }
};

// 1 / rms of d numbers.
UNITE_FAST_INLINE float rms_rstd(float sum_of_squares, Index d, float eps) {
    return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(d) + eps);
}

// Tokens per chunk of a sum: one partial sum per chunk, added in order, gives the same bits for any number of threads.
constexpr Index kChunk = 64;

// Longest run of terms that is summed directly; longer sums are sums of sums, because rounding grows with length.
constexpr Index kBlock = 16;

// to += from.
UNITE_FAST_INLINE void add_row(const float* __restrict from, Index d, float* __restrict to) {
#pragma omp simd
    for (Index i = 0; i < d; ++i) to[i] += from[i];
}

// out = the sum of `count` rows, `stride` apart, in order. Overwrites the rows.
UNITE_FAST_INLINE void sum_rows(float* rows, Index count, Index stride, Index d, float* out) {
    for (Index i = 0; i < d; ++i) out[i] = 0.0f;
    for (Index block = 0; block < count; block += kBlock) {
        float* sum = rows + block * stride;
        for (Index k = block + 1; k < count && k < block + kBlock; ++k) add_row(rows + k * stride, d, sum);
        add_row(sum, d, out);
    }
}

// At least one, so that the sum over no tokens is a zero.
inline Index chunks_of(Index tokens) { return tokens > kChunk ? (tokens + kChunk - 1) / kChunk : 1; }

// Below about this many elements, an op takes less time than waking the threads.
constexpr Index kParallelElements = 1 << 15;

inline int threads_for(Index elements, int threads) { return elements >= kParallelElements ? threads : 1; }

// Calls run(task) for each task, in parallel if the op has enough elements. A task must not depend on another.
template <class Run>
void parallel_for(Index tasks, Index elements, int threads, Run&& run) {
    const int used = threads_for(elements, threads);
    (void)used;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) run(task);
}

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace unite_fast
