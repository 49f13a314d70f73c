// Neurons in whole numbers: how many of their thresholds currents reach. models/integer.py is its only caller.
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

}  // namespace

#define KERNEL(NAME, X)                                                                                             \
    extern "C" int count_thresholds_##NAME(const X* x, const X* offset, const X* step, long positions,              \
                                           long channels, long most, long limit, unsigned char* out, int threads) { \
        return count_thresholds<X>(x, offset, step, positions, channels, X(most), X(limit), out, threads);          \
    }

KERNEL(float32, float)
KERNEL(float64, double)
