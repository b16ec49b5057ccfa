// Sums of directions in fp32, rounded once; a token that nothing changes is copied, or left alone.
#include "steer.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "spans.h"

namespace saesteer::cpu {
namespace {

// sum_i coef[i] rows[i], or the sum itself.
struct Terms {
  const float* sum = nullptr;
  std::vector<float> coef;
  std::vector<const void*> rows;

  void add(float c, const void* row) { coef.push_back(c), rows.push_back(row); }
  void clear() { sum = nullptr, coef.clear(), rows.clear(); }
  bool empty() const { return sum == nullptr && rows.empty(); }
};

class Edit {
 public:
  Edit(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
       const Values& values, const OutRows& y)
      : x_(x), directions_(directions), features_(features), values_(values), y_(y) {
    if (values.stride == 0 && tokens > 1) sum_common();
  }

  // In place nothing is written before its token is settled: the scan still reads x.
  Dead dead() const { return {common_.empty() || in_place() ? nullptr : common_.data(), y_}; }

  // Writes token t, in place only if it changes; acts is null outside the mask.
  void write(int64_t t, const float* acts) const {
    thread_local Terms terms;
    terms.clear();
    if (acts != nullptr) collect(t, acts, terms);
    if (!terms.empty())
      write_sum(x_[t], terms, y_[t], y_.dtype);
    else if (!in_place())
      kernels().copy(x_[t], x_.width * bytes(x_.dtype), y_[t]);
  }

 private:
  bool in_place() const { return y_.data == x_.data; }

  void write_sum(const void* base, const Terms& terms, void* y, Dtype y_dtype) const {
    kernels().add(base, y_dtype, terms.sum, terms.rows.data(), directions_.dtype, terms.coef.data(),
                  terms.rows.size(), x_.width, y, y_dtype);
  }

  void collect(int64_t t, const float* acts, Terms& terms) const {
    const auto is_zero = [](float a) { return a == 0; };
    if (!common_.empty() && std::all_of(acts, acts + features_, is_zero)) {
      terms.sum = common_.data();
      return;
    }
    for (int64_t f = 0; f < features_; ++f) {
      const float delta = values_.data[t * values_.stride + f] - acts[f];
      if (delta != 0) terms.add(delta, directions_[f]);
    }
  }

  // Most tokens have no live feature, so one sum serves them all. In fp32 it is bit for bit the sum
  // that each would make for itself.
  void sum_common() {
    const std::vector<float> acts(features_), base(x_.width, -0.f);  // -0 + s is s, even for s = -0
    Terms terms;
    collect(0, acts.data(), terms);
    if (terms.empty()) return;
    std::vector<float> sum(x_.width);
    write_sum(base.data(), terms, sum.data(), Dtype::f32);
    common_ = std::move(sum);
  }

  const Rows x_, directions_;
  const int64_t features_;
  const Values values_;
  const OutRows y_;
  std::vector<float> common_;
};

}  // namespace

void steer(const Rows& x, int64_t tokens, const Encoder& encoder, const Rows& directions,
           const Features& features, const Values& values, const bool* mask, const OutRows& y) {
  const Edit edit(x, tokens, directions, features.count, values, y);
  measure(x, tokens, encoder, features, mask, edit.dead(),
          [&edit](int64_t t, const float* acts) { edit.write(t, acts); });
}

void add(const Rows& x, int64_t tokens, const Rows& directions, int64_t features,
         const Values& coef, const OutRows& y) {
  const Edit edit(x, tokens, directions, features, coef, y);
  const std::vector<float> acts(features);
  over_tokens(tokens, [&](Spans& spans) {
    for (int64_t from, to; spans.take(from, to);)
      for (; from < to; ++from) edit.write(from, acts.data());
  });
}

}  // namespace saesteer::cpu
