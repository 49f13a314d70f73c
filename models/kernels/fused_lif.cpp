// Batch norm followed by an integrate-and-fire neuron, over all spike steps in one pass.
//
// The neuron, from rest:  H = V + (y - leak V) gain,  s = [H >= threshold],  V = H (1 - s);
// surrogate gradient ds/dH = 1 / (1 + (pi (H - threshold))^2), the reset is not detached. It leaks (leak 1, gain 1/tau)
// or does not (leak 0, gain 1). Or a neuron that sends y as a number: the nearest multiple of `last` from 0 to `most`.
// Tensors are channels-last: x [S, P, C] with P = batch * height * width, or [P, C] when the input is the
// same at every step. With `readout` weights [S] only sum_s readout[s] * spikes[s] is written, [P, C].
// fused_lif.py is its only caller.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bfloat16.h"
#include "tiles.h"

namespace {

constexpr long SHARES = 64;  // of the work at most; no more threads can take part

// Runs body(first row, row after the last, rows in a tile, number of the share) over all tiles of whole rows. The shares
// do not depend on the number of threads, and so the sums that each of them makes do not either.
template <class Body> void for_tiles(long positions, long channels, int threads, Body body) {
    const long rows = std::max(1L, TILE / channels), tiles = (positions + rows - 1) / rows;
    const long shares = std::min(SHARES, (tiles + 7) / 8);  // to begin one costs half a tile
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long share = 0; share < shares; ++share)
        body.run(tiles * share / shares * rows, std::min(positions, tiles * (share + 1) / shares * rows), rows, share);
}

// The same for a body with SUMS sums of its own in each share; their total over the shares goes to `totals [SUMS, C]`.
template <class Body> void for_tiles(long positions, long channels, int threads, Body body, double* totals) {
    const long width = Body::SUMS * channels;
    std::vector<double> sums(SHARES * width);
    body.sums = sums.data();
    for_tiles(positions, channels, threads, body);
    std::fill(totals, totals + width, 0.0);
    for (long share = 0; share < SHARES; ++share)
        for (long c = 0; c < width; ++c) totals[c] += sums[share * width + c];
}

// Adds rows of C values to the sums of each channel.
template <class A> void add_rows(const std::vector<A>& values, long count, long channels, double* sums) {
    for (long row = 0; row < count; row += channels)
#pragma omp simd
        for (long c = 0; c < channels; ++c) sums[c] += values[row + c];
}

// Sums of x and of its square, less the values of the first row: far from zero, little would be left of a variance.
template <class X> struct Moments {
    using A = typename Accumulator<X>::type;
    static constexpr long SUMS = 2;
    const X* x;
    long channels;
    double* sums;  // [SHARES, SUMS, C]
    void run(long begin, long end, long rows, long share) {
        double* total = sums + share * SUMS * channels;
        std::vector<A> origin(rows * channels), sum(rows * channels), square(rows * channels);
        for (long j = 0; j < rows * channels; ++j) origin[j] = load(x[j % channels]);
        for (long row = begin; row < end;) {
            std::fill(sum.begin(), sum.end(), A(0));
            std::fill(square.begin(), square.end(), A(0));
            for (int k = 0; k < 8 && row < end; ++k) {  // short runs in A, long sums in double
                const long n = std::min(rows, end - row) * channels;
                const X* in = x + row * channels;
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    const A v = load(in[j]) - origin[j];
                    sum[j] += v;
                    square[j] += v * v;
                }
                row += rows;
            }
            add_rows(sum, rows * channels, channels, total);
            add_rows(square, rows * channels, channels, total + channels);
        }
    }
};

template <class A> struct Firing {
    A gain, leak, threshold;
    explicit Firing(const A* values) : gain(values[0]), leak(values[1]), threshold(values[2]) {}
    A charged(A y, A v) const { return v + (y - leak * v) * gain; }
    bool fires(A h) const { return h >= threshold; }
    A sent(A h) const { return fires(h) ? A(1) : A(0); }
    A reset(A h) const { return h * (fires(h) ? A(0) : A(1)); }  // infinity becomes NaN, as in SpikingJelly
    // Gradient of the charge h, given those of its spike and of the potential after its reset.
    A gradient(A h, A ds, A dv) const {
        const A u = A(3.14159265358979323846) * (h - threshold);
        const A surrogate = A(1) / (A(1) + u * u);
        return ds * surrogate + dv * ((fires(h) ? A(0) : A(1)) - h * surrogate);
    }
};

template <class A> struct Sending {
    A last, most, gain = 1, leak = 1;  // it keeps nothing from one step to the next
    explicit Sending(const A* values) : last(values[0]), most(values[1]) {}
    A charged(A y, A) const { return y; }
    A sent(A h) const {  // what is no number stays none
        return std::floor(std::min(std::max(h, A(0)), most) / last + A(0.5)) * last;
    }
    A reset(A) const { return A(0); }
    A gradient(A h, A ds, A) const { return h >= A(0) && h <= most ? ds : A(0); }
};

template <class X, class Y, template <class> class Neuron> struct Forward {
    using A = typename Accumulator<X>::type;
    const Neuron<A> kind;
    const X* x;
    const A *scale, *shift, *readout;
    long steps, positions, channels;
    bool constant;
    Y* out;
    void run(long begin, long end, long rows, long) {
        const Neuron<A> neuron = kind;  // a copy that no store can change: it stays in registers
        const auto a = repeat(scale, channels, rows), b = repeat(shift, channels, rows);
        std::vector<A> voltage(rows * channels), sum(rows * channels);
        const long stride = positions * channels;
        for (long row = begin; row < end; row += rows) {
            const long n = std::min(rows, end - row) * channels, at = row * channels;
            std::fill(voltage.begin(), voltage.end(), A(0));
            std::fill(sum.begin(), sum.end(), A(0));
            for (long s = 0; s < steps; ++s) {
                const X* in = x + at + (constant ? 0 : s * stride);
                Y* to = out + at + s * stride;
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    const A h = neuron.charged(load(in[j]) * a[j] + b[j], voltage[j]);
                    const A spike = neuron.sent(h);
                    voltage[j] = neuron.reset(h);
                    if (readout)
                        sum[j] += spike * readout[s];
                    else
                        store(to[j], spike);
                }
            }
            if (readout)
#pragma omp simd
                for (long j = 0; j < n; ++j) store(out[at + j], sum[j]);
        }
    }
};

template <class X, class Y, template <class> class Neuron> struct Backward {
    using A = typename Accumulator<X>::type;
    static constexpr long SUMS = 3;
    const Neuron<A> kind;
    const bool learns;  // whether the gradient of `gain` is wanted
    const X* x;
    const A *scale, *shift, *mean, *invstd, *readout;
    long steps, positions, channels;
    bool constant;
    const Y* grad_out;
    X* grad;       // gradient of batch norm's output, shaped like x
    double* sums;  // [SHARES, SUMS, C]: of that gradient, of its product with the normalised input, gradient of `gain`
    void run(long begin, long end, long rows, long share) {
        const Neuron<A> neuron = kind;  // a copy that no store can change: it stays in registers
        const auto a = repeat(scale, channels, rows), b = repeat(shift, channels, rows);
        const auto m = repeat(mean, channels, rows), i = repeat(invstd, channels, rows);
        const long width = rows * channels, stride = positions * channels;
        std::vector<A> h(steps * width), voltage(width), dv(width), total(width), product(width), slope(width);
        double* out_sums = sums + share * SUMS * channels;
        const A keep = A(1) - neuron.leak * neuron.gain;
        for (long row = begin; row < end; row += rows) {
            const long n = std::min(rows, end - row) * channels, at = row * channels;
            std::fill(voltage.begin(), voltage.end(), A(0));
            std::fill(dv.begin(), dv.end(), A(0));
            std::fill(total.begin(), total.end(), A(0));
            std::fill(product.begin(), product.end(), A(0));
            if (learns) std::fill(slope.begin(), slope.end(), A(0));
            for (long s = 0; s < steps; ++s) {
                const X* in = x + at + (constant ? 0 : s * stride);
                A* hs = h.data() + s * width;
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    hs[j] = neuron.charged(load(in[j]) * a[j] + b[j], voltage[j]);
                    voltage[j] = neuron.reset(hs[j]);
                }
            }
            for (long s = steps - 1; s >= 0; --s) {
                const A* hs = h.data() + s * width;
                const X* in = x + at + (constant ? 0 : s * stride);
                const Y* from = grad_out + at + (readout ? 0 : s * stride);
                X* to = grad + at + (constant ? 0 : s * stride);
                const A weight = readout ? readout[s] : A(1);
                if (learns)
#pragma omp simd
                    for (long j = 0; j < n; ++j) {
                        const A before = s ? neuron.reset(hs[j - width]) : A(0);
                        const A dh = neuron.gradient(hs[j], weight * load(from[j]), dv[j]);
                        slope[j] += dh * (load(in[j]) * a[j] + b[j] - neuron.leak * before);
                    }
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    const A dh = neuron.gradient(hs[j], weight * load(from[j]), dv[j]);
                    const A g = dh * neuron.gain;
                    dv[j] = dh * keep;
                    total[j] += g;
                    product[j] += g * ((load(in[j]) - m[j]) * i[j]);
                    if (!constant) store(to[j], g);
                }
            }
            if (constant)
#pragma omp simd
                for (long j = 0; j < n; ++j) store(grad[at + j], total[j]);
            add_rows(total, n, channels, out_sums);
            add_rows(product, n, channels, out_sums + channels);
            if (learns) add_rows(slope, n, channels, out_sums + 2 * channels);
        }
    }
};

// Batch norm's backward pass, in place and element by element: grad = a grad + b x + c.
template <class X> struct Affine {
    using A = typename Accumulator<X>::type;
    const X* x;
    const A *a, *b, *c;
    long channels;
    X* grad;
    void run(long begin, long end, long rows, long) {
        const auto ra = repeat(a, channels, rows), rb = repeat(b, channels, rows), rc = repeat(c, channels, rows);
        for (long row = begin; row < end; row += rows) {
            const long n = std::min(rows, end - row) * channels, at = row * channels;
#pragma omp simd
            for (long j = 0; j < n; ++j)
                store(grad[at + j], ra[j] * load(grad[at + j]) + rb[j] * load(x[at + j]) + rc[j]);
        }
    }
};

}  // namespace

#define INPUT_KERNELS(NAME, X, A)                                                                            \
    extern "C" void moments_##NAME(const X* x, long positions, long channels, double* totals, int threads) { \
        for_tiles(positions, channels, threads, Moments<X>{x, channels, nullptr}, totals);                   \
        for (long c = 0; positions && c < channels; ++c) { /* mean, and sum of squares about it */           \
            const double sum = totals[c];                                                                    \
            totals[c] = load(x[c]) + sum / positions;                                                        \
            totals[channels + c] -= sum * sum / positions;                                                   \
        }                                                                                                    \
    }                                                                                                        \
    extern "C" void affine_##NAME(const X* x, const A* a, const A* b, const A* c, long positions,            \
                                  long channels, X* grad, int threads) {                                     \
        for_tiles(positions, channels, threads, Affine<X>{x, a, b, c, channels, grad});                      \
    }

#define NEURON_KERNELS(NAME, X, Y, A, NEURON)                                                                \
    extern "C" void forward_##NAME(const X* x, const A* scale, const A* shift, const A* readout, long steps, \
                                   long positions, long channels, bool constant, Y* out, const A* neuron,    \
                                   int threads) {                                                            \
        const NEURON<A> kind(neuron);                                                                        \
        for_tiles(positions, channels, threads,                                                              \
                  Forward<X, Y, NEURON>{kind, x, scale, shift, readout, steps, positions, channels,          \
                                        constant, out});                                                     \
    }                                                                                                        \
    extern "C" void backward_##NAME(const X* x, const A* scale, const A* shift, const A* mean,               \
                                    const A* invstd, const A* readout, long steps, long positions,           \
                                    long channels, bool constant, const Y* grad_out, X* grad,                \
                                    double* totals, const A* neuron, bool learns, int threads) {             \
        const NEURON<A> kind(neuron);                                                                        \
        for_tiles(positions, channels, threads,                                                              \
                  Backward<X, Y, NEURON>{kind, learns, x, scale, shift, mean, invstd, readout, steps,        \
                                         positions, channels, constant, grad_out, grad, nullptr},            \
                  totals);                                                                                   \
    }

#define BOTH_NEURONS(NAME, X, Y, A)             \
    NEURON_KERNELS(firing_##NAME, X, Y, A, Firing) \
    NEURON_KERNELS(sending_##NAME, X, Y, A, Sending)

INPUT_KERNELS(float32, float, float)
INPUT_KERNELS(float64, double, double)
INPUT_KERNELS(bfloat16, bfloat16, float)
BOTH_NEURONS(float32_float32, float, float, float)
BOTH_NEURONS(float64_float64, double, double, double)
BOTH_NEURONS(float32_bfloat16, float, bfloat16, float)
BOTH_NEURONS(bfloat16_bfloat16, bfloat16, bfloat16, float)
BOTH_NEURONS(bfloat16_float32, bfloat16, float, float)
