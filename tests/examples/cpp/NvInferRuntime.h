// What examples/cpp/src/tensorrt.cpp uses of TensorRT, declared as NVIDIA's headers of 8.6 and 10 do (NvInferRuntime.h,
// NvInferRuntimeBase.h, NvInferVersion.h), without what stands behind: enough to compile against.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef TRT_MAJOR_ENTERPRISE
#define TRT_MAJOR_ENTERPRISE 10
#endif
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE
#define NV_TENSORRT_MINOR 14
#define NV_TENSORRT_PATCH 1

struct CUstream_st;
typedef struct CUstream_st *cudaStream_t;

namespace nvinfer1 {

using AsciiChar = char;
enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

#if NV_TENSORRT_MAJOR < 10
class Dims32 {
  public:
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int32_t d[MAX_DIMS];
};
using Dims = Dims32;
#else
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };
class Dims64 {
  public:
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;
#endif

class INoCopy {
  protected:
    INoCopy() = default;
    virtual ~INoCopy() = default;
    INoCopy(INoCopy const &other) = delete;
    INoCopy &operator=(INoCopy const &other) = delete;
    INoCopy(INoCopy &&other) = delete;
    INoCopy &operator=(INoCopy &&other) = delete;
};

class ILogger {
  public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, AsciiChar const *msg) noexcept = 0;
    ILogger() = default;
    virtual ~ILogger() = default;

  protected:
    ILogger(ILogger const &) = default;
    ILogger(ILogger &&) = default;
    ILogger &operator=(ILogger const &) & = default;
    ILogger &operator=(ILogger &&) & = default;
};

class IExecutionContext : public INoCopy {
  public:
    virtual ~IExecutionContext() noexcept = default;
    bool setInputShape(char const *tensorName, Dims const &dims) noexcept;
    bool setTensorAddress(char const *tensorName, void *data) noexcept;
    Dims getTensorShape(char const *tensorName) const noexcept;
    bool setOptimizationProfileAsync(int32_t profileIndex, cudaStream_t stream) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine : public INoCopy {
  public:
    virtual ~ICudaEngine() noexcept = default;
#if NV_TENSORRT_MAJOR < 10
    IExecutionContext *createExecutionContext() noexcept;
#else
    IExecutionContext *createExecutionContext(ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept;
#endif
    DataType getTensorDataType(char const *tensorName) const noexcept;
    int32_t getNbOptimizationProfiles() const noexcept;
    Dims getProfileShape(char const *tensorName, int32_t profileIndex, OptProfileSelector select) const noexcept;
};

class IRuntime : public INoCopy {
  public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept;
};

}  // namespace nvinfer1

extern "C" void *createInferRuntime_INTERNAL(void *logger, int32_t version) noexcept;

namespace nvinfer1 {
namespace {
inline IRuntime *createInferRuntime(ILogger &logger) noexcept {
    return static_cast<IRuntime *>(createInferRuntime_INTERNAL(&logger, NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH));
}
}  // namespace
}  // namespace nvinfer1
