#include "npz.hpp"

#include <fstream>
#include <iterator>

#include <zlib.h>

namespace {

using Bytes = std::vector<std::uint8_t>;

std::uint32_t number(const Bytes &file, std::size_t at, int length) {
    if (at + static_cast<std::size_t>(length) > file.size()) throw std::runtime_error("the archive is cut short");
    std::uint32_t value = 0;
    for (int byte = length; byte-- > 0;) value = value << 8 | file[at + static_cast<std::size_t>(byte)];
    return value;
}

Bytes inflated(const std::uint8_t *packed, std::size_t packed_size, std::size_t size) {
    Bytes plain(size);
    z_stream stream{};
    stream.next_in = const_cast<Bytef *>(packed);
    stream.avail_in = static_cast<uInt>(packed_size);
    stream.next_out = plain.data();
    stream.avail_out = static_cast<uInt>(size);
    int state = inflateInit2(&stream, -MAX_WBITS) == Z_OK ? inflate(&stream, Z_FINISH) : Z_STREAM_ERROR;
    inflateEnd(&stream);
    if (state != Z_STREAM_END || stream.total_out != size) throw std::runtime_error("the archive is damaged");
    return plain;
}

std::string field(const std::string &header, const std::string &name, char open, char close) {
    std::size_t at = header.find("'" + name + "'");
    std::size_t begin = at == std::string::npos ? at : header.find(open, header.find(':', at));
    std::size_t end = begin == std::string::npos ? begin : header.find(close, begin + 1);
    if (end == std::string::npos) throw std::runtime_error("no '" + name + "' in an array's header");
    return header.substr(begin + 1, end - begin - 1);
}

Array npy(const Bytes &file) {
    if (file.size() < 12 || file[0] != 0x93) throw std::runtime_error("an entry of the archive is no array");
    int length_bytes = file[6] == 1 ? 2 : 4;
    std::size_t header_size = number(file, 8, length_bytes), data = 8 + static_cast<std::size_t>(length_bytes) + header_size;
    if (data > file.size()) throw std::runtime_error("an array of the archive is cut short");
    std::string header(file.begin() + 8 + length_bytes, file.begin() + static_cast<std::ptrdiff_t>(data));
    static const std::map<std::string, Type> types{{"<f4", Type::float32}, {"<f2", Type::float16}, {"|u1", Type::uint8},
                                                   {"<i4", Type::int32}, {"<i8", Type::int64}};
    auto type = types.find(field(header, "descr", '\'', '\''));
    if (type == types.end()) throw std::runtime_error("an array of another type: " + header);
    if (header.find("'fortran_order': False") == std::string::npos) throw std::runtime_error("an array in Fortran's order");
    std::vector<std::int64_t> shape;
    std::string sides = field(header, "shape", '(', ')');
    for (std::size_t at = 0; (at = sides.find_first_of("0123456789", at)) != std::string::npos;) {
        std::size_t used;
        shape.push_back(std::stoll(sides.substr(at), &used));
        at += used;
    }
    Array made{type->second, shape, Bytes(file.begin() + static_cast<std::ptrdiff_t>(data), file.end())};
    if (made.bytes.size() != made.size() * size_of(made.type)) throw std::runtime_error("an array of another size than it says");
    return made;
}

}  // namespace

Arrays read_npz(const std::string &path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path);
    Bytes file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    // The sizes stand in the central directory; its place in the last record, which has no comment here.
    if (file.size() < 22) throw std::runtime_error(path + " is no archive");
    std::size_t end = file.size() - 22;
    if (number(file, end, 4) != 0x06054b50) throw std::runtime_error(path + " is no archive");
    Arrays found;
    std::size_t entry = number(file, end + 16, 4);
    for (std::uint32_t left = number(file, end + 10, 2); left > 0; --left) {
        std::uint32_t method = number(file, entry + 10, 2), packed = number(file, entry + 20, 4);
        std::uint32_t size = number(file, entry + 24, 4), name_size = number(file, entry + 28, 2);
        std::size_t local = number(file, entry + 42, 4);
        std::size_t data = local + 30 + number(file, local + 26, 2) + number(file, local + 28, 2);
        if (packed == 0xffffffff || data + packed > file.size()) throw std::runtime_error(path + " is damaged");
        std::string name(file.begin() + static_cast<std::ptrdiff_t>(entry) + 46,
                         file.begin() + static_cast<std::ptrdiff_t>(entry) + 46 + name_size);
        Bytes plain = method == 0 ? Bytes(file.begin() + static_cast<std::ptrdiff_t>(data),
                                          file.begin() + static_cast<std::ptrdiff_t>(data + packed))
                                  : inflated(file.data() + data, packed, size);
        if (name.size() > 4 && name.substr(name.size() - 4) == ".npy") name.resize(name.size() - 4);
        found.emplace(name, npy(plain));
        entry += 46 + name_size + number(file, entry + 30, 2) + number(file, entry + 32, 2);
    }
    return found;
}
