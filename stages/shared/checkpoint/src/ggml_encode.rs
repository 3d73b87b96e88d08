//! Encoders of ggml's block types, bit for bit those of the Python package `gguf` (`quants.py`),
//! whose rounding is that of `ggml-quants.c`.

use half::{bf16, f16};

use crate::{GgmlType, ggml};

/// The types that [`GgmlType::encode`] writes.
const ENCODED: &str = "F32, F16, BF16, Q8_0, Q4_0";

impl GgmlType {
    /// Encodes row-major values; blocks of 32 elements share a scale in Q8_0 and Q4_0.
    ///
    /// # Errors
    /// Names a type that cannot be written, a value that is not finite, or a length that does not
    /// fit the blocks.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, String> {
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("value {at} is {}", values[at]));
        }
        let Some(bytes) = self.tensor_bytes(&[values.len() as u64]) else {
            return Err(format!("{} values do not fill blocks of {self:?}", values.len()));
        };
        let mut out = Vec::with_capacity(bytes as usize);
        let halves = |v: &f32| f16::from_f32(*v).to_le_bytes();
        let brains = |v: &f32| bf16::from_f32(*v).to_le_bytes();
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Self::F16 => out.extend(values.iter().flat_map(halves)),
            Self::BF16 => out.extend(values.iter().flat_map(brains)),
            Self::Q8_0 => out.extend(values.as_chunks().0.iter().flat_map(q8_0)),
            Self::Q4_0 => out.extend(values.as_chunks().0.iter().flat_map(q4_0)),
            _ => return Err(format!("type {self:?} cannot be written (can be: {ENCODED})")),
        }
        Ok(out)
    }

    /// Decodes whole blocks.
    ///
    /// # Panics
    /// Where the type is not supported, or the two lengths do not fit each other.
    pub fn decode_into(self, data: &[u8], out: &mut [f32]) {
        ggml::decode_into(self, data, out);
    }

    /// Decodes `count` values; `None` where the type is not supported or `data` has another length.
    pub fn decode(self, data: &[u8], count: usize) -> Option<Vec<f32>> {
        ggml::decode(self, data, count)
    }
}

/// `d: f16, codes: [i8; 32]`: the largest magnitude gets the code 127; halves round away from zero.
fn q8_0(values: &[f32; 32]) -> [u8; 34] {
    let d = values.iter().fold(0.0_f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = reciprocal(d);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (code, value) in block[2..].iter_mut().zip(values) {
        *code = ((value * inverse).round() as i8).cast_unsigned();
    }
    block
}

/// `d: f16, codes: [u4; 32]`, the first half in the low nibbles: the first value of the largest
/// magnitude gets the code 0, which stands for -8, so that `d` may be negative.
fn q4_0(values: &[f32; 32]) -> [u8; 18] {
    let largest = values.iter().fold(values[0], |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = largest / -8.0;
    let inverse = reciprocal(d);
    let code = |value: f32| ((value * inverse + 8.5) as u8).min(15);
    let mut block = [0; 18];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (i, byte) in block[2..].iter_mut().enumerate() {
        *byte = code(values[i]) | code(values[i + 16]) << 4;
    }
    block
}

fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::tensors::floats;

    const GOLDEN: &[u8] = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../tests/fixtures/checkpoint/gguf_quantised.safetensors"
    ));

    #[test]
    fn blocks_equal_those_of_the_package_gguf_byte_for_byte() {
        let file = SafeTensors::deserialize(GOLDEN).unwrap();
        let values = floats(file.tensor("values").unwrap().data());
        for (name, dtype) in [
            ("F32", GgmlType::F32),
            ("F16", GgmlType::F16),
            ("BF16", GgmlType::BF16),
            ("Q8_0", GgmlType::Q8_0),
            ("Q4_0", GgmlType::Q4_0),
        ] {
            let expected = file.tensor(name).unwrap();
            assert!(dtype.encode(&values).unwrap() == expected.data(), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_encoded_is_named() {
        assert!(GgmlType::Q6_K.encode(&[0.0; 256]).unwrap_err().contains("Q6_K"));
        assert!(GgmlType::Q8_0.encode(&[0.0; 31]).unwrap_err().contains("31 values"));
        assert!(GgmlType::F16.encode(&[0.0, f32::NAN]).unwrap_err().contains("value 1 is NaN"));
    }
}
