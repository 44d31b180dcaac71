/* The floor of an average's update: a += step (p - a) in place, by all threads. */

#include <stdint.h>
#include <string.h>

static float widened(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

void lerp_float32(int count, const long *sizes, float **averages, float **params,
                  float step) {
#pragma omp parallel
  for (int k = 0; k < count; k++) {
    float *restrict a = averages[k];
    const float *restrict p = params[k];
#pragma omp for simd schedule(static) nowait
    for (long i = 0; i < sizes[k]; i++) a[i] += step * (p[i] - a[i]);
  }
}

void lerp_bfloat16(int count, const long *sizes, float **averages, uint16_t **params,
                   float step) {
#pragma omp parallel
  for (int k = 0; k < count; k++) {
    float *restrict a = averages[k];
    const uint16_t *restrict p = params[k];
#pragma omp for simd schedule(static) nowait
    for (long i = 0; i < sizes[k]; i++) a[i] += step * (widened(p[i]) - a[i]);
  }
}
