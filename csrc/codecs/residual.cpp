#include "residual.h"

namespace rs {

std::vector<Term> residual_terms(const Spec& spec, Shape shape) {
  spec.only({"base", "rest", "clip"});
  const Spec *base = spec.find("base"), *rest = spec.find("rest");
  if (!base || !rest) throw std::invalid_argument("residual: needs base=... and rest=...");
  if (!(spec.number("clip", 0) >= 0))
    throw std::invalid_argument("residual: clip must be 0 or positive, got " +
                                spec.word("clip", ""));
  std::vector<Term> terms = resolve(*base, shape), more = resolve(*rest, shape);
  if (terms.size() != 1 || more.size() != 1)
    throw std::invalid_argument("residual: base and rest must be plain codecs, not sums again");
  // The rest's codes follow the base's params, and its own list of params follows them.
  Term& term = more.front();
  term.codes_param = static_cast<int>(terms.front().row.params.size());
  term.first_param = term.codes_param + 1;
  term.prefix = "rest_";
  terms.push_back(std::move(term));
  return terms;
}

}  // namespace rs
