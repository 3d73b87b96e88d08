//! Fast attention against its slow twin, for which a GPU is needed.

use super::*;
use crate::device::Buffer;

#[test]
fn a_sequence_whose_scores_have_no_room_is_refused() {
    // Of an H200, and of a T4.
    for (available, limit) in [(232_448, 29_056), (65_536, 8192)] {
        check_longest(limit, available, true, Dtype::F32).unwrap();
        check_longest(2 * limit, available, false, Dtype::F32).unwrap();
        check_longest(2 * limit + 1, available, false, Dtype::F32).unwrap_err();
        let refused = check_longest(limit + 1, available, true, Dtype::F32).unwrap_err();
        let says = format!("{} tokens where this GPU's attention serves {limit}", limit + 1);
        assert!(refused.to_string().contains(&says), "{refused}");
    }
}

/// The GPU, or nothing and a word about it.
fn gpu(dtype: Dtype, head_dim: usize) -> Option<Device> {
    let device = Device::open(0, dtype).map_err(fixtures::skipped).ok()?;
    device.head_dim.set(head_dim);
    Some(device)
}

fn random(device: &Device, count: usize, seed: u64) -> Buffer {
    let buffer = device.elements(count).unwrap();
    let (ptr, number, scale, seed) = (buffer.ptr(), count as u64, 1.0f32, seed << 40);
    // SAFETY: as many elements as were allocated.
    unsafe {
        let args = args![ptr, seed, scale, number];
        let grid = [count.div_ceil(256), 1];
        device.launch(("nf4.cu", "random_normal"), grid, 256, 0, args).unwrap();
    }
    buffer
}

fn floats(device: &Device, buffer: &Buffer, count: usize) -> Vec<f32> {
    device.dtype.decode(&device.read(buffer, count * device.dtype.size() as usize).unwrap())
}

fn off(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| norm(f64::from(a - b))).sum();
    (difference / b.iter().map(|b| norm(f64::from(*b))).sum::<f64>()).sqrt()
}

/// Segments as `(start, stop)` of every row.
struct Bounds {
    start: Buffer,
    stop: Buffer,
    pairs: Buffer,
    orders: [Buffer; 3],
    n: usize,
}

fn bounds(device: &Device, plan: &Plan, lengths: &[usize]) -> Bounds {
    let (mut start, mut stop, mut n) = (Vec::new(), Vec::new(), 0usize);
    for length in lengths {
        for _ in 0..*length {
            start.push(n as i32);
            stop.push((n + length) as i32);
        }
        n += length;
    }
    let upload = |values: &[i32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        device.upload(&bytes).unwrap()
    };
    let orders = plan.orders(&start, &stop).map(|order| upload(&order));
    let pairs: Vec<i32> = start.iter().zip(&stop).flat_map(|(a, b)| [*a, *b]).collect();
    Bounds { start: upload(&start), stop: upload(&stop), pairs: upload(&pairs), orders, n }
}

#[test]
fn fast_attention_equals_its_slow_twin() {
    // Segments, heads, heads of keys, width, type, softcap and window (0: none).
    type Case<'a> = (&'a [usize], usize, usize, usize, Dtype, f32, usize);
    let cases: [Case<'_>; 12] = [
        (&[1], 2, 1, 64, Dtype::Bf16, 0.0, 0),
        (&[200], 4, 2, 128, Dtype::Bf16, 0.0, 0),
        (&[1, 63, 64, 65, 300, 7, 129], 9, 3, 64, Dtype::Bf16, 0.0, 0),
        (&[5, 500, 31, 128, 256, 3], 16, 2, 128, Dtype::Bf16, 0.0, 0),
        (&[130, 127], 8, 8, 128, Dtype::F16, 0.0, 0),
        (&[1000, 24], 3, 1, 64, Dtype::F16, 0.0, 0),
        (&[300, 1, 77], 8, 4, 256, Dtype::Bf16, 2.0, 0),
        (&[500, 40, 16, 17], 8, 4, 256, Dtype::Bf16, 2.0, 64),
        (&[500, 40, 16, 17], 4, 2, 64, Dtype::Bf16, 1.5, 16),
        (&[90, 300], 4, 2, 128, Dtype::Bf16, 0.0, 100),
        (&[400, 3, 129], 8, 4, 256, Dtype::F16, 2.0, 100),
        (&[400, 3, 129], 4, 1, 64, Dtype::F16, 2.0, 1),
    ];
    for (lengths, heads, kv_heads, d, dtype, softcap, window) in cases {
        let Some(device) = gpu(dtype, d) else { return };
        let n: usize = lengths.iter().sum();
        let plan = Plan::new(&device, (heads, kv_heads, d), softcap > 0.0, n).unwrap();
        let Some(plan) = plan else { continue };
        let bounds = bounds(&device, &plan, lengths);
        assert_eq!(bounds.n, n);
        let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d + 16);
        let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
        let mut results: Vec<[Vec<f32>; 3]> = Vec::new();
        for kind in ["fast", "again", "slow"] {
            // Poison: whatever is not written shows.
            let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
            let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
            let bytes = plan.scratch_bytes(kv_heads, d, n);
            let parts = device.alloc(bytes).unwrap();
            let longest = lengths.iter().copied().max().unwrap();
            let (out_ptr, lse_ptr) = (out.ptr(), lse.ptr());
            let attention = Attention {
                plan: Some(plan),
                bounds: bounds.pairs.ptr(),
                qkv: qkv.ptr(),
                ld,
                out: out_ptr,
                ldo,
                lse: lse_ptr,
                start: bounds.start.ptr(),
                stop: bounds.stop.ptr(),
                orders: bounds.orders.each_ref().map(Buffer::ptr),
                heads,
                kv_heads,
                d,
                n,
                longest,
                scale: 1.0 / (d as f32).sqrt(),
                softcap,
                window: if window == 0 { usize::MAX } else { window },
            };
            let (to, from) = ((dqkv.ptr(), ld), (dout.ptr(), ldo));
            if kind == "slow" {
                attention.forward_reference(&device).unwrap();
                attention.backward_reference(&device, from, to, delta.ptr()).unwrap();
            } else {
                attention.forward(&device).unwrap();
                let scratch = (delta.ptr(), parts.ptr());
                attention.backward(&device, from, to, scratch).unwrap();
            }
            let mut out = floats(&device, &out, n * ldo);
            out.chunks_exact_mut(ldo).for_each(|row| row[heads * d..].fill(0.0));
            let lse = device.read_f32(&lse, n * heads).unwrap();
            results.push([out, lse, floats(&device, &dqkv, n * ld)]);
        }
        assert_eq!(results[0], results[1], "two runs differ");
        let limit = if dtype == Dtype::Bf16 { 8e-3 } else { 2e-3 };
        for (name, (fast, slow)) in
            ["out", "lse", "dqkv"].iter().zip(results[0].iter().zip(&results[2]))
        {
            let off = off(fast, slow);
            eprintln!(
                "{lengths:?} {heads}/{kv_heads} d{d} {dtype:?} cap {softcap} window {window} {name}: {off:.1e}"
            );
            assert!(off < limit, "{name}: {off}");
        }
    }
}

/// Times of one shape, for the eye: `cargo test -p cuda attention_times -- --ignored`.
#[test]
#[ignore = "prints times; needs a GPU"]
fn attention_times() {
    for (heads, kv_heads, d, lengths) in [
        (16, 16, 128, vec![2048; 2]),
        (16, 2, 128, vec![2048; 2]),
        (16, 2, 128, vec![512; 8]),
        (9, 3, 64, vec![2048; 2]),
    ] {
        let Some(device) = gpu(Dtype::Bf16, d) else { return };
        let n: usize = lengths.iter().sum();
        let plan = Plan::new(&device, (heads, kv_heads, d), false, n).unwrap().unwrap();
        let bounds = bounds(&device, &plan, &lengths);
        assert_eq!(bounds.n, n);
        let (ld, ldo) = ((heads + 2 * kv_heads) * d, heads * d);
        let (qkv, dout) = (random(&device, n * ld, 1), random(&device, n * ldo, 2));
        let (out, dqkv) = (random(&device, n * ldo, 9), random(&device, n * ld, 10));
        let [lse, delta] = [(); 2].map(|()| device.alloc((n * heads * 4) as u64).unwrap());
        let parts = device.alloc(plan.scratch_bytes(kv_heads, d, n)).unwrap();
        let attention = Attention {
            plan: Some(plan),
            bounds: bounds.pairs.ptr(),
            qkv: qkv.ptr(),
            ld,
            out: out.ptr(),
            ldo,
            lse: lse.ptr(),
            start: bounds.start.ptr(),
            stop: bounds.stop.ptr(),
            orders: bounds.orders.each_ref().map(Buffer::ptr),
            heads,
            kv_heads,
            d,
            n,
            longest: lengths[0],
            scale: 1.0 / (d as f32).sqrt(),
            softcap: 0.0,
            window: usize::MAX,
        };
        for round in 0..40 {
            if round == 10 {
                device.start_profile();
            }
            attention.forward(&device).unwrap();
            let scratch = (delta.ptr(), parts.ptr());
            attention.backward(&device, (dout.ptr(), ldo), (dqkv.ptr(), ld), scratch).unwrap();
        }
        eprintln!("heads {heads}/{kv_heads} d{d} segments {}x{}", lengths.len(), lengths[0]);
        for (class, (time, count)) in device.finish_profile().unwrap() {
            eprintln!("  {class:16} {:.4} ms", time / count as f64);
        }
    }
}
