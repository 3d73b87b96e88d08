//! Kernels against their CPU twins, in every type; need a GPU, else they are skipped.

use checkpoint::{Absmax, FloatType, NestedAbsmax, Nf4, StoredMatrix};
use kernels::cross_entropy::linear_cross_entropy;
use kernels::{elementwise, norm};

use crate::device::{Buffer, Device, args};
use crate::weights::{decode_linear, matrix::Matrix};
use crate::{Dtype, Linear};

/// GPUs in every type, or none and a word about it.
fn gpus() -> Vec<Device> {
    let open = |dtype| Device::open(0, dtype).map_err(|e| eprintln!("skipped: {e}")).ok();
    [Dtype::F32, Dtype::Bf16, Dtype::F16].into_iter().filter_map(open).collect()
}

/// Numbers in [-scale, scale), rounded to a type.
fn numbers(dtype: Dtype, count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| dtype.round(scale * next())).collect()
}

fn put(device: &Device, dtype: Dtype, values: &[f32]) -> Buffer {
    device.upload(&dtype.encode(values)).unwrap()
}

fn take(device: &Device, dtype: Dtype, buffer: &Buffer, count: usize) -> Vec<f32> {
    dtype.decode(&device.read(buffer, count * dtype.size() as usize).unwrap())
}

/// Asserts that a relative difference in norm is that of rounding once; NaN never passes.
fn near(dtype: Dtype, found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len());
    let norm =
        |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let off =
        norm(&mut found.iter().zip(wanted).map(|(a, b)| a - b)) / norm(&mut wanted.iter().copied());
    let limit = match dtype {
        Dtype::F32 => 1e-5,
        Dtype::Bf16 => 4e-3,
        Dtype::F16 => 5e-4,
    };
    eprintln!("{what} {dtype:?}: {off:.1e}");
    assert!(off < limit, "{what} {dtype:?}: {off}");
}

const ROWS: usize = 7;
const WIDTH: usize = 320;
const EPS: f32 = 1e-6;

#[test]
fn norms_equal_the_cpu() {
    for device in gpus() {
        let (own, stream) = (device.dtype, device.dtype.residual());
        let count = ROWS * WIDTH;
        let (x, before) = (numbers(stream, count, 1, 3.0), numbers(stream, count, 2, 2.0));
        let (w, dy) = (numbers(Dtype::F32, WIDTH, 3, 2.0), numbers(own, count, 4, 1.0));
        let old = numbers(own, count, 5, 1.0);
        let buffers = [put(&device, stream, &x), put(&device, stream, &before)];
        let [gpu_x, gpu_before] = buffers.each_ref().map(Buffer::ptr);
        let gpu_w = device.upload_f32(&w).unwrap();
        let gpu_dy = put(&device, own, &dy);
        let (y, sum) = (put(&device, own, &old), put(&device, stream, &before));
        let roots = device.alloc(ROWS as u64 * 4).unwrap();
        let [weight, root, dy_ptr, y_ptr, sum_ptr] =
            [&gpu_w, &roots, &gpu_dy, &y, &sum].map(Buffer::ptr);
        let (width, eps, grid) = (WIDTH as i32, EPS, [ROWS, 1]);
        // SAFETY: matrices of ROWS rows of WIDTH.
        unsafe {
            let args = args![gpu_x, width, weight, y_ptr, width, root, width, eps];
            device.launch(("layer.cu", "rms_norm"), grid, 256, 0, args).unwrap();
            let args = args![gpu_x, weight, gpu_before, sum_ptr, root, width, eps];
            device.launch(("layer.cu", "rms_norm_add"), grid, 256, 0, args).unwrap();
        }
        let mut wanted = vec![0.0; count];
        norm::rms_norm(&x, &w, EPS, &mut wanted);
        near(own, &take(&device, own, &y, count), &wanted, "norm");
        elementwise::add_assign(&mut wanted, &before);
        near(stream, &take(&device, stream, &sum, count), &wanted, "residual + norm");
        for (add, start) in [(0i32, vec![0.0; count]), (1, old.clone())] {
            let dx = put(&device, own, &old);
            let dx_ptr = dx.ptr();
            // SAFETY: as above.
            unsafe {
                let args =
                    args![gpu_x, width, weight, root, dy_ptr, width, dx_ptr, width, width, add];
                device.launch(("layer.cu", "rms_norm_backward"), grid, 256, 0, args).unwrap();
            }
            let mut wanted = start;
            norm::rms_norm_backward(&x, &w, EPS, &dy, &mut wanted);
            near(own, &take(&device, own, &dx, count), &wanted, "gradient of a norm");
        }
    }
}

/// Gate, up, or their gradients, of rows that hold both.
fn half(both: &[f32], second: bool) -> Vec<f32> {
    let rows = both.chunks_exact(2 * WIDTH);
    rows.flat_map(|row| row[usize::from(second) * WIDTH..][..WIDTH].to_vec()).collect()
}

#[test]
fn activations_equal_the_cpu() {
    type Forward = fn(&[f32], &[f32], &mut [f32]);
    type Backward = fn(&mut [f32], &mut [f32], &[f32]);
    let kinds: [(&str, &str, Forward, Backward); 2] = [
        ("swiglu", "swiglu_backward", elementwise::swiglu, elementwise::swiglu_backward),
        ("geglu", "geglu_backward", elementwise::geglu, elementwise::geglu_backward),
    ];
    for device in gpus() {
        let own = device.dtype;
        let count = ROWS * WIDTH;
        // From deep inside the tanh to far outside.
        let both = numbers(own, 2 * count, 7, 9.0);
        let dy = numbers(own, count, 8, 1.0);
        for (forward, backward, cpu_forward, cpu_backward) in kinds {
            let (from, gpu_dy) = (put(&device, own, &both), put(&device, own, &dy));
            let y = device.elements(count).unwrap();
            let [from_ptr, dy_ptr, y_ptr] = [&from, &gpu_dy, &y].map(Buffer::ptr);
            let [width, ld, rows] = [WIDTH, 2 * WIDTH, ROWS].map(|v| v as i32);
            let grid = [count.div_ceil(256), 1];
            // SAFETY: rows of gate and up, and of their product.
            unsafe {
                let args = args![from_ptr, ld, y_ptr, width, width, rows];
                device.launch(("layer.cu", forward), grid, 256, 0, args).unwrap();
                let args = args![from_ptr, ld, dy_ptr, width, from_ptr, ld, width, rows];
                device.launch(("layer.cu", backward), grid, 256, 0, args).unwrap();
            }
            let (mut gate, mut up) = (half(&both, false), half(&both, true));
            let mut wanted = vec![0.0; count];
            cpu_forward(&gate, &up, &mut wanted);
            near(own, &take(&device, own, &y, count), &wanted, forward);
            cpu_backward(&mut gate, &mut up, &dy);
            let found = take(&device, own, &from, 2 * count);
            near(own, &half(&found, false), &gate, backward);
            near(own, &half(&found, true), &up, backward);
        }
    }
}

#[test]
fn cross_entropy_equals_the_cpu() {
    for device in gpus() {
        // The second has columns that make no whole pack, a target among them.
        for vocabulary in [96, 103] {
            cross_entropy_of(&device, vocabulary);
        }
    }
}

/// Values in rows of `width`, with others behind each up to a stride of `ld`.
fn strided(values: &[f32], width: usize, ld: usize) -> Vec<f32> {
    let rows = values.chunks_exact(width);
    rows.flat_map(|row| row.iter().copied().chain(vec![900.0; ld - width])).collect()
}

fn cross_entropy_of(device: &Device, vocabulary: usize) {
    let own = device.dtype;
    let ld = vocabulary.next_multiple_of(16 / own.size() as usize);
    let count = ROWS * vocabulary;
    let logits = numbers(own, count, 9, 6.0);
    let targets: Vec<u32> = (0..ROWS as u32).map(|r| r * 17 % vocabulary as u32).collect();
    // The head is the identity, so that hidden rows are logits.
    let head: Vec<f32> = (0..vocabulary * vocabulary)
        .map(|i| f32::from(u8::from(i / vocabulary == i % vocabulary)))
        .collect();
    for cap in [None, Some(4.0f32)] {
        let bytes: Vec<u8> = targets.iter().flat_map(|t| t.to_le_bytes()).collect();
        let (gpu, labels) =
            (put(device, own, &strided(&logits, vocabulary, ld)), device.upload(&bytes).unwrap());
        let losses = device.alloc(ROWS as u64 * 4).unwrap();
        let total = device.zeros(8).unwrap();
        let [ptr, targets_ptr, losses_ptr, total_ptr] =
            [&gpu, &labels, &losses, &total].map(Buffer::ptr);
        let scales = device.upload_f32(&[0.5]).unwrap();
        let (columns, rows, scale, grid) =
            (vocabulary as i32, ROWS as i32, scales.ptr(), [ROWS, 1]);
        // SAFETY: ROWS rows of logits, labels and losses.
        unsafe {
            if let Some(cap) = cap {
                let args = args![ptr, targets_ptr, losses_ptr, columns, scale, cap];
                let kernel = ("loss.cu", "cross_entropy_capped");
                device.launch(kernel, grid, 1024, 0, args).unwrap();
            } else {
                let args = args![ptr, targets_ptr, losses_ptr, columns, scale];
                device.launch(("loss.cu", "cross_entropy"), grid, 1024, 0, args).unwrap();
            }
            let args = args![losses_ptr, rows, total_ptr];
            device.launch(("loss.cu", "add_losses"), [1, 1], 256, 0, args).unwrap();
        }
        let mut wanted = vec![0.0; count];
        let gradient = Some((0.5, &mut wanted[..]));
        let sum = linear_cross_entropy(&logits, &head, vocabulary, &targets, cap, gradient);
        let bytes = device.read(&total, 8).unwrap();
        let found = f64::from_le_bytes(bytes.try_into().unwrap());
        assert!((found - sum).abs() / sum < 1e-5, "{own:?} {cap:?}: {found} {sum}");
        let found = take(device, own, &gpu, ROWS * ld);
        let found: Vec<f32> =
            found.chunks_exact(ld).flat_map(|row| row[..vocabulary].to_vec()).collect();
        near(own, &found, &wanted, "gradient of logits");
    }
}

#[test]
fn four_bit_weights_decode_to_the_bits_of_the_cpu() {
    let [outputs, inputs] = [40, 128];
    let bytes = |count: usize, seed: u64| -> Vec<u8> {
        numbers(Dtype::F32, count, seed, 1.0).iter().map(|v| (v.to_bits() >> 9) as u8).collect()
    };
    let blocks = outputs * inputs / 64;
    for device in gpus() {
        for own in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
            let nested = NestedAbsmax {
                codes: bytes(blocks, 11).into(),
                map: Box::new(checkpoint::dynamic_map(true)),
                absmax: numbers(Dtype::F32, blocks.div_ceil(256), 12, 0.05),
                offset: 0.06,
                block_size: 256,
            };
            let plain = numbers(Dtype::F32, blocks, 13, 0.1);
            for absmax in [Absmax::Nested(nested), Absmax::Plain(plain)] {
                let codes = bytes(outputs * inputs / 2, 14);
                let weight = Nf4::new([outputs, inputs], 64, own, codes.into(), absmax).unwrap();
                let wanted = device.dtype.encode(&weight.decode());
                let matrix = Matrix::Stored(StoredMatrix::Nf4(weight));
                let linear = Linear::upload(&device, &matrix, [outputs, inputs]).unwrap();
                assert!(matches!(linear, Linear::Nf4 { .. }));
                let out = device.elements(outputs * inputs).unwrap();
                decode_linear(&device, &linear, (inputs, outputs), out.ptr(), inputs).unwrap();
                let found = device.read(&out, wanted.len()).unwrap();
                assert!(found == wanted, "{:?} from {own:?}", device.dtype);
            }
        }
    }
}

#[test]
fn the_greatest_logit_is_found_under_its_cap() {
    let Some(device) = gpus().pop() else { return };
    let mut logits = numbers(Dtype::F32, 3 * 5000, 15, 20.0);
    // Under the cap these are equal, and the first is taken.
    (logits[4000], logits[4999]) = (900.0, 1000.0);
    logits[5000 + 77] = 21.0;
    let (from, ids) = (device.upload_f32(&logits).unwrap(), device.zeros(12).unwrap());
    let [from_ptr, ids_ptr] = [&from, &ids].map(Buffer::ptr);
    let mut found = Vec::new();
    for cap in [0.0f32, 30.0] {
        let vocabulary = 5000i32;
        // SAFETY: three rows of logits and ids.
        unsafe {
            let args = args![from_ptr, vocabulary, cap, ids_ptr];
            device.launch(("generate.cu", "argmax"), [3, 1], 1024, 0, args).unwrap();
        }
        let bytes = device.read(&ids, 12).unwrap();
        found.push(bytes.chunks_exact(4).map(|b| b[0] as usize + 256 * b[1] as usize).collect());
    }
    let (plain, capped): (Vec<usize>, Vec<usize>) = (found.remove(0), found.remove(0));
    assert_eq!((plain[0], capped[0], plain[1]), (4999, 4000, 77));
    assert_eq!(plain[1..], capped[1..]);
}
