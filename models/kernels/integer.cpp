// Neurons in whole numbers. models/integer_neurons.py is its only caller.
#include <algorithm>

#include "tiles.h"

namespace {

// x [P, C] channels-last, offset and step [C]; writes min(max(floor((x + offset) / step), 0), most), [P, C]. Returns
// whether an x + offset is as large as `limit`, or no number.
template <class X> bool count_thresholds(const X* x, const X* offset, const X* step, long positions, long channels,
                                         X most, X limit, unsigned char* out, int threads) {
    const long rows = std::max(1L, TILE / channels), size = rows * channels, total = positions * channels;
    const auto offsets = repeat(offset, channels, rows), steps = repeat(step, channels, rows);
    long unfit = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : unfit)
    for (long begin = 0; begin < total; begin += size) {
        const X *in = x + begin, *a = offsets.data(), *b = steps.data();
        unsigned char* counts = out + begin;
        const long n = std::min(size, total - begin);
        X largest = 0;
#pragma omp simd reduction(max : largest)
        for (long j = 0; j < n; ++j) {
            const X beyond = in[j] + a[j], magnitude = beyond < 0 ? -beyond : beyond;
            largest = magnitude < largest ? largest : magnitude;  // the magnitude also if it is no number
            X count = beyond / b[j];
            count = count > 0 ? count : X(0);
            counts[j] = static_cast<unsigned char>(int(count < most ? count : most));
        }
        unfit += !(largest < limit);
    }
    return unfit > 0;
}

// x [S, P, C] channels-last, or [P, C] if constant, in multiples of 1 / units; offset and threshold [C], in units. LIF and
// IF neurons from rest: the potential V becomes V + ((x + offset - V) >> shift), or, if it does not leak, V + x + offset;
// it is at least -most; a spike is V >= threshold, and sets V to 0. A negative threshold stands for currents of the other
// sign. Writes spikes [S, P, C]. Returns whether an x is as large as `limit` units, or no number.
template <class X>
bool integrate(const X* x, const int* offset, const int* threshold, long steps, long positions, long channels,
               bool constant, int shift, bool leaks, X units, X limit, int most, unsigned char* out, int threads) {
    const long rows = std::max(1L, TILE / channels), size = rows * channels, total = positions * channels;
    const auto offsets = repeat(offset, channels, rows), thresholds = repeat(threshold, channels, rows);
    const int leak = leaks ? 1 : 0;
    long unfit = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : unfit)
    for (long begin = 0; begin < total; begin += size) {
        const long n = std::min(size, total - begin);
        std::vector<int> potentials(n, 0);
        int* v = potentials.data();
        const int *a = offsets.data(), *b = thresholds.data();
        for (long step = 0; step < steps; ++step) {
            const X* in = x + (constant ? 0 : step * total) + begin;
            unsigned char* spikes = out + step * total + begin;
            X largest = 0;
#pragma omp simd reduction(max : largest)
            for (long j = 0; j < n; ++j) {
                const X current = in[j] * units, magnitude = current < 0 ? -current : current;
                largest = magnitude < largest ? largest : magnitude;
                const int whole = int(current), negative = b[j] >> 31;
                const int change = ((whole ^ negative) - negative) + a[j] - leak * v[j];
                const int next = std::max(v[j] + (change >> shift), -most);
                const int fired = next >= ((b[j] ^ negative) - negative);
                v[j] = fired ? 0 : next;
                spikes[j] = static_cast<unsigned char>(fired);
            }
            unfit += !(largest < limit);
        }
    }
    return unfit > 0;
}

}  // namespace

#define KERNEL(NAME, X)                                                                                             \
    extern "C" int count_thresholds_##NAME(const X* x, const X* offset, const X* step, long positions,              \
                                           long channels, long most, long limit, unsigned char* out, int threads) { \
        return count_thresholds<X>(x, offset, step, positions, channels, X(most), X(limit), out, threads);          \
    }                                                                                                               \
    extern "C" int integrate_##NAME(const X* x, const int* offset, const int* threshold, long steps, long positions, \
                                    long channels, bool constant, long shift, bool leaks, long units, long limit,   \
                                    long most, unsigned char* out, int threads) {                                   \
        return integrate<X>(x, offset, threshold, steps, positions, channels, constant, int(shift), leaks,          \
                            X(units), X(limit), int(most), out, threads);                                           \
    }

KERNEL(float32, float)
KERNEL(float64, double)
