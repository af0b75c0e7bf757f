// What runs a bundle's graph. A program links one file that makes it: onnxruntime.cpp or tensorrt.cpp.
#pragma once

#include <memory>

#include "bundle.hpp"

struct Engine {
    virtual ~Engine() = default;
    // One run: each input (B, ...) under its name, all outputs under theirs.
    virtual Arrays run(const Arrays &inputs) = 0;
};

std::unique_ptr<Engine> open_engine(const Bundle &bundle);
