// Convolutions of binary spikes that cost what the spikes cost: for each output, the sum of the weights of its events.
//
// Spikes are [G, R, C]: G grids (spike steps times images) of R positions. A table [P, K] names the K neighbours of
// each of the P output positions among the R; R stands for padding. The events of an output are the numbers k C + c
// of its neighbours' spikes; those of all G P outputs are stored as consecutive lists (compressed sparse rows).
// The output is the sum of a row of weights [K C, O] for each event; the gradient of such a row is the sum of the
// gradients of the outputs that have the event. Both are the same loop, over TILE columns at a time, which stay in
// the L2 cache. The order of summation does not depend on the number of threads.
// event_conv.py is its only caller.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int TILE = 64;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

typedef float floats __attribute__((vector_size(BYTES)));
typedef double doubles __attribute__((vector_size(BYTES)));
typedef uint32_t words __attribute__((vector_size(BYTES)));
typedef int16_t shorts __attribute__((vector_size(BYTES)));

template <class V> inline V read(const void* from) {
    V result;
    std::memcpy(&result, from, sizeof(V));
    return result;
}

// The sum of some rows of TILE numbers, in vector registers.
template <class T, class V> struct Sum {
    static constexpr int LANES = BYTES / sizeof(T), COUNT = TILE / LANES;
    V parts[COUNT] = {};
    inline void add(const T* row) {
        for (int i = 0; i < COUNT; ++i) parts[i] += read<V>(row + i * LANES);
    }
    void write(T* to) const { std::memcpy(to, parts, sizeof(parts)); }
};

// The same for bfloat16, two to a word: the lower halves are even columns, the upper ones odd columns.
struct PairedSum {
    static constexpr int LANES = BYTES / 4, COUNT = TILE / 2 / LANES;
    floats even[COUNT] = {}, odd[COUNT] = {};
    inline void add(const bfloat16* row) {
        for (int i = 0; i < COUNT; ++i) {
            const words pairs = read<words>(row + 2 * i * LANES);
            even[i] += (floats)(pairs << 16);
            odd[i] += (floats)(pairs & 0xffff0000u);
        }
    }
    void write(float* to) const {
        float low[TILE / 2], high[TILE / 2];
        std::memcpy(low, even, sizeof(even));
        std::memcpy(high, odd, sizeof(odd));
        for (int j = 0; j < TILE / 2; ++j) to[2 * j] = low[j], to[2 * j + 1] = high[j];
    }
};

// The same for int8 in int16, of at most MOST rows. A column and the one half a tile further are a word, whose lower byte,
// of the former, is 128 too large and has no sign.
struct WholeSum {
    static constexpr int LANES = BYTES / 2, COUNT = TILE / 2 / LANES, MOST = 32767 / 128;
    shorts both[COUNT] = {}, odd[COUNT] = {};
    inline void add(const int8_t* row) {
        for (int i = 0; i < COUNT; ++i) {
            const shorts pairs = read<shorts>(row + 2 * i * LANES);
            both[i] += pairs;
            odd[i] += pairs >> 8;
        }
    }
    void add_to(float* total, int rows) const {
        uint16_t sums[TILE / 2];
        int16_t high[TILE / 2];
        std::memcpy(sums, both, sizeof(both));
        std::memcpy(high, odd, sizeof(odd));
        for (int j = 0; j < TILE / 2; ++j) {
            total[j] += float(int(uint16_t(sums[j] - 256 * high[j])) - 128 * rows);
            total[TILE / 2 + j] += float(high[j]);
        }
    }
};

template <class T> struct SumOf;
template <> struct SumOf<float> { using type = Sum<float, floats>; };
template <> struct SumOf<double> { using type = Sum<double, doubles>; };
template <> struct SumOf<bfloat16> { using type = PairedSum; };

// Sum of the rows of `table [., TILE]` that a list names.
template <class T, class A> inline void sum_rows(const int32_t* row, const int32_t* end, const T* table, A* to) {
    typename SumOf<T>::type sum;
    for (; row < end; ++row) sum.add(table + long(*row) * TILE);
    sum.write(to);
}

inline void sum_rows(const int32_t* row, const int32_t* end, const int8_t* table, float* to) {
    std::fill(to, to + TILE, 0.0f);
    while (row < end) {
        const int rows = int(std::min<long>(end - row, WholeSum::MOST));
        WholeSum sum;
        for (int i = 0; i < rows; ++i) sum.add(table + long(*row++) * TILE);
        sum.add_to(to, rows);
    }
}

inline bool is_zero(float v) { return v == 0; }
inline bool is_zero(double v) { return v == 0; }
inline bool is_zero(uint8_t v) { return v == 0; }
inline bool is_zero(bfloat16 v) { return (v.bits & 0x7fff) == 0; }
inline bool is_one(float v) { return v == 1; }
inline bool is_one(double v) { return v == 1; }
inline bool is_one(uint8_t v) { return v == 1; }
inline bool is_one(bfloat16 v) { return v.bits == 0x3f80; }

// Turns the lengths of lists, from starts[1] on, into where they begin and end.
void accumulate(int64_t* starts, long lists) {
    starts[0] = 0;
    for (long i = 0; i < lists; ++i) starts[i + 1] += starts[i];
}

// Where the list of the ones of each row of x [rows, C] begins. False if something is neither 0 nor 1.
template <class T> bool count(const T* x, long rows, long channels, int64_t* starts, int threads) {
    long strange = 0;
#pragma omp parallel for reduction(+ : strange) num_threads(threads)
    for (long r = 0; r < rows; ++r) {
        const T* in = x + r * channels;
        int ones = 0, others = 0;
#pragma omp simd reduction(+ : ones, others)
        for (long c = 0; c < channels; ++c) {
            ones += is_one(in[c]);
            others += !is_one(in[c]) & !is_zero(in[c]);
        }
        starts[r + 1] = ones;
        strange += others;
    }
    accumulate(starts, rows);
    return strange == 0;
}

// Which of at most 64 values are ones, as bits.
template <class T> uint64_t ones(const T* in, int n) {
    uint8_t flags[64] = {};
#pragma omp simd
    for (int j = 0; j < n; ++j) flags[j] = is_one(in[j]);
    uint64_t bits = 0;
    for (int j = 0; j < 64; j += 8) {
        uint64_t eight;
        std::memcpy(&eight, flags + j, 8);
        bits |= (eight * 0x0102040810204080u >> 56) << j;  // the lowest bit of each byte
    }
    return bits;
}

// The channels of the ones of each row, row r from channels_of[starts[r]] on.
template <class T>
void list(const T* x, const int64_t* starts, long rows, long channels, int32_t* channels_of, int threads) {
    constexpr long BLOCK = 64;
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; ++r) {
        const T* in = x + r * channels;
        int32_t* out = channels_of + starts[r];
        for (long first = 0; first < channels && out < channels_of + starts[r + 1]; first += BLOCK)
            for (uint64_t bits = ones(in + first, int(std::min(BLOCK, channels - first))); bits; bits &= bits - 1)
                *out++ = int32_t(first + __builtin_ctzll(bits));
    }
}

// Lists of events `events[offsets[o] ..]` of all outputs o = g P + p. The first pass (no events) makes the offsets.
void gather(const int64_t* starts, const int32_t* channels_of, const int64_t* table, long grids, long rows,
            long positions, long neighbours, long channels, int64_t* offsets, int32_t* events, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long o = 0; o < grids * positions; ++o) {
        const int64_t* near = table + o % positions * neighbours;
        const long first = o / positions * rows;
        int32_t* out = events ? events + offsets[o] : nullptr;
        int64_t length = 0;
        for (long k = 0; k < neighbours; ++k) {
            if (near[k] == rows) continue;
            const int64_t begin = starts[first + near[k]], n = starts[first + near[k] + 1] - begin;
            if (events)
                for (int64_t i = 0; i < n; ++i) out[length + i] = int32_t(k * channels + channels_of[begin + i]);
            length += n;
        }
        if (!events) offsets[o + 1] = length;
    }
    if (!events) accumulate(offsets, grids * positions);
}

// Weights w[k sk + c sc + o so] to tiles [ceil(O / TILE), K C, TILE] padded with zeros.
template <class W, class T>
void pack(const W* w, long sk, long sc, long so, long neighbours, long channels, long outputs, T* tiles, int threads) {
    const long count = (outputs + TILE - 1) / TILE, width = neighbours * channels;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (long tile = 0; tile < count; ++tile)
        for (long k = 0; k < neighbours; ++k)
            for (long c = 0; c < channels; c += 16) {  // a cache line of weights for each column
                const long n = std::min(16L, channels - c), columns = std::min<long>(TILE, outputs - tile * TILE);
                W rows[16][TILE] = {};
                for (long j = 0; j < columns; ++j)
                    for (long i = 0; i < n; ++i) rows[i][j] = w[k * sk + (c + i) * sc + (tile * TILE + j) * so];
                for (long i = 0; i < n; ++i)
                    for (long j = 0; j < TILE; ++j)
                        store(tiles[(tile * width + k * channels + c + i) * TILE + j], rows[i][j]);
            }
}

// Output [rows, O]: for each row, the sum of the weights of its events; of int8, in units [O].
template <class T, class O>
void forward(const int64_t* offsets, const int32_t* events, const T* tiles, const O* units, long rows, long width,
             long outputs, O* out, int threads) {
    constexpr long CHUNK = 64;
    const long count = (outputs + TILE - 1) / TILE, chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long tile = 0; tile < count; ++tile)
        for (long chunk = 0; chunk < chunks; ++chunk) {
            const T* weights = tiles + tile * width * TILE;
            const long n = std::min<long>(TILE, outputs - tile * TILE);
            for (long r = chunk * CHUNK; r < std::min(rows, (chunk + 1) * CHUNK); ++r) {
                typename Accumulator<T>::type sum[TILE];
                sum_rows(events + offsets[r], events + offsets[r + 1], weights, sum);
                O* to = out + r * outputs + tile * TILE;
                if constexpr (std::is_same<T, int8_t>::value)
                    for (long j = 0; j < n; ++j) to[j] = sum[j] * units[tile * TILE + j];
                else
                    for (long j = 0; j < n; ++j) store(to[j], sum[j]);
            }
        }
}

// Gradient [K C, O] of the weights, from that of the output [rows, O]. Works on a block of rows at a time, whose
// gradients stay in the L2 cache as tiles, and whose lists are inverted: from events to rows.
template <class T, class A>
void backward(const int64_t* offsets, const int32_t* events, const T* grad_out, long rows, long width, long outputs,
              A* grad, int threads) {
    const long block = std::min<long>(rows, 400000 / (TILE * sizeof(T))), blocks = (rows + block - 1) / block;
    const long count = (outputs + TILE - 1) / TILE;
    std::vector<int64_t> starts(blocks * (width + 1));
    std::vector<int32_t> rows_of(offsets[rows]);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long b = 0; b < blocks; ++b) {
        const long first = b * block, last = std::min(rows, first + block);
        int64_t* start = starts.data() + b * (width + 1);
        std::fill(start, start + width + 1, 0);
        for (int64_t i = offsets[first]; i < offsets[last]; ++i) ++start[events[i]];
        int64_t end = offsets[first];
        for (long e = 0; e < width; ++e) end += start[e], start[e] = end;
        start[width] = end;
        for (long r = last - 1; r >= first; --r)
            for (int64_t i = offsets[r + 1] - 1; i >= offsets[r]; --i) rows_of[--start[events[i]]] = int32_t(r - first);
    }
    std::vector<T> tiles(count * block * TILE);
    for (long b = 0; b < blocks; ++b) {
        const long first = b * block, last = std::min(rows, first + block);
        const int64_t* start = starts.data() + b * (width + 1);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for collapse(2)
            for (long tile = 0; tile < count; ++tile)
                for (long r = first; r < last; ++r) {
                    const long n = std::min<long>(TILE, outputs - tile * TILE);
                    std::copy_n(grad_out + r * outputs + tile * TILE, n, &tiles[(tile * block + r - first) * TILE]);
                }
#pragma omp for collapse(2) schedule(dynamic, 64)
            for (long tile = 0; tile < count; ++tile)
                for (long e = 0; e < width; ++e) {
                    A sum[TILE];
                    sum_rows(rows_of.data() + start[e], rows_of.data() + start[e + 1], &tiles[tile * block * TILE], sum);
                    A* to = grad + e * outputs + tile * TILE;
                    const long n = std::min<long>(TILE, outputs - tile * TILE);
                    for (long j = 0; j < n; ++j) to[j] += sum[j];
                }
        }
    }
}

}  // namespace

extern "C" void event_gather(const int64_t* starts, const int32_t* channels_of, const int64_t* table, long grids,
                             long rows, long positions, long neighbours, long channels, int64_t* offsets,
                             int32_t* events, int threads) {
    gather(starts, channels_of, table, grids, rows, positions, neighbours, channels, offsets, events, threads);
}

#define SPIKE_KERNELS(NAME, T)                                                                                        \
    extern "C" int event_count_##NAME(const T* x, long rows, long channels, int64_t* starts, int threads) {          \
        return count(x, rows, channels, starts, threads);                                                             \
    }                                                                                                                 \
    extern "C" void event_list_##NAME(const T* x, const int64_t* starts, long rows, long channels,                    \
                                      int32_t* channels_of, int threads) {                                            \
        list(x, starts, rows, channels, channels_of, threads);                                                        \
    }

#define FORWARD_KERNEL(NAME, T, O)                                                                                    \
    extern "C" void event_forward_##NAME(const int64_t* offsets, const int32_t* events, const T* tiles,               \
                                         const O* units, long rows, long width, long outputs, O* out, int threads) {  \
        forward(offsets, events, tiles, units, rows, width, outputs, out, threads);                                   \
    }

#define BACKWARD_KERNEL(NAME, T)                                                                                      \
    extern "C" void event_backward_##NAME(const int64_t* offsets, const int32_t* events, const T* grad_out,           \
                                          long rows, long width, long outputs, Accumulator<T>::type* grad,            \
                                          int threads) {                                                              \
        backward(offsets, events, grad_out, rows, width, outputs, grad, threads);                                     \
    }

#define PACK_KERNEL(NAME, W, T)                                                                                       \
    extern "C" void event_pack_##NAME(const W* w, long sk, long sc, long so, long neighbours, long channels,          \
                                      long outputs, T* tiles, int threads) {                                          \
        pack(w, sk, sc, so, neighbours, channels, outputs, tiles, threads);                                           \
    }

SPIKE_KERNELS(float32, float)
SPIKE_KERNELS(float64, double)
SPIKE_KERNELS(bfloat16, bfloat16)
SPIKE_KERNELS(uint8, uint8_t)
FORWARD_KERNEL(float32, float, float)
FORWARD_KERNEL(float64, double, double)
FORWARD_KERNEL(bfloat16, bfloat16, bfloat16)
FORWARD_KERNEL(int8, int8_t, float)
BACKWARD_KERNEL(float32, float)
BACKWARD_KERNEL(float64, double)
BACKWARD_KERNEL(bfloat16, bfloat16)
PACK_KERNEL(float32_float32, float, float)
PACK_KERNEL(float64_float64, double, double)
PACK_KERNEL(float32_bfloat16, float, bfloat16)
PACK_KERNEL(int8_int8, int8_t, int8_t)
