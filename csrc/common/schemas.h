// Schemas of an op's torch ops, which stand once, in vsod_ops/<op>/schemas.inc: with an empty line
// between them, and as a raw string, so that C++ can include what Python reads.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

namespace vsod {

inline void define_all(torch::stable::detail::StableLibrary& library, const std::string& text) {
  size_t start = 0;
  for (size_t end = 0; end != std::string::npos; start = end + 2) {
    end = text.find("\n\n", start);
    std::string schema = text.substr(start, end == std::string::npos ? end : end - start);
    std::replace(schema.begin(), schema.end(), '\n', ' ');
    library.def(schema.c_str());
  }
}

}  // namespace vsod
