// The graph of a bundle in ONNX Runtime, on the CPU.
#include "engine.hpp"

#include <onnxruntime_cxx_api.h>

namespace {

ONNXTensorElementDataType element(Type type) {
    switch (type) {
        case Type::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case Type::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case Type::uint8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case Type::int32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    }
}

Ort::SessionOptions options(const Bundle &bundle) {
    Ort::SessionOptions made;
    // The fast products of 8-bit integers overflow on CPUs without VNNI; weights of 7 bits cannot.
    const auto &quantization = bundle.manifest.at("quantization");
    if (bundle.manifest.at("precision") == "int8" && quantization.value("weight_bits", 8) != 7)
        made.AddConfigEntry("session.x64quantprecision", "1");
    return made;
}

class OnnxRuntime : public Engine {
  public:
    explicit OnnxRuntime(const Bundle &bundle)
        : env_(ORT_LOGGING_LEVEL_ERROR, "mae-deploy"),
          session_(env_, bundle.path(bundle.manifest.at("graph").at("file")).c_str(), options(bundle)),
          outputs_(bundle.names("outputs")) {}

    Arrays run(const Arrays &inputs) override {
        Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::vector<const char *> names, wanted;
        std::vector<Ort::Value> values;
        for (const auto &[name, array] : inputs) {
            names.push_back(name.c_str());
            values.push_back(Ort::Value::CreateTensor(memory, const_cast<std::uint8_t *>(array.bytes.data()), array.bytes.size(),
                                                      array.shape.data(), array.shape.size(), element(array.type)));
        }
        for (const std::string &name : outputs_) wanted.push_back(name.c_str());
        std::vector<Ort::Value> results = session_.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(), wanted.data(), wanted.size());
        Arrays found;
        for (std::size_t place = 0; place < results.size(); ++place) {
            auto info = results[place].GetTensorTypeAndShapeInfo();
            Type type = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? Type::float16 : Type::float32;
            Array array = Array::of(type, info.GetShape());
            std::memcpy(array.bytes.data(), results[place].GetTensorRawData(), array.bytes.size());
            found.emplace(outputs_[place], std::move(array));
        }
        return found;
    }

  private:
    Ort::Env env_;
    Ort::Session session_;
    std::vector<std::string> outputs_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Bundle &bundle) { return std::make_unique<OnnxRuntime>(bundle); }
