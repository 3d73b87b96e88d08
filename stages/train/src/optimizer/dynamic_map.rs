//! The dynamic 8-bit maps of bitsandbytes (Dettmers et al., "8-bit Optimizers via Block-wise
//! Quantization", 2022): 256 ascending values that are dense near zero.

use std::sync::LazyLock;

use checkpoint::dynamic_map;

/// Map of signed values, -0.993 to 1.
pub(super) static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(true));
/// Map of unsigned values, 0 to 1.
pub(super) static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic_map(false));

/// Code of the value nearest to `x`, by the search of bitsandbytes' CUDA kernel: of two equally near
/// values the one at which its binary search ends.
#[inline]
pub(super) fn encode(map: &[f32; 256], x: f32) -> u8 {
    let (mut pivot, mut low, mut high) = (127usize, 0usize, 255usize);
    let mut step = 64;
    while step > 0 {
        if x > map[pivot] {
            low = pivot;
            pivot += step;
        } else {
            high = pivot;
            pivot -= step;
        }
        step >>= 1;
    }
    let nearest = if x > map[pivot] {
        if x > (map[high] + map[pivot]) * 0.5 { high } else { pivot }
    } else if x < (map[low] + map[pivot]) * 0.5 {
        low
    } else {
        pivot
    };
    nearest as u8
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "equal bits are the claim")]
mod tests {
    use super::*;

    #[test]
    fn maps_have_the_values_of_bitsandbytes() {
        let near = |a: f32, b: f32| assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
        let signed = [(0, -0.992_968_74), (126, -5.5e-7), (128, 5.5e-7), (254, 0.992_968_74)];
        for (code, value) in signed {
            near(SIGNED[code], value);
        }
        assert_eq!((SIGNED[127], SIGNED[255]), (0.0, 1.0));
        for (code, value) in [(1, 3.25e-7), (254, 0.996_484_4)] {
            near(UNSIGNED[code], value);
        }
        assert_eq!((UNSIGNED[0], UNSIGNED[255]), (0.0, 1.0));
        assert!(SIGNED.is_sorted() && UNSIGNED.is_sorted());
    }

    #[test]
    fn encode_finds_a_nearest_value() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for i in -2100..=2100 {
                let x = (i as f32 / 2000.0).powi(3);
                let best = map.iter().map(|v| (v - x).abs()).fold(f32::MAX, f32::min);
                // The midpoint is rounded to f32, so that either of two neighbours may win at it.
                let off = (map[encode(map, x) as usize] - x).abs();
                assert!(off <= best + 1e-7 * x.abs(), "{x}: {off} {best}");
            }
            for code in 0..=255u8 {
                assert_eq!(encode(map, map[code as usize]), code);
            }
        }
    }
}
