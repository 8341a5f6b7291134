// Masks of a video's frames in C++ alone:
//   masks MODEL.pt2 OPERATORS.so FOLDER FRAME.ppm...
// reads frames (P6) and writes FOLDER/00000.pgm (P5) and so on.

#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

// -> (3, H, W) in [0, 1].
at::Tensor read_frame(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, most = 0;
  file >> kind >> width >> height >> most;
  if (kind != "P6" || width < 1 || height < 1 || width * height > 1 << 28 || most != 255)
    throw std::runtime_error(path + ": no PPM file of 8 bits (P6, without comments)");
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.get();
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel()))
    throw std::runtime_error(path + ": ends before its last pixel");
  return pixels.permute({2, 0, 1}).to(at::kFloat).div(255).contiguous();
}

// probability: (1, H, W).
void write_mask(const std::string& path, const at::Tensor& probability) {
  const at::Tensor grey = probability.mul(255).round().to(at::kByte).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << grey.size(2) << " " << grey.size(1) << "\n255\n";
  file.write(static_cast<const char*>(grey.data_ptr()), grey.numel());
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

at::Tensor resized(const at::Tensor& maps, at::IntArrayRef size) {
  return at::_upsample_bilinear2d_aa(maps, size, /*align_corners=*/false);
}

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("masks MODEL.pt2 OPERATORS.so FOLDER FRAME.ppm...");
  if (!dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  auto said = model.get_metadata();
  long height = 0, width = 0;
  std::sscanf(said.at("image_size").c_str(), "%ld,%ld", &height, &width);
  const int64_t length = std::stol(said.at("clip_length")), count = argc - 4;
  const bool last = said.at("outputs") == "last";  // a mask of the last frame of a window alone
  if (said.at("needs_prior") == "true") throw std::runtime_error("needs a motion prior");

  for (int64_t first = 0; first < count; first += last ? 1 : length) {
    std::vector<at::Tensor> window, beside;
    std::vector<std::vector<int64_t>> sizes;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t index =
          std::clamp<int64_t>(last ? first - length + 1 + t : first + t, 0, count - 1);
      const at::Tensor frame = read_frame(argv[4 + index]);
      sizes.push_back({frame.size(1), frame.size(2)});
      window.push_back(resized(frame.unsqueeze(0), {height, width}));
    }
    std::vector<at::Tensor> inputs{at::stack(window, 1)};
    if (said.at("needs_motion") == "true")  // as if nothing moved
      inputs.push_back(at::zeros({1, length, 4, (height + 3) / 4, (width + 3) / 4}));
    const at::Tensor probability = model.run(inputs).at(0).sigmoid().flatten(0, -4);
    for (int64_t t = 0; t < probability.size(0) && first + t < count; ++t) {
      char name[32];
      std::snprintf(name, sizeof name, "/%05ld.pgm", long(first + t));
      const auto& size = sizes[last ? length - 1 : t];
      write_mask(argv[3] + std::string(name), resized(probability.narrow(0, t, 1), size)[0]);
    }
  }
} catch (const std::exception& error) {
  std::cerr << "masks: " << error.what() << "\n";
  return 1;
}
