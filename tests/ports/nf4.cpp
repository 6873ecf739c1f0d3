// NF4 in C++20, written from the specification alone: the comment at a function names the clauses it implements.
// Build: g++ -std=c++20 -O2 -ffp-contract=off nf4.cpp -o nf4        Test: nf4 conform -- ./nf4
// -ffp-contract=off matters: a * b + c is two roundings (NF4-1.2, NF4-6.4), which GCC may otherwise fuse into one.
// Never add -ffast-math: it drops the signs of zeros, NaN and subnormals (NF4-1.5).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
using std::bit_cast, std::map, std::string, std::vector;
using Floats = vector<float>;
using Words = vector<uint64_t>;  // codes, or the bits of anything
using Fields = map<string, string>;  // of a JSON object
struct Refused : std::runtime_error { using runtime_error::runtime_error; };  // NF4-1.7
void require(bool ok, const char* otherwise) { if (!ok) throw Refused(otherwise); }
void require_finite(const Floats& x, const char* what) { for (float v : x) require(std::isfinite(v), what); }
uint64_t ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }  // NF4-1.4

float widen(uint32_t u, const string& dtype) {  // NF4-7.1
    if (dtype == "float32") return bit_cast<float>(u);
    const uint32_t sign = (u & 0x8000) << 16, h = u & 0x7fff, infinity = dtype == "float16" ? 0x7c00 : 0x7f80;
    if (h >= infinity) return bit_cast<float>(sign | (h > infinity ? 0x7fc00000 : 0x7f800000));
    return dtype == "bfloat16" ? bit_cast<float>(u << 16) : bit_cast<float>(sign | h << 13) * 0x1p112f;  // 127 - 15
}
uint32_t narrow(float x, const string& dtype) {  // NF4-7.2, NF4-7.3
    if (dtype == "float32") return bit_cast<uint32_t>(x);
    const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000, u = bit_cast<uint32_t>(x) & 0x7fffffff;
    if (u > 0x7f800000) return sign | (dtype == "float16" ? 0x7e00 : 0x7fc0);
    if (dtype == "bfloat16") return sign | (u + 0x7fff + (u >> 16 & 1)) >> 16;
    if (u < 0x38800000) return sign | (bit_cast<uint32_t>(std::fabs(x) + 0.5f) & 0x7fff);  // 0.5f has steps of 2^-24
    return sign | std::min((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13, 0x7c00u);
}
uint64_t narrow(uint64_t code, const string&) { return code; }  // a code is written as it is

// NF4-13.2: an array is its bits in hexadecimal. NF4-5.1: of the two codes in a byte the first is the first digit.
size_t digits(const string& dtype) { return stoul(dtype.substr(dtype.find_first_of("123456789"))) / 4; }
Words parse(const string& hex, const string& dtype) {
    Words words;
    for (size_t i = 0, n = digits(dtype); i < hex.size(); i += n) words.push_back(stoull(hex.substr(i, n), 0, 16));
    return words;
}
Floats read(const string& hex, const string& dtype = "float32") {
    Floats x;
    for (uint64_t word : parse(hex, dtype)) x.push_back(widen(uint32_t(word), dtype));
    return x;
}
string member(const string& name, const string& text) { return '"' + name + "\":\"" + text + '"'; }
string write(const string& name, const auto& x, const string& dtype = "float32") {
    string hex;
    for (const auto v : x)
        for (uint64_t u = narrow(v, dtype), i = digits(dtype); i-- > 0;) hex += "0123456789abcdef"[u >> 4 * i & 15];
    return member(name, hex);
}

const map<string, Floats> codebooks{  // NF4-2.1
    {"nf4", read("bf800000bf3239b1bf066b30beca32a0be91a24dbe3d353fbdba787100000000"
                 "3da2faff3e24cae33e7c04dd3ead033a3ee1a4b83f1007ab3f3913b33f800000")},
    {"int4", {-1, -6/7.f, -5/7.f, -4/7.f, -3/7.f, -2/7.f, -1/7.f, 0, 1/7.f, 2/7.f, 3/7.f, 4/7.f, 5/7.f, 6/7.f, 1, 1}},
    {"fp4", {0, 1/192.f, 2/3.f, 1, 1/3.f, .5, 1/6.f, .25, 0, -1/192.f, -2/3.f, -1, -1/3.f, -.5, -1/6.f, -.25}},
    {"fp4-e2m1", {0, 1/12.f, 1/6.f, .25, 1/3.f, .5, 2/3.f, 1, -0.f, -1/12.f, -1/6.f, -.25, -1/3.f, -.5, -2/3.f, -1}}};
Floats with_mirrored_half(Floats map) {  // NF4-6.2 from code 127 on: 126 to 0 are minus 128 to 254
    for (size_t k = 0; k < 127; k++) map.insert(map.begin(), -map[2 * k + 1]);
    return map;
}
const Floats nested_map = with_mirrored_half(read("000000003513a3b7365a1a94370205ff"
    "37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2823a016f003a1eecc13a3c6a803a59e83e3a7765ff3aa7ef9d3af1a9fc"
    "3b1db22d3b428f5c3b676c8a3b8624dd3b9893743bab020d3bbd70a43bcfdf3c3be24dd33bf4bc6a3c0395813c0ccccd3c1604183c1f3b64"
    "3c3ae1483c68f5c33c8b851f3ca28f5c3cb9999a3cd0a3d73ce7ae133cfeb8523d0ae1473d1666673d21eb853d2d70a33d38f5c23d447ae1"
    "3d5000003d5b85203d670a3d3d728f5d3d7e147b3d84cccd3d8a8f5d3d9051eb3d96147b3d9bd70b3da1999a3da75c2a3dad1eb83db2e148"
    "3db8a3d73dbe66673dc428f73dc9eb853ddb33343df800003e0a66663e18cccd3e2733333e3599993e4400003e5266663e60cccd3e6f3333"
    "3e7d99993e8600003e8d33333e9466663e9b999a3ea2cccc3eaa00003eb133323eb866663ebf999a3ec6cccc3ece00003ed533323edc6666"
    "3ee399993eeacccc3ef200003ef933323f0033333f03cccd3f0766663f0b00003f0e999a3f1233333f15cccd3f1966673f1d00003f20999a"
    "3f2433333f27cccd3f2b66673f2f00003f32999a3f3633333f39cccd3f3d66673f4100003f44999a3f4833333f4bcccd3f4f66663f530000"
    "3f56999a3f5a33333f5dcccd3f6166663f6500003f68999a3f6c33333f6fcccd3f7366663f7700003f7a999a3f7e33333f800000"));
Floats thresholds(Floats values) {  // NF4-2.2: a midpoint is exact in double, then rounded once
    std::ranges::sort(values);
    values.erase(std::unique(values.begin(), values.end()), values.end());  // +0 and -0 count as one
    for (size_t j = 0; j + 1 < values.size(); j++) values[j] = float((double(values[j]) + values[j + 1]) / 2);
    values.pop_back();
    return values;
}

struct Encoded { Words codes; Floats absmax; float offset; };  // a code for each element; offset: NF4-6.1
Encoded encode(Floats x, size_t block_size, const Floats& values, float offset = 0) {  // NF4-3.1 to 3.5, NF4-6.3
    const Floats limits = thresholds(values);
    const auto rank = [&](float s) { return size_t(std::ranges::lower_bound(limits, s) - limits.begin()); };
    Words code_of(limits.size() + 1), codes;
    for (size_t code = values.size(); code-- > 0;) code_of[rank(values[code])] = code;  // of two the lower stays
    Floats absmax(ceil_div(x.size(), block_size));
    for (float& value : x) value -= offset;
    for (size_t i = 0; i < x.size(); i++) absmax[i / block_size] = std::max(absmax[i / block_size], std::fabs(x[i]));
    for (size_t i = 0; i < x.size(); i++) {
        const float a = absmax[i / block_size], lift = a <= 0x1p-128f ? 0x1p64f : 1;
        codes.push_back(code_of[rank(a > 0 ? x[i] * lift * (1 / (a * lift)) : 0)]);
    }
    return {codes, absmax, offset};
}
Floats decode(const Words& codes, const Floats& absmax, size_t block_size, const Floats& values) {  // NF4-4.1, 12.5
    require(absmax.size() == ceil_div(codes.size(), block_size), "the number of blocks is wrong");
    Floats y;
    for (uint64_t code : codes) y.push_back(values[code] * absmax[y.size() / block_size]);
    return y;
}
float exact_mean(const Floats& values) {  // NF4-6.1, by long division in binary
    Words digit(384);  // of the sum; number k is worth 2^(k - 182)
    for (float v : values) if (v > 0) digit[std::ilogb(v) + 159] += uint64_t(std::ldexp(v, 23 - std::ilogb(v)));
    for (size_t k = 0; k < 383; digit[k++] %= 2) digit[k + 1] += digit[k] / 2;  // carries, down to 0 and 1
    uint64_t mean = 0, rest = 0, k = digit.size(), n = std::max(values.size(), size_t(1));
    for (; k > 0 && mean < 1ull << 40; rest %= n) {
        rest = 2 * rest + digit[--k];
        mean = 2 * mean + rest / n;
    }
    const bool more = rest > 0 || std::any_of(digit.begin(), digit.begin() + k, [](uint64_t d) { return d > 0; });
    return float(std::ldexp(double(2 * mean + more), int(k) - 183));  // more stands for all the digits that follow
}
Floats decode_absmax(const Encoded& nested, const Floats& map) {  // NF4-6.4
    require(map.size() == 256, "the map has not 256 values");
    Floats absmax = decode(nested.codes, nested.absmax, 256, map);
    for (float& a : absmax) a += nested.offset;
    return absmax;
}
Encoded encode_absmax(const Floats& absmax) {  // NF4-6.3, NF4-6.6
    for (float a : absmax) require(std::isfinite(a) && a >= 0, "an absmax is negative or not finite");
    const Encoded nested = encode(absmax, 256, nested_map, exact_mean(absmax));
    require_finite(decode_absmax(nested, nested_map), "an absmax would decode to an infinity");
    return nested;
}

Fields fields_of(const string& line) {  // NF4-13.4: those of a JSON object and of the one in it, without escapes
    std::istringstream in(line);
    Fields fields;
    string name;
    for (char colon, first; std::getline(in.ignore(line.size(), '"'), name, '"') && in >> colon >> first;)
        if (first == '"' || first == '[') std::getline(in, fields[name], first == '"' ? '"' : ']');
        else if (first != '{') std::getline(in.unget(), fields[name], ',');  // a number, perhaps with a } after it
    return fields;
}
string write_nested(const Encoded& nested) {  // NF4-13.3: NESTED
    return write("absmax_codes", nested.codes, "uint8") + ',' + write("nested_absmax", nested.absmax) + ',' +
           write("offset", Floats{nested.offset});
}
string run(const string& operation, Fields in) {  // NF4-13.3: the fields of the output
    if (operation == "echo") return write("x", parse(in["x"], in["dtype"]), in["dtype"]);
    in.merge(Fields{{"dtype", "float32"}, {"codebook", "nf4"}, {"block_size", "64"}, {"shape", in["elements"]}});
    const string dtype = in["dtype"];  // of a field that the operation has not, a value that is not refused
    require(dtype == "float32" || dtype == "float16" || dtype == "bfloat16", "an unknown dtype");  // NF4-12.2
    require(codebooks.contains(in["codebook"]), "an unknown codebook");  // NF4-2.1
    const Floats& values = codebooks.at(in["codebook"]);
    const uint64_t block_size = stoull(in["block_size"]);
    require(std::has_single_bit(block_size) && block_size >= 32 && block_size <= 4096, "a wrong block size");  // 12.3
    std::istringstream shape(in["shape"]);
    double n = 1;  // NF4-1.4: the number of elements, which is exact up to 2^53
    for (double size; shape >> size; shape.ignore(99, ',')) n *= size < 0 ? INFINITY : size;
    require(n < 0x1p53, "there is no such number of elements");
    if (operation == "codebook") return write("values", values) + ',' + write("thresholds", thresholds(values));
    if (operation == "widen") return write("y", read(in["x"], dtype));
    if (operation == "narrow") return write("y", read(in["x"]), dtype);
    if (operation == "encode_absmax") return write_nested(encode_absmax(read(in["absmax"])));
    if (operation == "storage") {  // NF4-5.4
        const uint64_t blocks = ceil_div(n, block_size), nested = blocks + 4 * ceil_div(blocks, 256) + 4;
        return "\"bytes\":" + std::to_string(ceil_div(n, 2) + (in["double_quant"][0] == 't' ? nested : 4 * blocks));
    }
    if (operation.starts_with("quantize")) {
        Floats x = read(in["x"], dtype);
        require(x.size() == n, "the number of elements contradicts the shape");
        require_finite(x, "an element is no finite number");  // NF4-12.1
        x.resize(2 * ceil_div(n, 2));  // NF4-5.2: an odd count gets another 0
        const Encoded q = encode(x, block_size, values);
        return write("codes", q.codes, "uint4") + ',' +
               (operation == "quantize" ? write("absmax", q.absmax) : write_nested(encode_absmax(q.absmax)));
    }
    const Floats absmax = operation == "dequantize" ? read(in["absmax"]) : decode_absmax(
        {parse(in["absmax_codes"], "uint8"), read(in["nested_absmax"]), read(in["offset"]).at(0)}, read(in["map"]));
    require_finite(absmax, "an absmax is no finite number");  // NF4-12.5
    if (operation == "decode_absmax") return write("absmax", absmax);
    Words codes = parse(in["codes"], "uint4");
    require(codes.size() == 2 * ceil_div(n, 2), "the number of codes contradicts the shape");  // NF4-12.5
    codes.resize(n);  // without the other 0
    return write("y", decode(codes, absmax, block_size, values), dtype);  // NF4-4.2
}
int main() {  // NF4-13.4
    Fields in;
    for (string line, answer; std::getline(std::cin, line) && (in = fields_of(line))["cmd"] != "stop";) {
        answer = R"("version":1,"name":"nf4-cpp","operations":["codebook","widen","narrow","storage","quantize",)"
                 R"("dequantize","encode_absmax","decode_absmax","quantize_double","dequantize_double"])";
        if (in["cmd"] == "run") {
            try { answer = R"("output":{)" + run(in["operation"], in) + '}'; }
            catch (const Refused& refusal) { answer = member("refused", refusal.what()); }
            catch (const std::exception& error) { answer = member("errored", error.what()); }
            answer = member("id", in["id"]) + ',' + answer;
        }
        std::cout << '{' << answer << '}' << std::endl;
    }
}
