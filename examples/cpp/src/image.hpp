// From an image file to the network's input, to the pixel as the manifest's `preprocess` says and Pillow does it.
#pragma once

#include <nlohmann/json.hpp>

#include "array.hpp"

// 8-bit pixels (H, W, C) of a PNG or JPEG file, upright, with 1 or 3 channels.
Array read_image(const std::string &path, int channels);

// Resized and cut, or filled: (height, width, C) of the manifest's image_size.
Array crop(const Array &pixels, const nlohmann::json &preprocess);

// As the graph takes it, (1, ...): uint8 (H, W, C) as it is, floating-point normalised (C, H, W).
Array graph_input(const Array &pixels, const nlohmann::json &preprocess, Type type);
