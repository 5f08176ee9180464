// Solves one assignment problem, given costs and column duals. The method is in assignment.cpp.
#pragma once

#include <cmath>

#include "assignment_rows.h"

namespace nlm::NLM_ISA {

// What problems of n rows need, for a number of workers.
template <class T>
struct Workspace {
  Workspace(int64_t n, bool sparse, int64_t workers)
      : padded(ceil_div(n, kStep) * kStep + kStep),
        rows(sparse ? n : 0),
        pushes(16 * rows),
        reals(7 * padded * workers),
        integers(7 * padded * workers),
        candidates(rows * workers),
        heap(pushes * workers) {}

  int64_t padded;  // at least one column more than whole vectors
  int64_t rows;    // with candidates
  int64_t pushes;
  Scratch<double> reals;
  Scratch<int64_t> integers;
  Scratch<Candidates<T>> candidates;
  Scratch<Heap::Entry> heap;
};

struct TwoBest {
  double first, second;
  int64_t column, other;  // `other`: where `second` is, or a free column with `first`; -1 unknown
};

template <class T>
class Problem {
 public:
  Problem(const Costs<T>& costs, const Workspace<T>& space, int64_t worker)
      : costs_(costs),
        n_(costs.n),
        padded_(space.padded),
        sparse_(space.rows > 0),
        heap_(space.heap.data() + worker * space.pushes, space.pushes),
        candidates_(space.candidates.data() + worker * space.rows) {
    double** reals[] = {&v, &distance_, &open_, &free_, &matched_, &offset_, &reach_};
    for (int k = 0; k < 7; ++k) *reals[k] = space.reals.data() + (7 * worker + k) * padded_;
    int64_t** integers[] = {&column_of, &row_of_,  &before_, &pending_,
                            &settled_,  &touched_, &cursor_};
    for (int k = 0; k < 7; ++k) *integers[k] = space.integers.data() + (7 * worker + k) * padded_;
    for (int64_t j = 0; j < padded_; ++j) {
      v[j] = -kInfinity;
      distance_[j] = kInfinity;
      free_[j] = j < n_ ? 0 : kInfinity;
      row_of_[j] = column_of[j] = -1;
    }
  }

  double* v;           // the columns' duals; minus infinity behind the last column
  int64_t* column_of;  // -1: the row is free

  double matched_cost(int64_t i) const { return matched_[column_of[i]]; }

  // What the methods below do to different rows is independent of each other.
  bool choose(int64_t i) {
    return candidates_[i].choose(costs_, v, i, static_cast<int32_t>(padded_ - 1));
  }
  void choose_none(int64_t i, double least) { candidates_[i].choose_none(least); }
  int64_t cheapest(int64_t i) const { return candidates_[i].column[0]; }

  void match(int64_t i, int64_t j) {
    column_of[i] = j;
    row_of_[j] = i;
    free_[j] = kInfinity;
    matched_[j] = costs_.at(i, j);
  }
  bool is_free(int64_t j) const { return row_of_[j] < 0; }

  // False where a row that is read for the first time has a cost that is not finite.
  bool solve() {
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (column_of[i] < 0) pending_[count++] = i;
    }
    for (int pass = 0; pass < kReductions && count > 0; ++pass) count = reduce_rows(count);
    int64_t failures = 0;
    for (int64_t k = 0; k < count && is_finite_; ++k) {
      const bool is_sparse = sparse_ && 8 * failures <= k + 64;
      if (is_sparse && search_candidates(pending_[k])) continue;
      failures += is_sparse;
      if (is_finite_) search_all(pending_[k]);
    }
    return is_finite_;
  }

 private:
  static constexpr int kReductions = 4;
  static constexpr int64_t kRenewed = 16;  // added to the cursor of a row whose candidates are new

  // Augmenting row reduction: each free row takes its cheapest column, whose dual falls until the
  // row's second best is as cheap; the row that had it is free again. Returns how many free rows
  // remain, in pending_.
  int64_t reduce_rows(int64_t count) {
    int64_t kept = 0, steps = 4 * n_ + count;
    for (int64_t k = 0; k < count;) {
      const int64_t i = pending_[k++];
      const TwoBest best = sparse_ ? best_candidates(i) : best_of_all(i);
      if (!is_finite_) return 0;
      int64_t j = best.column;
      const bool falls = best.first < best.second;
      if (falls) {
        if (best.second < kInfinity) v[j] -= best.second - best.first;
      } else if (!is_free(j) && best.other >= 0) {
        j = best.other;
      }
      const int64_t loser = row_of_[j];
      match(i, j);
      if (loser < 0) continue;
      column_of[loser] = -1;
      if (falls && --steps > 0) {
        pending_[--k] = loser;
      } else {
        pending_[kept++] = loser;
      }
    }
    return kept;
  }

  TwoBest best_candidates(int64_t i) {
    for (bool renewed = false;; renewed = true) {
      const Candidates<T>& list = candidates_[i];
      TwoBest best = {kInfinity, kInfinity, -1, -1};
      int b = 0;
      for (; b < list.blocks && best.second > list.bound[b]; ++b) {
        double keys[Candidates<T>::kBlock];
        keys_of(list, b, 0, keys);
        for (int k = 0; k < Candidates<T>::kBlock; ++k) {
          const int64_t j = list.column[b * Candidates<T>::kBlock + k];
          if (keys[k] < best.first) {
            best = {keys[k], best.first, j, best.column};
          } else if (keys[k] < best.second || (keys[k] == best.first && is_free(j))) {
            best.second = keys[k];
            best.other = j;
          }
        }
      }
      if (best.second <= list.bound[b]) return best;
      if (renewed) return best_of_all(i);
      is_finite_ &= choose(i);
    }
  }

  // (cost - v) - offset of a block's candidates.
  NLM_INLINE void keys_of(const Candidates<T>& list, int b, double offset, double* keys) const {
    constexpr int kBlock = Candidates<T>::kBlock;
    for (int k = b * kBlock; k < (b + 1) * kBlock; k += kHalf, keys += kHalf) {
      const vdouble cost = load_wide(list.cost + k) * costs_.sign;
      store(keys, (cost - gather(v, list.column + k)) - offset);
    }
  }

  TwoBest best_of_all(int64_t i) const {
    vdouble first[2] = {broadcast(kInfinity), broadcast(kInfinity)};
    vdouble second[2] = {first[0], first[0]};
    vint64 column[2] = {}, here[2];
    for (int64_t k = 0; k < kHalf; ++k) {
      here[0][k] = k;
      here[1][k] = k + kHalf;
    }
    costs_.sweep(i, 0, n_, [&](int64_t j, vdouble a, vdouble b) {
      const vdouble key[2] = {a - load(v + j), b - load(v + j + kHalf)};
      for (int p = 0; p < 2; ++p) {
        const vint64 less = key[p] < first[p];
        second[p] = less ? first[p] : smaller(key[p], second[p]);
        first[p] = less ? key[p] : first[p];
        column[p] = less ? here[p] : column[p];
        here[p] += kStep;
      }
    });
    double firsts[kStep], seconds[kStep];
    int64_t columns[kStep];
    for (int p = 0; p < 2; ++p) {
      store(firsts + p * kHalf, first[p]);
      store(seconds + p * kHalf, second[p]);
      std::memcpy(columns + p * kHalf, &column[p], sizeof column[p]);
    }
    TwoBest best = {kInfinity, kInfinity, -1, -1};
    for (int64_t k = 0; k < kStep; ++k) {
      if (firsts[k] < best.first) {
        best = {firsts[k], smaller(best.first, seconds[k]), columns[k], -1};
      } else {
        best.second = smaller(best.second, firsts[k]);
      }
    }
    if (best.first == best.second && !is_free(best.column)) {
      for (int64_t j = 0; j < n_; ++j) {
        if (j != best.column && costs_.at(i, j) - v[j] == best.first) {
          best.other = j;
          if (is_free(j)) break;
        }
      }
    }
    return best;
  }

  // The shortest augmenting path from a free row over candidates: Dijkstra's algorithm, in which
  // a row is pending with the bound of its columns that have not been looked at. False where a
  // row's candidates do not suffice; nothing has changed then but for their choice.
  bool search_candidates(int64_t source) {
    heap_.clear();
    nearest_ = kInfinity;
    sink_ = -1;
    touched_count_ = settled_count_ = 0;
    bool found = scan(source, 0.0, -kInfinity);
    while (found && !heap_.empty() && heap_.top().key < nearest_) {
      const double key = heap_.top().key;
      const int64_t code = heap_.top().code;
      heap_.pop();
      if (code < 0) {
        found = scan_on(~code, key);
      } else if (key == distance_[code]) {
        settle(code, key);
        const int64_t row = row_of_[code];
        found = scan(row, (matched_[code] - v[code]) - key, key);
      }
    }
    for (int64_t k = 0; k < touched_count_; ++k) distance_[touched_[k]] = kInfinity;
    if (!found || sink_ < 0) return false;
    finish(source);
    return true;
  }

  void settle(int64_t j, double key) {
    settled_[settled_count_] = j;
    reach_[settled_count_++] = key;
    distance_[j] = -kInfinity;
  }

  bool scan(int64_t row, double offset, double reached) {
    offset_[row] = offset;
    cursor_[row] = 0;
    return scan_on(row, reached);
  }

  // Looks at a row's next candidates, `reached` away.
  bool scan_on(int64_t row, double reached) {
    constexpr int kBlock = Candidates<T>::kBlock;
    const double offset = offset_[row];
    const Candidates<T>& list = candidates_[row];
    int64_t& b = cursor_[row];
    for (;; ++b) {
      const int64_t block = b & (kRenewed - 1);
      const double bound = list.bound[block] - offset;
      if (bound >= nearest_) return true;
      if (bound > reached) {
        if (!heap_.has_room(1)) return false;
        heap_.push(bound, static_cast<int32_t>(~row));
        return true;
      }
      if (block == list.blocks) {
        if (b >= kRenewed) return false;
        is_finite_ &= choose(row);
        b = kRenewed - 1;
        continue;
      }
      if (!heap_.has_room(kBlock)) return false;
      double keys[kBlock];
      keys_of(list, static_cast<int>(block), offset, keys);
      unsigned nearer = 0;
      const int32_t* const columns = list.column + block * kBlock;
      for (int k = 0; k < kBlock; k += kHalf) {
        const vdouble known = smaller(gather(distance_, columns + k), broadcast(nearest_));
        nearer |= (at_most(known, load(keys + k)) ^ kAllLanes) << k;
      }
      for (; nearer != 0; nearer &= nearer - 1) {
        const int k = __builtin_ctz(nearer);
        const int64_t j = columns[k];
        if (!(keys[k] < nearest_)) continue;
        const double key = larger(keys[k], reached);
        if (distance_[j] == kInfinity) touched_[touched_count_++] = j;
        distance_[j] = key;
        before_[j] = row;
        if (is_free(j)) {
          nearest_ = key;
          sink_ = j;
        } else {
          heap_.push(key, static_cast<int32_t>(j));
        }
      }
    }
  }

  // The same over all columns, without candidates.
  void search_all(int64_t source) {
    settled_count_ = 0;
    nearest_ = kInfinity;
    for (int64_t j = 0; j < padded_; ++j) open_[j] = v[j];
    double offset = 0, reached = -kInfinity;
    for (int64_t row = source;;) {
      vdouble near[2] = {broadcast(kInfinity), broadcast(kInfinity)};
      vdouble near_free = broadcast(nearest_);
      const vint64 here = vint64{} + row;
      costs_.sweep(row, 0, n_, [&](int64_t j, vdouble a, vdouble b) {
        const vdouble cost[2] = {a, b};
        for (int p = 0; p < 2; ++p, j += kHalf) {
          const vdouble key = (cost[p] - load(open_ + j)) - offset;
          vdouble known = load(distance_ + j);
          if (at_most(known, key) != kAllLanes) {
            const vint64 less = key < known;
            known = less ? key : known;
            store(distance_ + j, known);
            vint64 before = load_vector<vint64>(before_ + j);
            before = less ? here : before;
            std::memcpy(before_ + j, &before, sizeof before);
            near_free = smaller(known + load(free_ + j), near_free);
          }
          near[p] = smaller(known, near[p]);
        }
      });
      nearest_ = least_lane(near_free);
      const double key = least_lane(smaller(near[0], near[1]));
      if (!(std::fabs(key) < kInfinity)) {
        is_finite_ = false;
        return;
      }
      reached = larger(key, reached);
      int64_t j = 0;
      if (nearest_ <= key) {
        while (distance_[j] + free_[j] != nearest_) ++j;
        sink_ = j;
        break;
      }
      unsigned bits = 0;
      for (; (bits = at_most(load(distance_ + j), broadcast(key))) == 0;) j += kHalf;
      j += __builtin_ctz(bits);
      settle(j, reached);
      distance_[j] = kInfinity;
      open_[j] = -kInfinity;
      row = row_of_[j];
      offset = (matched_[j] - v[j]) - reached;
    }
    nearest_ = reached;
    for (int64_t j = 0; j < padded_; ++j) distance_[j] = kInfinity;
    finish(source);
  }

  // Moves the duals of the settled columns, and flips the path that ends in the sink.
  void finish(int64_t source) {
    for (int64_t k = 0; k < settled_count_; ++k) {
      v[settled_[k]] += smaller(reach_[k] - nearest_, 0.0);
    }
    for (int64_t j = sink_;;) {
      const int64_t i = before_[j];
      const int64_t next = column_of[i];
      match(i, j);
      if (i == source) return;
      j = next;
    }
  }

  const Costs<T> costs_;
  const int64_t n_, padded_;
  const bool sparse_;
  Heap heap_;
  Candidates<T>* candidates_;
  // By column: distance_ in the search, open_ is v but minus infinity where settled, free_ is 0
  // where free and infinity elsewhere, matched_ the cost with row_of_, before_ the row before.
  double *distance_, *open_, *free_, *matched_;
  int64_t *row_of_, *before_;
  // By row: what a search subtracts from cost - v, and the block of candidates it looks at next.
  double* offset_;
  int64_t* cursor_;
  // Lists: free rows, columns touched by a search, those settled and how far they are.
  int64_t *pending_, *touched_, *settled_;
  double* reach_;
  int64_t touched_count_ = 0, settled_count_ = 0, sink_ = -1;
  double nearest_ = kInfinity;
  bool is_finite_ = true;
};

}  // namespace nlm::NLM_ISA
