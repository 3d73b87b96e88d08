//! `numpy.random.default_rng(seed).permutation(n)`, bit for bit: what Hugging Face `datasets` uses
//! in `Dataset.shuffle(seed)`.
//!
//! Sources: numpy 2.4 `_generator.pyx` (`_shuffle_raw`), `distributions.c` (`random_interval`),
//! `pcg64.h`, `bit_generator.pyx` (`SeedSequence`).

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

/// PCG64 XSL-RR with the 32-bit buffer of numpy's bit generator.
struct Pcg64 {
    state: u128,
    increment: u128,
    high: Option<u32>,
}

impl Pcg64 {
    fn new(seed: u64) -> Self {
        let [a, b, c, d] = seed_state(seed);
        let initial = u128::from(a) << 64 | u128::from(b);
        let sequence = u128::from(c) << 64 | u128::from(d);
        let mut rng = Self { state: 0, increment: sequence << 1 | 1, high: None };
        rng.step();
        rng.state = rng.state.wrapping_add(initial);
        rng.step();
        rng
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let mixed = (self.state >> 64) as u64 ^ self.state as u64;
        mixed.rotate_right((self.state >> 122) as u32)
    }

    /// The low half of a fresh draw, whose high half is kept for the next call.
    fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.high.take() {
            return high;
        }
        let draw = self.next_u64();
        self.high = Some((draw >> 32) as u32);
        draw as u32
    }

    /// Uniform in `0..=max` by masked rejection.
    fn interval(&mut self, max: u64) -> u64 {
        let mask = u64::MAX >> max.max(1).leading_zeros();
        loop {
            let draw = if u32::try_from(max).is_ok() {
                u64::from(self.next_u32()) & mask
            } else {
                self.next_u64() & mask
            };
            if draw <= max {
                return draw;
            }
        }
    }
}

/// `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_state(seed: u64) -> [u64; 4] {
    let mut hash: u32 = 0x43b0_d7e5;
    let mut hashmix = |value: u32| {
        let mut value = value ^ hash;
        hash = hash.wrapping_mul(0x931e_8875);
        value = value.wrapping_mul(hash);
        value ^ value >> 16
    };
    let mix = |x: u32, y: u32| {
        let r = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        r ^ r >> 16
    };
    let words = [seed as u32, (seed >> 32) as u32, 0, 0];
    let mut pool = words.map(&mut hashmix);
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                pool[target] = mix(pool[target], hashmix(pool[source]));
            }
        }
    }
    let mut hash: u32 = 0x8b51_f9dd;
    let mut words = [0_u32; 8];
    for (i, word) in words.iter_mut().enumerate() {
        let mut value = pool[i % 4] ^ hash;
        hash = hash.wrapping_mul(0x58f3_8ded);
        value = value.wrapping_mul(hash);
        *word = value ^ value >> 16;
    }
    std::array::from_fn(|i| u64::from(words[2 * i]) | u64::from(words[2 * i + 1]) << 32)
}

/// The shuffled order of `0..count`.
pub(crate) fn permutation(seed: u64, count: usize) -> Vec<usize> {
    let mut rng = Pcg64::new(seed);
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        let j = rng.interval(i as u64) as usize;
        order.swap(i, j);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_sequence_and_generator_equal_numpy() {
        let state = [
            11_465_652_750_463_011_511,
            15_382_171_918_060_459_190,
            9_018_504_550_953_525_431,
            3_703_499_796_004_394_495,
        ];
        assert_eq!(seed_state(42), state);
        let mut rng = Pcg64::new(42);
        let first = [rng.next_u64(), rng.next_u64(), rng.next_u64()];
        assert_eq!(first, [0xc621_fbcd_16d9_2688, 0x705a_5661_a791_ffc1, 0xdbcd_12c2_6eda_1624]);
        assert_eq!(permutation(42, 10), [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]);
    }

    #[test]
    fn order_of_glaive_equals_datasets() {
        let order = permutation(42, 112_960);
        assert_eq!(order[..5], [58356, 35968, 52547, 102_721, 73767]);
        assert_eq!(order[2490..2495], [24304, 62941, 46231, 27986, 86538]);
        assert_eq!(order[2500..2505], [73790, 62537, 48433, 34570, 69872]);
        assert_eq!((order[2699], order[112_959]), (91811, 75400));
    }
}
