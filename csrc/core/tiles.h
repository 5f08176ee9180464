// The inner part of a matrix product on AMX: float32 operands as bfloat16 parts, in tiles.
//
// A value is split into kParts bfloat16 numbers: its rounding and, with two parts, the rounding of
// what that leaves, together 16 bits. All products of parts but low * low are made: 1 or 3.
//
// An operand is packed into panels of 16 channels, a panel into its parts, and a part into tiles
// of 32 samples (1 KB), which are read in the order of memory:
//
//     left  [channel][sample]            16 rows of 64 bytes
//     right [sample / 2][channel][2]     the transpose of left in words of two samples
//
// Numerics. An instruction sums the even and the odd samples of a tile, adds both, and that to the
// accumulator, in float32, rounding to nearest each time and taking subnormal numbers for zero.
// Every kMostDepth / kParts tiles the sums are added in float64, in the same order whatever region
// an entry lies in.
//
// Blocking: 2 x 2 tiles of accumulators; the operands of a region and a depth (768 KB for 6 + 6
// panels) stay in the second level cache. A multiplication takes 16 cycles, two loads as many.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "product.h"
#include "simd.h"
#include "transpose.h"

namespace nlm::NLM_ISA {

constexpr int64_t kTileSamples = 32;  // of 16 channels: one tile
constexpr int64_t kTileWords = 256;   // of two samples each
constexpr int64_t kMostDepth = 64;    // tiles of all parts of a panel that are multiplied at once

// Sets all eight tiles to 16 rows of 64 bytes while it lives.
class TileSetting {
 public:
  TileSetting() {
    static constexpr struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } kSetting = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    static_assert(sizeof kSetting == 64);
    _tile_loadconfig(&kSetting);
  }
  ~TileSetting() { _tile_release(); }
  TileSetting(const TileSetting&) = delete;
  TileSetting& operator=(const TileSetting&) = delete;
};

// One operand: the deviations of up to `capacity` samples, as left or right factor or as both.
// Memory order is [depth][panel][part][tile], so what is multiplied together lies together.
template <int kParts>
class Tiles {
 public:
  using Scalar = float;
  static constexpr int64_t kLanes = Lanes<float>::count;
  static constexpr int64_t kStep = 2;
  static constexpr bool kInPlace = false;
  static_assert(kLanes == 16 && (kParts == 1 || kParts == 2));

  Tiles(int64_t channels, int64_t capacity, bool left, bool right)
      : depth(smaller(kMostDepth / kParts, ceil_div(capacity, kTileSamples))),
        part(depth * kTileWords),
        panel(kParts * part),
        panels_(ceil_div(channels, kStep * kLanes) * kStep),
        left_(left ? size(capacity) : 0),
        right_(right ? size(capacity) : 0),
        is_left_(left),
        is_right_(right) {}

  const uint32_t* left(int64_t p, int64_t step) const { return left_.data() + at(p, step); }
  const uint32_t* right(int64_t p, int64_t step) const { return right_.data() + at(p, step); }

  float* room(int64_t, float* scratch) const { return scratch; }

  // Splits panel p, values[sample][lane]; zeroes the samples that fill its last tile.
  void keep(int64_t p, float* values, int64_t samples) const {
    const int64_t steps = ceil_div(samples, kTileSamples);
    std::memset(values + samples * kLanes, 0,
                static_cast<size_t>((steps * kTileSamples - samples) * kLanes) * sizeof(float));
    for (int64_t step = 0; step < steps; ++step) {
      vfloat words[kParts][kLanes];
      for (int64_t pair = 0; pair < kLanes; ++pair) {
        const float* source = values + (step * kTileSamples + 2 * pair) * kLanes;
        vfloat even = load(source), odd = load(source + kLanes);
        for (int i = 0; i < kParts; ++i) {
          const vuint32 even_bits = take_part(even), odd_bits = take_part(odd);
          words[i][pair] = (vfloat)(odd_bits | (even_bits >> 16));
        }
      }
      for (int i = 0; i < kParts; ++i) {
        const int64_t target = at(p, step) + i * part;
        if (is_right_) std::memcpy(right_.data() + target, words[i], sizeof words[i]);
        if (!is_left_) continue;
        transpose(words[i]);
        std::memcpy(left_.data() + target, words[i], sizeof words[i]);
      }
    }
  }

  const int64_t depth, part, panel;  // tiles of a part; words of a part and of a panel

 private:
  // The bits of the next part, a float32 rounded to 8 bits (Veltkamp's splitting), which is taken
  // off the value. The largest deviation is near 1, so nothing overflows; NaN stays NaN.
  static NLM_INLINE vuint32 take_part(vfloat& value) {
    const vfloat wide = value * 65537.0f;
    const vuint32 bits = (vuint32)(wide - (wide - value));
    value -= (vfloat)bits;
    return bits;
  }

  int64_t size(int64_t capacity) const {
    return ceil_div(ceil_div(capacity, kTileSamples), depth) * panels_ * panel;
  }
  int64_t at(int64_t p, int64_t step) const {
    return (step / depth * panels_ + p) * panel + step % depth * kTileWords;
  }

  int64_t panels_;
  Scratch<uint32_t> left_, right_;
  bool is_left_, is_right_;
};

struct Parts {
  int x, y;
};

// Adds the products of two panels of x and of y to tiles 0 to 3. What neighbouring pairs of parts
// share is loaded once.
template <int kPairs>
NLM_INLINE void add_products(const Parts (&pairs)[kPairs], const uint32_t* x, const uint32_t* y,
                             int64_t x_panel, int64_t y_panel, int64_t part, int64_t steps) {
  for (int64_t word = 0; word < steps * kTileWords; word += kTileWords) {
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      if (i == 0 || pairs[i].x != pairs[i - 1].x) {
        _tile_loadd(4, x + pairs[i].x * part + word, 64);
        _tile_loadd(5, x + pairs[i].x * part + word + x_panel, 64);
      }
      if (i == 0 || pairs[i].y != pairs[i - 1].y) {
        _tile_loadd(6, y + pairs[i].y * part + word, 64);
        _tile_loadd(7, y + pairs[i].y * part + word + y_panel, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// sums[32, 32] over `steps` tiles of two panels of x and of y.
template <int kParts>
void multiply_panels(const uint32_t* x, const uint32_t* y, int64_t x_panel, int64_t y_panel,
                     int64_t part, int64_t steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (kParts == 2) {
    constexpr Parts kAll[] = {{0, 1}, {0, 0}, {1, 0}};
    add_products(kAll, x, y, x_panel, y_panel, part, steps);
  } else {
    constexpr Parts kOne[] = {{0, 0}};
    add_products(kOne, x, y, x_panel, y_panel, part, steps);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
}

// tile = x y^T over the samples, for a region of pairs of panels. Where `same`, what lies wholly
// below the diagonal stays unset.
template <int kParts>
void multiply_region(const Tiles<kParts>& x, const Tiles<kParts>& y, bool same,
                     const Region& region, int64_t samples, double* tile) {
  constexpr int64_t kLanes = Tiles<kParts>::kLanes, kSums = 2 * kLanes;
  const TileSetting setting;
  alignas(64) float sums[kSums * kSums];
  const int64_t rows = (region.row_end - region.row_begin) * kLanes;
  std::memset(tile, 0, static_cast<size_t>(rows * kTile) * sizeof(double));
  const int64_t steps = ceil_div(samples, kTileSamples);
  for (int64_t step = 0; step < steps; step += x.depth) {
    for (int64_t column = region.column_begin; column < region.column_end; column += 2) {
      for (int64_t row = region.row_begin; row < region.row_end; row += 2) {
        if (same && row > column) continue;
        multiply_panels<kParts>(x.left(row, step), y.right(column, step), x.panel, y.panel, x.part,
                                smaller(x.depth, steps - step), sums);
        double* target = tile + (row - region.row_begin) * kLanes * kTile +
                         (column - region.column_begin) * kLanes;
        for (int64_t i = 0; i < kSums; ++i) {
          for (int64_t j = 0; j < kSums; ++j) {
            target[i * kTile + j] += static_cast<double>(sums[i * kSums + j]);
          }
        }
      }
    }
  }
}

}  // namespace nlm::NLM_ISA

#endif
