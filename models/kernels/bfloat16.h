// Tensor elements as the kernels read and write them: bfloat16 is computed with in float32.
#pragma once
#include <cstdint>
#include <cstring>

struct bfloat16 {
    uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(bfloat16 v) {
    uint32_t wide = uint32_t(v.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

inline void store(float& to, float v) { to = v; }
inline void store(double& to, double v) { to = v; }
inline void store(int8_t& to, int8_t v) { to = v; }
inline void store(bfloat16& to, float v) {  // round to nearest even
    uint32_t wide;
    std::memcpy(&wide, &v, 4);
    to.bits = uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

template <class T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
