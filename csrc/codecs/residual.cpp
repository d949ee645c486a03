#include "residual.h"

namespace rs {

std::vector<Term> residual_terms(const Spec& spec, Shape shape) {
  const Spec *base = spec.find("base"), *rest = spec.find("rest");
  if (!base || !rest) throw std::invalid_argument("residual: needs base=... and rest=...");
  std::vector<Term> terms = resolve(*base, shape);
  // The rest's codes follow the base's params, and its own list of params follows them.
  const int codes = terms.back().first_param + static_cast<int>(terms.back().row.params.size());
  for (Term& term : resolve(*rest, shape)) {
    term.codes_param = term.codes_param < 0 ? codes : codes + 1 + term.codes_param;
    term.first_param += codes + 1;
    term.prefix = "rest_" + term.prefix;
    terms.push_back(std::move(term));
  }
  return terms;
}

}  // namespace rs
