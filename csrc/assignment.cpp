// min over permutations p of sum_i cost[i, p(i)], with duals u, v that prove it:
//     u_i + v_j <= cost_ij for all i, j,   u_i + v_p(i) = cost_ip(i).
//
// Shortest augmenting paths with the initialisation of Jonker and Volgenant (Computing 38, 1987):
//   1. v_j = min_i cost_ij, unless a start gives v;
//   2. augmenting row reduction, four times;
//   3. for each row that is still free, a shortest path to a free column (Dijkstra's algorithm over
//      cost - u - v), along which the matching flips and v falls.
// Large problems read the matrix twice and then work on a few candidates per row. v only falls, so
// that a row's other columns never come nearer than they were when its candidates were chosen: that
// bound is a pending node of the search like any column. When it is the nearest one the row's
// candidates are chosen anew, and when it is again, the search is repeated over all columns. So no
// column is missed and nothing remains to be proven at the end.
//
// Sums are in float64. Where the optimum is not unique, any one: but the same for any number of
// threads, as only steps that are independent for each problem, row or column are shared.
#include "assignment.h"

#include <cmath>

#include "assignment_search.h"

namespace nlm::NLM_ISA {
namespace {

constexpr int64_t kDenseRows = 512;  // up to here all columns are looked at, in a float64 copy
constexpr int64_t kRowsPerTask = 64;

// Rows of a task of reduce_columns: at most 32 tasks.
int64_t task_rows(int64_t n) { return larger(kRowsPerTask, ceil_div(n, 32)); }

// One problem's start and results, and the memory that it may use.
struct Slot {
  int64_t* columns;
  double *row_duals, *column_duals;
  bool warm;
  const uint8_t* changed;
  double sign;         // of the duals against those of a minimisation
  double* partials;    // [ceil_div(n, task_rows(n)), n rounded up to kStep]
  uint8_t* is_finite;  // [ceil_div(n, kRowsPerTask)]
  // For a start, of rows: the least of cost - v, and whether the start holds. Of columns: the free
  // ones.
  double* least;
  uint8_t* is_kept;
  int64_t* free;
};

// v_j = min_i cost_ij, over blocks of rows.
template <class T>
void reduce_columns(const Costs<T>& costs, double* v, double* partials, int threads) {
  constexpr int64_t kRowGroup = 4;
  const int64_t n = costs.n;
  const int64_t padded = ceil_div(n, kStep) * kStep;
  const int64_t rows = task_rows(n);
  const int64_t tasks = ceil_div(n, rows);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    double* low = partials + task * padded;
    for (int64_t j = 0; j < padded; ++j) low[j] = kInfinity;
    const int64_t last = smaller(n, (task + 1) * rows);
    for (int64_t i = task * rows; i < last; i += kRowGroup) {
      const int64_t group = smaller(kRowGroup, last - i);
      for (int64_t j = 0; j < n; j += kStep) {
        vdouble a = load(low + j), b = load(low + j + kHalf);
        for (int64_t r = 0; r < group; ++r) {
          vdouble c, d;
          costs.load_step(costs.data + (i + r) * costs.row_stride, j, c, d);
          a = smaller(c, a);
          b = smaller(d, b);
        }
        store(low + j, a);
        store(low + j + kHalf, b);
      }
    }
  });
  for (int64_t j = 0; j < n; ++j) {
    v[j] = partials[j];
    for (int64_t t = 1; t < tasks; ++t) v[j] = smaller(partials[t * padded + j], v[j]);
  }
}

// v = the start's duals, and its assignments of those rows for which no other column is cheaper: as
// found by one read, or as known of a row that has not changed, for v has not risen since. False
// where a sum of squared costs is not finite.
template <class T>
bool keep_start(const Costs<T>& costs, Problem<T>& problem, const Slot& slot, int threads) {
  const int64_t n = costs.n;
  const int64_t rows = task_rows(n);
  double* const v = problem.v;
  for (int64_t j = 0; j < n; ++j) v[j] = slot.sign * slot.column_duals[j];
  parallel_for(ceil_div(n, rows), threads, [&](int64_t task, int) {
    constexpr double kRounding = 4 * std::numeric_limits<double>::epsilon();
    const int64_t last = smaller(n, (task + 1) * rows);
    for (int64_t i = task * rows; i < last; ++i) {
      const int64_t j = slot.columns[i];
      const bool has_column = j >= 0 && j < n;
      const double cost = has_column ? costs.at(i, j) : 0;
      if (slot.changed != nullptr) {
        slot.least[i] = slot.sign * slot.row_duals[i];
        slot.is_kept[i] = has_column && !slot.changed[i] && cost - v[j] == slot.least[i];
      } else {
        const double rounding = has_column ? kRounding * (std::fabs(cost) + std::fabs(v[j])) : 0;
        slot.least[i] = least_key(costs, v, i);
        slot.is_kept[i] = has_column && cost - v[j] <= slot.least[i] + rounding;
      }
    }
  });
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite &= !std::isnan(slot.least[i]);
    slot.is_kept[i] = slot.is_kept[i] && problem.is_free(slot.columns[i]);
    if (slot.is_kept[i]) problem.match(i, slot.columns[i]);
  }
  return finite;
}

// v of the free columns rises as far as the kept rows allow: it is their minimum over the costs
// less u. Else columns that a start frees again and again would become too dear to be found.
template <class T>
void raise_free_columns(const Costs<T>& costs, Problem<T>& problem, const Slot& slot, int threads) {
  const int64_t n = costs.n;
  const int64_t rows = task_rows(n);
  const int64_t tasks = ceil_div(n, rows);
  int64_t free_count = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (problem.is_free(j)) slot.free[free_count++] = j;
  }
  parallel_for(tasks, threads, [&](int64_t task, int) {
    double* low = slot.partials + task * n;
    for (int64_t k = 0; k < free_count; ++k) low[k] = kInfinity;
    const int64_t last = smaller(n, (task + 1) * rows);
    for (int64_t i = task * rows; i < last; ++i) {
      if (!slot.is_kept[i]) continue;
      for (int64_t k = 0; k < free_count; ++k) {
        low[k] = smaller(costs.at(i, slot.free[k]) - slot.least[i], low[k]);
      }
    }
  });
  for (int64_t k = 0; k < free_count; ++k) {
    double low = kInfinity;
    for (int64_t t = 0; t < tasks; ++t) low = smaller(slot.partials[t * n + k], low);
    if (low < kInfinity) problem.v[slot.free[k]] = low;
  }
}

// The candidates of all rows that are not kept; false where a sum of squared costs is not finite.
template <class T>
bool choose_candidates(Problem<T>& problem, const Slot& slot, int64_t n, int threads) {
  const int64_t tasks = ceil_div(n, kRowsPerTask);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    bool all = true;
    const int64_t last = smaller(n, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < last; ++i) {
      if (slot.warm && slot.is_kept[i]) {
        problem.choose_none(i, slot.least[i]);
      } else {
        all &= problem.choose(i);
      }
    }
    slot.is_finite[task] = all;
  });
  bool finite = true;
  for (int64_t t = 0; t < tasks; ++t) finite &= slot.is_finite[t] != 0;
  return finite;
}

// Half of the rows that are not kept, or more, have a free column as their cheapest: most of them
// will take it, so that raising the free columns, a read of half the matrix, would gain nothing.
template <class T>
bool is_well_matched(const Problem<T>& problem, const Slot& slot, int64_t n) {
  int64_t free_rows = 0, found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (slot.is_kept[i]) continue;
    free_rows += 1;
    found += problem.is_free(problem.cheapest(i));
  }
  return 2 * found >= free_rows;
}

// False where a sum of squared costs is not finite.
template <class T>
bool solve(const Costs<T>& costs, const Slot& slot, const Workspace<T>& space, int64_t worker,
           int threads) {
  const int64_t n = costs.n;
  const bool sparse = space.rows > 0;
  Problem<T> problem(costs, space, worker);
  if (!slot.warm) {
    reduce_columns(costs, problem.v, slot.partials, threads);
  } else if (!keep_start(costs, problem, slot, threads)) {
    return false;
  }
  if (sparse && !choose_candidates(problem, slot, n, threads)) return false;
  if (slot.warm && !(sparse && is_well_matched(problem, slot, n))) {
    raise_free_columns(costs, problem, slot, threads);
    if (sparse) choose_candidates(problem, slot, n, threads);
  }

  if (!problem.solve()) return false;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = problem.column_of[i];
    slot.columns[i] = j;
    slot.row_duals[i] = slot.sign * (problem.matched_cost(i) - problem.v[j]);
    slot.column_duals[i] = slot.sign * problem.v[i];
  }
  return true;
}

// A float64 copy with the sign of a minimisation; false where the sum of squares is not finite.
template <class T>
bool copy_costs(const Costs<T>& costs, double* copy) {
  const int64_t padded = ceil_div(costs.n, kStep) * kStep;
  vdouble squares[2] = {};
  for (int64_t i = 0; i < costs.n; ++i) {
    double* row = copy + i * padded;
    costs.sweep(i, 0, costs.n, [&](int64_t j, vdouble a, vdouble b) {
      squares[0] = fma(a, a, squares[0]);
      squares[1] = fma(b, b, squares[1]);
      store(row + j, a);
      store(row + j + kHalf, b);
    });
  }
  return sum_lanes(squares[0] + squares[1]) < kInfinity;
}

template <class T>
bool solve_batch(const View3& costs, int64_t groups, int64_t group_stride, bool maximize,
                 const Assignment& result, int threads) {
  const int64_t n = costs.inner, batch = groups * costs.outer;
  const bool sparse = n > kDenseRows;
  const double sign = maximize ? -1 : 1;
  // Threads share the problems of a batch, or the rows of one problem after another.
  const bool across = batch >= threads || (!sparse && batch > 1);
  const int64_t workers = across ? smaller(batch, threads) : 1;
  const int64_t padded = ceil_div(n, kStep) * kStep;
  const int64_t partials = ceil_div(n, task_rows(n)) * padded;

  const Workspace<T> space(sparse ? n : 0, sparse, workers);
  const Workspace<double> dense_space(sparse ? 0 : n, false, workers);
  const Scratch<double> copies(sparse ? 0 : workers * n * padded);
  const Scratch<double> reals(workers * (partials + n));
  const Scratch<int64_t> columns(workers * n);
  const Scratch<uint8_t> flags(workers * 2 * n);
  const Scratch<uint8_t> solved(batch);

  parallel_for(batch, across ? threads : 1, [&](int64_t b, int worker) {
    double* const real = reals.data() + worker * (partials + n);
    uint8_t* const flag = flags.data() + worker * 2 * n;
    const Slot slot = {result.columns + b * n,
                       result.row_duals + b * n,
                       result.column_duals + b * n,
                       result.warm,
                       result.changed == nullptr ? nullptr : result.changed + b * n,
                       sign,
                       real,
                       flag,
                       real + partials,
                       flag + n,
                       columns.data() + worker * n};
    const T* first = costs.at<T>(b % costs.outer, 0, 0) + b / costs.outer * group_stride;
    const Costs<T> given = {first, n, costs.channel_stride, sign};
    if (sparse) {
      solved.data()[b] = solve(given, slot, space, worker, across ? 1 : threads);
      return;
    }
    double* copy = copies.data() + worker * n * padded;
    const Costs<double> copied = {copy, n, padded, 1.0};
    solved.data()[b] = copy_costs(given, copy) && solve(copied, slot, dense_space, worker, 1);
  });
  for (int64_t b = 0; b < batch; ++b) {
    if (!solved.data()[b]) return false;
  }
  return true;
}

}  // namespace

bool assignment(const View3& costs, int64_t groups, int64_t group_stride, bool maximize,
                const Assignment& result, int threads) {
  if (costs.empty() || groups == 0) return true;
  auto* const run = costs.dtype == DType::kFloat64 ? solve_batch<double> : solve_batch<float>;
  return run(costs, groups, group_stride, maximize, result, threads);
}

}  // namespace nlm::NLM_ISA
