#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::float_cmp, reason = "equal bits are the claim")]

use safetensors::SafeTensors;

use super::*;

fn config(kind: OptimizerKind, weight_decay: f64) -> AdamConfig {
    AdamConfig { kind, betas: [0.9, 0.999], eps: 1e-8, weight_decay }
}

/// Numbers in ±1 that are a function of the index.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| (i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40)
        .map(|bits| bits as f32 / 8_388_608.0 - 1.0)
        .collect()
}

/// Expected values from PyTorch 2.15:
///
/// ```python
/// p = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0, 1e-3, -3.0]))
/// opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
///                         foreach=False, fused=False)
/// for s in range(10):
///     p.grad = torch.tensor([((i * 7 + s * 3) % 11 - 5) / 10 ** i for i in range(6)])
///     opt.step()
/// print([f"{v:.9g}" for v in p.tolist()])
/// ```
#[test]
fn ten_steps_of_adamw_equal_torch() {
    let mut p = [0.5, -1.0, 2.0, 0.0, 1e-3, -3.0];
    let mut optimizer =
        Optimizer::new(config(OptimizerKind::Adamw, 0.1), std::slice::from_ref(&(0..6)));
    for s in 0..10 {
        let grad: Vec<f32> =
            (0..6).map(|i| (f64::from((i * 7 + s * 3) % 11 - 5) / 10f64.powi(i)) as f32).collect();
        optimizer.update(1e-2, &mut p, &grad);
    }
    let torch = [
        0.526_415_586,
        -1.019_011_38,
        1.983_246_33,
        -0.012_386_367_7,
        -0.028_521_109_4,
        -2.936_544_42,
    ];
    for (ours, theirs) in p.iter().zip(torch) {
        assert!(
            (f64::from(*ours) - theirs).abs() <= 3e-7 * theirs.abs().max(0.1),
            "{ours} {theirs}"
        );
    }
}

/// AdamW by its definition, in f64; `decay_first` is torch's order.
fn reference(p: &mut [f64], grads: &[Vec<f32>], rate: f64, wd: f64, decay_first: bool) {
    let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    for (t, grad) in grads.iter().enumerate() {
        let (c1, c2) = (1.0 - 0.9f64.powi(t as i32 + 1), 1.0 - 0.999f64.powi(t as i32 + 1));
        for i in 0..p.len() {
            let g = f64::from(grad[i]);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.999 * v[i] + 0.001 * g * g;
            let step = rate * (m[i] / c1) / ((v[i] / c2).sqrt() + 1e-8);
            let decay = 1.0 - rate * wd;
            p[i] = if decay_first { p[i] * decay - step } else { (p[i] - step) * decay };
        }
    }
}

#[test]
fn both_orders_of_decay_equal_f64_across_tensors() {
    let n = 40_000;
    for (kind, decay_first) in [(OptimizerKind::Adamw, true), (OptimizerKind::Adamw8bit, false)] {
        // Tensors below 4096 elements keep f32 states in the 8-bit variant.
        let tensors: Vec<Range<usize>> = (0..10).map(|i| i * 4000..(i + 1) * 4000).collect();
        let mut optimizer = Optimizer::new(config(kind, 0.3), &tensors);
        let mut p = numbers(n, 1);
        let mut exact: Vec<f64> = p.iter().map(|v| f64::from(*v)).collect();
        let grads: Vec<Vec<f32>> = (0..5).map(|s| numbers(n, 100 + s)).collect();
        for grad in &grads {
            optimizer.update(1e-2, &mut p, grad);
        }
        reference(&mut exact, &grads, 1e-2, 0.3, decay_first);
        for (ours, exact) in p.iter().zip(&exact) {
            assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
        }
    }
}

/// bitsandbytes' blockwise 8-bit AdamW by its definition, one element after another in f64, with the
/// nearest code found by trying all.
struct EightBitReference {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl EightBitReference {
    fn update(&mut self, t: i32, grad: &[f32], rate: f64, wd: f64) {
        let (c1, c2) = (1.0 - 0.9f64.powi(t), (1.0 - 0.999f64.powi(t)).sqrt());
        for (i, g) in grad.iter().map(|g| f64::from(*g)).enumerate() {
            self.m[i] = 0.9 * self.m[i] + 0.1 * g;
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g;
            self.p[i] -= rate * c2 / c1 * self.m[i] / (self.v[i].sqrt() + c2 * 1e-8);
            self.p[i] *= 1.0 - rate * wd;
        }
        for (values, map) in
            [(&mut self.m, &*dynamic_map::SIGNED), (&mut self.v, &*dynamic_map::UNSIGNED)]
        {
            for block in values.chunks_mut(256) {
                let scale = block.iter().fold(0.0f64, |a, b| a.max(b.abs()));
                for value in block.iter_mut().filter(|_| scale > 0.0) {
                    let off = |code: &f32| (f64::from(*code) - *value / scale).abs();
                    let mut at = (0..256).min_by(|a, b| off(&map[*a]).total_cmp(&off(&map[*b])));
                    if let Some(at) = &mut at
                        && map[0] < 0.0
                        && map[*at].is_sign_negative() != value.is_sign_negative()
                    {
                        *at = if *value > 0.0 { *at + 1 } else { *at - 1 };
                    }
                    *value = f64::from(map[at.unwrap()]) * scale;
                }
            }
        }
    }
}

#[test]
fn eight_bit_adamw_follows_a_scalar_reference() {
    // Not a multiple of the block, and one block of zeros.
    let n = 4096 + 100;
    let mut optimizer =
        Optimizer::new(config(OptimizerKind::Adamw8bit, 0.1), std::slice::from_ref(&(0..n)));
    assert!(matches!(optimizer.tensors[0].1, States::Blocks(_)));
    let mut p = numbers(n, 5);
    let exact = p.iter().map(|v| f64::from(*v)).collect();
    let mut reference = EightBitReference { p: exact, m: vec![0.0; n], v: vec![0.0; n] };
    let mut apart = 0;
    for t in 1..=6 {
        let mut grad: Vec<f32> =
            numbers(n, 50 + t as u64).iter().map(|g| g * g * g * 1e-3).collect();
        grad[512..768].fill(0.0);
        optimizer.update(1e-2, &mut p, &grad);
        reference.update(t, &grad, 1e-2, 0.1);
        assert!(p.iter().all(|v| v.is_finite()));
        let off = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() > 1e-5;
        apart = p.iter().zip(&reference.p).filter(|(a, b)| off((a, b))).count();
    }
    // A moment near the middle of two codes may be rounded either way in f32 and in f64.
    assert!(apart < n / 200, "{apart} of {n}");
}

/// `benches/fixtures/adamw8bit.py` runs bitsandbytes. On a CPU it decays before the update, which is
/// `lr * weight_decay` of an update less, and finds codes through a table of 65,536 values.
#[test]
fn ten_steps_of_eight_bit_adamw_are_those_of_bitsandbytes() {
    let raw = include_bytes!("../../../../tests/fixtures/adamw8bit.safetensors");
    let file = SafeTensors::deserialize(raw).unwrap();
    let bytes = |name: &str| file.tensor(name).unwrap().data();
    let floats = |name: &str| -> Vec<f32> {
        bytes(name).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    for name in ["wide", "narrow"] {
        let (mut p, gradients) =
            (floats(&format!("{name}.start")), floats(&format!("{name}.gradients")));
        let range = 0..p.len();
        let config = config(OptimizerKind::Adamw8bit, 0.01);
        let mut optimizer = Optimizer::new(config, std::slice::from_ref(&range));
        for gradient in gradients.chunks_exact(range.len()) {
            optimizer.update(1e-2, &mut p, gradient);
        }
        let end = floats(&format!("{name}.end"));
        let apart: Vec<f32> = p.iter().zip(&end).map(|(a, b)| a - b).collect();
        assert!(norm(&apart) < 1e-4 * norm(&end), "{name}: {} of {}", norm(&apart), norm(&end));
        let States::Blocks(states) = &optimizer.tensors[0].1 else { continue };
        for (ours, scales, map, number) in [
            (&states.m, &states.m_scale, &dynamic_map::SIGNED, 1),
            (&states.v, &states.v_scale, &dynamic_map::UNSIGNED, 2),
        ] {
            let theirs = bytes(&format!("wide.state{number}"));
            // A moment in the middle of two codes may go either way, and carries the difference along:
            // nearly all codes are equal, and nearly all others adjacent.
            let apart = |(a, b): (&u8, &u8)| a.abs_diff(*b);
            let equal = ours.iter().zip(theirs).filter(|pair| apart(*pair) == 0).count();
            let near = ours.iter().zip(theirs).filter(|pair| apart(*pair) <= 1).count();
            assert!(equal * 100 > ours.len() * 99, "moment {number}: {equal} of {}", ours.len());
            assert!(near * 1000 > ours.len() * 999, "moment {number}: {near} of {}", ours.len());
            let off = |(a, b): (&u8, &u8)| (map[*a as usize] - map[*b as usize]).abs();
            let off = ours.iter().zip(theirs).map(off).fold(0.0, f32::max);
            assert!(off < 0.03, "moment {number}: {off}");
            let theirs = floats(&format!("wide.absmax{number}"));
            assert!(scales.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-5 * b), "{number}");
        }
    }
}

#[test]
fn tensors_from_4096_elements_are_quantised() {
    for (len, quantised) in [(3072, false), (4095, false), (4096, true)] {
        let config = config(OptimizerKind::Adamw8bit, 0.0);
        let optimizer = Optimizer::new(config, std::slice::from_ref(&(0..len)));
        assert_eq!(matches!(optimizer.tensors[0].1, States::Blocks(_)), quantised, "{len}");
    }
}

#[test]
fn states_read_back_and_continue_exactly() {
    for kind in [OptimizerKind::Adamw, OptimizerKind::Adamw8bit] {
        let tensors = [0..5000, 5000..5010];
        let mut a = Optimizer::new(config(kind, 0.1), &tensors);
        let mut p = numbers(5010, 3);
        a.update(1e-2, &mut p, &numbers(5010, 4));
        let mut bytes = Vec::new();
        a.write(&mut bytes);
        let mut b = Optimizer::new(config(kind, 0.1), &tensors);
        assert_eq!(b.read(&bytes), Some(()));
        let mut q = p.clone();
        a.update(1e-2, &mut p, &numbers(5010, 6));
        b.update(1e-2, &mut q, &numbers(5010, 6));
        assert_eq!((p, a), (q, b));
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let n = 100_000;
            let config = config(OptimizerKind::Adamw8bit, 0.1);
            let mut optimizer = Optimizer::new(config, &[0..n / 2, n / 2..n]);
            let (mut p, mut g) = (numbers(n, 1), numbers(n, 2));
            let norm = global_norm(&g);
            clip(&mut g, norm, 1.0);
            optimizer.update(1e-3, &mut p, &g);
            (norm.to_bits(), p)
        })
    };
    assert_eq!(run(1), run(3));
}

/// `torch.nn.utils.clip_grad_norm_([x], 1.0)` on a gradient of `[3, -4, 12, 0]` returns 13 and
/// leaves `[0.23076921701431274, -0.307692289352417, 0.923076868057251, 0.0]`.
#[test]
fn clipping_equals_torch_and_leaves_small_gradients_alone() {
    let mut g = [3.0, -4.0, 12.0, 0.0];
    let norm = global_norm(&g);
    assert_eq!(norm, 13.0);
    clip(&mut g, norm, 1.0);
    assert_eq!(g, [0.230_769_22, -0.307_692_3, 0.923_076_87, 0.0]);
    for (norm, limit) in [(0.5, 1.0), (13.0, 0.0)] {
        let mut kept = [3.0, 4.0];
        clip(&mut kept, norm, limit);
        assert_eq!(kept, [3.0, 4.0]);
    }
}
