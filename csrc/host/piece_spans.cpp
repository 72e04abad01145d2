// Reads the message that sentencepiece's encoder returns as "serialized_proto": the token ids and the bytes of input that each one covers.
// The wire format is protocol buffers, of which this needs three fields of one submessage (source: sentencepiece.proto):
//   SentencePieceText { repeated SentencePiece pieces = 2; }   SentencePiece { uint32 id = 2; uint32 begin = 4; uint32 end = 5; }
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace pgolf {
namespace {

struct Field {
    uint32_t number = 0;
    uint64_t value = 0;       // of a varint
    std::string_view bytes;   // of a length-delimited field
};

class Message {
public:
    explicit Message(std::string_view bytes) : rest_(bytes) {}

    bool next(Field& field) {
        if (rest_.empty()) return false;
        const uint64_t key = varint();
        field = {uint32_t(key >> 3)};
        switch (key & 7) {
            case 0: field.value = varint(); break;
            case 1: take(8); break;
            case 2: field.bytes = take(varint()); break;
            case 5: take(4); break;
            default: throw std::invalid_argument("message: not a serialized SentencePieceText");
        }
        return true;
    }

private:
    std::string_view take(uint64_t size) {
        if (size > rest_.size()) throw std::invalid_argument("message: cut short");
        const std::string_view taken = rest_.substr(0, size);
        rest_.remove_prefix(size);
        return taken;
    }

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = static_cast<unsigned char>(take(1)[0]);
            value |= uint64_t(byte & 127) << shift;
            if (byte < 128) return value;
        }
        throw std::invalid_argument("message: not a serialized SentencePieceText");
    }

    std::string_view rest_;
};

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(py::ssize_t(values.size()), values.data());
}

// (ids, begin of the first piece, end of every piece); the pieces adjoin, so these are all the spans.
py::tuple piece_spans(const py::bytes& message) {
    std::vector<int32_t> ids;
    std::vector<int64_t> ends;
    int64_t first_begin = 0;
    Message text{std::string_view(message)};
    for (Field field; text.next(field);) {
        if (field.number != 2) continue;
        int64_t id = 0, begin = 0, end = 0;
        Message piece(field.bytes);
        for (Field part; piece.next(part);) {
            if (part.number == 2) id = int64_t(part.value);
            if (part.number == 4) begin = int64_t(part.value);
            if (part.number == 5) end = int64_t(part.value);
        }
        if (ids.empty()) first_begin = begin;
        if (begin != (ids.empty() ? first_begin : ends.back()) || end < begin)
            throw std::invalid_argument("message: the pieces do not adjoin");
        ids.push_back(int32_t(id));
        ends.push_back(end);
    }
    return py::make_tuple(to_array(ids), first_begin, to_array(ends));
}

}  // namespace

void register_piece_spans(py::module_& m) {
    m.def("piece_spans", &piece_spans, py::arg("message"),
          "(ids int32, begin of the first piece, end of every piece int64), in bytes of the encoder's input");
}

}  // namespace pgolf
