//! Rates at which one thread decodes stored matrices, in values a second:
//! `cargo run --release -p checkpoint --example decode_rate`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::time::Instant;

use checkpoint::{FloatType, GgmlType, NestedRounding, Nf4};

const ROWS: usize = 512;
const COLUMNS: usize = 2048;

fn show(name: &str, mut decode: impl FnMut()) {
    decode();
    let rate = |_| {
        let start = Instant::now();
        decode();
        (ROWS * COLUMNS) as f64 / start.elapsed().as_secs_f64()
    };
    let best = (0..9).map(rate).fold(0.0, f64::max);
    println!("{name}: {:.0} M/s", best / 1e6);
}

fn main() {
    let count = ROWS * COLUMNS;
    let values: Vec<f32> = (0..count).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 1e4).collect();
    let mut out = vec![0.0; count];
    for dtype in [FloatType::F32, FloatType::Bf16] {
        let shape = [ROWS, COLUMNS];
        let packed = Nf4::quantise(&values, shape, 64, dtype, Some(NestedRounding::Table)).unwrap();
        show(&format!("NF4 of {dtype:?}"), || packed.decode_rows(0..ROWS, &mut out));
    }
    for dtype in GgmlType::DECODED {
        let bytes = dtype.tensor_bytes(&[count as u64]).unwrap() as usize;
        let data: Vec<u8> = (0..bytes).map(|i| (i * 31 % 120) as u8).collect();
        show(&format!("{dtype:?}"), || dtype.decode_into(&data, &mut out));
    }
}
