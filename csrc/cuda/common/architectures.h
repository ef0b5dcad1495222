// Which of the architectures a build names runs on a device: plain data, so that it can be asked without a GPU.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace moekernels {

// `built` as CMake has it, separated by spaces: "80-real 89 90a-real". A name alone stands for machine code and PTX.
// The answer is "sm_90a", "PTX of sm_89", or "" where nothing runs on a device of this compute capability (90).
//
// Machine code runs on devices of its own major version from its minor version on, PTX on every newer device; with an
// "a" both run on this one architecture alone, with an "f" machine code and PTX stay within the major version.
inline std::string code_for_device(const std::string& built, int compute_capability) {
  int best_code = -1;
  int best_ptx = -1;
  std::string code;
  std::string ptx;
  std::istringstream names(built);
  for (std::string name; names >> name;) {
    char* end = nullptr;
    const auto number = static_cast<int>(std::strtol(name.c_str(), &end, 10));
    const bool is_exact = *end == 'a';
    const bool is_family = *end == 'f';
    if (is_exact || is_family) ++end;
    const std::string kind = end;
    const bool same_major = number / 10 == compute_capability / 10;
    const bool reaches = is_exact ? number == compute_capability : number <= compute_capability;
    const std::string label = "sm_" + name.substr(0, static_cast<size_t>(end - name.c_str()));
    // Of two names for one architecture the one for it alone is the better.
    const int rank = 2 * number + (is_exact ? 1 : 0);
    if (kind != "-virtual" && same_major && reaches && rank > best_code) {
      best_code = rank;
      code = label;
    }
    if (kind != "-real" && reaches && (same_major || !is_family) && rank > best_ptx) {
      best_ptx = rank;
      ptx = "PTX of " + label;
    }
  }
  return code.empty() ? ptx : code;
}

}  // namespace moekernels
