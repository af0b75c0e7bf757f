// An array as a bundle's golden file and an engine have it.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

enum class Type { float32, float16, uint8, int32, int64 };

inline std::size_t size_of(Type type) {
    return type == Type::int64 ? 8 : type == Type::float16 ? 2 : type == Type::uint8 ? 1 : 4;
}

inline float from_half(std::uint16_t half) {
    std::uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ffu, bits;
    if (exponent == 0) {
        float value = static_cast<float>(fraction) / 16777216.0f;  // 2^-24
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint16_t to_half(float value) {  // to the nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    std::int32_t exponent = static_cast<std::int32_t>(bits >> 23 & 255) - 112;
    std::uint32_t fraction = (bits & 0x7fffffu) | 0x800000u;
    if (exponent >= 31) return sign | 0x7c00u;
    if (exponent < -10) return sign;
    int shift = exponent > 0 ? 13 : 14 - exponent;
    std::uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
    kept += rest > half || (rest == half && (kept & 1));
    return static_cast<std::uint16_t>(sign | (exponent > 0 ? (static_cast<std::uint32_t>(exponent - 1) << 10) + kept : kept));
}

struct Array {
    Type type = Type::float32;
    std::vector<std::int64_t> shape;
    std::vector<std::uint8_t> bytes;

    static Array of(Type type, std::vector<std::int64_t> shape) {
        Array made{type, std::move(shape), {}};
        made.bytes.resize(made.size() * size_of(type));
        return made;
    }
    std::size_t size() const {
        std::size_t count = 1;
        for (std::int64_t side : shape) count *= static_cast<std::size_t>(side);
        return count;
    }
    template <typename Value> Value *data() { return reinterpret_cast<Value *>(bytes.data()); }
    template <typename Value> const Value *data() const { return reinterpret_cast<const Value *>(bytes.data()); }
    double at(std::size_t place) const {
        switch (type) {
            case Type::float32: return data<float>()[place];
            case Type::float16: return from_half(data<std::uint16_t>()[place]);
            case Type::uint8: return data<std::uint8_t>()[place];
            case Type::int32: return data<std::int32_t>()[place];
            default: return static_cast<double>(data<std::int64_t>()[place]);
        }
    }
    // Samples first to last - 1; beyond the end the last one is repeated, as a graph of a fixed batch wants it.
    Array samples(std::int64_t first, std::int64_t last) const {
        Array made{type, shape, {}};
        made.shape[0] = last - first;
        std::size_t row = bytes.size() / static_cast<std::size_t>(shape[0]);
        for (std::int64_t sample = first; sample < last; ++sample) {
            auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(row) * std::min(sample, shape[0] - 1);
            made.bytes.insert(made.bytes.end(), begin, begin + static_cast<std::ptrdiff_t>(row));
        }
        return made;
    }
};

using Arrays = std::map<std::string, Array>;
