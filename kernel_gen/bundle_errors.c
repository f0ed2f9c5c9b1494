/* What the compiled kernels of a bundle call when CUDA refuses: two functions that the CUTLASS DSL's own run-time library has, so that a bundle needs
 * neither that library nor Python. Their signatures are those of the DSL's CuteDSLRuntime.h; each hands tvm-ffi an error to raise. */
#include <stdint.h>
#include <stdio.h>

typedef void (*set_error_fn)(const char *kind, const char **parts, int32_t num_parts);

const char *cudaGetErrorName(int code);
const char *cudaGetErrorString(int code);

void CuteDSLRT_TVMFFISetRaisedCudaError(set_error_fn set_error, int32_t code) {
  char text[256];
  snprintf(text, sizeof text, "CUDA error %d, %s: %s", (int)code, cudaGetErrorName(code), cudaGetErrorString(code));
  const char *parts[1] = {text};
  if (set_error) set_error("CUDADialectError", parts, 1);
}

void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(
    set_error_fn set_error, int32_t grid_x, int32_t grid_y, int32_t grid_z, int32_t block_x, int32_t block_y, int32_t block_z, int32_t block_threads,
    int64_t dynamic_smem, int32_t device, int32_t max_threads, int32_t max_block_x, int32_t max_block_y, int32_t max_block_z, int32_t max_grid_x,
    int32_t max_grid_y, int32_t max_grid_z, int32_t max_smem, int32_t max_smem_optin, const char *violation, const char *source_file,
    int32_t source_line, int32_t source_col, int32_t source_end_col) {
  char text[384];
  snprintf(text, sizeof text,
           "CUDA refuses the launch on device %d: %s; grid %dx%dx%d of at most %dx%dx%d, block %dx%dx%d (%d threads) of at most %dx%dx%d (%d threads), "
           "%lld bytes of dynamic shared memory of at most %d",
           (int)device, violation ? violation : "unknown limit", (int)grid_x, (int)grid_y, (int)grid_z, (int)max_grid_x, (int)max_grid_y,
           (int)max_grid_z, (int)block_x, (int)block_y, (int)block_z, (int)block_threads, (int)max_block_x, (int)max_block_y, (int)max_block_z,
           (int)max_threads, (long long)dynamic_smem, (int)(max_smem_optin > max_smem ? max_smem_optin : max_smem));
  (void)source_file, (void)source_line, (void)source_col, (void)source_end_col;
  const char *parts[1] = {text};
  if (set_error) set_error("CUDADialectError", parts, 1);
}
