// Tensors [P, C] a few rows at a time.
#pragma once

#include <algorithm>
#include <vector>

constexpr long TILE = 512;  // elements a thread carries through all spike steps while they stay in its L1 cache

// Per-channel values repeated over the rows of a tile, so that inner loops run over one flat index.
template <class A> std::vector<A> repeat(const A* values, long channels, long rows) {
    std::vector<A> result(channels * rows);
    for (long r = 0; r < rows; ++r) std::copy(values, values + channels, result.begin() + r * channels);
    return result;
}
