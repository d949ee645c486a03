// Codec settings as text: name(key=value, ...), a value being a number, a word or another spec.
// It is the argument `codec` of every op; Python writes it in canonical form.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rs {

struct Spec {
  std::string name;
  std::vector<std::pair<std::string, Spec>> items;  // a number or word is a Spec without items

  static Spec parse(std::string_view text) {
    size_t at = 0;
    Spec spec = parse_value(text, at, 0);
    if (at != text.size()) fail(text, at);
    return spec;
  }

  const Spec* find(std::string_view key) const {
    for (const auto& [name, value] : items)
      if (name == key) return &value;
    return nullptr;
  }

  // Every setting is one of `keys`, and given once.
  void only(std::initializer_list<std::string_view> keys) const {
    std::string known;
    for (std::string_view key : keys)
      known += std::string(known.empty() ? "" : ", ") + std::string(key);
    for (size_t i = 0; i < items.size(); ++i) {
      const std::string& key = items[i].first;
      if (std::find(keys.begin(), keys.end(), key) == keys.end())
        throw std::invalid_argument(name + ": unknown setting '" + key + "', it has " + known);
      if (find(key) != &items[i].second)
        throw std::invalid_argument(name + ": " + key + " is given twice");
    }
  }

  double number(std::string_view key, double fallback) const {
    const Spec* value = find(key);
    if (!value) return fallback;
    char* end = nullptr;
    const double parsed = std::strtod(value->name.c_str(), &end);
    if (*end || end == value->name.c_str())
      throw std::invalid_argument(name + ": " + std::string(key) + " must be a number, got '" +
                                  value->name + "'");
    return parsed;
  }

  bool flag(std::string_view key, bool fallback) const {
    const Spec* value = find(key);
    if (!value) return fallback;
    if (value->name == "True") return true;
    if (value->name == "False") return false;
    throw std::invalid_argument(name + ": " + std::string(key) + " must be True or False, got '" +
                                value->name + "'");
  }

  std::string word(std::string_view key, std::string fallback) const {
    const Spec* value = find(key);
    return value ? value->name : fallback;
  }

 private:
  [[noreturn]] static void fail(std::string_view text, size_t at) {
    throw std::invalid_argument("codec spec '" + std::string(text.substr(0, 200)) +
                                "' cannot be read at character " + std::to_string(at));
  }
  static bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '-' ||
           c == '+';
  }
  static Spec parse_value(std::string_view text, size_t& at, int depth) {
    if (depth > 4) fail(text, at);
    Spec spec;
    while (at < text.size() && is_word(text[at])) spec.name += text[at++];
    if (spec.name.empty()) fail(text, at);
    if (at == text.size() || text[at] != '(') return spec;
    ++at;
    while (at < text.size() && text[at] != ')') {
      if (!spec.items.empty()) {
        if (text[at] != ',') fail(text, at);
        ++at;
        while (at < text.size() && text[at] == ' ') ++at;
      }
      std::string key;
      while (at < text.size() && is_word(text[at])) key += text[at++];
      if (key.empty() || at == text.size() || text[at] != '=') fail(text, at);
      ++at;
      spec.items.emplace_back(std::move(key), parse_value(text, at, depth + 1));
    }
    if (at == text.size()) fail(text, at);
    ++at;
    return spec;
  }
};

}  // namespace rs
