#pragma once

namespace vsod {

// "" if a kernel of this build runs on GPU `device` and gives the right result, else the reason.
const char* cuda_probe(int device);

}  // namespace vsod
