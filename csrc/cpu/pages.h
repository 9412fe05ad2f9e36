// What the operating system is told about memory that a kernel is about to write.
#pragma once

#include <cstddef>

namespace scm {

// `bytes` from `data` on are about to be written, all of them, and perhaps for the first time.
// Fresh memory has no pages yet, and to get one of 4 KiB costs as much as to read the inputs for it
// several times over: asks for pages of 2 MiB.
void expect_writes(void* data, size_t bytes);

}  // namespace scm
