// PTX text, taken apart: kernels, their parameters, and instructions whose operands are registers.
// Numbers, special registers and addresses of variables are registers too, that hold a constant.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Warp;
struct Instruction;

enum class Outcome { done, jumped, wait };

// copy: the first operand's shared, the second's global
enum class Space { generic, global, shared, parameter, copy };

// Runs an instruction for the lanes of a mask.
using Handler = Outcome (*)(Warp&, const Instruction&, uint32_t mask);

struct Operand {
  int reg = -1;           // of an address: its base
  int second = -1;        // the q of p|q
  bool negated = false;   // !p
  int64_t offset = 0;     // [reg + offset]
  std::vector<int> list;  // {a, b}: registers
};

struct Instruction {
  Handler run = nullptr;
  std::vector<std::string> words;  // add, s32
  std::vector<Operand> operands;
  int guard = -1;  // @p
  bool guard_negated = false;
  bool aligned = false;  // by all lanes at once
  bool members = false;  // by all lanes of its last operand at once
  int target = -1;       // of a branch
  int variant = 0;       // what decode has made of the words, for the handler
  Space space = Space::generic;
  bool strong = false;    // relaxed, volatile and stronger
  bool constant = false;  // a read past coherence
  int line = 0;
  std::string text;

  bool has(const char* word) const;
};

struct Parameter {
  std::string name;
  int offset, bytes;
};

// A register that is not computed: a number, or one whose value the launch knows.
struct Constant {
  enum Kind { number, special, parameter, shared } kind;
  std::string name;  // of a special register
  uint64_t value;    // a number, or an address within its space
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int most_threads = 1024;
  int static_shared = 0;
  int registers = 0;        // constants come after them
  bool multiplies = false;  // by wgmma
  std::vector<Constant> constants;
  std::vector<Instruction> code;
};

struct Module {
  std::map<std::string, Kernel> kernels;
};

Module parse(const std::string& text);

// Finds the instruction's handler; throws std::runtime_error for what there is none for.
void decode(Instruction& instruction);

}  // namespace ptx
