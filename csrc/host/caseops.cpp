// CaseOps, the bijective case transform: text to lower case plus four operators, and back. UTF-8 in, UTF-8 out.
// pgolf_fast/caseops.py states the rules and holds the plain reference; this is the fast form of the same.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace py = pybind11;

namespace pgolf {
namespace {

// U+E001 to U+E004 are EE 80 81 to EE 80 84; in valid UTF-8 the byte EE only ever starts a character.
enum Operator : unsigned char { kTitle = 0x81, kAllCaps = 0x82, kCapNext = 0x83, kEscape = 0x84 };
constexpr size_t kOperatorBytes = 3;

enum Class : unsigned char { kOther, kLower, kUpper, kMaybeOperator };

constexpr std::array<Class, 256> byte_classes() {
    std::array<Class, 256> table{};
    for (int c = 'a'; c <= 'z'; ++c) table[c] = kLower;
    for (int c = 'A'; c <= 'Z'; ++c) table[c] = kUpper;
    table[0xEE] = kMaybeOperator;
    return table;
}
constexpr auto kClasses = byte_classes();

Class class_of(char c) { return kClasses[static_cast<unsigned char>(c)]; }
bool is_letter(Class c) { return c == kLower || c == kUpper; }
char lower(char c) { return char(c | 0x20); }
char upper(char c) { return char(c & ~0x20); }  // of an ASCII letter, either case

size_t character_bytes(char first) {
    const auto byte = static_cast<unsigned char>(first);
    return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The operator that starts at text[i], or 0.
unsigned char operator_at(std::string_view text, size_t i) {
    if (i + kOperatorBytes > text.size() || text[i] != '\xEE' || text[i + 1] != '\x80') return 0;
    const auto last = static_cast<unsigned char>(text[i + 2]);
    return last >= kTitle && last <= kEscape ? last : 0;
}

void append_operator(std::string& out, unsigned char op) {
    const char bytes[kOperatorBytes] = {'\xEE', '\x80', char(op)};
    out.append(bytes, kOperatorBytes);
}

void append_lower(std::string& out, std::string_view word) {
    const size_t at = out.size();
    out.append(word);
    for (size_t i = at; i < out.size(); ++i) out[i] = lower(out[i]);
}

void append_word(std::string& out, std::string_view word, size_t num_upper) {
    const bool has_first_upper = class_of(word[0]) == kUpper;
    if (num_upper == 0) {
        out.append(word);
    } else if (num_upper == word.size() && word.size() >= 2) {
        append_operator(out, kAllCaps);
        append_lower(out, word);
    } else if (num_upper == 1 && has_first_upper) {
        append_operator(out, kTitle);
        append_lower(out, word);
    } else {
        if (has_first_upper) append_operator(out, kTitle);
        out.push_back(lower(word[0]));
        for (const char c : word.substr(1)) {
            if (class_of(c) == kUpper) append_operator(out, kCapNext);
            out.push_back(lower(c));
        }
    }
}

std::string encode(std::string_view text) {
    std::string out;
    out.reserve(text.size() + text.size() / 8);
    size_t i = 0;
    while (i < text.size()) {
        size_t end = i;
        while (end < text.size() && class_of(text[end]) == kOther) ++end;
        out.append(text.substr(i, end - i));
        i = end;
        size_t num_upper = 0;
        for (; end < text.size() && is_letter(class_of(text[end])); ++end) num_upper += class_of(text[end]) == kUpper;
        if (end > i) append_word(out, text.substr(i, end - i), num_upper);
        i = end;
        if (i < text.size() && class_of(text[i]) == kMaybeOperator) {
            if (operator_at(text, i)) append_operator(out, kEscape);
            out.append(text.substr(i, kOperatorBytes));  // EE starts a character of three bytes, operator or not
            i += kOperatorBytes;
        }
    }
    return out;
}

std::string decode(std::string_view text) {
    enum Mode { kNone, kTitleMode, kAllCapsMode } pending_mode = kNone;
    bool pending_escape = false, pending_cap = false, in_word = false, is_all_caps = false;
    std::string out;
    out.reserve(text.size());
    size_t i = 0;
    const auto require = [&](bool condition, const char* problem) {
        if (!condition) throw std::invalid_argument("encoded: byte " + std::to_string(i) + ": " + problem);
    };
    while (i < text.size()) {
        const Class c = class_of(text[i]);
        const unsigned char op = c == kMaybeOperator ? operator_at(text, i) : 0;
        if (pending_escape) {
            require(pending_mode == kNone || is_letter(c), "TITLE or ALLCAPS is not followed by a letter");
            const size_t size = character_bytes(text[i]);
            out.append(text.substr(i, size));
            i += size;
            pending_escape = false;
            in_word = is_letter(c);
            is_all_caps = is_all_caps && in_word;
        } else if (op == kEscape) {
            pending_escape = true;
            i += kOperatorBytes;
        } else if (op == kTitle || op == kAllCaps) {
            require(pending_mode == kNone && !in_word && !pending_cap, "TITLE or ALLCAPS inside a word or after another operator");
            pending_mode = op == kTitle ? kTitleMode : kAllCapsMode;
            i += kOperatorBytes;
        } else if (op == kCapNext) {
            require(!pending_cap, "CAPNEXT twice");
            pending_cap = true;
            i += kOperatorBytes;
        } else if (is_letter(c)) {
            require(!in_word || pending_mode == kNone, "TITLE or ALLCAPS inside a word");
            if (!in_word) is_all_caps = pending_mode == kAllCapsMode;
            out.push_back(pending_mode != kNone || is_all_caps || pending_cap ? upper(text[i]) : text[i]);
            pending_mode = kNone;
            pending_cap = false;
            in_word = true;
            ++i;
        } else {
            require(pending_mode == kNone && !pending_cap, "an operator is not followed by a letter");
            out.push_back(text[i]);
            in_word = is_all_caps = false;
            ++i;
        }
    }
    require(!pending_escape && pending_mode == kNone && !pending_cap, "the text ends after an operator");
    return out;
}

std::string_view utf8(const py::str& text) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!data) throw py::error_already_set();  // a lone surrogate
    return {data, size_t(size)};
}

template <std::string (*transform)(std::string_view)>
py::str through_utf8(const py::str& text) {
    const std::string_view bytes = utf8(text);
    std::string out;
    {
        py::gil_scoped_release release;
        out = transform(bytes);
    }
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(out.data(), Py_ssize_t(out.size()), nullptr));
}

using Ends = py::array_t<int64_t, py::array::c_style>;

// Original bytes in each span [previous end, end) of encoded UTF-8: all but those of unescaped operators.
Ends span_bytes(const py::bytes& encoded, int64_t begin, const Ends& ends) {
    const std::string_view text = encoded;
    if (ends.ndim() != 1) throw std::invalid_argument("ends: expected one dimension");
    const int64_t n = ends.shape(0);
    Ends counts(n);
    const int64_t* end = ends.data();
    int64_t* count = counts.mutable_data();
    if (begin < 0) throw std::invalid_argument("begin: expected at least 0, got " + std::to_string(begin));
    bool is_escaped = false;
    size_t i = size_t(begin);
    for (int64_t span = 0; span < n; ++span) {
        if (end[span] < int64_t(i) || end[span] > int64_t(text.size()))
            throw std::invalid_argument("ends: not ascending within the " + std::to_string(text.size()) + " bytes of encoded text");
        count[span] = end[span] - int64_t(i);
        while (i < size_t(end[span])) {
            const unsigned char op = operator_at(text, i);
            if (op && !is_escaped) count[span] -= kOperatorBytes;
            is_escaped = op == kEscape && !is_escaped;
            i += op ? kOperatorBytes : 1;
        }
    }
    return counts;
}

}  // namespace

void register_caseops(py::module_& m) {
    m.def("caseops_encode", &through_utf8<encode>, py::arg("text"), "text to lower case plus operators");
    m.def("caseops_decode", &through_utf8<decode>, py::arg("encoded"), "the inverse");
    m.def("caseops_span_bytes", &span_bytes, py::arg("encoded"), py::arg("begin"), py::arg("ends").noconvert(),
          "original bytes in each of the adjoining spans of encoded UTF-8 that start at `begin` and stop at `ends`");
}

}  // namespace pgolf
