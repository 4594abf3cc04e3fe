// The fused ops as Python functions. A tensor arrives as plain integers (address, type, strides): a conversion of
// tensor objects would cost more than a small op. Every check is done in Python, by the callers in kernels/*.py.
#include "fused_ops.h"

#include "adaln.h"
#include "flow_loss.h"
#include "noise_injection.h"
#include "qk_norm_rope.h"
#include "swiglu.h"

namespace nb = nanobind;

namespace {

using namespace unite_fast;

// Reads a call's arguments in their order.
class Arguments {
public:
    explicit Arguments(const nb::args& args) : args_(args) {}

    Index integer() { return nb::cast<Index>(next()); }
    float number() { return nb::cast<float>(next()); }
    Type type() { return static_cast<Type>(integer()); }
    void* address() { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(integer())); }
    float* floats() { return static_cast<float*>(address()); }

    // Braced lists are evaluated from left to right.
    Size size() { return {integer(), integer(), integer()}; }
    Rows rows() { return {address(), type(), integer(), integer()}; }
    Vectors vectors() { return {address(), type(), integer()}; }
    Heads heads() { return {address(), integer(), integer(), integer()}; }

    // The number of threads comes last.
    int threads() {
        const auto count = static_cast<int>(integer());
        if (next_ != args_.size()) throw nb::value_error("wrong number of arguments");
        return count < 1 ? 1 : count;
    }

private:
    nb::handle next() {
        if (next_ >= args_.size()) throw nb::value_error("wrong number of arguments");
        return args_[next_++];
    }

    const nb::args& args_;
    std::size_t next_ = 0;
};

template <bool kGated, bool kNormed>
void forward(const nb::args& args) {
    Arguments in(args);
    AdalnForward op{};
    op.size = in.size();
    op.gated = kGated;
    op.normed = kNormed;
    op.eps = in.number();
    op.x = in.rows();
    if (kGated) op.branch = in.rows(), op.gate = in.vectors();
    if (kNormed) op.norm_weight = in.floats();
    op.weight = in.floats();
    op.shift = in.vectors();
    op.scale = in.vectors();
    if (kGated) op.x_out = in.rows();
    op.h = in.rows();
    op.inverse = in.floats();
    if (kNormed) op.norm_inverse = op.inverse + op.size.batch * op.size.tokens;
    const int threads = in.threads();
    nb::gil_scoped_release release;
    adaln_forward(op, threads);
}

template <bool kGated, bool kNormed>
void backward(const nb::args& args) {
    Arguments in(args);
    AdalnBackward op{};
    op.size = in.size();
    op.gated = kGated;
    op.normed = kNormed;
    if (kGated) op.d_x_out = in.rows();
    op.d_h = in.rows();
    op.x = in.rows();
    if (kGated) op.branch = in.rows(), op.gate = in.vectors();
    if (kNormed) op.norm_weight = in.floats();
    op.weight = in.floats();
    op.scale = in.vectors();
    op.inverse = in.floats();
    if (kNormed) op.norm_inverse = op.inverse + op.size.batch * op.size.tokens;
    op.d_x = in.rows();
    if (kGated) op.d_branch = in.rows(), op.d_gate = in.vectors();
    if (kNormed) op.d_norm_weight = in.floats();
    op.d_weight = in.floats();
    op.d_shift = in.vectors();
    op.d_scale = in.vectors();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    adaln_backward(op, threads);
}

QkNormRope qk_norm_rope(Arguments& in) {
    QkNormRope op{};
    op.batch = in.integer();
    op.tokens = in.integer();
    op.heads = in.integer();
    op.head_dim = in.integer();
    op.eps = in.number();
    op.qkv = in.rows();
    op.q_weight = in.floats();
    op.k_weight = in.floats();
    op.cos = in.floats();
    op.sin = in.floats();
    op.inverse = in.floats();
    return op;
}

void rope_forward(const nb::args& args) {
    Arguments in(args);
    const QkNormRope op = qk_norm_rope(in);
    const Heads q = in.heads(), k = in.heads();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    qk_norm_rope_forward(op, q, k, threads);
}

void rope_backward(const nb::args& args) {
    Arguments in(args);
    const QkNormRope op = qk_norm_rope(in);
    const Heads d_q = in.heads(), d_k = in.heads(), d_v = in.heads();
    const Rows d_qkv = in.rows();
    float *d_q_weight = in.floats(), *d_k_weight = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    qk_norm_rope_backward(op, d_q, d_k, d_v, d_qkv, d_q_weight, d_k_weight, threads);
}

void glu_forward(const nb::args& args) {
    Arguments in(args);
    const Type type = in.type();
    const Index rows = in.integer(), width = in.integer();
    const void* uw = in.address();
    void* out = in.address();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    swiglu_forward(type, rows, width, uw, out, threads);
}

void glu_backward(const nb::args& args) {
    Arguments in(args);
    const Type type = in.type();
    const Index rows = in.integer(), width = in.integer();
    const void *d_out = in.address(), *uw = in.address();
    void* d_uw = in.address();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    swiglu_backward(type, rows, width, d_out, uw, d_uw, threads);
}

NoiseInjection noise_injection(Arguments& in) {
    NoiseInjection op{};
    op.draws = in.integer();
    op.batch = in.integer();
    op.elements = in.integer();
    op.t = in.floats();
    op.gate = static_cast<const std::uint8_t*>(in.address());
    return op;
}

void noise_forward(const nb::args& args) {
    Arguments in(args);
    const NoiseInjection op = noise_injection(in);
    const auto seed_low = static_cast<std::uint64_t>(in.integer()), seed_high = static_cast<std::uint64_t>(in.integer());
    const auto step = static_cast<std::uint32_t>(in.integer()), stream = static_cast<std::uint32_t>(in.integer());
    const auto* positions = static_cast<const std::int64_t*>(in.address());
    const Type z_type = in.type();
    const void* z = in.address();
    float* out = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    noise_injection_forward(op, {seed_high << 32 | seed_low, step, stream << 16}, positions, z_type, z, out, threads);
}

void noise_backward(const nb::args& args) {
    Arguments in(args);
    const NoiseInjection op = noise_injection(in);
    const float* d_out = in.floats();
    float* d_z = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    noise_injection_backward(op, d_out, d_z, threads);
}

FlowLoss flow_loss(Arguments& in) {
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
    op.share = in.floats();
    op.mean = in.floats();
    op.inverse = in.floats();
    return op;
}

void loss_forward(const nb::args& args) {
    Arguments in(args);
    const FlowLoss op = flow_loss(in);
    const float* t = in.floats();
    const float min_time_left = in.number(), eps = in.number();
    float* loss = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    flow_loss_forward(op, t, min_time_left, eps, loss, threads);
}

void loss_backward(const nb::args& args) {
    Arguments in(args);
    const FlowLoss op = flow_loss(in);
    const float* d_loss = in.floats();
    void* d_y = in.address();
    float *d_weight = in.floats(), *d_bias = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    flow_loss_backward(op, d_loss, d_y, d_weight, d_bias, threads);
}

}  // namespace

void bind_fused_ops(nb::module_& m) {
    m.def("adaln_modulate_forward", &forward<false, false>);
    m.def("adaln_modulate_backward", &backward<false, false>);
    m.def("gated_residual_adaln_forward", &forward<true, false>);
    m.def("gated_residual_adaln_backward", &backward<true, false>);
    m.def("gated_residual_norm_adaln_forward", &forward<true, true>);
    m.def("gated_residual_norm_adaln_backward", &backward<true, true>);
    m.def("qk_norm_rope_forward", &rope_forward);
    m.def("qk_norm_rope_backward", &rope_backward);
    m.def("swiglu_forward", &glu_forward);
    m.def("swiglu_backward", &glu_backward);
    m.def("noise_injection_forward", &noise_forward);
    m.def("noise_injection_backward", &noise_backward);
    m.def("flow_loss_forward", &loss_forward);
    m.def("flow_loss_backward", &loss_backward);
}
