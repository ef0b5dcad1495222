// Prints what CuTe says of the instructions that the kernels use, evaluated on the host: a table a line, its name and
// then its numbers. tests/simt/test_crosscheck.py places operands by these tables and runs the emulated instructions.
//
//   wgmma     where each element of the operands [rows, 64] lies in shared memory (bytes, K fastest), the descriptors
//             of the four k16 steps, and m + 64 n of every sum of every thread
//   mma       m + 16 k, n + 8 k and m + 16 n of what each lane holds of a, b and d
//   ldmatrix  which of the 32 rows of 8 elements, as 8 row + column, each lane gets in each half register; stmatrix: puts
//   encode    the arguments of cuTensorMapEncodeTiled but for the address and the L2 promotion
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

// CuTe calls the encoder by name: this one tells what it was given.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1

using Numbers = std::vector<int64_t>;

static FILE* output;
static Numbers encoded;

static void print(const std::string& name, const Numbers& numbers) {
  fprintf(output, "%s:", name.c_str());
  for (const int64_t number : numbers) fprintf(output, " %lld", static_cast<long long>(number));
  fprintf(output, "\n");
}

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void*,
                                                   const cuuint64_t* dims, const cuuint64_t* strides,
                                                   const cuuint32_t* box, const cuuint32_t* element_strides,
                                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  encoded = {type, rank, interleave, swizzle, fill};
  encoded.insert(encoded.end(), dims, dims + rank);
  encoded.insert(encoded.end(), strides, strides + rank - 1);
  encoded.insert(encoded.end(), box, box + rank);
  encoded.insert(encoded.end(), element_strides, element_strides + rank);
  return CUDA_SUCCESS;
}

#include <cute/tensor.hpp>  // before the others, which need it

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace {

namespace gmma = cute::SM90::GMMA;
using cute::_1;
using cute::_16;
using cute::_2;
using cute::_64;
using cute::bfloat16_t;
using cute::Int;
using cute::Shape;
using KFirst = cute::Step<_2, _1>;  // which blocks of an operand follow each other
using RowsFirst = cute::Step<_1, _2>;

// ---- wgmma ----

// An operand [kRows, 64] of this layout at the address 0.
template <gmma::Major kMajor, int kRows, class Layout>
void print_operand(const std::string& name, const Layout& layout) {
  const auto tensor = cute::make_tensor(cute::make_smem_ptr(static_cast<bfloat16_t*>(nullptr)), layout);
  Numbers places;
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < 64; ++k) places.push_back(reinterpret_cast<intptr_t>(&tensor(row, k)));
  }
  const auto steps = cute::tiled_divide(tensor, Shape<Int<kRows>, _16>{});
  const auto descriptors = cute::make_tensor<gmma::smem_desc<kMajor>>(steps);
  Numbers bits;
  for (int k = 0; k < 4; ++k) {
    const uint64_t descriptor = *(descriptors.data() + descriptors.layout()(0, 0, k));
    bits.push_back(static_cast<int64_t>(descriptor));
  }
  print(name + " places", places);
  print(name + " descriptors", bits);
}

template <template <class> class Atom, int kRows>
void k_major(const std::string& name) {
  print_operand<gmma::Major::K, kRows>(name, cute::tile_to_shape(Atom<bfloat16_t>{}, Shape<Int<kRows>, _64>{}));
}

template <template <class> class Atom, class Order, int kRows>
void mn_major(const std::string& name) {
  print_operand<gmma::Major::MN, kRows>(name,
                                        cute::tile_to_shape(Atom<bfloat16_t>{}, Shape<Int<kRows>, _64>{}, Order{}));
}

// Those that the kernels use, and one of each other kind.
void print_operands() {
  k_major<gmma::Layout_K_SW128_Atom, 8>("k128 8");
  k_major<gmma::Layout_K_SW128_Atom, 64>("k128 64");
  k_major<gmma::Layout_K_SW128_Atom, 128>("k128 128");
  k_major<gmma::Layout_K_SW128_Atom, 192>("k128 192");
  k_major<gmma::Layout_K_SW128_Atom, 256>("k128 256");
  k_major<gmma::Layout_K_SW64_Atom, 64>("k64 64");
  k_major<gmma::Layout_K_SW32_Atom, 64>("k32 64");
  k_major<gmma::Layout_K_INTER_Atom, 64>("k16 64");
  mn_major<gmma::Layout_MN_SW128_Atom, KFirst, 64>("mn128 64");
  mn_major<gmma::Layout_MN_SW128_Atom, KFirst, 128>("mn128 128");
  mn_major<gmma::Layout_MN_SW128_Atom, KFirst, 256>("mn128 256");
  mn_major<gmma::Layout_MN_SW128_Atom, RowsFirst, 128>("mn128 rows first 128");
  mn_major<gmma::Layout_MN_SW64_Atom, KFirst, 64>("mn64 64");
}

template <int... kColumns>
void print_sums() {
  const auto one = [](auto columns) {
    constexpr int kN = decltype(columns)::value;
    const auto layout = gmma::CLayout_64xN<kN>{};
    Numbers places;
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kN / 2; ++i) places.push_back(layout(thread, i));
    }
    print("wgmma sums " + std::to_string(kN), places);
  };
  (one(Int<kColumns>{}), ...);
}

// ---- one warp ----

template <class Operation>
void print_mma(const std::string& name) {
  using Traits = cute::MMA_Traits<Operation>;
  const auto one = [&](const char* operand, const auto& layout) {
    Numbers places;
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < cute::size<1>(layout); ++i) places.push_back(layout(lane, i));
    }
    print(name + " " + operand, places);
  };
  one("a", typename Traits::ALayout{});
  one("b", typename Traits::BLayout{});
  one("d", typename Traits::CLayout{});
}

// Layouts of a copy map (thread, bit) to a bit of the data. Memory is held by rows: thread r has row r.
template <class Rows, class Registers>
void print_matrix_copy(const std::string& name, const Rows& rows, const Registers& registers) {
  Numbers element_of_bit(32 * 8 * 16, -1);
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 8; ++column) element_of_bit[rows(row, 16 * column)] = 8 * row + column;
  }
  Numbers elements;
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 8; ++half) elements.push_back(element_of_bit[registers(lane, 16 * half)]);
  }
  print(name, elements);
}

// ---- tensor maps ----

template <class Layout, class Box>
void print_encoding(const std::string& name, const Layout& layout, const Box& box) {
  auto* const somewhere = reinterpret_cast<bfloat16_t*>(uintptr_t{1} << 40);
  const auto tensor = cute::make_tensor(cute::make_gmem_ptr(somewhere), layout);
  encoded.clear();
  cute::make_tma_copy(cute::SM90_TMA_LOAD{}, tensor, box);
  print(name, encoded);
}

void print_encodings() {
  using KMajor = gmma::Layout_K_SW128_Atom<bfloat16_t>;
  using RowsMajor = gmma::Layout_MN_SW128_Atom<bfloat16_t>;
  const auto weight =
      cute::make_layout(cute::make_shape(384, 1000, 5), cute::make_stride(int64_t{1024}, _1{}, int64_t{400000}));
  print_encoding("encode weight 256", weight, cute::tile_to_shape(KMajor{}, Shape<Int<256>, _64>{}));
  print_encoding("encode weight 128", weight, cute::tile_to_shape(KMajor{}, Shape<Int<128>, _64>{}));
  const auto transposed =
      cute::make_layout(cute::make_shape(384, 1000, 5), cute::make_stride(_1{}, int64_t{512}, int64_t{600000}));
  print_encoding("encode transposed", transposed, cute::tile_to_shape(RowsMajor{}, Shape<_64, _64>{}, KFirst{}));
  const auto rows =
      cute::make_layout(cute::make_shape(777, 1000, 1), cute::make_stride(int64_t{1008}, _1{}, int64_t{777 * 1008}));
  print_encoding("encode rows", rows, cute::tile_to_shape(KMajor{}, Shape<_64, _64>{}));
}

}  // namespace

int main(int, char** arguments) {
  output = fopen(arguments[1], "w");
  print_operands();
  print_sums<8, 64, 128, 192, 256>();
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma bfloat16");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma float16");
  print_mma<cute::SM80_16x8x8_F32TF32TF32F32_TN>("mma float32");
  using Load = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
  using LoadTransposed = cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>;
  using Store = cute::Copy_Traits<cute::SM90_U32x4_STSM_N>;
  print_matrix_copy("ldmatrix", Load::SrcLayout{}, Load::DstLayout{});
  print_matrix_copy("ldmatrix transposed", LoadTransposed::SrcLayout{}, LoadTransposed::DstLayout{});
  print_matrix_copy("stmatrix", Store::DstLayout{}, Store::SrcLayout{});
  print_encodings();
  return fclose(output);
}
