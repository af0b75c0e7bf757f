#include "bundle.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

Bundle::Bundle(const std::string &folder) : folder(folder) {
    std::ifstream file(path("manifest.json"));
    if (!file) throw std::runtime_error("no bundle at " + folder + ": there is no manifest.json");
    manifest = nlohmann::json::parse(file);
    if (manifest.at("schema_version") != 2) throw std::runtime_error("a manifest of another version");
    if (manifest.at("token_mode") == "cached") throw std::runtime_error("a cached graph keeps a stream's memory, which is not written here");
    if (manifest.at("preprocess").contains("pixel_max") && !manifest.at("preprocess").at("pixel_max").is_null())
        throw std::runtime_error("pixels of more than 8 bits are not written here");
}

std::vector<std::string> Bundle::names(const std::string &which) const {
    std::vector<std::string> found;
    for (const auto &entry : manifest.at("graph").at(which)) found.push_back(entry.at("name"));
    return found;
}

Type Bundle::image_type() const {
    std::string name = manifest.at("graph").at("inputs")[0].at("dtype");
    return name == "uint8" ? Type::uint8 : name == "float16" ? Type::float16 : Type::float32;
}

// The measures of mae_deploy/runtime/parity/compare.py but centred_cosine, which `mae-deploy verify` has too.
std::vector<std::string> failures(const Bundle &bundle, const Arrays &expected, const Arrays &found) {
    const auto &tolerance = bundle.manifest.at("tolerance");
    auto limit = [&](const char *name, double none) {
        return tolerance.contains(name) && !tolerance.at(name).is_null() ? tolerance.at(name).get<double>() : none;
    };
    std::vector<std::string> missed;
    for (const std::string &name : bundle.names("outputs")) {
        const Array &want = expected.at(name), &have = found.at(name);
        std::ostringstream says;
        says << name << ":";
        if (want.shape != have.shape) {
            missed.push_back(name + ": another shape");
            continue;
        }
        std::size_t samples = static_cast<std::size_t>(want.shape[0]), row = want.size() / samples, agreeing = 0;
        double worst = 1, most = 0, largest = 0, signal = 0, noise = 0;
        for (std::size_t sample = 0; sample < samples; ++sample) {
            double aa = 0, ab = 0, bb = 0;
            std::size_t best_want = 0, best_have = 0;
            for (std::size_t place = 0; place < row; ++place) {
                double a = want.at(sample * row + place), b = have.at(sample * row + place);
                aa += a * a, ab += a * b, bb += b * b;
                noise += (a - b) * (a - b);
                most = std::max(most, std::isfinite(b) ? std::abs(a - b) : HUGE_VAL);
                largest = std::max(largest, std::abs(a));
                if (a > want.at(sample * row + best_want)) best_want = place;
                if (b > have.at(sample * row + best_have)) best_have = place;
            }
            signal += aa;
            worst = std::min(worst, aa * bb > 0 ? ab / std::sqrt(aa * bb) : (aa == bb ? 1.0 : 0.0));
            agreeing += best_want == best_have;
        }
        double sqnr = noise > 0 ? 10 * std::log10(signal / noise) : HUGE_VAL, relative = largest > 0 ? most / largest : most;
        bool classes = name == "logits" || name == "probs";
        double least_agreeing = limit("top1_agreement", 0);
        if (least_agreeing < 1) least_agreeing = std::min(least_agreeing, (static_cast<double>(samples) - 1) / static_cast<double>(samples));
        if (!(worst >= limit("cosine", -1))) says << " cosine " << worst;
        if (name != "probs" && !(sqnr >= limit("sqnr_db", -HUGE_VAL))) says << " SQNR " << sqnr << " dB";
        if (classes && static_cast<double>(agreeing) < least_agreeing * static_cast<double>(samples)) says << " top-1 of " << agreeing;
        bool bounded = tolerance.contains("max_abs") || tolerance.contains("max_relative");
        if (bounded && !(most <= limit("max_abs", -1) || relative <= limit("max_relative", -1))) says << " difference " << most;
        if (says.str() != name + ":") missed.push_back(says.str() + " misses the tolerance");
    }
    return missed;
}
