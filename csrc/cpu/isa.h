// Which instruction set the CPU kernels use: the best that this machine has, or a lesser one named
// by SAESTEER_CPU_ISA (plain, avx2, avx512, avx512bf16, amx), read once.
#pragma once

namespace saesteer::cpu {

enum class Isa { plain, avx2, avx512, avx512bf16, amx };

Isa detected_isa();
Isa isa_in_use();
const char* isa_name(Isa isa);

}  // namespace saesteer::cpu
