#include "module.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>
#include <tuple>

#include "numbers.h"

namespace ptx {

bool Instruction::has(const char* word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

namespace {

struct Token {
  std::string text;
  int line;
};

bool is_word(const std::string& s, size_t i) {
  const unsigned char c = s[i];
  return isalnum(c) || c == '_' || c == '$' || c == '%' || c == '.';
}

std::vector<Token> tokens_of(const std::string& s) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < s.size();) {
    if (s[i] == '\n') ++line;
    if (isspace(static_cast<unsigned char>(s[i]))) {
      ++i;
    } else if (s.compare(i, 2, "//") == 0) {
      i = std::min(s.find('\n', i), s.size());
    } else if (s.compare(i, 2, "/*") == 0) {
      const size_t end = s.find("*/", i) + 2;
      line += static_cast<int>(std::count(s.begin() + i, s.begin() + end, '\n'));
      i = end;
    } else if (s[i] == '"') {
      const size_t end = s.find('"', i + 1) + 1;
      tokens.push_back({s.substr(i, end - i), line});
      i = end;
    } else {
      const size_t from = i;
      while (i < s.size() && (is_word(s, i) || s.compare(i, 2, "::") == 0))
        i += s.compare(i, 2, "::") == 0 ? 2 : 1;
      i += i == from;
      tokens.push_back({s.substr(from, i - from), line});
    }
  }
  return tokens;
}

std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> parts(1);
  for (const char c : s)
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  return parts;
}

bool is_number(const std::string& s) { return isdigit(static_cast<unsigned char>(s[0])); }

uint64_t number(std::string s) {
  if (s.size() > 2 && (s[1] == 'f' || s[1] == 'F') && s[0] == '0')
    return std::stoull(s.substr(2), nullptr, 16);
  if (s.size() > 2 && (s[1] == 'd' || s[1] == 'D') && s[0] == '0')
    return std::stoull(s.substr(2), nullptr, 16);
  return std::stoull(s, nullptr, 0);  // a U at the end is left alone
}

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokens_of(text)) {}

  Module module() {
    while (at_ < tokens_.size()) {
      const std::string word = next();
      if (word == ".shared")
        shared_variable();
      else if (word == ".entry")
        kernel();
      else if (word == ".func" || word == ".global" || word == ".const")
        fail("is not executed here");
      else if (word == ".section")
        while (next() != "}") {
        }
    }
    return std::move(module_);
  }

 private:
  const std::string& peek() const {
    if (at_ >= tokens_.size()) throw std::runtime_error("PTX ends early");
    return tokens_[at_].text;
  }
  std::string next() {
    peek();
    return tokens_[at_++].text;
  }
  bool take(const char* text) {
    if (peek() != text) return false;
    ++at_;
    return true;
  }
  void need(const char* text) {
    if (!take(text)) fail((std::string("comes where ") + text + " should").c_str());
  }
  [[noreturn]] void fail(const char* what) const {
    const Token& t = tokens_[at_ ? at_ - 1 : 0];
    throw std::runtime_error("PTX, line " + std::to_string(t.line) + ": '" + t.text + "' " + what);
  }

  // .shared .align 16 .b8 name[bytes]; an extern one, without bytes, is the dynamic memory.
  void shared_variable() {
    int align = 1, bytes = 1;
    std::string name;
    while (!take(";")) {
      const std::string word = next();
      if (word == ".align")
        align = std::stoi(next());
      else if (word[0] == '.')
        bytes = bytes_of(word.substr(1));
      else if (word == "[")
        bytes *= peek() == "]" ? 0 : std::stoi(next());
      else if (word != "]")
        name = word;
    }
    if (bytes == 0) {
      shared_[name] = -1;
      return;
    }
    static_shared_ = (static_shared_ + align - 1) / align * align;
    shared_[name] = static_shared_;
    static_shared_ += bytes;
  }

  void parameters() {
    if (!take("(")) return;
    while (!take(")")) {
      need(".param");
      Parameter p{"", 0, 0};
      int align = 0;
      for (; peek() != "," && peek() != ")"; ++at_) {
        const std::string word = peek();
        if (word == ".align") {
          ++at_;
          // of the parameter, or of what a .ptr points at
          if (!align) align = std::stoi(peek());
        } else if (word == ".ptr") {
          align = p.bytes;
        } else if (word[0] == '.' && word.size() > 2 && isdigit(word[2])) {
          p.bytes = bytes_of(word.substr(1));
        } else if (word == "[") {
          ++at_;
          p.bytes *= std::stoi(peek());
        } else if (word[0] != '.' && word != "]") {
          p.name = word;
        }
      }
      take(",");
      if (!align) align = p.bytes;
      p.offset = (kernel_.parameter_bytes + align - 1) / align * align;
      kernel_.parameter_bytes = p.offset + p.bytes;
      kernel_.parameters.push_back(p);
    }
  }

  void kernel() {
    kernel_ = {};
    kernel_.name = next();
    scopes_ = {Scope{}};
    labels_.clear();
    constants_.clear();
    numbers_.clear();
    parameters();
    while (!take("{")) {
      const std::string word = next();
      if (word == ".maxntid" || word == ".reqntid") {
        kernel_.most_threads = std::stoi(next());
        while (take(",")) kernel_.most_threads *= std::stoi(next());
      }
    }
    body();
    finish();
  }

  // Braces; inline assembly has its own names in them.
  struct Scope {
    std::string prefix;
    std::set<std::string> names;
    std::map<std::string, int> ranges;  // %r<9>: %r0 to %r8
  };

  void body() {
    while (scopes_.size()) {
      if (take("}"))
        scopes_.pop_back();
      else if (take("{"))
        scopes_.push_back({std::to_string(++count_) + ":", {}, {}});
      else if (peek()[0] == '.')
        directive();
      else if (tokens_[at_ + 1].text == ":")
        label();
      else if (!take(";"))
        instruction();
    }
  }

  void directive() {
    const std::string word = next();
    if (word == ".shared") return shared_variable();
    if (word == ".local") fail("is not executed here");
    if (word == ".reg") return registers();
    if (word == ".loc") {  // it ends with its line
      for (const int line = tokens_[at_ - 1].line; tokens_[at_].line == line;) ++at_;
      return;
    }
    while (!take(";")) ++at_;
  }

  void registers() {
    next();  // their type
    do {
      const std::string name = next();
      if (take("<")) {
        scopes_.back().ranges[name] = std::stoi(next());
        need(">");
      } else {
        scopes_.back().names.insert(name);
      }
    } while (take(","));
    need(";");
  }

  // The name under which a register that was declared is known; empty for another name.
  std::string declared(const std::string& name) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (size_t s = scopes_.size(); s-- > 0;) {
      const Scope& scope = scopes_[s];
      if (scope.names.count(name)) return scope.prefix + name;
      const auto range = scope.ranges.find(name.substr(0, digits));
      if (range != scope.ranges.end() && digits < name.size() &&
          std::stoi(name.substr(digits)) < range->second)
        return scope.prefix + name;
    }
    return "";
  }

  void label() {
    labels_[scopes_.back().prefix + peek()] = static_cast<int>(kernel_.code.size());
    next();
    need(":");
  }

  void instruction() {
    Instruction i;
    i.line = tokens_[at_].line;
    const size_t from = at_;
    if (take("@")) {
      i.guard_negated = take("!");
      i.guard = register_of(next());
    }
    i.words = split(next(), '.');
    const std::string& name = i.words[0];
    if (name == "bra") {
      jumps_.push_back({kernel_.code.size(), next(), {}});
      for (const Scope& s : scopes_) jumps_.back().prefixes.push_back(s.prefix);
    } else if (peek() != ";") {
      do i.operands.push_back(operand());
      while (take(","));
    }
    need(";");
    for (size_t t = from; t < at_ - 1; ++t) i.text += (t > from ? " " : "") + tokens_[t].text;
    decode(i);
    kernel_.multiplies |= i.words[0] == "wgmma";
    kernel_.code.push_back(std::move(i));
  }

  Operand operand() {
    Operand o;
    if (take("[")) {
      o.reg = value();
      if (take("+")) o.offset = signed_number();
      // [map, {column, row}]
      if (take(",")) o.list = list();
      need("]");
    } else if (peek() == "{") {
      o.list = list();
    } else {
      o.negated = take("!");
      o.reg = value();
      if (take("|")) o.second = value();
    }
    return o;
  }

  std::vector<int> list() {
    std::vector<int> registers;
    need("{");
    do registers.push_back(value());
    while (take(","));
    need("}");
    return registers;
  }

  int64_t signed_number() {
    const bool minus = take("-");
    const auto v = static_cast<int64_t>(number(next()));
    return minus ? -v : v;
  }

  // The register of a name, a number or a variable's address; -1 for _.
  int value() {
    if (peek() == "-" || is_number(peek()))
      return constant({Constant::number, "", static_cast<uint64_t>(signed_number())});
    const std::string name = next();
    return name == "_" ? -1 : register_of(name);
  }

  int register_of(const std::string& name) {
    const std::string known = declared(name);
    if (!known.empty())
      return numbers_.emplace(known, kernel_.registers).second ? kernel_.registers++
                                                               : numbers_[known];
    for (const Parameter& p : kernel_.parameters)
      if (p.name == name)
        return constant({Constant::parameter, "", static_cast<uint64_t>(p.offset)});
    const auto variable = shared_.find(name);
    if (variable != shared_.end())
      return constant({Constant::shared, "", static_cast<uint64_t>(variable->second)});
    if (name[0] != '%') fail("is not known");
    return constant({Constant::special, name, 0});
  }

  // Constants are numbered from -2 down until the count of registers is known.
  int constant(const Constant& c) {
    const auto key = std::make_tuple(static_cast<int>(c.kind), c.name, c.value);
    const auto known = constants_.find(key);
    if (known != constants_.end()) return known->second;
    kernel_.constants.push_back(c);
    return constants_[key] = -1 - static_cast<int>(kernel_.constants.size());
  }

  void finish() {
    for (const Jump& jump : jumps_) kernel_.code[jump.at].target = target_of(jump);
    jumps_.clear();
    const auto place = [&](int& reg) {
      if (reg < -1) reg = kernel_.registers + (-2 - reg);
    };
    for (Instruction& i : kernel_.code)
      for (Operand& o : i.operands) {
        place(o.reg), place(o.second);
        for (int& reg : o.list) place(reg);
      }
    kernel_.static_shared = static_shared_;
    module_.kernels[kernel_.name] = std::move(kernel_);
  }

  struct Jump {
    size_t at;
    std::string label;
    std::vector<std::string> prefixes;
  };

  int target_of(const Jump& jump) const {
    for (size_t s = jump.prefixes.size(); s-- > 0;) {
      const auto found = labels_.find(jump.prefixes[s] + jump.label);
      if (found != labels_.end()) return found->second;
    }
    throw std::runtime_error("PTX: no label " + jump.label);
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int count_ = 0, static_shared_ = 0;
  Module module_;
  Kernel kernel_;
  std::vector<Scope> scopes_;
  std::vector<Jump> jumps_;
  std::map<std::string, int> shared_, labels_, numbers_;
  std::map<std::tuple<int, std::string, uint64_t>, int> constants_;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).module(); }

}  // namespace ptx
