#include "ptx.h"

#include <algorithm>
#include <set>

#include "guarded.h"
#include "machine.h"
#include "tensor_map.h"

namespace ptx {

namespace {

const char* load_error = nullptr;
uint32_t seed = 0;

struct {
  std::string kernel, words;
  int which;
  bool wanted = false;
  int64_t count = -1;
} omission;

Traffic traffic;
bool are_tritons = false;

// Its place in the code, or -1.
int left_out(const Kernel& k) {
  if (!omission.wanted || k.name.find(omission.kernel) == std::string::npos) return -1;
  int which = omission.which;
  for (size_t at = 0; at < k.code.size(); ++at)
    if (k.code[at].text.rfind(omission.words, 0) == 0 && which-- == 0) return static_cast<int>(at);
  return -1;
}

const std::map<Handler (*)(Instruction&), std::set<std::string>> kWords = {
    {memory, {"ld", "st", "atom", "red", "cp", "cvta", "prefetch"}},
    {synchronisation,
     {"bra", "ret", "exit", "trap", "bar", "barrier", "fence", "membar", "shfl", "elect", "redux",
      "vote", "mbarrier", "setmaxnreg"}},
    {tensor, {"ldmatrix", "stmatrix", "mma", "wgmma"}},
};

Handler found(Instruction& i) {
  if (i.words[0] == "cp" && i.has("tensor")) return tensor(i);
  for (const auto& [of, words] : kWords)
    if (words.count(i.words[0])) return of(i);
  return arithmetic(i);
}

const Kernel& kernel_of(void* module, const char* name) {
  const auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) throw std::runtime_error(std::string("no kernel ") + name);
  return found->second;
}

}  // namespace

void decode(Instruction& i) {
  try {
    i.run = found(i);
  } catch (const std::runtime_error&) {
  }
  if (!i.run)
    throw std::runtime_error("PTX, line " + std::to_string(i.line) + ": not known here: " + i.text);
}

}  // namespace ptx

using namespace ptx;

extern "C" {

const char* ptx_error() { return load_error; }

void ptx_settle(uint32_t value) { seed = value; }

void ptx_take_as_tritons(bool on) { are_tritons = on; }

void ptx_leave_out(const char* kernel, const char* words, int which) {
  omission = {kernel ? kernel : "", words ? words : "", which, kernel != nullptr, -1};
}

void ptx_count_traffic(bool on) {
  traffic.on = on;
  traffic.clear();
}

const char* ptx_traffic() {
  static std::string told;
  told = traffic.told();
  return told.c_str();
}

int ptx_left_out() { return static_cast<int>(omission.count); }

void* ptx_load(const char* text) {
  void* module = nullptr;
  load_error = guarded([&] { module = new Module(parse(text)); });
  return module;
}

void ptx_unload(void* module) { delete static_cast<Module*>(module); }

int ptx_parameter_bytes(void* module, const char* kernel, int i) {
  int bytes = -1;
  guarded([&] {
    const auto& parameters = kernel_of(module, kernel).parameters;
    bytes = i < static_cast<int>(parameters.size()) ? parameters[i].bytes : 0;
  });
  return bytes;
}

int ptx_most_threads(void* module, const char* kernel) {
  return kernel_of(module, kernel).most_threads;
}

int ptx_static_shared(void* module, const char* kernel) {
  return kernel_of(module, kernel).static_shared;
}

const char* ptx_launch(void* module, const char* kernel, const uint32_t grid[3],
                       const uint32_t block[3], uint32_t dynamic_shared, bool together,
                       const void* const* arguments) {
  return guarded([&] {
    const Kernel& k = kernel_of(module, kernel);
    Grid launch(k, grid, block, dynamic_shared, together, seed);
    for (size_t i = 0; i < k.parameters.size(); ++i)
      memcpy(launch.arguments.data() + k.parameters[i].offset, arguments[i], k.parameters[i].bytes);
    if (launch.threads_of_block() > k.most_threads)
      throw std::runtime_error(k.name + ": more threads than it was compiled for");
    launch.traffic = &traffic;
    launch.is_tritons = launch.races.copies_differ = are_tritons;
    launch.left_out = left_out(k);
    if (launch.left_out >= 0) omission.count = std::max<int64_t>(omission.count, 0);
    launch.run();
    omission.count += launch.times_left_out;
  });
}

const char* ptx_tensor_map(void* map, int element_bytes, int rank, const void* base,
                           const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                           int swizzle) {
  return guarded([&] {
    const auto require = [](bool holds, const char* rule) {
      if (!holds) throw std::runtime_error(std::string("tensor map: ") + rule);
    };
    require(rank >= 1 && rank <= 5, "1 to 5 dimensions");
    require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "16-byte alignment");
    TensorMap m{};
    m.magic = TensorMap::kMagic;
    m.rank = static_cast<uint8_t>(rank);
    m.element_bytes = static_cast<uint8_t>(element_bytes);
    m.swizzle = static_cast<uint8_t>(swizzle);
    m.base = reinterpret_cast<uintptr_t>(base);
    for (int d = 0; d < rank; ++d) {
      require(sizes[d] >= 1 && sizes[d] <= UINT32_MAX, "sizes of 1 to 2^32 - 1");
      require(box[d] >= 1 && box[d] <= 256, "boxes of 1 to 256");
      m.sizes[d] = static_cast<uint32_t>(sizes[d]);
      m.box[d] = static_cast<uint16_t>(box[d]);
      if (d == 0) continue;
      require(strides[d - 1] % 16 == 0 && strides[d - 1] < uint64_t{1} << 40,
              "strides of multiples of 16 bytes");
      m.strides[d - 1] = strides[d - 1];
    }
    require(box[0] * element_bytes % 16 == 0, "rows of a box of multiples of 16 bytes");
    require(!swizzle || static_cast<int>(box[0]) * element_bytes <= swizzle,
            "rows of a box no longer than the swizzle");
    memcpy(map, &m, sizeof m);
  });
}
}
