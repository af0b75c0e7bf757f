// What mae-deploy export writes: the manifest, the graph or a plan, and golden samples of PyTorch's outputs.
#pragma once

#include <nlohmann/json.hpp>

#include "array.hpp"

struct Bundle {
    std::string folder;
    nlohmann::json manifest;

    explicit Bundle(const std::string &folder);
    std::string path(const std::string &name) const { return folder + "/" + name; }
    std::vector<std::string> names(const std::string &which) const;  // of the graph's "inputs" or "outputs"
    Type image_type() const;
};

// What an engine misses of the manifest's tolerance, an output a line; empty where every one meets it.
std::vector<std::string> failures(const Bundle &bundle, const Arrays &expected, const Arrays &found);
