//! Quantises matrices to NF4 as bitsandbytes does on a CPU, and its eight-bit dynamic map.
//!
//! Source: `bitsandbytes/functional.py` (`create_dynamic_map`, `quantize_4bit`),
//! `backends/default/ops.py` and `csrc/cpu_ops.cpp`, version 0.50.2.

use crate::nf4::{Absmax, FloatType, NF4_VALUES, NestedAbsmax, Nf4};

/// Block size of the scales in double quantisation.
const NESTED_BLOCK: usize = 256;
/// The smallest divisor: a block of zeros has no scale of its own.
const SMALLEST: f32 = 1e-38;

/// How double quantisation chooses the eight-bit code of a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedRounding {
    /// The nearest code, ties to the lower: bitsandbytes' general implementation.
    Nearest,
    /// Through a table of 65,536 evenly spaced values, as bitsandbytes' CPU kernel: codes near zero
    /// are not reached, so that small scales lose a little.
    Table,
}

impl Nf4 {
    /// Quantises a row-major matrix; with `nested`, the scales too, in blocks of 256.
    ///
    /// Codes and scales are those of bitsandbytes, byte for byte. The mean of the scales is not
    /// defined to the last bit there (torch adds in an order that depends on the machine): here it
    /// is added in f64 and rounded once.
    ///
    /// # Errors
    /// Says which length or block size does not fit, or that a value is not finite.
    pub fn quantise(
        values: &[f32],
        shape: [usize; 2],
        block_size: usize,
        dtype: FloatType,
        nested: Option<NestedRounding>,
    ) -> Result<Self, String> {
        if values.len() != shape[0].saturating_mul(shape[1]) {
            return Err(format!("{} values for the shape {shape:?}", values.len()));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("value {at} is {}, which NF4 cannot hold", values[at]));
        }
        let (packed, scales) = four_bits(values, block_size.max(1));
        let absmax = match nested {
            None => Absmax::Plain(scales),
            Some(rounding) => {
                let sum: f64 = scales.iter().map(|s| f64::from(*s)).sum();
                let offset = (sum / scales.len() as f64) as f32;
                Absmax::Nested(nest(&scales, offset, rounding))
            }
        };
        Self::new(shape, block_size, dtype, packed.into(), absmax)
    }
}

/// Packed codes and the scale of each block.
fn four_bits(values: &[f32], block_size: usize) -> (Vec<u8>, Vec<f32>) {
    let middles = midpoints(&NF4_VALUES);
    let mut codes = Vec::with_capacity(values.len() + 1);
    let mut scales = Vec::with_capacity(values.len().div_ceil(block_size));
    for block in values.chunks(block_size) {
        scales.push(normalise(block, block_size, |x| codes.push(nearest(&middles, x))));
    }
    if codes.len() % 2 == 1 {
        // bitsandbytes pads with the value zero, not with the code zero.
        codes.push(nearest(&middles, 0.0));
    }
    (codes.as_chunks().0.iter().map(|[high, low]| high << 4 | low).collect(), scales)
}

/// Calls `each` with the values of a block over its largest absolute value, which it returns.
/// A block that is cut short is divided, a whole one multiplied by the rounded reciprocal.
fn normalise(block: &[f32], block_size: usize, mut each: impl FnMut(f32)) -> f32 {
    let largest = largest(block);
    let clamped = largest.max(SMALLEST);
    let whole = block.len() == block_size;
    let inverse = 1.0 / clamped;
    for value in block {
        let scaled = if whole { value * inverse } else { value / clamped };
        each(scaled.clamp(-1.0, 1.0));
    }
    if whole { largest } else { clamped }
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// Quantises scales less `offset`.
fn nest(scales: &[f32], offset: f32, rounding: NestedRounding) -> NestedAbsmax {
    let map = dynamic_map(true);
    let shifted: Vec<f32> = scales.iter().map(|s| s - offset).collect();
    let (codes, absmax) = eight_bits(&shifted, &map, NESTED_BLOCK, rounding);
    NestedAbsmax {
        codes: codes.into(),
        absmax,
        map: Box::new(map),
        block_size: NESTED_BLOCK,
        offset,
    }
}

/// Codes and the scale of each block, by a sorted map (`quantize_blockwise`).
fn eight_bits(
    values: &[f32],
    map: &[f32; 256],
    block_size: usize,
    rounding: NestedRounding,
) -> (Vec<u8>, Vec<f32>) {
    let middles = midpoints(map);
    let mut codes = Vec::with_capacity(values.len());
    let scales = values.chunks(block_size).map(|block| match rounding {
        NestedRounding::Nearest => {
            normalise(block, block_size, |x| codes.push(nearest(&middles, x)))
        }
        NestedRounding::Table => {
            let scale = largest(block);
            let inverse = 1.0 / scale;
            codes.extend(block.iter().map(|v| {
                // The kernel gives a block of zeros the code 0, whatever that stands for.
                if scale == 0.0 { 0 } else { nearest(&middles, to_grid(v * inverse)) }
            }));
            scale
        }
    });
    let scales = scales.collect();
    (codes, scales)
}

/// The value of the table's entry for `x` (`norm_to_lut_index`, `build_quantize_lut`).
fn to_grid(x: f32) -> f32 {
    let index = ((x.clamp(-1.0, 1.0) + 1.0) * 0.5).mul_add(65_535.0, 0.5).floor();
    -1.0 + 2.0 * index / 65_535.0
}

/// Midpoints of neighbouring values.
fn midpoints(sorted: &[f32]) -> Vec<f32> {
    sorted.windows(2).map(|pair| f32::midpoint(pair[0], pair[1])).collect()
}

/// How many midpoints are below `x`: the code of the nearest value, the lower of two equally near.
fn nearest(middles: &[f32], x: f32) -> u8 {
    middles.partition_point(|m| *m < x) as u8
}

/// bitsandbytes' eight-bit dynamic map, sorted (`create_dynamic_map`; Dettmers et al. 2022,
/// arXiv:2110.02861): the fewer bits a value's exponent takes, the more its fraction has.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for bits in 0..7 {
        let steps = if signed { 1 << bits } else { 2 << bits };
        let bounds: Vec<f32> = (0..=steps).map(|i| tenth_to_one(i, steps)).collect();
        let magnitude = 10_f64.powi(bits - 6) as f32;
        for middle in midpoints(&bounds) {
            values.push(magnitude * middle);
            if signed {
                values.push(-magnitude * middle);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("invariant: 2 + 254 values, signed or not")
}

/// Point `i` of torch's `linspace(0.1, 1, steps + 1)`: counted from the nearer end, one rounding.
fn tenth_to_one(i: usize, steps: usize) -> f32 {
    let step = (1.0 - 0.1_f32) / steps as f32;
    if i < steps.div_ceil(2) {
        step.mul_add(i as f32, 0.1)
    } else {
        (-step).mul_add((steps - i) as f32, 1.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;

    use safetensors::SafeTensors;

    use super::*;
    use crate::quant_state::QuantState;
    use crate::tensors::{floats, to_f32};

    /// What `benches/fixtures/nf4.py` wrote; `PIPE_NF4` names a larger file.
    fn golden() -> SafeTensors<'static> {
        static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let own = "../../../tests/fixtures/checkpoint/nf4/model.safetensors";
            let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(own);
            std::fs::read(std::env::var_os("PIPE_NF4").map_or(own, PathBuf::from)).unwrap()
        });
        SafeTensors::deserialize(&FILE).unwrap()
    }

    fn bytes(name: &str) -> &'static [u8] {
        golden().tensor(name).unwrap().data()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn dynamic_maps_are_those_of_bitsandbytes() {
        assert_eq!(bits(&dynamic_map(true)), bits(&floats(bytes("map.signed"))));
        assert_eq!(bits(&dynamic_map(false)), bits(&floats(bytes("map.unsigned"))));
    }

    #[test]
    fn eight_bit_codes_are_those_of_both_implementations() {
        let (values, map) = (floats(bytes("blockwise.input")), dynamic_map(true));
        for (rounding, name) in
            [(NestedRounding::Table, "table"), (NestedRounding::Nearest, "nearest")]
        {
            let (codes, absmax) = eight_bits(&values, &map, 256, rounding);
            assert_eq!(codes, bytes(&format!("blockwise.{name}")), "{name}");
            assert_eq!(bits(&absmax), bits(&floats(bytes("blockwise.absmax"))), "{name}");
        }
    }

    #[test]
    fn quantised_matrices_equal_those_of_bitsandbytes_byte_for_byte() {
        let file = golden();
        let cases: Vec<&str> =
            file.names().into_iter().filter_map(|n| n.strip_suffix(".decoded")).collect();
        assert!(cases.len() >= 15, "{cases:?}");
        for case in cases {
            let input = file.tensor(&format!("{case}.input")).unwrap();
            let input = to_f32(input.dtype(), input.data()).unwrap();
            let state =
                QuantState::parse(bytes(&format!("{case}.weight.quant_state.bitsandbytes__nf4")))
                    .unwrap();
            let rounding = state.nested.map(|_| NestedRounding::Table);
            let ours = Nf4::quantise(&input, state.shape, state.block_size, state.dtype, rounding)
                .unwrap();
            assert_eq!(ours.packed(), bytes(&format!("{case}.weight")), "{case}");
            let stored = bytes(&format!("{case}.weight.absmax"));
            let Some((_, offset)) = state.nested else {
                assert_eq!(*ours.absmax(), Absmax::Plain(floats(stored)), "{case}");
                continue;
            };
            // The mean is defined up to the order of addition: the rest is compared at theirs.
            let (_, scales) = four_bits(&input, state.block_size);
            let Absmax::Nested(own) = ours.absmax() else { panic!("{case} is not nested") };
            assert!((own.offset - offset).abs() <= offset * 2e-7, "{case}: {}", own.offset);
            let nested = nest(&scales, offset, NestedRounding::Table);
            assert_eq!(*nested.codes, *stored, "{case}");
            let outer = floats(bytes(&format!("{case}.weight.nested_absmax")));
            assert_eq!(bits(&nested.absmax), bits(&outer), "{case}");
            let map = floats(bytes(&format!("{case}.weight.nested_quant_map")));
            assert_eq!(bits(&nested.map[..]), bits(&map), "{case}");
        }
    }

    #[test]
    fn what_nf4_cannot_hold_is_refused() {
        let quantise = |values: &[f32], shape, size| {
            Nf4::quantise(values, shape, size, FloatType::F32, None).unwrap_err()
        };
        assert!(quantise(&[0.0, f32::NAN], [1, 2], 64).contains("value 1 is NaN"));
        assert!(quantise(&[0.0; 3], [1, 2], 64).contains("3 values"));
        assert!(quantise(&[0.0; 2], [1, 2], 48).contains("blocksize is 48"));
        assert!(quantise(&[], [0, 2], 64).contains("empty"));
    }
}
