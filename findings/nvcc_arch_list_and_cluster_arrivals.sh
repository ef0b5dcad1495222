#!/usr/bin/env bash
# nvcc 13.0.88, two things that a kernel for Hopper has to know:
#   - __CUDA_ARCH_LIST__, by which host code can ask what is built, is 900 for sm_90 and for sm_90a alike, though wgmma
#     exists in the second alone: host code cannot tell whether the kernels it launches have a body;
#   - an arrival at another block's mbarrier compiles to one instruction, but written out as .release.cluster, which reads
#     like the same, it also gets a fence of the whole GPU (MEMBAR.ALL.GPU) each time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvdisasm==13.5.37
toolkit=$(echo "$folder"/venv/lib/python3*/site-packages/nvidia/cu13)
PATH="$toolkit/bin:$PATH"
nvcc --version | tail -1

echo 'const int built[] = {__CUDA_ARCH_LIST__};' > "$folder/list.cu"
list_for() { nvcc "-gencode=arch=compute_$1,code=sm_$1" -E -x cu "$folder/list.cu" | grep -o 'built\[\] = .*'; }
echo "sm_90:  $(list_for 90)"
echo "sm_90a: $(list_for 90a)"
[ "$(list_for 90)" = "$(list_for 90a)" ]

fences() {
  echo "__global__ void kernel(unsigned to) { asm volatile(\"mbarrier.arrive$1.shared::cluster.b64 _, [%0];\" :: \"r\"(to) : \"memory\"); }" > "$folder/arrive.cu"
  nvcc -gencode=arch=compute_90a,code=sm_90a -cubin "$folder/arrive.cu" -o "$folder/arrive.cubin"
  nvdisasm "$folder/arrive.cubin" | grep -c MEMBAR.ALL.GPU || true
}
plain=$(fences "") written_out=$(fences .release.cluster)
echo "fences of the GPU: mbarrier.arrive $plain, mbarrier.arrive.release.cluster $written_out"
[ "$plain" = 0 ] && [ "$written_out" = 1 ]
