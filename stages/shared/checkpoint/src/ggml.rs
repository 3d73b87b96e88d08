//! Decoders of ggml's block types, bit for bit those of the Python package `gguf`.
//!
//! Layouts: `ggml-common.h` and `ggml-quants.c` of ggml. A block holds 32 elements, or 256 in the
//! K types, where a sub-block of 16 or 32 elements has its own scale. Every product is rounded
//! before the offset is added, as the references do.

use half::{bf16, f16};

use crate::GgmlType;

/// Decodes `count` elements; `None` where the type is not one of [`GgmlType::DECODED`] or `data` does not
/// hold exactly that many elements of it.
pub(crate) fn decode(dtype: GgmlType, data: &[u8], count: usize) -> Option<Vec<f32>> {
    if !GgmlType::DECODED.contains(&dtype)
        || dtype.tensor_bytes(&[count as u64]) != Some(data.len() as u64)
    {
        return None;
    }
    let mut out = vec![0.0; count];
    decode_into(dtype, data, &mut out);
    Some(out)
}

/// Decodes whole blocks.
///
/// # Panics
/// Where the type is not one of [`GgmlType::DECODED`], or the two lengths do not fit each other.
pub(crate) fn decode_into(dtype: GgmlType, data: &[u8], out: &mut [f32]) {
    let fits = dtype.tensor_bytes(&[out.len() as u64]) == Some(data.len() as u64);
    assert!(fits, "{} bytes of {dtype:?} for {} values", data.len(), out.len());
    match dtype {
        GgmlType::F32 => blocks(data, out, |b, o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        GgmlType::F16 => blocks(data, out, |b: &[u8; 2], o: &mut [f32; 1]| o[0] = half(b, 0)),
        GgmlType::BF16 => blocks(data, out, |b, o: &mut [f32; 1]| {
            o[0] = bf16::from_le_bytes(*b).to_f32();
        }),
        GgmlType::Q4_0 => blocks(data, out, q4_0),
        GgmlType::Q4_1 => blocks(data, out, q4_1),
        GgmlType::Q5_0 => blocks(data, out, q5_0),
        GgmlType::Q5_1 => blocks(data, out, q5_1),
        GgmlType::Q8_0 => blocks(data, out, q8_0),
        GgmlType::Q2_K => blocks(data, out, q2_k),
        GgmlType::Q3_K => blocks(data, out, q3_k),
        GgmlType::Q4_K => blocks(data, out, q4_k),
        GgmlType::Q5_K => blocks(data, out, q5_k),
        GgmlType::Q6_K => blocks(data, out, q6_k),
        _ => unreachable!("invariant: callers look at `DECODED`"),
    }
}

/// Decodes block after block; the lengths are constants, so that the loops need no bounds checks.
fn blocks<const BYTES: usize, const LEN: usize>(
    data: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in data.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The constant-length part of a block that starts at `AT`.
fn part<const AT: usize, const LEN: usize, const BYTES: usize>(block: &[u8; BYTES]) -> &[u8; LEN] {
    const { assert!(AT + LEN <= BYTES) };
    block[AT..].first_chunk().expect("invariant: the length is checked above")
}

/// `d: f16, codes: [u4; 32]`, low nibbles first; value `d * (code - 8)`.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, q) in part::<2, 16, 18>(block).iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// `d, m: f16, codes: [u4; 32]`; value `d * code + m`.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, q) in part::<4, 16, 20>(block).iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Five-bit codes: four bits in nibbles, the fifth of element `i` in bit `i` of `high`.
fn five_bits(low: &[u8; 16], high: [u8; 4]) -> [f32; 32] {
    let high = u32::from_le_bytes(high);
    let mut codes = [0.0; 32];
    for (i, q) in low.iter().enumerate() {
        codes[i] = f32::from(q & 15 | ((high >> i & 1) as u8) << 4);
        codes[i + 16] = f32::from(q >> 4 | ((high >> (i + 16) & 1) as u8) << 4);
    }
    codes
}

/// `d: f16, high: u32, codes: [u4; 32]`; value `d * (code - 16)`.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(block, 0);
    let codes = five_bits(part::<6, 16, 22>(block), *part::<2, 4, 22>(block));
    for (o, q) in out.iter_mut().zip(codes) {
        *o = d * (q - 16.0);
    }
}

/// `d, m: f16, high: u32, codes: [u4; 32]`; value `d * code + m`.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let codes = five_bits(part::<8, 16, 24>(block), *part::<4, 4, 24>(block));
    for (o, q) in out.iter_mut().zip(codes) {
        *o = d * q + m;
    }
}

/// `d: f16, codes: [i8; 32]`.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (o, q) in out.iter_mut().zip(part::<2, 32, 34>(block)) {
        *o = d * f32::from(*q as i8);
    }
}

/// Two-bit codes: each half of 128 elements keeps its four runs of 32 in bits 0-1, 2-3, 4-5, 6-7
/// of 32 bytes.
fn two_bits(packed: &[u8; 64], codes: &mut [u8; 256]) {
    let halves = packed.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<128>().0);
    for (packed, codes) in halves {
        for (run, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, q) in codes.iter_mut().zip(packed) {
                *code = q >> (2 * run) & 3;
            }
        }
    }
}

/// `scales: [u4 scale, u4 min; 16], codes: [u2; 256], d, min: f16`.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, min) = (half(block, 80), half(block, 82));
    let mut codes = [0; 256];
    two_bits(part::<16, 64, 84>(block), &mut codes);
    let scales = part::<0, 16, 84>(block);
    let runs = out.as_chunks_mut::<16>().0.iter_mut().zip(codes.as_chunks::<16>().0);
    for ((out, codes), scale) in runs.zip(scales) {
        let (scale, offset) = (d * f32::from(scale & 15), min * f32::from(scale >> 4));
        for (o, q) in out.iter_mut().zip(codes) {
            *o = scale * f32::from(*q) - offset;
        }
    }
}

/// `high: [u1; 256], codes: [u2; 256], scales: [u6; 16], d: f16`; a clear high bit means minus 4.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half(block, 108);
    let mut codes = [0; 256];
    two_bits(part::<32, 64, 110>(block), &mut codes);
    let high = part::<0, 32, 110>(block);
    let packed = part::<96, 12, 110>(block);
    let scale = |i: usize| {
        let low = packed[i % 8] >> (i / 8 * 4) & 15;
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        d * (f32::from(low | high << 4) - 32.0)
    };
    let runs = out.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<32>().0);
    for (run, (out, codes)) in runs.enumerate() {
        let scales = [scale(2 * run), scale(2 * run + 1)];
        for i in 0..32 {
            let low = if high[i] >> run & 1 == 1 { 0.0 } else { 4.0 };
            out[i] = scales[i / 16] * (f32::from(codes[i]) - low);
        }
    }
}

/// The six-bit scales and mins of the eight sub-blocks of Q4_K and Q5_K (`get_scale_min_k4`).
fn scales_and_mins(packed: &[u8; 12]) -> [(f32, f32); 8] {
    std::array::from_fn(|i| {
        let (scale, min) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            let low = packed[i + 4];
            (low & 15 | packed[i - 4] >> 2 & 0x30, low >> 4 | packed[i] >> 2 & 0x30)
        };
        (f32::from(scale), f32::from(min))
    })
}

/// `d, min: f16, scales: [u6, u6; 8], codes: [u4; 256]`, sub-blocks of 32 in low, then high nibbles.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    k_nibbles(block, part::<4, 12, 144>(block), part::<16, 128, 144>(block), &[0; 32], out);
}

/// As Q4_K, with `high: [u1; 256]` before the codes: bit `s` of byte `i` is element `32 s + i`'s.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scales, codes) = (part::<4, 12, 176>(block), part::<48, 128, 176>(block));
    k_nibbles(block, scales, codes, part::<16, 32, 176>(block), out);
}

fn k_nibbles(
    block: &[u8],
    scales: &[u8; 12],
    codes: &[u8; 128],
    high: &[u8; 32],
    out: &mut [f32; 256],
) {
    let (d, min) = (half(block, 0), half(block, 2));
    let scales = scales_and_mins(scales);
    for (run, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let codes = &codes.as_chunks::<32>().0[run / 2];
        let (scale, offset) = (d * scales[run].0, min * scales[run].1);
        for i in 0..32 {
            let q = codes[i] >> (run % 2 * 4) & 15 | (high[i] >> run & 1) << 4;
            out[i] = scale * f32::from(q) - offset;
        }
    }
}

/// `low: [u4; 256], high: [u2; 256], scales: [i8; 16], d: f16`; value `d * scale * (code - 32)`.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(block, 208);
    let (low, scales) = (part::<0, 128, 210>(block), part::<192, 16, 210>(block));
    let mut high = [0; 256];
    two_bits(part::<128, 64, 210>(block), &mut high);
    let runs = out.as_chunks_mut::<32>().0.iter_mut().zip(high.as_chunks::<32>().0);
    for (run, (out, high)) in runs.enumerate() {
        // Of each half, runs 0 and 1 are the low nibbles of its 64 bytes, 2 and 3 the high ones.
        let low = &low.as_chunks::<32>().0[run / 4 * 2 + run % 2];
        let shift = run % 4 / 2 * 4;
        let scale = [2 * run, 2 * run + 1].map(|i| d * f32::from(scales[i] as i8));
        for i in 0..32 {
            let q = low[i] >> shift & 15 | high[i] << 4;
            out[i] = scale[i / 16] * (f32::from(q) - 32.0);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    const GOLDEN: &[u8] = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../tests/fixtures/checkpoint/gguf_blocks.safetensors"
    ));

    #[test]
    fn every_type_decodes_bit_for_bit_as_in_the_gguf_package() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        assert_eq!(golden.len(), 2 * GgmlType::DECODED.len());
        for dtype in GgmlType::DECODED {
            let blocks = golden.tensor(&format!("{dtype:?}.blocks")).unwrap();
            let values = golden.tensor(&format!("{dtype:?}.values")).unwrap();
            let decoded = decode(dtype, blocks.data(), values.data().len() / 4).unwrap();
            for (i, (ours, theirs)) in decoded.iter().zip(values.data().as_chunks().0).enumerate() {
                let theirs = f32::from_le_bytes(*theirs);
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{dtype:?} {i}: {ours} {theirs}");
            }
        }
    }

    #[test]
    fn data_of_another_length_is_refused() {
        for dtype in GgmlType::DECODED {
            let (bytes, len) = (dtype.block_bytes() as usize, dtype.block_len() as usize);
            assert!(decode(dtype, &vec![0; 2 * bytes], 2 * len).is_some(), "{dtype:?}");
            assert!(decode(dtype, &vec![0; 2 * bytes - 1], 2 * len).is_none(), "{dtype:?}");
            assert!(decode(dtype, &vec![0; bytes], 2 * len).is_none(), "{dtype:?}");
        }
        assert!(decode(GgmlType::Q8_K, &[0; 292], 256).is_none());
    }
}
