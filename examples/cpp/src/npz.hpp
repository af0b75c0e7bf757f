// NumPy's archives: the golden samples of a bundle.
#pragma once

#include "array.hpp"

Arrays read_npz(const std::string &path);
