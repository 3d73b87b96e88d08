//! Dropout whose mask is a function of a key and the element's index: nothing to store, and the
//! same mask after a resume.

/// One splitmix64 step (Steele, Lea and Flood, 2014).
pub fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Zeroes each element with `probability` and scales the others by `1 / (1 - probability)`. Applied
/// to a gradient with the same key it is the backward pass.
pub fn dropout(x: &mut [f32], probability: f32, key: u64) {
    let keep = 1.0 / (1.0 - probability);
    let threshold = (f64::from(probability) * 2f64.powi(32)) as u64;
    for (i, x) in x.iter_mut().enumerate() {
        let draw = mix(key ^ mix(i as u64)) >> 32;
        *x = if draw < threshold { 0.0 } else { *x * keep };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_is_dropped_and_the_mean_is_kept() {
        let mut x = vec![1.0; 100_000];
        dropout(&mut x, 0.25, 7);
        let zeros = x.iter().filter(|v| **v == 0.0).count();
        assert!((24_500..25_500).contains(&zeros), "{zeros}");
        let mut again = vec![1.0; 100_000];
        dropout(&mut again, 0.25, 7);
        assert_eq!(x, again);
    }
}
