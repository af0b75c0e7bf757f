// PROGRAM BUNDLE [IMAGE]: the golden samples against the tolerance, then the classes or first features of an image.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>

#include "engine.hpp"
#include "image.hpp"
#include "npz.hpp"

namespace {

Arrays run_golden(const Bundle &bundle, Engine &engine, const Arrays &golden) {
    std::vector<std::string> inputs = bundle.names("inputs");
    std::int64_t samples = golden.at(inputs[0]).shape[0];
    const auto &fixed = bundle.manifest.at("batch");
    std::int64_t batch = fixed.is_null() ? 1 : fixed.get<std::int64_t>();
    Arrays found;
    for (std::int64_t first = 0; first < samples; first += batch) {
        Arrays given;
        for (const std::string &name : inputs) given.emplace(name, golden.at(name).samples(first, first + batch));
        for (auto &[name, values] : engine.run(given)) {
            Array real = values.samples(0, std::min(batch, samples - first));
            auto [entry, is_first] = found.emplace(name, real);
            if (is_first) continue;
            entry->second.shape[0] += real.shape[0];
            entry->second.bytes.insert(entry->second.bytes.end(), real.bytes.begin(), real.bytes.end());
        }
    }
    return found;
}

// What preprocessing makes of the golden frame here, against what it was at export.
double frame_difference(const Bundle &bundle, const Arrays &golden) {
    const auto &preprocess = bundle.manifest.at("preprocess");
    Array made = graph_input(crop(golden.at("frame"), preprocess), preprocess, Type::float32);
    const Array &expected = golden.at("frame_image");
    if (made.size() != expected.size()) return HUGE_VAL;
    double most = 0;
    for (std::size_t place = 0; place < made.size(); ++place) most = std::max(most, std::abs(made.at(place) - expected.at(place)));
    return most;
}

void describe(const Bundle &bundle, Engine &engine, const std::string &path) {
    const auto &preprocess = bundle.manifest.at("preprocess");
    Array image = graph_input(crop(read_image(path, preprocess.at("channels")), preprocess), preprocess, bundle.image_type());
    Arrays inputs{{"images", image.samples(0, bundle.manifest.at("batch").is_null() ? 1 : bundle.manifest.at("batch").get<std::int64_t>())}};
    std::int64_t rows = inputs.at("images").shape[0];
    if (bundle.manifest.at("token_mode") != "full") {  // as many patches as the graph was checked for, from the first on
        std::int64_t keep = bundle.manifest.at("profile").at("K")[2];
        Array ids = Array::of(Type::int64, {rows, keep}), lengths = Array::of(Type::int64, {rows});
        for (std::int64_t row = 0; row < rows; ++row) std::iota(ids.data<std::int64_t>() + row * keep, ids.data<std::int64_t>() + (row + 1) * keep, 0);
        std::fill_n(lengths.data<std::int64_t>(), rows, keep);
        inputs.emplace("ids_keep", ids);
        if (bundle.manifest.at("token_mode") == "ragged") inputs.emplace("num_keep", lengths);
    }
    Arrays found = engine.run(inputs);
    if (found.count("logits") == 0) {
        const auto &[name, values] = *found.begin();
        std::cout << name << ":";
        for (std::size_t place = 0; place < std::min<std::size_t>(8, values.size()); ++place) std::cout << " " << values.at(place);
        std::cout << " …\n";
        return;
    }
    const Array &logits = found.at("logits");
    std::size_t classes = static_cast<std::size_t>(logits.shape[1]);
    std::vector<std::size_t> order(classes);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits.at(a) > logits.at(b); });
    double sum = 0;
    for (std::size_t place = 0; place < classes; ++place) sum += std::exp(logits.at(place) - logits.at(order[0]));
    const auto &names = bundle.manifest.at("class_names");
    for (std::size_t place = 0; place < std::min<std::size_t>(5, classes); ++place) {
        std::size_t index = order[place];
        std::cout << (names.is_null() ? std::to_string(index) : names[index].get<std::string>()) << " "
                  << std::exp(logits.at(index) - logits.at(order[0])) / sum << "\n";
    }
}

}  // namespace

int main(int count, char **arguments) try {
    if (count < 2 || count > 3) {
        std::cerr << "usage: " << arguments[0] << " BUNDLE [IMAGE]\n";
        return 2;
    }
    Bundle bundle(arguments[1]);
    Arrays golden = read_npz(bundle.path(bundle.manifest.at("golden").at("file")));
    std::unique_ptr<Engine> engine = open_engine(bundle);
    std::vector<std::string> missed = failures(bundle, golden, run_golden(bundle, *engine, golden));
    bool has_frame = golden.count("frame") && golden.count("frame_image");
    double difference = has_frame ? frame_difference(bundle, golden) : 0;
    if (difference > 1e-5) missed.push_back("preprocessing: the golden frame differs by " + std::to_string(difference));
    for (const std::string &line : missed) std::cerr << "error: " << line << "\n";
    if (!missed.empty()) return 1;
    std::cout << "golden samples: " << golden.at("images").shape[0] << " within the tolerance"
              << (has_frame ? "; preprocessing: as at export" : "") << "\n";
    if (count == 3) describe(bundle, *engine, arguments[2]);
    return 0;
} catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
}
