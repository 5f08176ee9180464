// The CUDA kernels' work on one (block, thread); tests run the same code over the grid on the CPU.
//
// A row is one position of the leading axes. Its columns are those of the last axis, and of the one
// before it where that is gathered and the last is a short run (the 3 x 3 of a convolution). The
// row's threads compute its source offset once (through the indices of the leading axes and of
// their parents), then copy or gather packs of up to 16 bytes: neighbouring threads write
// neighbouring memory.
//
// Where columns are gathered from rows that are whole in memory, a block first copies its rows into
// shared memory: gathered from there they cost a few bank conflicts, gathered from the first-level
// cache a tag look-up per element. Wide rows that share their index are stacked: a thread reads its
// part of the index once for all of them. An index outside of its axis is the memory's `fail`.
#pragma once

#include <cstdint>

#include "core/device.h"
#include "permute_plan.h"

namespace nlm::NLM_ISA {

struct alignas(16) Word16 {
  uint64_t half[2];
};

// What a kernel gets by value (2.9 KB).
struct PermuteGrid {
  Plan plan;
  RowGrid grid;  // rows are stacks; columns in packs
  int64_t rows;
  int stack;                           // rows of a stack
  int64_t below[kPermuteMaxAxes + 1];  // rows per step of a leading axis
  int leading;                         // number of leading axes; the next one is gathered, or last
  bool gathers;
  int64_t run;             // columns of a gathered position
  int64_t lanes_gathered;  // a thread's step in gathered positions
  int64_t lanes_run;       // and in columns of a run
  int64_t run_stride;      // of the source
  int64_t staged_columns;  // of a row in shared memory; 0: it is read in place
  int stage_words;         // 16-byte words of such a row; 0: it is copied by elements
};

// Columns of a pack: at most four, whose places fit into registers, and 16 bytes.
template <int kElementBytes>
inline constexpr int kPackOf = kElementBytes <= 4 ? 4 : 16 / kElementBytes;

inline constexpr int64_t kLongestRun = 64;
// Measured on an H100: longer rows, and stacks of wider elements, leave too few blocks to a
// multiprocessor.
inline constexpr int64_t kMostStagedBytes = 64 << 10;
inline constexpr int64_t kMostStacked = 4;
inline constexpr int kWidestStacked = 2;

// The last axis is a short run of the gathered one before it.
inline bool ends_in_run(const Plan& plan) {
  const int gathered = plan.count - 2;
  if (gathered < 0 || plan.axes[gathered].index == nullptr) return false;
  if (plan.axes[plan.count - 1].index != nullptr) return false;
  if (plan.axes[plan.count - 1].size > kLongestRun) return false;
  for (int a = 0; a < plan.count; ++a) {
    if (a != gathered && plan.changes_with(a, gathered)) return false;
  }
  return true;
}

// `pack` becomes the number of columns that a thread writes at once: `widest`, or 1.
inline PermuteGrid make_permute_grid(const Plan& plan, int element_bytes, int widest, int& pack) {
  PermuteGrid work = {};
  work.plan = plan;
  const bool has_run = ends_in_run(plan);
  const PlanAxis& last = plan.axes[plan.count - 1];
  work.leading = plan.count - (has_run ? 2 : 1);
  work.gathers = plan.axes[work.leading].index != nullptr;
  work.run = has_run ? last.size : 1;
  work.run_stride = has_run ? last.stride : 0;
  int64_t rows = 1;
  for (int a = work.leading - 1; a >= 0; --a) {
    work.below[a] = rows;
    rows *= plan.axes[a].size;
  }
  const int64_t columns = plan.axes[work.leading].size * work.run;
  const bool packs = work.gathers && columns % widest == 0 && is_aligned(plan.target, 16);
  pack = packs ? widest : 1;
  work.rows = rows;
  work.stack = 1;
  work.grid = RowGrid::make(rows, columns / pack);
  if (!work.gathers) return work;

  const bool whole = plan.axes[work.leading].stride == work.run && (!has_run || last.stride == 1);
  if (whole && columns * element_bytes <= kMostStagedBytes) {
    work.staged_columns = columns;
    if (work.grid.rows_per_block == 1 && element_bytes <= kWidestStacked &&
        !plan.axes[work.leading].has_parents) {
      const int64_t fitting = kMostStagedBytes / (columns * element_bytes);
      const int64_t stack = fitting < kMostStacked ? fitting : kMostStacked;
      work.stack = stack > 1 ? static_cast<int>(stack) : 1;
      work.grid = RowGrid::make((rows + work.stack - 1) / work.stack, columns / pack);
    }
    work.grid.segment = work.grid.columns;  // one block has the whole row
    work.grid.segments = 1;
    int64_t common =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(plan.source)) | (columns * element_bytes);
    for (int a = 0; a < work.leading; ++a) common |= plan.axes[a].stride * element_bytes;
    if (common % 16 == 0) work.stage_words = static_cast<int>(columns * element_bytes / 16);
  }
  work.lanes_gathered = work.grid.lanes * static_cast<int64_t>(pack) / work.run;
  work.lanes_run = work.grid.lanes * static_cast<int64_t>(pack) % work.run;
  return work;
}

inline int64_t shared_bytes(const PermuteGrid& work, int element_bytes) {
  return work.staged_columns * element_bytes * work.grid.rows_per_block * work.stack;
}

// Where the last axis is copied in runs, the largest power of two of bytes, up to 16, that divides
// runs, strides and addresses: the plan then counts in such words.
inline int widen_words(Plan& plan, int element_bytes) {
  const PlanAxis& last = plan.axes[plan.count - 1];
  if (last.index != nullptr || last.stride != 1) return element_bytes;
  uint64_t common = reinterpret_cast<uintptr_t>(plan.source) |
                    reinterpret_cast<uintptr_t>(plan.target) | 16 |
                    static_cast<uint64_t>(last.size * element_bytes);
  for (int a = 0; a + 1 < plan.count; ++a) {
    common |= static_cast<uint64_t>(plan.axes[a].stride * element_bytes);
  }
  const int word = static_cast<int>(common & (~common + 1));
  if (word <= element_bytes) return element_bytes;
  const int ratio = word / element_bytes;
  for (int a = 0; a + 1 < plan.count; ++a) plan.axes[a].stride /= ratio;
  plan.axes[plan.count - 1].size /= ratio;
  plan.elements /= ratio;
  return word;
}

NLM_DEVICE int64_t axis_position(const PermuteGrid& work, int a, int64_t row) {
  return remainder(quotient(row, work.below[a]), work.plan.axes[a].size);
}

// Where the index row of axis `a` begins. Only leading axes are parents.
NLM_DEVICE int64_t index_begin(const PermuteGrid& work, int a, int64_t row) {
  const PlanAxis& axis = work.plan.axes[a];
  int64_t begin = 0;
  if (axis.has_parents) {
    for (int p = 0; p < work.leading; ++p) {
      const int64_t step = axis.parent_stride[p];
      if (step != 0) begin += step * axis_position(work, p, row);
    }
  }
  return begin;
}

template <class Memory>
NLM_DEVICE int64_t gathered(const PermuteGrid& work, int a, int64_t index_at,
                            const Memory& memory) {
  const int64_t found = memory.index(a)[index_at];
  if (static_cast<uint64_t>(found) < static_cast<uint64_t>(work.plan.axes[a].size)) return found;
  memory.fail();
  return 0;
}

// Where a row begins in the source.
template <class Memory>
NLM_DEVICE int64_t row_offset(const PermuteGrid& work, int64_t row, const Memory& memory) {
  int64_t offset = 0;
  for (int a = 0; a < work.leading; ++a) {
    const PlanAxis& axis = work.plan.axes[a];
    int64_t position = axis_position(work, a, row);
    if (axis.index != nullptr) {
      position = gathered(work, a, index_begin(work, a, row) + position, memory);
    }
    offset += position * axis.stride;
  }
  return offset;
}

// First phase, where rows are staged: the block's rows, as they are, into shared memory.
template <class T, class Memory>
NLM_DEVICE void stage_body(const PermuteGrid& work, int64_t block, int thread,
                           const Memory& memory) {
  const int lane = thread % work.grid.lanes;
  const int64_t first = work.grid.row(block, thread) * work.stack;
  const int64_t local = static_cast<int64_t>(thread / work.grid.lanes) * work.stack;
  for (int64_t k = 0; k < work.stack && first + k < work.rows; ++k) {
    const int64_t offset = row_offset(work, first + k, memory);
    if (work.stage_words != 0) {
      const auto source = memory.template source<Word16>();
      const auto shared = memory.template shared<Word16>();
      const int64_t word = offset / static_cast<int64_t>(sizeof(Word16) / sizeof(T));
      for (int64_t i = lane; i < work.stage_words; i += work.grid.lanes) {
        shared[(local + k) * work.stage_words + i] = source[word + i];
      }
    } else {
      const auto source = memory.template source<T>();
      const auto shared = memory.template shared<T>();
      for (int64_t i = lane; i < work.staged_columns; i += work.grid.lanes) {
        shared[(local + k) * work.staged_columns + i] = source[offset + i];
      }
    }
  }
}

// write(target element, source element) for every element of the thread's rows, of which the first
// begins at `offset` in `source`.
// `Place` counts the elements of `source`.
template <class T, int kPack, class Place, class Source, class Memory, class Write>
NLM_DEVICE void gather_columns(const PermuteGrid& work, int64_t block, int thread, int64_t row,
                               const Source& source, int64_t offset, const Memory& memory,
                               const Write& write) {
  const int a = work.leading;
  const auto target = memory.template target<Pack<T, kPack>>();
  const int64_t stride = work.plan.axes[a].stride;
  const int64_t end = work.grid.end_column(block);
  int64_t column = work.grid.first_column(block, thread);
  int64_t position = column * kPack;
  int64_t in_run = 0;
  if (work.run > 1) {
    in_run = remainder(position, work.run);
    position = quotient(position, work.run);
  }
  const int64_t begin = index_begin(work, a, row);
  const int64_t target_row = row * work.grid.columns;
  int64_t rows = 1;
  if (sizeof(Place) == 4) {  // staged: else there are no stacks
    rows = work.stack < work.rows - row ? work.stack : work.rows - row;
  }
  for (; column < end; column += work.grid.lanes) {
    int64_t at = position;
    int64_t inside = in_run;
    Place from[kPack];
    for (int i = 0; i < kPack; ++i) {
      from[i] = offset + inside * work.run_stride + gathered(work, a, begin + at, memory) * stride;
      if (++inside >= work.run) {
        inside = 0;
        ++at;
      }
    }
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t place = target_row + k * work.grid.columns + column;
      Pack<T, kPack> pack = {};
      if (Write::kReads) pack = target[place];
      for (int i = 0; i < kPack; ++i) {
        write(pack.value[i], source[from[i] + static_cast<Place>(k * work.staged_columns)]);
      }
      target[place] = pack;
    }
    position += work.lanes_gathered;
    in_run += work.lanes_run;
    if (in_run >= work.run) {
      in_run -= work.run;
      ++position;
    }
  }
}

// What is done with a row's columns. Each is a kernel of its own, with its own need of registers.
enum class Columns { kCopied, kGathered, kStaged };

inline Columns columns_of(const PermuteGrid& work) {
  if (!work.gathers) return Columns::kCopied;
  return work.staged_columns != 0 ? Columns::kStaged : Columns::kGathered;
}

template <class T, int kPack, Columns kColumns, class Memory, class Write>
NLM_DEVICE void permute_body(const PermuteGrid& work, int64_t block, int thread,
                             const Memory& memory, const Write& write) {
  const int64_t row = work.grid.row(block, thread) * work.stack;
  if (row >= work.rows) return;
  if constexpr (kColumns == Columns::kStaged) {
    const int64_t local = thread / work.grid.lanes * work.stack * work.staged_columns;
    gather_columns<T, kPack, int32_t>(work, block, thread, row, memory.template shared<T>(), local,
                                      memory, write);
  } else {
    const auto source = memory.template source<T>();
    const int64_t offset = row_offset(work, row, memory);
    if constexpr (kColumns == Columns::kGathered) {
      gather_columns<T, kPack, int64_t>(work, block, thread, row, source, offset, memory, write);
    } else {
      const auto target = memory.template target<T>();
      const int64_t stride = work.plan.axes[work.leading].stride;
      const int64_t end = work.grid.end_column(block);
      for (int64_t column = work.grid.first_column(block, thread); column < end;
           column += work.grid.lanes) {
        write(target[row * work.grid.columns + column], source[offset + column * stride]);
      }
    }
  }
}

template <class T>
struct WriteCopy {
  static constexpr bool kReads = false;
  NLM_DEVICE void operator()(T& target, const T& source) const { target = source; }
};

// Rounds after the product and after the sum, as the reference does.
template <class T, class Compute>
struct WriteSum {
  static constexpr bool kReads = true;
  Compute weight;
  NLM_DEVICE void operator()(T& target, const T& source) const {
    narrow(widen(target) + widen(source) * weight, target);
  }
};

}  // namespace nlm::NLM_ISA
