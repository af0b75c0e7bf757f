#include "image.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include <jpeglib.h>
#include <png.h>

namespace {

using File = std::unique_ptr<std::FILE, int (*)(std::FILE *)>;

// --- files ---

Array turned(const Array &image, int orientation) {  // as EXIF says that it is to be shown
    std::int64_t H = image.shape[0], W = image.shape[1], C = image.shape[2];
    bool swapped = orientation >= 5;
    Array made = Array::of(Type::uint8, {swapped ? W : H, swapped ? H : W, C});
    for (std::int64_t y = 0; y < made.shape[0]; ++y)
        for (std::int64_t x = 0; x < made.shape[1]; ++x) {
            std::int64_t from_y = swapped ? x : y, from_x = swapped ? y : x;
            if (orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8)
                (swapped ? from_x : from_y) = (swapped ? W : H) - 1 - (swapped ? from_x : from_y);
            if (orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7)
                (swapped ? from_y : from_x) = (swapped ? H : W) - 1 - (swapped ? from_y : from_x);
            std::copy_n(image.data<std::uint8_t>() + (from_y * W + from_x) * C, C,
                        made.data<std::uint8_t>() + (y * made.shape[1] + x) * C);
        }
    return made;
}

int orientation_of(const jpeg_decompress_struct &jpeg) {
    for (auto marker = jpeg.marker_list; marker != nullptr; marker = marker->next) {
        const std::uint8_t *exif = marker->data;
        std::size_t size = marker->data_length;
        if (marker->marker != JPEG_APP0 + 1 || size < 20 || std::memcmp(exif, "Exif\0\0", 6) != 0) continue;
        const std::uint8_t *tiff = exif + 6;
        bool little = tiff[0] == 'I';
        auto read = [&](std::size_t at, int length) -> std::size_t {
            std::size_t value = 0;
            if (at + 6 + static_cast<std::size_t>(length) > size) return 0;
            for (int byte = 0; byte < length; ++byte)
                value |= static_cast<std::size_t>(tiff[at + static_cast<std::size_t>(byte)]) << 8 * (little ? byte : length - 1 - byte);
            return value;
        };
        std::size_t directory = read(4, 4);
        for (std::size_t entry = 0, count = read(directory, 2); entry < count; ++entry)
            if (read(directory + 2 + 12 * entry, 2) == 0x0112) {
                int found = static_cast<int>(read(directory + 2 + 12 * entry + 8, 2));
                return found >= 1 && found <= 8 ? found : 1;
            }
    }
    return 1;
}

Array read_jpeg(std::FILE *file) {
    jpeg_decompress_struct jpeg;
    jpeg_error_mgr errors;
    jpeg.err = jpeg_std_error(&errors);
    errors.error_exit = [](j_common_ptr info) {
        char message[JMSG_LENGTH_MAX];
        info->err->format_message(info, message);
        jpeg_destroy(info);
        throw std::runtime_error(message);
    };
    jpeg_create_decompress(&jpeg);
    jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_stdio_src(&jpeg, file);
    jpeg_read_header(&jpeg, TRUE);
    if (jpeg.num_components == 4) throw std::runtime_error("a JPEG in CMYK: convert it to RGB");
    jpeg.out_color_space = jpeg.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_start_decompress(&jpeg);
    Array image = Array::of(Type::uint8, {jpeg.output_height, jpeg.output_width, jpeg.output_components});
    while (jpeg.output_scanline < jpeg.output_height) {
        JSAMPROW row = image.bytes.data() + static_cast<std::size_t>(jpeg.output_scanline) * jpeg.output_width * jpeg.output_components;
        jpeg_read_scanlines(&jpeg, &row, 1);
    }
    int orientation = orientation_of(jpeg);
    jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return orientation == 1 ? image : turned(image, orientation);
}

Array read_png(std::FILE *file) {
    auto fail = [](png_structp, png_const_charp message) { throw std::runtime_error(message); };
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, fail, [](png_structp, png_const_charp) {});
    png_infop info = png_create_info_struct(png);
    struct Ends {
        png_structp *png;
        png_infop *info;
        ~Ends() { png_destroy_read_struct(png, info, nullptr); }
    } ends{&png, &info};
    png_init_io(png, file);
    png_read_info(png, info);
    if (png_get_bit_depth(png, info) == 16) throw std::runtime_error("a PNG of 16 bits: save it with 8");
    png_set_expand(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    std::int64_t H = png_get_image_height(png, info), W = png_get_image_width(png, info), C = png_get_channels(png, info);
    Array image = Array::of(Type::uint8, {H, W, C});
    std::vector<png_bytep> rows;
    for (std::int64_t y = 0; y < H; ++y) rows.push_back(image.bytes.data() + y * W * C);
    png_read_image(png, rows.data());
    if (C == 1 || C == 3) return image;
    Array opaque = Array::of(Type::uint8, {H, W, C - 1});  // what is transparent lies on white
    for (std::int64_t pixel = 0; pixel < H * W; ++pixel)
        for (std::int64_t c = 0; c + 1 < C; ++c) {
            int alpha = image.bytes[pixel * C + C - 1], value = image.bytes[pixel * C + c];
            opaque.bytes[pixel * (C - 1) + c] = static_cast<std::uint8_t>((value * alpha + 255 * (255 - alpha) + 127) / 255);
        }
    return opaque;
}

Array with_channels(const Array &image, int channels) {
    std::int64_t H = image.shape[0], W = image.shape[1], C = image.shape[2];
    if (C == channels) return image;
    Array made = Array::of(Type::uint8, {H, W, channels});
    for (std::int64_t pixel = 0; pixel < H * W; ++pixel) {
        const std::uint8_t *from = image.data<std::uint8_t>() + pixel * C;
        if (channels == 1)  // ITU-R 601-2, in the integers that Pillow takes
            made.bytes[pixel] = static_cast<std::uint8_t>((from[0] * 19595 + from[1] * 38470 + from[2] * 7471 + 0x8000) >> 16);
        else
            std::fill_n(made.data<std::uint8_t>() + pixel * 3, 3, from[0]);
    }
    return made;
}

// --- resizing, as Pillow's Resample.c: with antialiasing, in integers of 22 bits after the point ---

struct Filter {
    double support;
    double (*weight)(double);
};

double sinc(double x) { return x == 0 ? 1 : std::sin(M_PI * x) / (M_PI * x); }

Filter filter_of(const std::string &name) {
    if (name == "bicubic")
        return {2, [](double x) {
                    x = std::abs(x);
                    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
                    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
                }};
    if (name == "bilinear") return {1, [](double x) { return std::max(0.0, 1 - std::abs(x)); }};
    if (name == "lanczos") return {3, [](double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }};
    if (name == "box") return {0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0; }};
    if (name == "hamming")
        return {1, [](double x) { return std::abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * std::cos(M_PI * x)); }};
    throw std::runtime_error("interpolation '" + name + "' is not written here");
}

// One axis: (outer, from, inner) to (outer, to, inner).
std::vector<std::uint8_t> resized(const std::vector<std::uint8_t> &pixels, std::int64_t outer, std::int64_t from,
                                  std::int64_t to, std::int64_t inner, const Filter &filter) {
    constexpr int bits = 22;
    double scale = static_cast<double>(from) / static_cast<double>(to), stretch = std::max(scale, 1.0);
    double support = filter.support * stretch;
    std::vector<std::uint8_t> made(static_cast<std::size_t>(outer * to * inner));
    for (std::int64_t place = 0; place < to; ++place) {
        double center = (static_cast<double>(place) + 0.5) * scale, sum = 0;
        auto first = std::max<std::int64_t>(0, static_cast<std::int64_t>(center - support + 0.5));
        auto last = std::min<std::int64_t>(from, static_cast<std::int64_t>(center + support + 0.5));
        std::vector<double> weights;
        for (std::int64_t at = first; at < last; ++at) {
            weights.push_back(filter.weight((static_cast<double>(at) - center + 0.5) * (1.0 / stretch)));
            sum += weights.back();
        }
        std::vector<int> fixed;
        for (double weight : weights) {
            double value = (sum != 0 ? weight / sum : weight) * (1 << bits);
            fixed.push_back(static_cast<int>(value < 0 ? value - 0.5 : value + 0.5));
        }
        for (std::int64_t o = 0; o < outer; ++o)
            for (std::int64_t i = 0; i < inner; ++i) {
                int total = 1 << (bits - 1);
                for (std::size_t k = 0; k < fixed.size(); ++k)
                    total += fixed[k] * pixels[static_cast<std::size_t>((o * from + first + static_cast<std::int64_t>(k)) * inner + i)];
                made[static_cast<std::size_t>((o * to + place) * inner + i)] = static_cast<std::uint8_t>(std::clamp(total >> bits, 0, 255));
            }
    }
    return made;
}

Array resized(const Array &image, std::int64_t width, std::int64_t height, const Filter &filter) {
    std::int64_t H = image.shape[0], W = image.shape[1], C = image.shape[2];
    std::vector<std::uint8_t> pixels = image.bytes;
    if (width != W) pixels = resized(pixels, H, W, width, C, filter);
    if (height != H) pixels = resized(pixels, 1, H, height, width * C, filter);
    return {Type::uint8, {height, width, C}, pixels};
}

Array cut(const Array &image, std::int64_t left, std::int64_t top, std::int64_t width, std::int64_t height,
          const std::vector<std::uint8_t> &fill) {
    std::int64_t H = image.shape[0], W = image.shape[1], C = image.shape[2];
    Array made = Array::of(Type::uint8, {height, width, C});
    for (std::int64_t y = 0; y < height; ++y)
        for (std::int64_t x = 0; x < width; ++x) {
            std::int64_t from_y = y + top, from_x = x + left;
            bool inside = from_y >= 0 && from_y < H && from_x >= 0 && from_x < W;
            const std::uint8_t *from = inside ? image.data<std::uint8_t>() + (from_y * W + from_x) * C : fill.data();
            std::copy_n(from, C, made.data<std::uint8_t>() + (y * width + x) * C);
        }
    return made;
}

std::int64_t start(std::int64_t side, std::int64_t wanted) {  // std::nearbyint rounds halves to even, as Python does
    return side >= wanted ? static_cast<std::int64_t>(std::nearbyint(static_cast<double>(side - wanted) / 2)) : -((wanted - side) / 2);
}

}  // namespace

Array read_image(const std::string &path, int channels) {
    if (channels != 1 && channels != 3) throw std::runtime_error("images of " + std::to_string(channels) + " channels are not written here");
    File file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw std::runtime_error("cannot read " + path);
    int first = std::fgetc(file.get());
    std::rewind(file.get());
    if (first != 0x89 && first != 0xff) throw std::runtime_error(path + " is neither PNG nor JPEG");
    return with_channels(first == 0x89 ? read_png(file.get()) : read_jpeg(file.get()), channels);
}

Array crop(const Array &pixels, const nlohmann::json &preprocess) {
    if (pixels.type != Type::uint8) throw std::runtime_error("pixels of more than 8 bits are not written here");
    std::int64_t height = preprocess.at("image_size")[0], width = preprocess.at("image_size")[1];
    std::string mode = preprocess.value("crop_mode", "center");
    double crop_pct = mode == "letterbox" ? 1 : preprocess.at("crop_pct").get<double>();
    auto covered_w = static_cast<std::int64_t>(static_cast<double>(width) / crop_pct);
    auto covered_h = static_cast<std::int64_t>(static_cast<double>(height) / crop_pct);
    std::int64_t H = pixels.shape[0], W = pixels.shape[1], to_w = covered_w, to_h = covered_h;
    Array part = pixels;
    if (mode == "center") {  // of strips, the middle; then the smallest size of the image's form that covers the input
        std::int64_t longest = 100 * std::min(W, H), w = std::min(W, longest), h = std::min(H, longest);
        if (w != W || h != H) part = cut(pixels, (W - w) / 2, (H - h) / 2, w, h, {});
        if (covered_h * w >= covered_w * h)
            to_w = static_cast<std::int64_t>(static_cast<double>(covered_h * w) / static_cast<double>(h));
        else
            to_h = static_cast<std::int64_t>(static_cast<double>(covered_w * h) / static_cast<double>(w));
    } else if (mode != "squash") {
        double ratio = std::max(static_cast<double>(W) / static_cast<double>(covered_w), static_cast<double>(H) / static_cast<double>(covered_h));
        to_w = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::nearbyint(static_cast<double>(W) / ratio)));
        to_h = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::nearbyint(static_cast<double>(H) / ratio)));
    }
    std::vector<std::uint8_t> fill(static_cast<std::size_t>(pixels.shape[2]), 0);
    if (mode == "border")
        for (std::size_t c = 0; c < fill.size(); ++c)
            fill[c] = static_cast<std::uint8_t>(std::nearbyint(255 * preprocess.at("mean")[c].get<double>()));
    Array made = resized(part, to_w, to_h, filter_of(preprocess.at("interpolation")));
    return cut(made, start(to_w, width), start(to_h, height), width, height, fill);
}

Array graph_input(const Array &pixels, const nlohmann::json &preprocess, Type type) {
    std::int64_t H = pixels.shape[0], W = pixels.shape[1], C = pixels.shape[2];
    if (type == Type::uint8) return {type, {1, H, W, C}, pixels.bytes};
    Array made = Array::of(type, {1, C, H, W});
    for (std::int64_t c = 0; c < C; ++c) {
        float mean = preprocess.at("mean")[c], std = preprocess.at("std")[c];
        for (std::int64_t pixel = 0; pixel < H * W; ++pixel) {
            float value = (static_cast<float>(pixels.bytes[pixel * C + c]) / 255.0f - mean) / std;
            if (type == Type::float16)
                made.data<std::uint16_t>()[c * H * W + pixel] = to_half(value);
            else
                made.data<float>()[c * H * W + pixel] = value;
        }
    }
    return made;
}
