#include "codecs/all.h"

namespace rs {

std::vector<Term> resolve(const Spec& spec, Shape shape) {
  for (const CodecEntry& entry : kCodecs) {
    if (spec.name != entry.name) continue;
    std::vector<Term> terms = entry.terms(spec, shape);
    for (Term& term : terms)
      if (term.spec.name.empty()) term.spec = spec;
    return terms;
  }
  std::string known;
  for (const CodecEntry& entry : kCodecs)
    known += std::string(known.empty() ? "" : ", ") + entry.name;
  throw std::invalid_argument("unknown codec '" + spec.name + "', this build has " + known);
}

}  // namespace rs
