// A plan of a bundle in TensorRT, 8.6 or later, on the first GPU.
#include "engine.hpp"

#include <fstream>
#include <iostream>
#include <iterator>
#include <utility>

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

namespace {

void check(cudaError_t state) {
    if (state != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(state));
}

class Log : public nvinfer1::ILogger {
    void log(Severity severity, const char *message) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << "TensorRT: " << message << "\n";
    }
};

Type type_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return Type::float32;
        case nvinfer1::DataType::kHALF: return Type::float16;
        case nvinfer1::DataType::kUINT8: return Type::uint8;
        case nvinfer1::DataType::kINT32: return Type::int32;
        default: return Type::int64;
    }
}

Array as(const Array &array, Type type) {  // plans of TensorRT 8.6 take patches in 32 bits
    if (array.type == type) return array;
    if (array.type != Type::int64 || type != Type::int32) throw std::runtime_error("an input of another type than the plan takes");
    Array made = Array::of(type, array.shape);
    for (std::size_t place = 0; place < made.size(); ++place) made.data<std::int32_t>()[place] = static_cast<std::int32_t>(array.data<std::int64_t>()[place]);
    return made;
}

class Memory {
  public:
    explicit Memory(std::size_t size) { check(cudaMalloc(&data_, size)); }
    Memory(Memory &&other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    ~Memory() { cudaFree(data_); }
    void *get() const { return data_; }

  private:
    void *data_ = nullptr;
};

class TensorRt : public Engine {
  public:
    explicit TensorRt(const Bundle &bundle) : outputs_(bundle.names("outputs")) {
        runtime_.reset(nvinfer1::createInferRuntime(log_));
        std::string version = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." + std::to_string(NV_TENSORRT_PATCH);
        for (const auto &entry : bundle.manifest.at("engines")) {
            std::string built = entry.at("tensorrt");
            if (entry.at("stripped") || built.compare(0, version.size(), version) != 0) continue;
            std::ifstream file(bundle.path(entry.at("file")), std::ios::binary);
            std::vector<char> plan((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
            engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
            if (engine_) break;  // else it was built for another GPU
        }
        if (!engine_) throw std::runtime_error("the bundle has no plan of TensorRT " + version + " for this GPU: mae-deploy build-engine " + bundle.folder);
        context_.reset(engine_->createExecutionContext());
        check(cudaStreamCreate(&stream_));
    }
    ~TensorRt() override { cudaStreamDestroy(stream_); }

    Arrays run(const Arrays &inputs) override {
        take_profile(inputs);
        std::vector<Memory> memory;
        for (const auto &[name, array] : inputs) {
            Array given = as(array, type_of(engine_->getTensorDataType(name.c_str())));
            nvinfer1::Dims shape{};
            shape.nbDims = static_cast<std::int32_t>(given.shape.size());
            for (std::size_t axis = 0; axis < given.shape.size(); ++axis) shape.d[axis] = static_cast<std::remove_reference_t<decltype(shape.d[0])>>(given.shape[axis]);
            memory.emplace_back(given.bytes.size());
            check(cudaMemcpy(memory.back().get(), given.bytes.data(), given.bytes.size(), cudaMemcpyHostToDevice));
            if (!context_->setInputShape(name.c_str(), shape) || !context_->setTensorAddress(name.c_str(), memory.back().get()))
                throw std::runtime_error("the plan does not take this shape of " + name);
        }
        Arrays found;
        std::map<std::string, void *> places;
        for (const std::string &name : outputs_) {
            nvinfer1::Dims shape = context_->getTensorShape(name.c_str());
            Array array = Array::of(type_of(engine_->getTensorDataType(name.c_str())), {shape.d, shape.d + shape.nbDims});
            memory.emplace_back(array.bytes.size());
            places[name] = memory.back().get();
            context_->setTensorAddress(name.c_str(), places[name]);
            found.emplace(name, std::move(array));
        }
        if (!context_->enqueueV3(stream_)) throw std::runtime_error("TensorRT did not run");
        check(cudaStreamSynchronize(stream_));
        for (auto &[name, array] : found) check(cudaMemcpy(array.bytes.data(), places[name], array.bytes.size(), cudaMemcpyDeviceToHost));
        return found;
    }

  private:
    void take_profile(const Arrays &inputs) {  // the first that has room for these shapes
        for (std::int32_t index = 0; index < engine_->getNbOptimizationProfiles(); ++index) {
            bool fits = true;
            for (const auto &[name, array] : inputs) {
                nvinfer1::Dims least = engine_->getProfileShape(name.c_str(), index, nvinfer1::OptProfileSelector::kMIN);
                nvinfer1::Dims most = engine_->getProfileShape(name.c_str(), index, nvinfer1::OptProfileSelector::kMAX);
                for (std::size_t axis = 0; axis < array.shape.size(); ++axis)
                    fits = fits && least.d[axis] <= array.shape[axis] && array.shape[axis] <= most.d[axis];
            }
            if (!fits) continue;
            if (!context_->setOptimizationProfileAsync(index, stream_)) throw std::runtime_error("TensorRT did not take a profile");
            return;
        }
        throw std::runtime_error("no profile of the plan has room for these shapes");
    }

    Log log_;
    std::vector<std::string> outputs_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    cudaStream_t stream_{};
};

}  // namespace

std::unique_ptr<Engine> open_engine(const Bundle &bundle) { return std::make_unique<TensorRt>(bundle); }
